"""Checks of lab 3.1.3: each looks at the noise, output − input, and names the mistakes that people make."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.adapters import AdapterConfig, adapted_layers, adapters_disabled, add_adapters
from spark_ft.lab import parity
from spark_ft.lab.checks import (
    CheckFailed,
    call,
    check,
    require,
    require_close,
    require_gradient,
    require_parity,
)
from spark_ft.scoring import sequence_logps

SHAPES = ((6, 25, 64), (2, 60, 24), (3, 9, 200), (1, 1, 4000))  # batch, seq, width; 1,000 numbers a text
NONE_IN_TRAINING = (
    "no noise in training with gradients on: register the hook on model.get_input_embeddings(), and let it "
    "*return* the noisy embeddings"
)


def _noise(answer: Callable[..., Tensor], embeddings: Tensor, what: str, *arguments: Any) -> Tensor:
    """What the answer added to the embeddings, in float64; requires a new tensor of their shape and type."""
    given, state = embeddings.clone(), torch.get_rng_state()
    out = call(answer, what, given, *arguments)
    require(isinstance(out, Tensor), f"{what} gave {type(out).__name__}, not a tensor; is a return missing?")
    require(
        out.shape == embeddings.shape,
        f"{what} gave shape {tuple(out.shape)}, but should give {tuple(embeddings.shape)}",
    )
    require(
        out.dtype == embeddings.dtype,
        f"{what} turned {embeddings.dtype} into {out.dtype}; draw noise of their type: torch.empty_like",
    )
    noise = out.detach().double() - embeddings.double()
    require(torch.isfinite(noise).all(), f"{what} gave nan or inf; is there a division by zero?")
    require(
        not noise.any() or not torch.equal(torch.get_rng_state(), state),
        f"{what} did not come from torch's own generator, so it is the same at every call: use "
        "no fixed seed and no generator of your own",
    )
    return noise


def _require_uniform(noise: Tensor, bound: float, what: str, wrong_bounds: dict[str, float]) -> None:
    """Require noise as from U(−bound, bound); `wrong_bounds`: message → the bound of a known mistake."""
    low, high, spread = noise.min().item(), noise.max().item(), noise.std().item()
    reach = max(-low, high)
    require(
        low < 0 < high,
        f"{what}: all noise lies on one side of zero, from {low:.3g} to {high:.3g}, and pushes every text "
        "the same way; draw from −bound to +bound",
    )
    # reach/spread: √3 if uniform, 1 if ±bound; a Gaussian's grows with the number of draws, here over 2.7
    require(
        reach < 2.3 * spread,
        f"{what} looks Gaussian: it reaches {reach / spread:.1f} times its standard deviation; NEFTune's "
        "noise is uniform and never exceeds the bound",
    )
    require(
        reach > 1.3 * spread,
        f"{what}: every number is the bound or minus the bound; draw from the range between them",
    )
    for message, wrong in wrong_bounds.items():
        require(not _fits(reach, wrong) or _fits(reach, bound), f"{what}: {message}")
    require(
        _fits(reach, bound),
        f"{what}: the noise reaches {reach:.4g}, but its bound should be α/√(L·d) = {bound:.4g}",
    )


def _fits(reach: float, bound: float) -> bool:
    # the largest of a thousand draws is within 2% of the bound
    return 0.98 * bound < reach < bound * (1 + 1e-4)


def _require_different(parts: Tensor, what: str, mistake: str) -> None:
    """Require the first two parts' noise to differ by more than the rounding of embeddings + noise."""
    same = len(parts) > 1 and (parts[0] - parts[1]).abs().max() < 1e-3 * parts.abs().max()
    require(not same, f"{what}: {mistake}; draw it in the embeddings' whole shape")


def _require_silent_zero(answer: Callable[..., Tensor], embeddings: Tensor, *arguments: Any) -> None:
    state = torch.get_rng_state()
    out = call(answer, "the embeddings at alpha=0", embeddings, 0.0, *arguments)
    require_close(out, embeddings, "the embeddings at alpha=0, which should not change")
    require(
        torch.equal(torch.get_rng_state(), state),
        "alpha=0 draws random numbers, so every later draw, such as dropout's, differs from the baseline's; "
        "return the embeddings before drawing",
    )


@check
def check_noisy_embeddings(answer: Callable[[Tensor, float], Tensor]) -> str:
    """Uniform in ±α/√(L·d), L the batch's padded length."""
    for (batch, seq, width), alpha in zip(SHAPES, (5.0, 8.0, 15.0, 1.0), strict=True):
        what = f"the noise for alpha={alpha:g}, batch={batch}, seq={seq}, width={width}"
        embeddings = torch.randn(batch, seq, width)
        noise = _noise(answer, embeddings, what, alpha)
        alone = (noise + embeddings).std() < 0.5  # embeddings of standard deviation 1 went in
        require(not alone, f"{what}: the embeddings are gone and only noise came out; add it to them")
        require(noise.any(), f"{what}: there is no noise; the output is the input")
        _require_different(noise, what, "every text got the same noise")
        _require_different(noise[0], what, "every token of a text got the same noise")
        bound = alpha / math.sqrt(seq * width)
        _require_uniform(
            noise,
            bound,
            what,
            {
                "√d is missing: a wider model gets more noise; it is α/√(L·d)": alpha / math.sqrt(seq),
                "√L is missing: a longer text gets more noise; it is α/√(L·d)": alpha / math.sqrt(width),
                "it is not scaled: alpha itself is the bound": alpha,
                "the square root is missing: it is scaled by α/(L·d)": alpha / (seq * width),
                "the batch's size is in it, √(B·L·d): L and d are those of one text": (
                    alpha / math.sqrt(batch * seq * width)
                ),
                "it is √(L + d), not √(L·d)": alpha / math.sqrt(seq + width),
                "alpha is missing": 1 / math.sqrt(seq * width),
                "alpha is inside the root": math.sqrt(alpha / (seq * width)),
                "it is half as wide, from −bound/2 to bound/2; draw from −bound to bound": bound / 2,
                "α/√3 is the expected *norm* of all the noise, not the bound": bound / math.sqrt(3),
            },
        )
    zeros = _noise(answer, torch.zeros(2, 30, 40), "the noise on embeddings of zero", 5.0)
    require(
        zeros.any(),
        "there is no noise on embeddings of zero: it is multiplied with the embeddings, but should be added",
    )
    first, second = (_noise(answer, embeddings, what, alpha) for _ in range(2))
    require(
        not torch.equal(first, second),
        "two calls gave the same noise: draw fresh noise each time, without a fixed seed",
    )
    _noise(answer, torch.randn(2, 30, 40).bfloat16(), "the noise on bf16 embeddings", 5.0)
    _require_silent_zero(answer, embeddings)
    leaf = torch.randn(2, 7, 16, requires_grad=True)
    out = call(answer, "the noisy embeddings", leaf, 5.0)
    require_gradient(out, {"embeddings": leaf}, 1.0 * leaf, "the output")
    return (
        "uniform in ±α/√(L·d), fresh at every call, embeddings unchanged, for 4 shapes; alpha=0 draws nothing"
    )


@check
def check_true_length_noise(answer: Callable[[Tensor, float, Tensor], Tensor]) -> str:
    """Uniform in ±α/√(length·d) on each text's own tokens, zero on padding."""
    cases: Sequence[tuple[list[int], int, float]] = (
        ([60, 20, 31], 64, 5.0),
        ([8, 40], 300, 8.0),
        ([1, 2, 3], 2000, 15.0),
    )
    for lengths, width, alpha in cases:
        seq, what = max(lengths) + 3, f"the noise for lengths {lengths}, width {width}, alpha={alpha:g}"
        embeddings = torch.randn(len(lengths), seq, width)
        given = torch.tensor(lengths)
        out = call(answer, what, embeddings.clone(), alpha, given)
        noise = _noise(answer, embeddings, what, alpha, given)
        for i, length in enumerate(lengths):
            row, text = noise[i], f"{what}, text {i + 1}"
            require(row.any(), f"{text}: there is no noise; the output is the input")
            if row[length:].any():
                require(
                    out[i, length:].any(), f"{text}: the padding's embeddings were erased, not left alone"
                )
                require(
                    row[length + 1 :].any(),
                    f"{text}: the first padded position has noise; {length} tokens end at index {length - 1}",
                )
                raise CheckFailed(f"{text}: padding has noise; only the first {length} tokens should have it")
            last = length == 1 or row[length - 1].any()
            require(last, f"{text}: its last token has no noise; the mask is one too short")
            bounds = {
                "its bound is that of the padded length; each text has its own": seq,
                "its bound is that of the longest text": max(lengths),
                "its bound is that of the mean length": sum(lengths) / len(lengths),
                "its bound is that of all texts' tokens together": sum(lengths),
                "√length is missing": 1,
                "the square root of the length is missing": length**2,
            }
            _require_uniform(
                row[:length],
                alpha / math.sqrt(length * width),
                text,
                {message: alpha / math.sqrt(tokens * width) for message, tokens in bounds.items()}
                | {"√d is missing": alpha / math.sqrt(length)},
            )
        shortest = min(lengths)
        level = noise[:, :shortest] * given[:, None, None].double().sqrt()
        _require_different(level, what, "every text got the same noise but for its size")
    _require_silent_zero(answer, embeddings, given)
    leaf = torch.randn(2, 7, 16, requires_grad=True)
    out = call(answer, "the noisy embeddings", leaf, 5.0, torch.tensor([7, 3]))
    require_gradient(out, {"embeddings": leaf}, 1.0 * leaf, "the output")
    return "each text's noise is scaled by its own length, and padding has none, for 3 batches"


class _Model(nn.Module):
    """An embedding layer, one for positions, and a head; keeps what the two embedding layers returned."""

    def __init__(self):
        super().__init__()
        self.embed, self.places, self.head = nn.Embedding(40, 24), nn.Embedding(16, 24), nn.Linear(24, 5)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor) -> Tensor:
        self.words, self.where = self.embed(ids), self.places(torch.arange(ids.shape[1]).expand(ids.shape))
        return self.head(self.words + self.where)

    def noise(self, ids: Tensor) -> Tensor:
        """The embedding layer's output in one pass, less its weight's rows."""
        self(ids)
        require(
            isinstance(self.words, Tensor),
            f"inside the block the embedding layer returns {type(self.words).__name__}",
        )
        return self.words.detach() - F.embedding(ids, self.embed.weight.detach())


@check
def check_embedding_noise(answer: Callable[[nn.Module, float], AbstractContextManager]) -> str:
    """Noise only inside the block, in training with gradients on; nothing stays behind."""
    ids, alpha = torch.randint(40, (3, 12)), 5.0
    model = _Model().train()
    weight = model.embed.weight.detach().clone()
    manager = call(answer, "embedding_noise(model, alpha)", model, alpha, may_change=[model])
    require(
        hasattr(manager, "__enter__") and hasattr(manager, "__exit__"),
        f"embedding_noise(model, alpha) returns {type(manager).__name__}, which `with` cannot use: "
        "put @contextmanager above it, and yield once inside",
    )
    require(not model.noise(ids).any(), "there is noise before the block begins")
    with manager:
        _check_inside(model, ids, weight, alpha / math.sqrt(12 * 24))
    require(model.training, "after the block the model is in eval mode; leave its mode alone")
    _require_clean(model, ids, "after the block")
    with answer(model.eval(), alpha):
        require(not model.training, "the block switched the model to training; leave its mode alone")
        require(
            not model.noise(ids).any(), "there is noise although the model was in eval mode before the block"
        )
    require(not model.training, "the block changed the model's mode")
    model.train()
    seen = None
    try:
        with answer(model, alpha):
            raise KeyError("an error inside the block")
    except KeyError as error:
        seen = error
    require(
        seen is not None,
        "an error inside the block was swallowed: use try … finally, without except and without return",
    )
    _require_clean(model, ids, "after an error inside the block", ": remove it in a `finally`")
    state = torch.get_rng_state()
    with answer(model, 0.0):
        require(not model.noise(ids).any(), "there is noise at alpha=0")
    silent = torch.equal(torch.get_rng_state(), state)
    require(silent, "alpha=0 draws random numbers, so the run differs from the baseline")
    require(torch.equal(model.embed.weight, weight), "the embedding's weight was changed")
    return (
        "noise only in training with gradients on; no hook left after the block or an error; weight unchanged"
    )


def _check_inside(model: _Model, ids: Tensor, weight: Tensor, bound: float) -> None:
    given = []
    watch = model.embed.register_forward_hook(
        lambda _, ids, out: given.append((out, out.detach().clone())), prepend=True
    )
    noise = model.noise(ids)
    watch.remove()
    require(noise.any(), NONE_IN_TRAINING)
    require(
        torch.equal(model.embed.weight, weight),
        "the embedding's weight was changed, and the noise stays in it and grows; change the layer's output",
    )
    require(
        torch.equal(*given[0]),
        "the layer's output was changed in place, so others who hold it see the noise: return a new one",
    )
    require(
        torch.equal(model.where[0], model.places.weight[:12]),
        "the positions' embedding has noise too: only get_input_embeddings()'s layer should",
    )
    reach = noise.abs().max().item()
    require(
        _fits(reach, bound),
        f"the noise reaches {reach:.3g}, but its bound should be α/√(L·d) = {bound:.3g}; use neftune_noise",
    )
    require(not torch.equal(model.noise(ids), noise), "two passes got the same noise: draw it in the hook")
    model(ids).sum().backward()
    require(
        model.embed.weight.grad is not None and model.embed.weight.grad.any(),
        "the embedding gets no gradient: no .detach() or no_grad around the layer's output",
    )
    model.eval()
    require(
        not model.noise(ids).any(),
        "there is noise in eval mode: ask the embedding layer whether it is `.training`",
    )
    model.train()
    with torch.no_grad():
        quiet = not model.noise(ids).any()
    require(
        quiet,
        "there is noise under torch.no_grad(), where nothing trains: reference models run like that, in "
        "training mode; ask torch.is_grad_enabled() too",
    )
    model.embed.requires_grad_(False)
    require(
        model.noise(ids).any(),
        "no noise where the embedding is frozen, as under LoRA: ask torch.is_grad_enabled(), not whether the "
        "output requires a gradient",
    )
    model.embed.requires_grad_(True)
    require(model.training, "the block changed the model's mode")


def _require_clean(model: _Model, ids: Tensor, when: str, mend: str = "") -> None:
    require(not model.noise(ids).any(), f"{when} there is still noise: the hook was left on{mend}")
    require(
        not model.embed._forward_hooks and not model.embed._forward_pre_hooks,
        f"{when} a hook is left on{mend}",
    )


@check
def check_reference_logps(answer: Callable[[nn.Module, dict[str, Tensor]], Tensor]) -> str:
    """The base model's log-probabilities with transformers' noise on; the model is unchanged afterwards."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations.neftune import activate_neftune

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=60, num_key_value_heads=2, initializer_range=0.2, **shape)
    model = LlamaForCausalLM(config).eval()
    add_adapters(model, AdapterConfig(rank=2))
    layers = adapted_layers(model).values()
    for layer in layers:
        nn.init.normal_(layer.lora_B, std=0.2)
    ids = torch.randint(60, (3, 11))
    mask = torch.tensor([[1] * 11, [1] * 8 + [0] * 3, [1] * 9 + [0] * 2])
    labels = ids.masked_fill((mask == 0) | (torch.arange(11) < 4), -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    with torch.no_grad():
        policy = sequence_logps(model, batch)[0]
        with adapters_disabled(model):
            clean = sequence_logps(model, batch)[0]
    activate_neftune(model, 5.0)  # an attribute and a hook on the embedding layer
    for training in (True, False):
        model.train(training)
        mode = "training" if training else "eval"
        kept = batch["input_ids"].clone()
        got = call(answer, f"the reference of a model in {mode} mode", model, batch, may_change=[model])
        require(
            isinstance(got, Tensor),
            f"reference_logps gave {type(got).__name__}, not a tensor; is a return missing?",
        )
        require(not got.requires_grad, "the reference carries a gradient: compute it under torch.no_grad()")
        if training and got.shape == clean.shape and not torch.equal(got, clean):
            require(
                torch.equal(answer(model, batch), got),
                "two calls differ: the noise reaches the reference. transformers' hook only asks whether the "
                "embedding layer is in training mode; switch that off",
            )
        what, policies = (
            f"the reference of a model in {mode} mode",
            {"that is the policy: the adapters are on": policy},
        )
        require_close(got, clean, what, policies, tolerance=1e-6)
        same_mode = all(m.training is training for m in model.modules())
        require(same_mode, f"the model was in {mode} mode, and is not any more; put it back")
        on = all(layer.enabled for layer in layers)
        require(on, "the adapters stayed off; `with adapters_disabled(model):` turns them on again")
        require(torch.equal(batch["input_ids"], kept), "the batch was changed")
    model.train()
    require(torch.is_grad_enabled(), "gradients stayed off; use `with torch.no_grad():`")
    first, second = (model(ids).logits.detach() for _ in range(2))
    require(
        not torch.equal(first, second),
        "the noise is gone from training too: the policy's pass needs the hook",
    )
    try:
        answer(model, {**batch, "input_ids": ids + 1000})  # no such token: the pass raises
    except IndexError:
        require(model.training, "after an error the model stayed in eval mode: put it back in a `finally`")
        require(all(layer.enabled for layer in layers), "after an error the adapters stayed off")
        require(torch.is_grad_enabled(), "after an error gradients stayed off")
    return "the base model's log-probabilities without noise; model, adapters and gradients are as before"


@check
def check_parity(
    noise: Callable[[Tensor, float], Tensor], manager: Callable[[nn.Module, float], AbstractContextManager]
) -> str:
    """Yours against transformers' own hook, from the same state of the generator."""
    differences = parity.neftune_against_transformers(noise, manager)
    require_parity(differences, "transformers'")
    said = (
        f"{name} " + ("bit for bit" if value == 0 else f"to {value:.0e}")
        for name, value in differences.items()
    )
    return "yours equals transformers' hook: " + ", ".join(said)
