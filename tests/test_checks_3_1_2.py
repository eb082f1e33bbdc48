"""Every check of lab 3.1.2 passes the right answer and names each wrong one that people really give."""

import torch
from helpers import accepts, refuses
from torch import nn
from torch.nn import functional as F

from spark_ft.lab.checks import lab_3_1_2 as checks


def length(matrix):
    return torch.linalg.vector_norm(matrix, dim=1)


def test_decompose():
    accepts(
        checks.check_decompose,
        lambda W: (length(W), F.normalize(W, dim=1)),
        lambda W: (W.pow(2).sum(1).sqrt(), W / W.norm(dim=1, keepdim=True)),
    )
    refuses(
        checks.check_decompose,
        ("the norm runs over the wrong axis", lambda W: (W.norm(dim=0), W / W.norm(dim=0))),
        ("no keepdim", lambda W: (W.norm(dim=1, keepdim=True), F.normalize(W, dim=1))),
        ("one number for the whole matrix", lambda W: (W.norm(), W / W.norm())),
        ("length of the whole matrix", lambda W: (W.norm().expand(len(W)), W / W.norm())),
        ("square root is missing", lambda W: (W.square().sum(1), F.normalize(W, dim=1))),
        ("sum of absolute values", lambda W: (W.abs().sum(1), F.normalize(W, dim=1, p=1))),
        ("don't average", lambda W: (W.square().mean(1).sqrt(), F.normalize(W, dim=1))),
        ("it is W itself", lambda W: (length(W), W)),
        ("columns are divided", lambda W: (length(W), F.normalize(W, dim=0))),
        ("twice", lambda W: (length(W), W / length(W)[:, None] ** 2)),
        ("multiplied", lambda W: (length(W), W * length(W)[:, None])),
        ("two tensors", lambda W: length(W)),
        ("two tensors", lambda W: None),
    )


def parts(W, A, B):
    return W.square().sum(1), (W @ A.T * B).sum(1), (B @ (A @ A.T) * B).sum(1)


def from_parts(function):
    """A row norm that is the root of function(s, ‖W‖², W·BA, ‖BA‖²)."""
    return lambda W, A, B, s: function(s, *parts(W, A, B)).clamp(0).sqrt()


row_norm = from_parts(lambda s, plain, cross, note: plain + 2 * s * cross + s * s * note)


def in_one_sum(W, A, B, s):
    return (length(W) ** 2 + (B * (2 * s * W @ A.T + s * s * B @ (A @ A.T))).sum(1)).clamp(0).sqrt()


def through_an_identity(W, A, B, s):  # PEFT's way
    return length(W + s * (torch.eye(W.shape[1]) @ A.T @ B.T).T)


def test_row_norm():
    accepts(checks.check_row_norm, row_norm, in_one_sum)
    refuses(
        checks.check_row_norm,
        ("as large as the weight itself", lambda W, A, B, s: length(W + s * B @ A)),
        ("as large as the weight itself", through_an_identity),
        ("as large as the weight itself", lambda W, A, B, s: length(W + s * torch.einsum("or,ri->oi", B, A))),
        ("wrong axis", lambda W, A, B, s: (W + s * B @ A).norm(dim=0)),
        ("square root is missing", lambda W, A, B, s: row_norm(W, A, B, s) ** 2),
        ("middle term counts twice", from_parts(lambda s, W2, cross, BA2: W2 + s * cross + s * s * BA2)),
        ("middle term is missing", from_parts(lambda s, plain, cross, note: plain + s * s * note)),
        ("not squared", from_parts(lambda s, plain, cross, note: plain + 2 * s * cross + s * note)),
        ("missing in the middle term", from_parts(lambda s, W2, cross, BA2: W2 + 2 * cross + s * s * BA2)),
        ("scaling is missing: that is", from_parts(lambda s, plain, cross, note: plain + 2 * cross + note)),
        ("the note is missing", from_parts(lambda s, plain, cross, note: plain)),
        ("the weight is missing", from_parts(lambda s, plain, cross, note: s * s * note)),
        ("the last term is missing", from_parts(lambda s, plain, cross, note: plain + 2 * s * cross)),
        ("wrong sign", from_parts(lambda s, plain, cross, note: plain - 2 * s * cross + s * s * note)),
        ("the lengths were added", lambda W, A, B, s: length(W) + s * parts(W, A, B)[2].sqrt()),
        ("A B instead of B A", lambda W, A, B, s: row_norm(W, B, A, s)),
        ("is a return missing", lambda W, A, B, s: None),
    )


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

    def turned(self):
        return self.base.weight + self.scaling * self.lora_B @ self.lora_A

    def volume(self):
        return self.magnitude / length(self.turned()).detach()

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


def norm_of(weight, dim=1):
    return changed(volume=lambda s: s.magnitude / weight(s).norm(dim=dim).detach())


def forward(function):
    """A mutant whose forward is function(self, g, x), with whatever dropout that takes."""
    return changed(forward=lambda s, x: function(s, s.volume(), x))


def input_scaled(self, g, x):
    return self.base(x * g) + self.low(x * g) if x.shape[-1] == len(g) else Right.forward(self, x)


def adds(first, second):
    """A mutant whose own dropouts are `first(self, x)` on the change of volume and `second` on the update."""
    return forward(lambda s, g, x: s.base(x) + (g - 1) * s.plain(first(s, x)) + g * s.low(second(s, x)))


def not_grown(self, x):
    return x * (torch.rand_like(x) >= self.dropout) if self.training else x


class PlainMagnitude(Right):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        magnitude = self.magnitude.detach()
        del self.magnitude
        self.register_buffer("magnitude", magnitude)


not_detached = changed(volume=lambda s: s.magnitude / length(s.turned()))
norm_of_W = norm_of(lambda s: s.base.weight)


def test_layer():
    accepts(checks.check_dora_linear, Right)
    refuses(
        checks.check_dora_linear,
        ("the norm runs over the wrong axis", changed(first_magnitude=lambda s: s.base.weight.norm(dim=0))),
        ("starts at zero", changed(first_magnitude=lambda s: length(s.lora_B @ s.lora_A).detach())),
        ("it starts at one", changed(first_magnitude=lambda s: torch.ones(s.base.out_features))),
        ("self.magnitude is Tensor: the optimizer only sees", PlainMagnitude),
        ("base.(weight|bias), base.(weight|bias) still trains", changed(freeze=lambda s: None)),
        ("the norm is not detached", not_detached),
        ("the norm runs over the wrong axis", norm_of(Right.turned, dim=0)),
        ("the norm is that of W alone", norm_of_W),
        ("missing in the norm", norm_of(lambda s: s.base.weight + s.lora_B @ s.lora_A)),
        ("magnitude has no effect", changed(volume=lambda s: s.magnitude / s.magnitude.detach())),
        ("not divided by the norm", changed(volume=lambda s: s.magnitude)),
        ("the bias is scaled too", forward(lambda s, g, x: g * (s.base(x) + s.low(x)))),
        ("the bias is lost", forward(lambda s, g, x: g * (s.plain(x) + s.low(x)))),
        ("note's share is not scaled", forward(lambda s, g, x: g * s.plain(x) + s.low(x) + shift(s))),
        ("the base's share is not scaled", forward(lambda s, g, x: s.base(x) + g * s.low(x))),
        ("appear only in the norm", forward(lambda s, g, x: g * s.plain(x) + shift(s))),
        ("magnitude gets no gradient", changed(volume=lambda s: Right.volume(s).detach())),
        ("inputs, not the outputs", forward(input_scaled)),
        ("handled as LoRA's", forward(lambda s, g, x: g * s.plain(x) + shift(s) + g * s.low(s.drop(x)))),
        ("dropout is drawn twice", adds(Right.drop, Right.drop)),
        ("the base's too", forward(lambda s, g, x: g * (s.plain(y := s.drop(x)) + s.low(y)) + shift(s))),
        ("on the change of volume only", adds(Right.drop, lambda s, x: x)),
        ("active in eval mode", changed(drop=lambda s, x: F.dropout(x, s.dropout))),
        ("does nothing in training", changed(drop=lambda s, x: x)),
        ("does not grow", changed(drop=not_grown)),
        ("does not allow", changed(drop=lambda s, x: F.dropout(x, 0.3 * (s.dropout > 0), s.training))),
    )


def test_what_an_undetached_norm_changes():
    """The check's sentence: the output is the same, and each row's gradient loses its part along the row."""
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


def merged_weight(W, m, A, B, s):
    V = W + s * B @ A
    return (m / length(V))[:, None] * V


def from_rows(function):
    """A merged weight of function(m, its second axis added; V = W + sBA; W; sBA)."""
    return lambda W, m, A, B, s: function(m[:, None], W + s * B @ A, W, s * B @ A)


def lengths(matrix):
    return length(matrix)[:, None]


def test_merged_weight():
    accepts(
        checks.check_merged_weight,
        merged_weight,
        lambda W, m, A, B, s: torch.diag(m) @ F.normalize(W + s * B @ A, dim=1),
    )
    refuses(
        checks.check_merged_weight,
        ("not divided by the norm", from_rows(lambda m, V, W, note: m * V)),
        ("the norm is that of W alone", from_rows(lambda m, V, W, note: m / lengths(W) * V)),
        ("the direction alone", from_rows(lambda m, V, W, note: V / lengths(V))),
        ("that is LoRA's", from_rows(lambda m, V, W, note: V)),
        ("scaling is missing", lambda W, m, A, B, s: merged_weight(W, m, A, B, 1.0)),
        ("the note is missing", from_rows(lambda m, V, W, note: m * W / lengths(W))),
        ("off by up to", from_rows(lambda m, V, W, note: m * W / lengths(W) + note)),
        ("only W is scaled", from_rows(lambda m, V, W, note: m / lengths(V) * W + note)),
        ("only the note is scaled", from_rows(lambda m, V, W, note: W + m / lengths(V) * note)),
        ("columns, not rows", from_rows(lambda m, V, W, note: m.T / lengths(V).T * V)),
        ("wrong axis", from_rows(lambda m, V, W, note: m / lengths(V.T) * V)),
        ("A B instead of B A", lambda W, m, A, B, s: merged_weight(W, m, B, A, s)),
        ("is a return missing", lambda W, m, A, B, s: None),
    )


def cosines(before, after):
    return torch.cosine_similarity(before, after, dim=1)


def turned(before, after):
    return (1 - cosines(before, after)).mean()


def longer(before, after):
    return length(after) - length(before)


def moved(before, after):
    return longer(before, after).abs().mean()


def pair(lengths, directions):
    return lambda before, after: (lengths(before, after), directions(before, after))


def test_movement():
    accepts(
        checks.check_movement,
        pair(moved, turned),
        pair(lambda b, a: moved(b, a).item(), lambda b, a: turned(b, a).item()),
    )
    refuses(
        checks.check_movement,
        ("cancel", pair(lambda b, a: longer(b, a).mean(), turned)),
        ("cancel|absolute value of the mean", pair(lambda b, a: longer(b, a).mean().abs(), turned)),
        ("ΔM of a 8×8 weight: it is the sum", pair(lambda b, a: longer(b, a).abs().sum(), turned)),
        ("squared", pair(lambda b, a: longer(b, a).square().mean(), turned)),
        ("share of the old length", pair(lambda b, a: (length(a) / length(b) - 1).abs().mean(), turned)),
        ("length of the rows' difference", pair(lambda b, a: length(a - b).mean(), turned)),
        ("wrong axis", pair(lambda b, a: moved(b.T, a.T), turned)),
        ("the two are swapped", pair(turned, moved)),
        ("that is the cosine", pair(moved, lambda b, a: cosines(b, a).mean())),
        ("that is the angle", pair(moved, lambda b, a: cosines(b, a).acos().mean())),
        ("ΔD of a 8×8 weight: it is the sum", pair(moved, lambda b, a: (1 - cosines(b, a)).sum())),
        ("the cosine runs over the wrong axis", pair(moved, lambda b, a: turned(b.T, a.T))),
        ("lengths are still in it", pair(moved, lambda b, a: (1 - (a * b).sum(1)).mean())),
        ("two numbers, .* not Tensor", moved),
        ("two numbers, .* not NoneType", lambda before, after: None),
        ("two numbers, .* None", pair(moved, lambda b, a: None)),
    )


def test_parity():
    accepts(checks.check_parity, (Right, merged_weight))
    refuses(
        checks.check_parity,
        ("output: yours and PEFT's differ", (norm_of_W, merged_weight)),
        ("gradient of A: yours and PEFT's differ", (not_detached, merged_weight)),
        ("merged weight: yours", (Right, lambda W, m, A, B, s: W + s * B @ A)),
    )
