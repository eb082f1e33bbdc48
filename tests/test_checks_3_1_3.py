"""Every check of lab 3.1.3 passes the right answer and names each wrong one that people really give."""

import math
from contextlib import contextmanager

import torch
from helpers import accepts, mutant, printed_by, refuses, then

from spark_ft import adapters_disabled, sequence_logps
from spark_ft.adapters import adapted_layers  # noqa: F401  a wrong answer uses it
from spark_ft.lab.checks import lab_3_1_3 as checks
from spark_ft.methods.neftune import neftune, neftune_noise


def bound_of(e, alpha):
    return alpha / math.sqrt(e.shape[-2] * e.shape[-1])


def uniform(e, bound):
    return torch.empty_like(e).uniform_(-bound, bound)


def bounded(bound):
    """The right answer but for the bound, a function of (embeddings, alpha)."""
    return lambda e, alpha: e if alpha == 0 else e + uniform(e, bound(e, alpha))


def shaped(noise):
    """The right answer but for the noise, a function of (embeddings, bound)."""
    return lambda e, alpha: e if alpha == 0 else e + noise(e, bound_of(e, alpha))


noisy = bounded(bound_of)


def seeded(e, bound):
    return torch.empty_like(e).uniform_(-bound, bound, generator=torch.Generator().manual_seed(0))


def test_noisy_embeddings():
    halves = shaped(lambda e, b: (2 * torch.rand_like(e) - 1) * b)
    by_shape = shaped(lambda e, b: torch.empty(e.shape, dtype=e.dtype).uniform_(-b, b))
    accepts(checks.check_noisy_embeddings, noisy, neftune_noise, halves, by_shape, times=100)
    refuses(
        checks.check_noisy_embeddings,
        ("looks Gaussian", shaped(lambda e, b: torch.randn_like(e) * b)),
        ("looks Gaussian", shaped(lambda e, b: torch.randn_like(e) * b / math.sqrt(3))),
        ("looks Gaussian", shaped(lambda e, b: e * uniform(e, b))),
        ("√d is missing", bounded(lambda e, a: a / math.sqrt(e.shape[1]))),
        ("√L is missing", bounded(lambda e, a: a / math.sqrt(e.shape[2]))),
        ("not scaled", bounded(lambda e, a: a)),
        ("the square root is missing", bounded(lambda e, a: a / (e.shape[1] * e.shape[2]))),
        ("the batch's size is in it", bounded(lambda e, a: a / math.sqrt(e.numel()))),
        ("not √", bounded(lambda e, a: a / math.sqrt(e.shape[1] + e.shape[2]))),
        ("alpha is missing", bounded(lambda e, a: 1 / math.sqrt(e.shape[1] * e.shape[2]))),
        ("alpha is inside the root", bounded(lambda e, a: math.sqrt(a / (e.shape[1] * e.shape[2])))),
        ("half as wide", bounded(lambda e, a: bound_of(e, a) / 2)),
        (r"expected \*norm\*", bounded(lambda e, a: bound_of(e, a) / math.sqrt(3))),
        ("but its bound should be", bounded(lambda e, a: 1.1 * bound_of(e, a))),
        ("one side of zero", shaped(lambda e, b: torch.rand_like(e) * b)),
        ("the bound or minus the bound", shaped(lambda e, b: torch.rand_like(e).sub(0.5).sign() * b)),
        ("every text got the same noise", shaped(lambda e, b: uniform(e[:1], b))),
        ("every token of a text got the same noise", shaped(lambda e, b: uniform(e[:, :1], b))),
        ("multiplied with the embeddings", shaped(lambda e, b: e.sign() * uniform(e, b))),
        ("alpha=0 draws random numbers", lambda e, a: e + uniform(e, bound_of(e, a))),
        ("in place", lambda e, a: e.add_(uniform(e, bound_of(e, a)))),
        ("did not come from torch's own generator", shaped(seeded)),
        ("seeds torch's generator", lambda e, a: torch.manual_seed(0) and noisy(e, a)),
        ("into torch.float32", shaped(lambda e, b: torch.empty(e.shape).uniform_(-b, b))),
        ("carries no gradient", torch.no_grad()(noisy)),
        ("no gradient", lambda e, a: noisy(e.detach(), a)),
        ("there is no noise", lambda e, a: e),
        ("the embeddings are gone", lambda e, a: e if a == 0 else uniform(e, bound_of(e, a))),
        ("should give", then(noisy, lambda out: out[0])),
        ("nan or inf", lambda e, a: e / 0),
        ("not scaled", shaped(lambda e, b: uniform(e, 5.0))),
        ("half as wide|but its bound", shaped(lambda e, b: (torch.rand_like(e) - 0.5) * b)),
        ("one side of zero", shaped(lambda e, b: -uniform(e, b).abs())),
        ("is the input|there is no noise", lambda e, a: e if a == 0 else e + 0 * uniform(e, 1.0)),
        ("not a tensor|None", lambda e, a: e if a == 0 else None),
        ("should give|shape|RuntimeError", shaped(lambda e, b: uniform(e, b)[:, :, None])),
        ("in place", lambda e, a: e.mul_(1).add_(uniform(e, bound_of(e, a))) if a else e),
        (
            "RuntimeError",
            lambda e, a: (
                noisy(e.unflatten(0, (e.shape[0], 1, 1)), a)[0]
                if e.dim() == 2
                else noisy(e, a).unflatten(1, (0, 2))
            ),
        ),
        ("TypeError", lambda e, a: noisy(e, a) + "noise"),
        ("every token of a text|every text", shaped(lambda e, b: uniform(e[:1, :1], b))),
        (
            "torch's own generator|same noise",
            shaped(lambda e, b: torch.linspace(-b, b, e.numel()).view_as(e)),
        ),
        ("gradients off|no gradient", lambda e, a: (torch.set_grad_enabled(False), noisy(e, a))[1]),
        ("but its bound", bounded(lambda e, a: a / math.sqrt(e.shape[1] * e.shape[2]) / 1.5)),
    )


def real(e, lengths):
    return torch.arange(e.shape[1]) < lengths[:, None]


def changed(numbers=lambda e, n: n * e.shape[2], mask=real, draw=uniform, kept=lambda e, n: 1, zero=True):
    """True-length noise with one of its parts changed; its bound is α/√numbers(embeddings, lengths)."""

    def answer(e, alpha, lengths):
        bound = alpha / (numbers(e, lengths) * torch.ones(len(lengths))).sqrt()[:, None, None]
        noise = draw(e, 1.0) * bound * mask(e, lengths)[..., None] if alpha or not zero else 0
        return e * (kept(e, lengths) if alpha else 1) + noise

    return answer


def row_by_row(e, alpha, lengths):
    if not alpha:
        return e
    rows = []
    for text, n in zip(e, lengths.tolist(), strict=True):
        own = text[:n] + torch.empty_like(text[:n]).uniform_(-1, 1) * alpha / math.sqrt(n * e.shape[2])
        rows.append(torch.cat([own, text[n:]]))
    return torch.stack(rows)


def test_true_length_noise():
    accepts(checks.check_true_length_noise, changed(), neftune_noise, row_by_row, times=100)
    refuses(
        checks.check_true_length_noise,
        ("padding has noise", lambda e, a, lengths: noisy(e, a)),
        ("padding has noise", changed(mask=lambda e, n: torch.ones(e.shape[:2]))),
        ("the first padded position has noise", changed(mask=lambda e, n: real(e, n + 1))),
        ("last token has no noise|there is no noise", changed(mask=lambda e, n: real(e, n - 1))),
        ("the padded length", changed(lambda e, n: e.shape[1] * e.shape[2])),
        ("the longest text", changed(lambda e, n: n.max() * e.shape[2])),
        ("the mean length", changed(lambda e, n: n.double().mean() * e.shape[2])),
        ("all texts' tokens", changed(lambda e, n: n.sum() * e.shape[2])),
        ("√d is missing", changed(lambda e, n: n)),
        ("√length is missing", changed(lambda e, n: e.shape[2])),
        ("square root of the length", changed(lambda e, n: n**2 * e.shape[2])),
        ("every text got the same noise", changed(draw=lambda e, b: uniform(e[:1], b))),
        ("padding's embeddings were erased", changed(kept=lambda e, n: real(e, n)[..., None])),
        ("alpha=0 draws random numbers", changed(zero=False)),
        ("no noise", lambda e, a, n: e),
        ("in place", lambda e, a, n: e.add_(changed()(0 * e, a, n)) if a else e),
        (
            "lengths` was changed|`n` was changed",
            lambda e, a, n: changed()(e, a, n.sub_(1).add_(1).clamp_(max=5)),
        ),
        ("padding has noise", changed(mask=lambda e, n: ~real(e, n))),
        (
            "padding's embeddings were erased",
            lambda e, a, n: changed()(e, a, n) * real(e, n)[..., None] if a else e,
        ),
        ("no gradient", lambda e, a, n: changed()(e.detach(), a, n)),
        ("looks Gaussian", changed(draw=lambda e, b: torch.randn_like(e) * b)),
        ("one side of zero", changed(draw=lambda e, b: torch.rand_like(e) * b)),
        ("not a tensor|None", lambda e, a, n: None),
        ("seeds torch's generator", lambda e, a, n: (torch.manual_seed(1), changed()(e, a, n))[1]),
        ("RuntimeError", lambda e, a, n: e + uniform(e, 1.0) * (a / (n * e.shape[2]).sqrt())[:, None]),
    )


@contextmanager
def right(model, alpha):
    layer = model.get_input_embeddings()

    def add_noise(module, _, out):
        return neftune_noise(out, alpha) if module.training and torch.is_grad_enabled() else out

    hook = layer.register_forward_hook(add_noise)
    try:
        yield model
    finally:
        hook.remove()


@contextmanager
def patched_forward(model, alpha):
    """No hook, but as good."""
    layer = model.get_input_embeddings()
    plain = layer.forward
    now = lambda: alpha if layer.training and torch.is_grad_enabled() else 0  # noqa: E731
    layer.forward = lambda ids: neftune_noise(plain(ids), now())
    try:
        yield model
    finally:
        del layer.forward


class Noise:
    """A context manager as a class."""

    def __init__(self, model, alpha):
        self.model, self.alpha = model, alpha

    def __enter__(self):
        self.hook = self.model.get_input_embeddings().register_forward_hook(self.shake)
        return self.model

    def shake(self, layer, inputs, out):
        return neftune_noise(out, self.alpha) if layer.training and torch.is_grad_enabled() else None

    def __exit__(self, *error):
        self.hook.remove()


def test_embedding_noise():
    accepts(checks.check_embedding_noise, right, neftune, patched_forward, Noise, times=100)
    where, when = "layer = model.get_input_embeddings()", "module.training and torch.is_grad_enabled()"
    gives, cleans = "neftune_noise(out, alpha)", "    finally:\n        hook.remove()"
    hooks, shaken = "register_forward_hook(add_noise)", "add_(0.01 * torch.randn_like(layer.weight))"
    refuses(
        checks.check_embedding_noise,
        ("noise in eval mode", when, "True"),
        ("noise in eval mode", when, "torch.is_grad_enabled()"),
        ("under torch.no_grad", when, "module.training"),
        ("the embedding is frozen", when, "module.training and out.requires_grad"),
        ("no noise in training", when, "not module.training"),
        ("after an error .* hook was left on.*finally", "finally", "except GeneratorExit: ...\n    else"),
        ("after the block .* left on", "hook.remove()", "pass"),
        ("swallowed", cleans, f"    except KeyError:\n        pass\n{cleans}"),
        ("weight was changed|there is noise|reaches", where, f"{where}; layer.weight.data.{shaken}"),
        ("weight was changed", gives, f"(layer.weight.data.{shaken}, {gives})[1]"),
        ("changed in place", gives, "out.add_(neftune_noise(0 * out, alpha))"),
        ("gets no gradient", gives, "neftune_noise(out.detach(), alpha)"),
        ("but its bound should be", gives, "out + alpha / 20 * torch.randn_like(out)"),
        ("but its bound should be", gives, "neftune_noise(out, alpha / 2)"),
        ("alpha=0", gives, "neftune_noise(out, alpha + 1e-9)"),
        ("positions' embedding has noise", "hook =", f"model.places.{hooks}\n    hook ="),
        ("no noise in training", where, "layer = model.places"),
        ("no noise in training", where, "layer = model"),
        ("no noise in training", gives, "None"),  # the hook forgets to return
        ("two passes got the same noise", gives, f"(torch.manual_seed(3), {gives})[1]"),
        ("switched the model to training", where, f"{where}; model.train()"),
        ("returns generator", lambda model, alpha: (x for x in [model])),
        ("returns NoneType|is NoneType|None", lambda model, alpha: None),
        ("noise in eval mode", when, "module.training or torch.is_grad_enabled()"),
        ("no noise in training", when, "module.training and not torch.is_grad_enabled()"),
        ("under torch.no_grad", when, "model.training"),
        ("but its bound should be", gives, "neftune_noise(out, 2 * alpha)"),
        ("no noise in training", hooks, "register_forward_pre_hook(lambda *a: None)"),
        ("no noise in training|AttributeError", "module.training", "False"),
        ("left on", "hook.remove()", "hook"),
        ("AttributeError|TypeError", "hook.remove()", "hook.delete()"),
        ("cannot be called", "def add_noise(module, _, out):", "def add_noise(out):"),
        ("swallowed", "        hook.remove()", "        hook.remove()\n        return"),
        ("mode|training", "        hook.remove()", "        hook.remove()\n        model.eval()"),
        right=right,
    )  # fmt: skip


def reference(model, batch):
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), adapters_disabled(model):
            return sequence_logps(model, batch)[0]
    finally:
        model.train(training)


def test_reference_logps():
    # As good if nothing else draws numbers: only the layer with the noise leaves its training mode.
    layer, back = "model.get_input_embeddings()", "model.train(training)"
    embedding_alone = mutant(reference, "= model.", f"= {layer}.", "model.eval", f"{layer}.eval",
                             "model.train(", f"{layer}.train(")  # fmt: skip
    logps, disabled = "sequence_logps(model, batch)[0]", "with torch.no_grad(), adapters_disabled(model):"
    careless = f"out = {logps}; {back}; return out"
    embedding_trains = f"{layer}.weight.requires_grad_(), model.eval()"
    off = "[setattr(layer, 'enabled', False) for layer in adapted_layers(model).values()]"
    accepts(checks.check_reference_logps, reference, embedding_alone, times=25)
    refuses(
        checks.check_reference_logps,
        ("two calls differ: the noise reaches the reference", "model.eval()", "pass"),
        ("was in training mode, and is not", back, "model.eval()"),
        ("was in eval mode, and is not", back, "model.train()"),
        ("after an error .* stayed in eval", back, "pass", f"return {logps}", careless),
        ("that is the policy", ", adapters_disabled(model)", ""),
        ("carries a gradient", "no_grad", "enable_grad", "model.eval()", embedding_trains),
        ("the adapters stayed off", disabled, f"{off}\n        with torch.no_grad():"),
        ("gone from training too", "model.eval()", f"{layer}._forward_hooks.clear()"),
        ("gone from training too", "model.eval()", f"vars({layer}).update(neftune_noise_alpha=0)"),
        ("seeds torch's generator", "model.eval()", "torch.manual_seed(0)"),
        ("gradients off or on for good", back, f"{back}; torch.set_grad_enabled(False)"),
        ("shape", "[0]", "[0].mean()"),
        ("not a tensor|tuple", "[0]", ""),
        ("not a tensor|NoneType", "return sequence_logps", "sequence_logps"),
        ("off by|shape|int64", "[0]", "[1]"),
        ("two calls differ", "model.eval()", "model.train()"),
        ("was in eval mode, and is not|was in training", back, "model.train(not training)"),
        (
            "batch was changed|changed",
            logps,
            "sequence_logps(model, {**batch, 'input_ids': batch['input_ids'].fill_(3)})[0]",
        ),
        ("off by", logps, "2 * sequence_logps(model, batch)[0]"),
        right=reference,
    )


def test_parity():
    accepts(checks.check_parity, (noisy, right))
    said = printed_by(checks.check_parity, (neftune_noise, neftune))
    assert "noise bit for bit, loss bit for bit, gradient bit for bit" in said
    doubled = mutant(right, "(out, alpha)", "(out, 2 * alpha)")
    refuses(
        checks.check_parity,
        ("noise: yours and", (bounded(lambda e, a: a / math.sqrt(e.shape[1])), right)),
        ("noise: yours and transformers' differ", (shaped(lambda e, b: -uniform(e, b)), right)),
        ("loss: yours", (noisy, doubled)),
        ("loss: yours", (noisy, mutant(right, "module.training", "False"))),
    )
