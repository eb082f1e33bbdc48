"""Every check of lab 3.1.2 passes the right answer and names each wrong one that people really give."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spark_ft.lab.checks import CheckFailed
from spark_ft.lab.checks import lab_3_1_2 as checks


def refuse(check, match, *answers):
    with pytest.raises(CheckFailed, match=match):
        check(*answers)


def length(matrix):
    return torch.linalg.vector_norm(matrix, dim=1)


# ── exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_decompose_right(capsys):
    checks.check_decompose(lambda W: (length(W), F.normalize(W, dim=1)))
    checks.check_decompose(lambda W: (W.pow(2).sum(1).sqrt(), W / W.norm(dim=1, keepdim=True)))
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda W: (W.norm(dim=0), W / W.norm(dim=0)), "the norm runs over the wrong axis"),
        (lambda W: (W.norm(dim=1, keepdim=True), F.normalize(W, dim=1)), "no keepdim"),
        (lambda W: (W.norm(), W / W.norm()), "one number for the whole matrix"),
        (lambda W: (W.norm().expand(len(W)), W / W.norm()), "length of the whole matrix"),
        (lambda W: (W.square().sum(1), F.normalize(W, dim=1)), "square root is missing"),
        (lambda W: (W.abs().sum(1), F.normalize(W, dim=1, p=1)), "sum of absolute values"),
        (lambda W: (W.square().mean(1).sqrt(), F.normalize(W, dim=1)), "don't average"),
        (lambda W: (length(W), W), "it is W itself"),
        (lambda W: (length(W), F.normalize(W, dim=0)), "columns are divided"),
        (lambda W: (length(W), W / length(W)[:, None] ** 2), "twice"),
        (lambda W: (length(W), W * length(W)[:, None]), "multiplied"),
        (lambda W: length(W), "two tensors"),
        (lambda W: None, "two tensors"),
    ],
)
def test_decompose_mutants(mutant, message):
    refuse(checks.check_decompose, message, mutant)


# ── exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def parts(W, A, B):
    return W.square().sum(1), (W @ A.T * B).sum(1), (B @ (A @ A.T) * B).sum(1)


def row_norm(W, A, B, s):
    plain, cross, note = parts(W, A, B)
    return (plain + 2 * s * cross + s * s * note).sqrt()


def through_an_identity(W, A, B, s):  # PEFT's way
    return length(W + s * (torch.eye(W.shape[1]) @ A.T @ B.T).T)


def wrong_parts(function):
    return lambda W, A, B, s: function(s, *parts(W, A, B)).clamp(0).sqrt()


def test_row_norm_right(capsys):
    checks.check_row_norm(row_norm)
    checks.check_row_norm(
        lambda W, A, B, s: (
            (length(W) ** 2 + (B * (2 * s * W @ A.T + s * s * B @ (A @ A.T))).sum(1)).clamp(0).sqrt()
        )
    )
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda W, A, B, s: length(W + s * B @ A), "as large as the weight itself"),
        (through_an_identity, "as large as the weight itself"),
        (lambda W, A, B, s: length(W + s * torch.einsum("or,ri->oi", B, A)), "as large as the weight itself"),
        (lambda W, A, B, s: (W + s * B @ A).norm(dim=0), "shape|wrong axis"),
        (lambda W, A, B, s: row_norm(W, A, B, s) ** 2, "square root is missing"),
        (
            wrong_parts(lambda s, plain, cross, note: plain + s * cross + s * s * note),
            "middle term counts twice",
        ),
        (wrong_parts(lambda s, plain, cross, note: plain + s * s * note), "middle term is missing"),
        (wrong_parts(lambda s, plain, cross, note: plain + 2 * s * cross + s * note), "not squared"),
        (
            wrong_parts(lambda s, plain, cross, note: plain + 2 * cross + s * s * note),
            "missing in the middle term",
        ),
        (wrong_parts(lambda s, plain, cross, note: plain + 2 * cross + note), "scaling is missing: that is"),
        (wrong_parts(lambda s, plain, cross, note: plain), "the note is left out"),
        (wrong_parts(lambda s, plain, cross, note: s * s * note), "the weight is left out"),
        (wrong_parts(lambda s, plain, cross, note: plain + 2 * s * cross), "the last term is missing"),
        (wrong_parts(lambda s, plain, cross, note: plain - 2 * s * cross + s * s * note), "wrong sign"),
        (lambda W, A, B, s: length(W) + s * parts(W, A, B)[2].sqrt(), "the lengths were added"),
        (lambda W, A, B, s: row_norm(W, B, A, s), "PyTorch says|A B instead of B A"),
        (lambda W, A, B, s: None, "is a return missing"),
    ],
)
def test_row_norm_mutants(mutant, message):
    refuse(checks.check_row_norm, message, mutant)


# ── exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Right(nn.Module):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        self.freeze()
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.magnitude = nn.Parameter(self.first_magnitude())
        self.scaling, self.dropout = alpha / rank, dropout

    def freeze(self):
        self.base.requires_grad_(False)

    def first_magnitude(self):
        return length(self.base.weight)

    def drop(self, x):
        return F.dropout(x, self.dropout, self.training)

    def volume(self):
        return self.magnitude / length(self.base.weight + self.scaling * self.lora_B @ self.lora_A).detach()

    def plain(self, x):
        return F.linear(x, self.base.weight)

    def low(self, x):
        return self.scaling * x @ self.lora_A.T @ self.lora_B.T

    def forward(self, x):
        g, dropped = self.volume(), self.drop(x)
        return self.base(x) + (g - 1) * self.plain(dropped) + g * self.low(dropped)


def changed(**methods):
    return type("Mutant", (Right,), methods)


def shift(self):
    return 0.0 if self.base.bias is None else self.base.bias


def not_detached(self):
    return self.magnitude / length(self.base.weight + self.scaling * self.lora_B @ self.lora_A)


def norm_of(weight):
    return lambda self: self.magnitude / weight(self).norm(dim=1).detach()


def wrong_axis(self):
    return self.magnitude / (self.base.weight + self.scaling * self.lora_B @ self.lora_A).norm(dim=0).detach()


def forward(function):
    """A mutant whose forward is function(self, g, x) without dropout, or with what it takes of it itself."""
    return changed(forward=lambda self, x: function(self, self.volume(), x))


def lora_dropout(self, g, x):
    return g * self.plain(x) + shift(self) + g * self.low(self.drop(x))


def two_masks(self, g, x):
    return self.base(x) + (g - 1) * self.plain(self.drop(x)) + g * self.low(self.drop(x))


def input_scaled(self, g, x):
    return self.base(x * g) + self.low(x * g) if x.shape[-1] == len(g) else Right.forward(self, x)


class PlainMagnitude(Right):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        magnitude = self.magnitude.detach()
        del self.magnitude
        self.register_buffer("magnitude", magnitude)


def test_layer_right(capsys):
    checks.check_dora_linear(Right)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (changed(first_magnitude=lambda self: self.base.weight.norm(dim=0)), "the norm runs over the wrong axis"),
        (changed(first_magnitude=lambda self: length(self.lora_B @ self.lora_A).detach()), "the magnitude starts at zero"),
        (changed(first_magnitude=lambda self: torch.ones(self.base.out_features)), "it starts at one"),
        (PlainMagnitude, "self.magnitude is Tensor: make it an nn.Parameter"),
        (changed(freeze=lambda self: None), "base.weight, base.bias still trains|base.bias, base.weight still trains"),
        (changed(volume=not_detached), "the norm is not detached"),
        (changed(volume=wrong_axis), "the norm runs over the wrong axis"),
        (changed(volume=norm_of(lambda self: self.base.weight)), "the norm is that of W alone"),
        (changed(volume=norm_of(lambda self: self.base.weight + self.lora_B @ self.lora_A)), "missing in the norm"),
        (changed(volume=lambda self: self.magnitude / self.magnitude.detach()), "the magnitude has no effect"),
        (changed(volume=lambda self: self.magnitude), "not divided by the norm"),
        (forward(lambda self, g, x: g * (self.base(x) + self.low(x))), "the bias is scaled too"),
        (forward(lambda self, g, x: g * (self.plain(x) + self.low(x))), "the bias is lost"),
        (forward(lambda self, g, x: g * self.plain(x) + self.low(x) + shift(self)), "the note's share is not scaled"),
        (forward(lambda self, g, x: self.base(x) + g * self.low(x)), "the base's share is not scaled"),
        (forward(lambda self, g, x: g * self.plain(x) + shift(self)), "appear in the norm alone"),
        (forward(lambda self, g, x: g.detach() * (self.plain(x) + self.low(x)) + shift(self)), "magnitude gets no gradient"),
        (forward(input_scaled), "inputs, not the outputs"),
        (forward(lora_dropout), "dropout is handled as LoRA's"),
        (forward(two_masks), "dropout is drawn twice"),
        (forward(lambda self, g, x: Right.forward(self, self.drop(x)) if self.dropout else Right.forward(self, x)),
         "none that the formula allows|the base too"),
        (forward(lambda self, g, x: g * (self.plain(y := self.drop(x)) + self.low(y)) + shift(self)), "the base too"),
        (forward(lambda self, g, x: self.base(x) + (g - 1) * self.plain(self.drop(x)) + g * self.low(x)),
         "on the change of volume only"),
        (changed(drop=lambda self, x: F.dropout(x, self.dropout)), "active in eval mode"),
        (changed(drop=lambda self, x: x), "does nothing in training"),
        (changed(drop=lambda self, x: x * (torch.rand_like(x) >= self.dropout) if self.training else x), "does not grow"),
        (changed(drop=lambda self, x: F.dropout(x, 0.3 * (self.dropout > 0), self.training)), "none that the formula"),
    ],
)  # fmt: skip
def test_layer_mutants(mutant, message):
    refuse(checks.check_dora_linear, message, mutant)


def test_what_an_undetached_norm_changes():
    """The sentence in the lab and in the check's message: same output, and each row's gradient loses its part along the row."""
    torch.manual_seed(0)
    W, x, slope = torch.randn(7, 9), torch.randn(4, 9), torch.randn(4, 7)
    gradients, outputs = [], []
    for still in (True, False):
        V = W.clone().requires_grad_()
        n = length(V).detach() if still else length(V)
        out = x @ (length(W)[:, None] * V / n[:, None]).T
        out.backward(slope)
        gradients.append(V.grad)
        outputs.append(out.detach())
    assert torch.equal(*outputs)
    direction = F.normalize(W, dim=1)
    along = (gradients[0] * direction).sum(1, keepdim=True) * direction
    assert along.norm() > 0.05 * gradients[0].norm()
    assert torch.allclose(gradients[0] - along, gradients[1], atol=1e-5)


# ── exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def merged_weight(W, m, A, B, s):
    V = W + s * B @ A
    return (m / length(V))[:, None] * V


def test_merged_weight_right(capsys):
    checks.check_merged_weight(merged_weight)
    checks.check_merged_weight(lambda W, m, A, B, s: torch.diag(m) @ F.normalize(W + s * B @ A, dim=1))
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda W, m, A, B, s: m[:, None] * (W + s * B @ A), "not divided by the norm"),
        (lambda W, m, A, B, s: (m / length(W))[:, None] * (W + s * B @ A), "the norm is that of W alone"),
        (lambda W, m, A, B, s: F.normalize(W + s * B @ A, dim=1), "the direction alone"),
        (lambda W, m, A, B, s: W + s * B @ A, "that is LoRA's"),
        (lambda W, m, A, B, s: merged_weight(W, m, A, B, 1.0), "scaling is missing"),
        (lambda W, m, A, B, s: m[:, None] * F.normalize(W, dim=1), "the note is left out"),
        (lambda W, m, A, B, s: m[:, None] * F.normalize(W, dim=1) + s * B @ A, "off by up to"),
        (lambda W, m, A, B, s: (m / length(W + s * B @ A))[:, None] * W + s * B @ A, "only W is scaled"),
        (
            lambda W, m, A, B, s: W + (m / length(W + s * B @ A))[:, None] * (s * B @ A),
            "only the note is scaled",
        ),
        (lambda W, m, A, B, s: m / length(W + s * B @ A) * (W + s * B @ A), "columns, not rows"),
        (lambda W, m, A, B, s: (m / (W + s * B @ A).norm(dim=0))[:, None] * (W + s * B @ A), "wrong axis"),
        (lambda W, m, A, B, s: merged_weight(W, m, B, A, s), "A B instead of B A"),
        (lambda W, m, A, B, s: None, "is a return missing"),
    ],
)
def test_merged_weight_mutants(mutant, message):
    refuse(checks.check_merged_weight, message, mutant)


# ── exercise 5 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def turned(before, after):
    return (1 - torch.cosine_similarity(before, after, dim=1)).mean()


def moved(before, after):
    return (length(after) - length(before)).abs().mean()


def test_movement_right(capsys):
    checks.check_movement(lambda before, after: (moved(before, after), turned(before, after)))
    checks.check_movement(lambda before, after: (moved(before, after).item(), turned(before, after).item()))
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("lengths", "directions", "message"),
    [
        (lambda b, a: (length(a) - length(b)).mean(), turned, "cancel"),
        (lambda b, a: (length(a) - length(b)).mean().abs(), turned, "cancel|absolute value of the mean"),
        (lambda b, a: (length(a) - length(b)).abs().sum(), turned, "ΔM of a 8×8 weight: it is the sum"),
        (lambda b, a: (length(a) - length(b)).square().mean(), turned, "squared"),
        (lambda b, a: (length(a) / length(b) - 1).abs().mean(), turned, "share of the old length"),
        (lambda b, a: length(a - b).mean(), turned, "length of the difference"),
        (lambda b, a: (a.norm(dim=0) - b.norm(dim=0)).abs().mean(), turned, "wrong axis"),
        (turned, moved, "the two are swapped"),
        (moved, lambda b, a: torch.cosine_similarity(b, a, dim=1).mean(), "that is the cosine"),
        (moved, lambda b, a: torch.cosine_similarity(b, a, dim=1).acos().mean(), "that is the angle"),
        (
            moved,
            lambda b, a: (1 - torch.cosine_similarity(b, a, dim=1)).sum(),
            "ΔD of a 8×8 weight: it is the sum",
        ),
        (moved, lambda b, a: turned(b.T, a.T), "the cosine runs over the wrong axis"),
        (moved, lambda b, a: (1 - (a * b).sum(1)).mean(), "lengths are still in it"),
    ],
)
def test_movement_mutants(lengths, directions, message):
    refuse(
        checks.check_movement,
        message,
        lambda before, after: (lengths(before, after), directions(before, after)),
    )


@pytest.mark.parametrize("mutant", [moved, lambda before, after: None])
def test_movement_of_one_number(mutant):
    refuse(checks.check_movement, "two numbers", mutant)


# ── parity ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parity_right(capsys):
    checks.check_parity(Right, merged_weight)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("layer", "merged", "message"),
    [
        (
            changed(volume=norm_of(lambda self: self.base.weight)),
            merged_weight,
            "output: your layer and PEFT's differ",
        ),
        (changed(volume=not_detached), merged_weight, "gradient of A: your layer and PEFT's differ"),
        (Right, lambda W, m, A, B, s: W + s * B @ A, "merged weight: your layer"),
    ],
)
def test_parity_mutants(layer, merged, message):
    refuse(checks.check_parity, message, layer, merged)


def test_every_check_lets_a_stub_pass(capsys):
    def stub(*_):
        raise NotImplementedError("your turn (exercise 1)")

    for check in (checks.check_decompose, checks.check_row_norm, checks.check_dora_linear):
        check(stub)
    for check in (checks.check_merged_weight, checks.check_movement):
        check(stub)
    checks.check_parity(stub, stub)
    assert capsys.readouterr().out.count("not attempted yet") == 6
