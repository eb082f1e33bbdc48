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
    accepts(checks.check_noisy_embeddings, noisy, neftune_noise, halves)
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
        ("two calls gave the same noise|torch's own", lambda e, a: torch.manual_seed(0) and noisy(e, a)),
        ("into torch.float32", shaped(lambda e, b: torch.empty(e.shape).uniform_(-b, b))),
        ("carry no gradient", torch.no_grad()(noisy)),
        ("carry no gradient", lambda e, a: noisy(e.detach(), a)),
        ("there is no noise", lambda e, a: e),
        ("the embeddings are gone", lambda e, a: e if a == 0 else uniform(e, bound_of(e, a))),
        ("should give", then(noisy, lambda out: out[0])),
        ("nan or inf", lambda e, a: e / 0),
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


def test_true_length_noise():
    accepts(checks.check_true_length_noise, changed(), neftune_noise)
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


def test_embedding_noise():
    accepts(checks.check_embedding_noise, right, neftune, patched_forward)
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
    accepts(checks.check_reference_logps, reference, embedding_alone)
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
        ("off by up to", "model.eval()", "torch.manual_seed(0)"),
        ("gradients stayed off", back, f"{back}; torch.set_grad_enabled(False)"),
        ("shape", "[0]", "[0].mean()"),
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
