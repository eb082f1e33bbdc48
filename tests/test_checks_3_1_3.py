"""Every check of lab 3.1.3 passes the right answer and names each wrong one that people really give."""

import math
from contextlib import contextmanager, suppress

import pytest
import torch
from torch import nn

from spark_ft import adapters_disabled, sequence_logps
from spark_ft.adapters import adapted_layers
from spark_ft.lab.checks import CheckFailed
from spark_ft.lab.checks import lab_3_1_3 as checks
from spark_ft.methods.neftune import neftune, neftune_noise


def refuse(check, match, *answers):
    with pytest.raises(CheckFailed, match=match):
        check(*answers)


# ── exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def bound_of(e, alpha):
    return alpha / math.sqrt(e.shape[-2] * e.shape[-1])


def uniform(e, bound):
    return torch.empty_like(e).uniform_(-bound, bound)


def noisy(e, alpha):
    return e if alpha == 0 else e + uniform(e, bound_of(e, alpha))


def bounded(bound):
    """The right answer but for the bound, a function of (embeddings, alpha)."""
    return lambda e, alpha: e if alpha == 0 else e + uniform(e, bound(e, alpha))


def shaped(noise):
    """The right answer but for the noise, a function of (embeddings, bound)."""
    return lambda e, alpha: e if alpha == 0 else e + noise(e, bound_of(e, alpha))


def in_place(e, alpha):
    return e.add_(uniform(e, bound_of(e, alpha)))


def seeded(e, alpha):
    generator = torch.Generator().manual_seed(0)
    return (
        e
        if alpha == 0
        else e + torch.empty_like(e).uniform_(-bound_of(e, alpha), bound_of(e, alpha), generator=generator)
    )


def reseeded(e, alpha):
    torch.manual_seed(0)
    return noisy(e, alpha)


@torch.no_grad()
def without_gradient(e, alpha):
    return noisy(e, alpha)


def test_noisy_right(capsys):
    checks.check_noisy_embeddings(noisy)
    checks.check_noisy_embeddings(neftune_noise)
    checks.check_noisy_embeddings(shaped(lambda e, b: (2 * torch.rand_like(e) - 1) * b))
    assert capsys.readouterr().out.count("✓") == 3


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (shaped(lambda e, b: torch.randn_like(e) * b), "looks Gaussian"),
        (shaped(lambda e, b: torch.randn_like(e) * b / math.sqrt(3)), "looks Gaussian"),
        (bounded(lambda e, a: a / math.sqrt(e.shape[1])), "√d is missing"),
        (bounded(lambda e, a: a / math.sqrt(e.shape[2])), "√L is missing"),
        (bounded(lambda e, a: a), "not scaled"),
        (bounded(lambda e, a: a / (e.shape[1] * e.shape[2])), "the square root is missing"),
        (bounded(lambda e, a: a / math.sqrt(e.numel())), "the batch's size is in it"),
        (bounded(lambda e, a: a / math.sqrt(e.shape[1] + e.shape[2])), "not √"),
        (bounded(lambda e, a: 1 / math.sqrt(e.shape[1] * e.shape[2])), "alpha is missing"),
        (bounded(lambda e, a: math.sqrt(a / (e.shape[1] * e.shape[2]))), "alpha is inside the root"),
        (bounded(lambda e, a: bound_of(e, a) / 2), "half as wide"),
        (bounded(lambda e, a: bound_of(e, a) / math.sqrt(3)), "expected \\*norm\\*"),
        (bounded(lambda e, a: 1.1 * bound_of(e, a)), "but its bound should be"),
        (shaped(lambda e, b: torch.rand_like(e) * b), "one side of zero"),
        (shaped(lambda e, b: torch.rand_like(e).sub(0.5).sign() * b), "the bound or minus the bound"),
        (shaped(lambda e, b: uniform(e[:1], b)), "every text got the same noise"),
        (shaped(lambda e, b: uniform(e[:, :1], b)), "every token of a text got the same noise"),
        (lambda e, a: e if a == 0 else e * (1 + uniform(e, bound_of(e, a))), "looks Gaussian"),
        (
            lambda e, a: e if a == 0 else e + e.sign() * uniform(e, bound_of(e, a)),
            "multiplied with the embeddings",
        ),
        (lambda e, a: e + uniform(e, bound_of(e, a)), "alpha=0 draws random numbers"),
        (in_place, "in place"),
        (seeded, "left torch's generator where it was"),
        (reseeded, "two calls gave the same noise|left torch's generator where it was"),
        (shaped(lambda e, b: torch.empty(e.shape).uniform_(-b, b)), "into torch.float32"),
        (without_gradient, "carry no gradient"),
        (lambda e, a: noisy(e.detach(), a), "carry no gradient"),
        (lambda e, a: e, "there is no noise"),
        (lambda e, a: e if a == 0 else uniform(e, bound_of(e, a)), "the embeddings are gone"),
        (lambda e, a: noisy(e, a)[0], "should give"),
        (lambda e, a: None, "is a return missing"),
        (lambda e, a: e / 0, "nan or inf"),
    ],
)
def test_noisy_mutants(mutant, message):
    refuse(checks.check_noisy_embeddings, message, mutant)


# ── exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def real(e, lengths):
    return torch.arange(e.shape[1]) < lengths[:, None]


def true_length(e, alpha, lengths, bound=None, mask=None):
    if alpha == 0:
        return e
    bound = alpha / (lengths * e.shape[-1]).sqrt() if bound is None else bound(e, alpha, lengths)
    mask = real(e, lengths) if mask is None else mask(e, lengths)
    return e + uniform(e, 1.0) * bound[:, None, None] * mask[..., None]


def changed(**parts):
    return lambda e, alpha, lengths: true_length(e, alpha, lengths, **parts)


def one_draw_for_all(e, alpha, lengths):
    bound = alpha / (lengths * e.shape[-1]).sqrt()
    return e if alpha == 0 else e + uniform(e[:1], 1.0) * bound[:, None, None] * real(e, lengths)[..., None]


def erases_padding(e, alpha, lengths):
    return e if alpha == 0 else true_length(e, alpha, lengths) * real(e, lengths)[..., None]


def test_true_length_right(capsys):
    checks.check_true_length_noise(true_length)
    checks.check_true_length_noise(neftune_noise)
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda e, a, lengths: noisy(e, a), "padding has noise"),
        (changed(mask=lambda e, n: torch.ones(e.shape[:2])), "padding has noise"),
        (
            changed(mask=lambda e, n: torch.arange(e.shape[1]) <= n[:, None]),
            "the first padded position has noise",
        ),
        (
            changed(mask=lambda e, n: torch.arange(e.shape[1]) < n[:, None] - 1),
            "last token stays clean|there is no noise",
        ),
        (
            changed(bound=lambda e, a, n: a / (e.shape[1] * e.shape[2] * torch.ones(len(n))).sqrt()),
            "the padded length",
        ),
        (
            changed(bound=lambda e, a, n: a / (n.max() * e.shape[2] * torch.ones(len(n))).sqrt()),
            "the longest text",
        ),
        (
            changed(bound=lambda e, a, n: a / (n.double().mean() * e.shape[2] * torch.ones(len(n))).sqrt()),
            "the mean length",
        ),
        (
            changed(bound=lambda e, a, n: a / (n.sum() * e.shape[2] * torch.ones(len(n))).sqrt()),
            "all texts' tokens",
        ),
        (changed(bound=lambda e, a, n: a / n.sqrt()), "√d is missing"),
        (changed(bound=lambda e, a, n: a / math.sqrt(e.shape[2]) * torch.ones(len(n))), "√length is missing"),
        (changed(bound=lambda e, a, n: a / (n * math.sqrt(e.shape[2]))), "square root of the length"),
        (one_draw_for_all, "every text got the same noise"),
        (erases_padding, "padding's embeddings were erased"),
        (
            lambda e, a, n: e + true_length(e, a, n) - e if a else e + 0 * uniform(e, 1.0),
            "alpha=0 draws random numbers",
        ),
        (lambda e, a, n: e, "no noise"),
        (lambda e, a, n: None, "is a return missing"),
    ],
)
def test_true_length_mutants(mutant, message):
    refuse(checks.check_true_length_noise, message, mutant)


# ── exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def trains(module, out):
    return module.training and torch.is_grad_enabled()


@contextmanager
def right(model, alpha, when=trains, give=neftune_noise, where=lambda model: [model.get_input_embeddings()]):
    def add_noise(module, _, out):
        return give(out, alpha) if when(module, out) else out

    hooks = [layer.register_forward_hook(add_noise) for layer in where(model)]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def with_parts(**parts):
    return lambda model, alpha: right(model, alpha, **parts)


@contextmanager
def without_finally(model, alpha):
    with right(model, 0.0):
        hook = model.get_input_embeddings().register_forward_hook(
            lambda module, _, out: neftune_noise(out, alpha) if trains(module, out) else out
        )
        yield model
        hook.remove()


@contextmanager
def never_removed(model, alpha):
    model.get_input_embeddings().register_forward_hook(
        lambda module, _, out: neftune_noise(out, alpha) if trains(module, out) else out
    )
    yield model


@contextmanager
def swallows(model, alpha):
    with right(model, alpha), suppress(KeyError):
        yield model


@contextmanager
def noisy_weight(model, alpha):
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight += 0.01 * torch.randn_like(weight)
    with right(model, alpha):
        yield model


@contextmanager
def weight_in_the_hook(model, alpha):
    def add_noise(module, _, out):
        with torch.no_grad():
            module.weight += uniform(module.weight, 0.01)
        return neftune_noise(out, alpha)

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield model
    finally:
        hook.remove()


def output_in_place(out, alpha):
    return out.add_(neftune_noise(torch.zeros_like(out), alpha))


@contextmanager
def forgets_to_return(model, alpha):
    def add_noise(module, _, out):
        out = neftune_noise(out, alpha)  # a new name in here, and the layer gives what it gave

    hook = model.get_input_embeddings().register_forward_hook(add_noise)
    try:
        yield model
    finally:
        hook.remove()


@contextmanager
def drawn_once(model, alpha):
    state = torch.get_rng_state()

    def same(out, alpha):
        torch.set_rng_state(state)
        return neftune_noise(out, alpha)

    with right(model, alpha, give=same):
        yield model


@contextmanager
def switches_to_training(model, alpha):
    model.train()
    with right(model, alpha):
        yield model


def not_a_manager(model, alpha):
    yield model


@contextmanager
def patched_forward(model, alpha):
    """No hook, but as good."""
    embedding = model.get_input_embeddings()
    plain = embedding.forward
    embedding.forward = lambda ids: (
        neftune_noise(plain(ids), alpha) if trains(embedding, None) else plain(ids)
    )
    try:
        yield model
    finally:
        del embedding.forward


def test_manager_right(capsys):
    checks.check_embedding_noise(right)
    checks.check_embedding_noise(neftune)
    checks.check_embedding_noise(patched_forward)
    assert capsys.readouterr().out.count("✓") == 3


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (with_parts(when=lambda module, out: True), "noise in eval mode"),
        (with_parts(when=lambda module, out: torch.is_grad_enabled()), "noise in eval mode"),
        (with_parts(when=lambda module, out: module.training), "under torch.no_grad"),
        (
            with_parts(when=lambda module, out: module.training and out.requires_grad),
            "the embedding is frozen",
        ),
        (with_parts(when=lambda module, out: not module.training), "no noise in training"),
        (without_finally, "after an error inside the block .* hook was left on.*finally"),
        (never_removed, "after the block .* left on"),
        (swallows, "swallowed"),
        (noisy_weight, "weight was changed|no noise in training|there is noise|reaches"),
        (weight_in_the_hook, "weight was changed"),
        (with_parts(give=output_in_place), "changed in place"),
        (with_parts(give=lambda out, alpha: neftune_noise(out.detach(), alpha)), "gets no gradient"),
        (
            with_parts(give=lambda out, alpha: out + alpha / 20 * torch.randn_like(out)),
            "but its bound should be",
        ),
        (with_parts(give=lambda out, alpha: neftune_noise(out, alpha / 2)), "but its bound should be"),
        (with_parts(give=lambda out, alpha: neftune_noise(out, alpha + 1e-9)), "alpha=0"),
        (
            with_parts(where=lambda m: [x for x in m.modules() if isinstance(x, nn.Embedding)]),
            "places' embedding has noise",
        ),
        (with_parts(where=lambda model: [model.places]), "no noise in training"),
        (with_parts(where=lambda model: [model]), "no noise in training"),
        (forgets_to_return, "no noise in training"),
        (drawn_once, "two passes got the same noise"),
        (switches_to_training, "switched the model to training"),
        (not_a_manager, "gives generator"),
        (lambda model, alpha: None, "gives NoneType"),
    ],
)
def test_manager_mutants(mutant, message):
    refuse(checks.check_embedding_noise, message, mutant)


# ── exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def reference(model, batch):
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), adapters_disabled(model):
            return sequence_logps(model, batch)[0]
    finally:
        model.train(training)


def the_bug(model, batch):
    with torch.no_grad(), adapters_disabled(model):
        return sequence_logps(model, batch)[0]


def embedding_alone(model, batch):
    """Only the layer with the noise leaves its training mode: as good, where nothing else draws random numbers."""
    embedding = model.get_input_embeddings()
    training = embedding.training
    embedding.eval()
    try:
        return the_bug(model, batch)
    finally:
        embedding.train(training)


def stays_in_eval(model, batch):
    model.eval()
    return the_bug(model, batch)


def no_finally(model, batch):
    training = model.training
    model.eval()
    out = the_bug(model, batch)
    model.train(training)
    return out


def always_back_to_training(model, batch):
    model.eval()
    try:
        return the_bug(model, batch)
    finally:
        model.train()


def adapters_on(model, batch):
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return sequence_logps(model, batch)[0]
    finally:
        model.train(training)


def with_gradient(model, batch):
    for layer in adapted_layers(model).values():
        layer.enabled = False
    model.get_input_embeddings().weight.requires_grad_(True)
    training = model.training
    model.eval()
    out = sequence_logps(model, batch)[0]
    model.train(training)
    return out


def adapters_stay_off(model, batch):
    for layer in adapted_layers(model).values():
        layer.enabled = False
    return adapters_on(model, batch)


def hook_thrown_away(model, batch):
    model.get_input_embeddings()._forward_hooks.clear()
    return the_bug(model, batch)


def alpha_zeroed(model, batch):
    model.get_input_embeddings().neftune_noise_alpha = 0.0
    return the_bug(model, batch)


def seeded_reference(model, batch):
    torch.manual_seed(0)
    return the_bug(model, batch)


def gradients_off(model, batch):
    torch.set_grad_enabled(False)
    return reference(model, batch)


@pytest.fixture(autouse=True)
def gradients_on_again():
    yield
    torch.set_grad_enabled(True)


def test_reference_right(capsys):
    checks.check_reference_logps(reference)
    checks.check_reference_logps(embedding_alone)
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (the_bug, "two calls differ: the noise reaches the reference"),
        (stays_in_eval, "was in training mode, and is not any more"),
        (always_back_to_training, "was in eval mode, and is not any more"),
        (no_finally, "after an error the model stayed in eval mode"),
        (adapters_on, "that is the policy"),
        (with_gradient, "carries a gradient"),
        (adapters_stay_off, "the adapters stayed off"),
        (hook_thrown_away, "the noise is gone from training too"),
        (alpha_zeroed, "the noise is gone from training too"),
        (seeded_reference, "off by up to"),
        (gradients_off, "gradients stayed off"),
        (lambda model, batch: reference(model, batch).mean(), "shape"),
        (lambda model, batch: None, "is a return missing"),
    ],
)
def test_reference_mutants(mutant, message):
    refuse(checks.check_reference_logps, message, mutant)


# ── parity ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parity_right(capsys):
    checks.check_parity(noisy, right)
    checks.check_parity(neftune_noise, neftune)
    out = capsys.readouterr().out
    assert out.count("✓") == 2
    assert "noise bit for bit, loss bit for bit, gradient bit for bit" in out.splitlines()[-1]


@pytest.mark.parametrize(
    ("noise", "manager", "message"),
    [
        (bounded(lambda e, a: a / math.sqrt(e.shape[1])), right, "noise: yours and transformers' differ"),
        (shaped(lambda e, b: -uniform(e, b)), right, "noise: yours and transformers' differ"),
        (noisy, with_parts(give=lambda out, alpha: neftune_noise(out, 2 * alpha)), "loss: yours"),
        (noisy, with_parts(when=lambda module, out: False), "loss: yours"),
    ],
)
def test_parity_mutants(noise, manager, message):
    refuse(checks.check_parity, message, noise, manager)


def test_every_check_lets_a_stub_pass(capsys):
    def stub(*_):
        raise NotImplementedError("your turn (exercise 1)")

    @contextmanager
    def manager_stub(model, alpha):
        raise NotImplementedError("your turn (exercise 3)")
        yield

    for check in (
        checks.check_noisy_embeddings,
        checks.check_true_length_noise,
        checks.check_reference_logps,
    ):
        check(stub)
    checks.check_embedding_noise(manager_stub)
    checks.check_parity(stub, stub)
    assert capsys.readouterr().out.count("not attempted yet") == 5
