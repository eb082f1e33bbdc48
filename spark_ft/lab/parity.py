"""Your code and the package's beside PEFT, TRL, transformers and bitsandbytes, on the same inputs."""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spark_ft.adapters import AdapterConfig, add_adapters, save_adapters
from spark_ft.bench import peers
from spark_ft.data.batches import collate_sft
from spark_ft.embedded import EMBEDDED
from spark_ft.methods.nf4 import NF4Linear, NF4Tensor
from spark_ft.models import load_model
from spark_ft.scoring import sft_loss


def relative_difference(actual: Tensor, expected: Tensor) -> float:
    """max |actual − expected| / max |expected|."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def lora_against_peft(
    layer_type: type[nn.Module], merge: Callable[[nn.Module], None], rank: int = 8, alpha: float = 24.0
) -> dict[str, float]:
    """Compare a LoRA layer with PEFT's on the same W, A, B and x; return relative differences.

    Args:
        layer_type: called as (base, rank, alpha, dropout); has lora_A, lora_B and base.
        merge: puts the update into base.weight.

    Returns:
        differences of the output, the gradients of x, A and B, and the merged weight.
    """

    def merged(layer: nn.Module) -> Tensor:
        merge(layer)
        return layer.base.weight

    return _against_peft(layer_type, merged, rank, alpha, dora=False)


def dora_against_peft(
    layer_type: type[nn.Module], merged: Callable[[nn.Module], Tensor], rank: int = 8, alpha: float = 24.0
) -> dict[str, float]:
    """Compare a DoRA layer with PEFT's on the same W, A, B, magnitude and x; return relative differences.

    Args:
        layer_type: called as (base, rank, alpha, dropout); has lora_A, lora_B, magnitude and base.
        merged: the layer's merged weight.

    Returns:
        differences of the output, the gradients of x, A, B and the magnitude, and the merged weight.
    """
    return _against_peft(layer_type, merged, rank, alpha, dora=True)


def _against_peft(
    layer_type: type[nn.Module], merged: Callable[[nn.Module], Tensor], rank: int, alpha: float, dora: bool
) -> dict[str, float]:
    base = nn.Linear(96, 64)
    ours = layer_type(copy.deepcopy(base), rank, alpha, 0.0)
    theirs = peers.peft_layer(base, rank, alpha, dora)
    trained = {
        "A": (ours.lora_A, theirs.lora_A["default"].weight),
        "B": (ours.lora_B, theirs.lora_B["default"].weight),
    }
    if dora:
        trained["the magnitude"] = (ours.magnitude, theirs.lora_magnitude_vector["default"].weight)
    with torch.no_grad():
        trained["B"][1].normal_(std=0.1 if dora else 1.0)
        if dora:
            magnitude = trained["the magnitude"][1]
            magnitude.mul_(0.5 + torch.rand_like(magnitude))
        for mine, their in trained.values():
            mine.copy_(their)
    x, slope = torch.randn(2, 5, 96), torch.randn(2, 5, 64)
    x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out, expected = ours(x_ours), theirs(x_theirs)
    out.backward(slope)
    expected.backward(slope)
    theirs.merge()
    pairs = {
        "output": (out.detach(), expected.detach()),
        "gradient of x": (x_ours.grad, x_theirs.grad),
        **{f"gradient of {name}": (mine.grad, their.grad) for name, (mine, their) in trained.items()},
        "merged weight": (merged(ours).detach(), theirs.get_base_layer().weight.detach()),
    }
    return {name: relative_difference(*pair) for name, pair in pairs.items()}


# The embedded model's own template with marks around what the assistant says, and the same text when
# rendered: what TRL's `assistant_only_loss` needs. `all_answers` needs none of it.
GENERATION_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def adapter_against_peft(folder: Path, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, float]:
    """An adapter's folder in PEFT, on a fresh base model, beside the model that it was saved from.

    Returns:
        the largest relative difference of the logits at real tokens, and that of the adapter's gradients.
    """
    batch = {key: tensor.to(model.device) for key, tensor in batch.items()}
    theirs = peers.peft_model(load_model()[0], str(folder)).eval()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = [each(**given).logits[real] for each in (model, theirs)]
    total, count = sft_loss(model, batch)
    (total / count).backward()
    theirs(**batch).loss.backward()
    gradients = []
    for each in (model, theirs):
        named = {
            n.removeprefix("base_model.model.").replace(".default", ""): p for n, p in each.named_parameters()
        }
        gradients.append(torch.cat([named[n].grad.flatten() for n in sorted(named) if "lora_" in n]))
        each.zero_grad()
    return {"logits": relative_difference(*logits), "gradients": relative_difference(*gradients)}


def trl_marks(
    records: list[dict[str, Any]], tokenizer, completion_only: bool = False, assistant_only: bool = False
) -> list[tuple[list[int], list[bool]]]:
    """Each row's token ids, and whether each is learned, as TRL prepares and collates them for SFT.

    Args:
        records: rows of messages, or of prompt and completion.
        tokenizer: its chat template renders messages; `assistant_only` needs one with {% generation %}.
        completion_only, assistant_only: TRL's settings of these names; neither learns all tokens.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape)
    model = LlamaForCausalLM(config)  # it computes nothing
    trainer = peers.sft_trainer(
        model, tokenizer, records, completion_only=completion_only, assistant_only=assistant_only
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(records))])
    rows = zip(batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True)
    return [(ids[real].tolist(), (labels[real] != -100).tolist()) for ids, labels, real in rows]


def neftune_against_transformers(
    noise: Callable[[Tensor, float], Tensor], manager: Callable[[nn.Module, float], Any], alpha: float = 5.0
) -> dict[str, float]:
    """Compare NEFTune with transformers' own hook from the same generator state; return relative differences.

    Args:
        noise: (embeddings, alpha) → noisy embeddings.
        manager: (model, alpha) → a context manager in which the model trains on noisy embeddings.

    Returns:
        differences of the noise, and of a small model's loss and of its adapters' gradient; 0 is bit for bit.
    """
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations.neftune import (
        activate_neftune,
        deactivate_neftune,
        neftune_post_forward_hook,
    )

    shape = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=80, num_key_value_heads=2, initializer_range=0.1, **shape)
    )
    add_adapters(model, AdapterConfig(rank=4)).train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    ids, embeddings, state = torch.randint(80, (3, 20)), torch.randn(3, 20, 48), torch.get_rng_state()

    def step() -> tuple[Tensor, Tensor]:
        torch.set_rng_state(state)
        loss = model(input_ids=ids, labels=ids).loss
        return loss.detach(), torch.cat([g.flatten() for g in torch.autograd.grad(loss, adapters)])

    hook = activate_neftune(model, alpha)
    torch.set_rng_state(state)
    their_noise = neftune_post_forward_hook(model.get_input_embeddings(), None, embeddings) - embeddings
    their_loss, their_gradient = step()
    deactivate_neftune(model, hook)
    torch.set_rng_state(state)
    our_noise = noise(embeddings, alpha) - embeddings
    with manager(model, alpha):
        our_loss, our_gradient = step()
    pairs = {
        "noise": (our_noise, their_noise),
        "loss": (our_loss, their_loss),
        "gradient": (our_gradient, their_gradient),
    }
    return {name: relative_difference(*pair) for name, pair in pairs.items()}


def dpo_against_trl(
    loss: Callable[..., Tensor],
    records: list[dict[str, Any]],
    tokenizer,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    per_token: bool = False,
) -> dict[str, float]:
    """Compare a loss with TRL's DPOTrainer on the trainer's own batch; return relative differences.

    Args:
        loss: called as (chosen, rejected, ref_chosen, ref_rejected, beta=beta), all numbers TRL's own; gives
            a loss per pair, or their mean.
        records: preference rows, which make one batch; a small random model with adapters scores them.
        beta, loss_type, label_smoothing: TRL's settings.
        per_token: give the loss means over the completion's tokens in place of sums.

    Returns:
        differences of the mean loss, and of its gradient with respect to the policy's log-probabilities.
    """
    settings = {"beta": beta, "loss_type": loss_type, "label_smoothing": label_smoothing}
    trainer = small_trainer(peers.dpo_trainer, records, tokenizer, settings)
    return against_trl(partial(loss, beta=beta), peers.dpo_numbers(trainer), per_token)


def simpo_against_trl(
    loss: Callable[..., Tensor],
    records: list[dict[str, Any]],
    tokenizer,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
) -> dict[str, float]:
    """`dpo_against_trl` with TRL's CPOTrainer, set to be SimPO; loss is (chosen, rejected, beta=, gamma=)."""
    trainer = small_trainer(peers.simpo_trainer, records, tokenizer, {"beta": beta, "gamma": gamma})
    numbers = peers.odds_numbers(trainer)
    numbers = numbers._replace(logps=numbers.logps[:2])  # with cpo_alpha = 0 the NLL is not used
    return against_trl(partial(loss, beta=beta, gamma=gamma), numbers)


def orpo_against_trl(
    loss: Callable[..., Tensor], records: list[dict[str, Any]], tokenizer, *, weight: float = 0.1
) -> dict[str, float]:
    """`dpo_against_trl` with TRL's ORPOTrainer; loss is (chosen, rejected, nll, weight=), nll one number."""
    trainer = small_trainer(peers.orpo_trainer, records, tokenizer, {"weight": weight})
    return against_trl(partial(loss, weight=weight), peers.odds_numbers(trainer))


def kto_against_trl(
    loss: Callable[..., Tensor],
    records: list[dict[str, Any]],
    tokenizer,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> dict[str, float]:
    """`dpo_against_trl` with TRL's KTOTrainer, on feedback rows.

    Args:
        loss: called as (policy, reference, desirable, kl, beta=, desirable_weight=, undesirable_weight=);
            kl is the mean over the mismatched pairs, clamped at 0.
    """
    settings = {
        "beta": beta,
        "desirable_weight": desirable_weight,
        "undesirable_weight": undesirable_weight,
    }
    trainer = small_trainer(peers.kto_trainer, records, tokenizer, settings)
    numbers = peers.kto_numbers(trainer)
    *rest, kl = numbers.logps
    return against_trl(partial(loss, **settings), numbers._replace(logps=(*rest, kl.clamp(min=0))))


def against_trl(
    loss: Callable[..., Tensor], theirs: peers.TrlNumbers, per_token: bool = False
) -> dict[str, float]:
    """Compare a loss with TRL's on the log-probabilities that TRL computed; return relative differences."""
    policy = ("chosen", "rejected") if len(theirs.slopes) == 2 else ("policy",)
    sums = [x.clone() for x in theirs.logps]
    trained = [x.requires_grad_() for x in sums[: len(policy)]]
    inputs = [x / n for x, n in zip(sums, theirs.tokens, strict=True)] if per_token else sums
    ours = loss(*inputs).mean()
    slopes = torch.autograd.grad(ours, trained)
    found = {"loss": relative_difference(ours.detach(), theirs.loss)}
    largest = torch.cat(theirs.slopes).abs().max()  # of all, since one side's slopes may cancel to nothing
    for name, slope, their in zip(policy, slopes, theirs.slopes, strict=True):
        found[f"gradient of {name}"] = ((slope - their).abs().max() / largest).item()
    return found


def small_trainer(build: Callable, records: list[dict[str, Any]], tokenizer, settings: dict[str, Any]):
    """A TRL trainer of a small random model whose adapters have moved it well away from its reference.

    Args:
        build: `dpo_trainer`, `kto_trainer`, `simpo_trainer` or `orpo_trainer` of `bench.peers`.
        settings: that function's own.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, initializer_range=0.1, **shape)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = peers.text_rows(records, tokenizer)
        trainer = build(LlamaForCausalLM(config), tokenizer, rows, peers.peft_config(4), **settings)
        for name, p in trainer.model.named_parameters():
            if p.requires_grad and "lora_B" in name:
                p.data.normal_(std=0.05)
    return trainer


def nf4_against_bitsandbytes(
    weight: Tensor, packed: Tensor, absmax: Tensor, dequantized: Tensor
) -> dict[str, float]:
    """Compare a weight's NF4 bytes, scales and numbers with bitsandbytes' own, block 64, scales in fp32.

    Returns:
        shares of bytes and of scales that are equal, and the largest difference of a dequantized number.
    """
    theirs, state, dequantize = peers.bitsandbytes_nf4(weight, double_quant=False)
    return {
        "bytes equal": _share_equal(packed, theirs),
        "scales equal": _share_equal(absmax, state.absmax),
        "dequantized, at most": (dequantized - dequantize()).abs().max().item(),
    }


def double_quantization_against_bitsandbytes(weight: Tensor, ours: NF4Tensor) -> dict[str, float]:
    """Compare a doubly quantized weight with bitsandbytes' own.

    Returns:
        shares of equal bytes and of equal 8-bit scales, the largest difference of two such scales, and our
        mean error as a multiple of theirs.
    """
    theirs, state, dequantize = peers.bitsandbytes_nf4(weight, double_quant=True)
    errors = [(numbers - weight).abs().mean() for numbers in (ours.dequantize(), dequantize())]
    return {
        "bytes equal": _share_equal(ours.packed, theirs),
        "8-bit scales equal": _share_equal(ours.scale_codes, state.absmax),
        "8-bit scales apart, at most": (ours.scale_codes.int() - state.absmax.int()).abs().max().item(),
        "error, ours / theirs": (errors[0] / errors[1]).item(),
    }


def _share_equal(ours: Tensor, theirs: Tensor) -> float:
    return (ours.view(-1) == theirs.view(-1)).float().mean().item()


def qlora_against_peft(
    records: list[dict[str, Any]],
    steps: int,
    batch_size: int = 2,
    rank: int = 16,
    learning_rate: float = 2e-3,
) -> dict[str, Any]:
    """QLoRA steps on the embedded model, with spark_ft alone and with bitsandbytes and PEFT.

    Both start from one checkpoint, written by bitsandbytes, and from the same adapters, and train on the same
    batches, in fp32, with AdamW.

    Returns:
        the share of its 4-bit bytes that spark_ft's own quantization makes too; both sides' losses, by step.
    """
    ours, tokenizer = load_model(str(peers.four_bit_folder()), dtype=torch.float32)
    theirs, _ = peers.bitsandbytes_model(peers.four_bit_folder())
    by_us, _ = load_model(EMBEDDED, dtype=torch.float32, quantize="nf4")
    quantized = {name: layer.weight for name, layer in by_us.named_modules() if isinstance(layer, NF4Linear)}
    bytes_equal = [
        _share_equal(weight.packed, theirs.get_submodule(name).weight) for name, weight in quantized.items()
    ]
    add_adapters(ours, AdapterConfig(rank=rank, alpha=2 * rank)).train()
    with tempfile.TemporaryDirectory() as folder:
        theirs = peers.peft_model(theirs, str(save_adapters(ours, folder)))

    def our_loss(batch: dict[str, Tensor]) -> Tensor:
        total, count = sft_loss(ours, batch)
        return total / count

    losses = []
    for model, loss in ((ours, our_loss), (theirs, lambda batch: theirs(**batch).loss)):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
        losses.append([])
        for step in range(steps):
            value = loss(collate_sft(records[step * batch_size : (step + 1) * batch_size], tokenizer))
            value.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[-1].append(value.item())
    return {"bytes equal": sum(bytes_equal) / len(bytes_equal), "ours": losses[0], "theirs": losses[1]}
