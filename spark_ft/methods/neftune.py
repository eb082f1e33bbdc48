"""NEFTune: noisy embeddings for fine-tuning (Jain et al. 2023, arXiv:2310.05914)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from spark_ft.methods.lora import LoRALinear


def neftune_noise(
    embeddings: Float[Tensor, "batch seq width"],
    alpha: float,
    lengths: Int[Tensor, " batch"] | Sequence[int] | None = None,
) -> Float[Tensor, "batch seq width"]:
    """Embeddings with uniform noise whose expected norm is α/√3 for any length L of a text and any width d.

        e + ε,   ε ~ U(−α/√(L·d), +α/√(L·d))          (Jain et al. 2023, algorithm 1)

    Args:
        embeddings: what the embedding layer gave; a new tensor is returned.
        alpha: α, 5 to 15 in the paper; more is noisier. 0 returns the embeddings and draws no random number.
        lengths: each text's number of tokens, padding on the right. With it L is a text's own length and its
            padding stays clean, as in the authors' code; without it L is `seq`, as in transformers.

    Raises:
        ValueError: there is not one length per text, or one is longer than `seq`.
    """
    if alpha == 0:
        return embeddings
    batch, seq, width = embeddings.shape
    if lengths is None:
        bound = alpha / torch.tensor(seq * width).sqrt()
        return embeddings + torch.zeros_like(embeddings).uniform_(-bound, bound)
    lengths = torch.as_tensor(lengths, device=embeddings.device)
    if lengths.shape != (batch,) or (lengths > seq).any():
        found = f"lengths={lengths.tolist()} do not fit {batch} texts of at most {seq} tokens"
        raise ValueError(f"{found}; give one per text")
    return _masked_noise(embeddings, alpha, torch.arange(seq, device=embeddings.device) < lengths[:, None])


def _masked_noise(embeddings: Tensor, alpha: float, real: Tensor) -> Tensor:
    bound = alpha / (real.sum(1, keepdim=True).clamp_min(1) * embeddings.shape[-1]).sqrt() * real
    noise = torch.zeros_like(embeddings).uniform_(-1, 1)
    return embeddings + (noise * bound[..., None]).to(embeddings.dtype)


@contextmanager
def neftune(model: nn.Module, alpha: float, true_lengths: bool = False) -> Iterator[nn.Module]:
    """Inside the block the model trains on noisy embeddings; it is restored on exit, even after an exception.

    There is noise only where `draws_noise`: not in evaluation, not in a reference pass. Sequences packed in
    one row get noise by their own lengths. Put adapters on before the block begins.

    Args:
        model: one with `get_input_embeddings()`, as all of transformers' have.
        alpha: α of `neftune_noise`; 0 leaves the model alone.
        true_lengths: scale by each text's own length, which `attention_mask` tells, and leave padding clean.

    Raises:
        ValueError: alpha is negative, or the model has its noise already.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}; the noise's size must be at least 0, usually 5 to 15")
    embedding, backbone = model.get_input_embeddings(), getattr(model, "base_model", model)
    if getattr(embedding, "neftune_alpha", 0):
        raise ValueError("NEFTune is on already for this model and would count twice; leave that block first")
    call: dict = {}

    def remember(_, args, kwargs):
        call.update(mask=kwargs.get("attention_mask"), lengths=kwargs.get("lengths"))

    def add_noise(_, args, embeddings):
        if not draws_noise(model):
            return embeddings
        mask, lengths = call.pop("mask", None), call.pop("lengths", None)
        if lengths:
            return torch.cat([neftune_noise(part, alpha) for part in embeddings.split(lengths, dim=1)], dim=1)
        if true_lengths and mask is not None:
            return _masked_noise(embeddings, alpha, mask.bool())
        return neftune_noise(embeddings, alpha)

    embedding.neftune_alpha = alpha
    embedding.neftune_adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    before = backbone.register_forward_pre_hook(remember, with_kwargs=True)
    after = embedding.register_forward_hook(add_noise)
    try:
        yield model
    finally:
        before.remove()
        after.remove()
        del embedding.neftune_alpha, embedding.neftune_adapters


def draws_noise(model: nn.Module) -> bool:
    """Whether a forward pass would add noise now: in training, with gradients, with no adapter disabled."""
    embedding = model.get_input_embeddings()
    on = getattr(embedding, "neftune_alpha", 0) > 0 and embedding.training and torch.is_grad_enabled()
    return on and all(layer.enabled for layer in embedding.neftune_adapters)
