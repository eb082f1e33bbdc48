"""Every check of lab 3.1.2 passes the right answer and names each wrong one that people really give."""

import torch
from helpers import accepts, mutant, refuses, then
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
    )


class Right(nn.Module):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.magnitude = nn.Parameter(length(base.weight))
        self.scaling, self.dropout = alpha / rank, dropout

    def forward(self, x):
        g = self.magnitude / length(self.base.weight + self.scaling * self.lora_B @ self.lora_A).detach()
        dropped = F.dropout(x, self.dropout, self.training)
        plain, low = F.linear(dropped, self.base.weight), dropped @ self.lora_A.T @ self.lora_B.T
        return self.base(x) + (g - 1) * plain + g * self.scaling * low


not_detached = ".detach()", ""
norm_of_W = " + self.scaling * self.lora_B @ self.lora_A)", ")"


def test_layer():
    first, volume = "nn.Parameter(length(base.weight))", "g = self.magnitude / length("
    out = "self.base(x) + (g - 1) * plain + g * self.scaling * low"
    dropped = "F.dropout(x, self.dropout, self.training)"
    bias, note = "(0.0 if self.base.bias is None else self.base.bias)", "self.scaling * low"
    scaled = "if len(g) == x.shape[-1]:\n            x, g = x * g, torch.ones_like(g)\n        dropped ="
    accepts(checks.check_dora_linear, Right)
    refuses(
        checks.check_dora_linear,
        ("the norm runs over the wrong axis", first, "nn.Parameter(length(base.weight.T))"),
        ("starts at zero", first, "nn.Parameter(0 * length(base.weight))"),
        ("it starts at one", first, "nn.Parameter(torch.ones(base.out_features))"),
        ("self.magnitude is Tensor: the optimizer only sees", f"self.magnitude = {first}",
         'self.register_buffer("magnitude", length(base.weight))'),
        ("base.(weight|bias), base.(weight|bias) still trains", "base.requires_grad_(False)", "base"),
        ("the norm is not detached", *not_detached),
        ("the norm runs over the wrong axis", volume, f"{volume}torch.t(", ").detach()", ")).detach()"),
        ("the norm is that of W alone", *norm_of_W),
        ("missing in the norm", "+ self.scaling * self.lora_B", "+ self.lora_B"),
        ("magnitude has no effect", volume, "g = self.magnitude / self.magnitude.detach() + 0 * length("),
        ("not divided by the norm", volume, "g = self.magnitude + 0 * length("),
        ("the bias is scaled too", out, f"g * (self.base(x) + {note})"),
        ("the bias is lost", out, f"g * (plain + {note})"),
        ("note's share is not scaled", out, f"g * plain + {note} + {bias}"),
        ("the base's share is not scaled", out, f"self.base(x) + g * {note}"),
        ("appear only in the norm", out, f"g * plain + {bias}"),
        ("magnitude gets no gradient", "self.magnitude / ", "self.magnitude.detach() / "),
        ("inputs, not the outputs", "dropped =", scaled),
        ("handled as LoRA's", "F.linear(dropped", "F.linear(x"),
        ("dropout is drawn twice", "F.linear(dropped", f"F.linear({dropped}"),
        ("the base's too", out, f"g * (plain + {note}) + {bias}"),
        ("on the change of volume only", "dropped @", "x @"),
        ("active in eval mode", dropped, "F.dropout(x, self.dropout)"),
        ("does nothing in training", dropped, "x"),
        ("does not grow", dropped, "x * (torch.rand_like(x) >= self.dropout) if self.training else x"),
        ("does not allow", dropped, "F.dropout(x, 0.3 * (self.dropout > 0), self.training)"),
        right=Right,
    )  # fmt: skip


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
    )


def movement(before, after):
    moved = (length(after) - length(before)).abs().mean()
    cosine = torch.cosine_similarity(before, after, dim=1)
    return moved, (1 - cosine).mean()


def test_movement():
    longer, turned = "(length(after) - length(before))", "(1 - cosine).mean()"
    accepts(checks.check_movement, movement, then(movement, lambda pair: (pair[0].item(), pair[1].item())))
    refuses(
        checks.check_movement,
        ("cancel", f"{longer}.abs()", longer),
        ("cancel|absolute value of the mean", ".abs().mean()", ".mean().abs()"),
        ("ΔM of a 8×8 weight: it is the sum", ".abs().mean()", ".abs().sum()"),
        ("squared", ".abs().mean()", ".square().mean()"),
        ("share of the old length", longer, "(length(after) / length(before) - 1)"),
        ("length of the rows' difference", longer, "length(after - before)"),
        ("wrong axis", longer, "(length(after.T) - length(before.T))"),
        ("the two are swapped", f"moved, {turned}", f"{turned}, moved"),
        ("that is the cosine", turned, "cosine.mean()"),
        ("that is the angle", turned, "cosine.acos().mean()"),
        ("ΔD of a 8×8 weight: it is the sum", turned, "(1 - cosine).sum()"),
        ("the cosine runs over the wrong axis", "dim=1", "dim=0"),
        ("lengths are still in it", "torch.cosine_similarity", "(lambda a, b, dim: (a * b).sum(dim))"),
        ("two numbers, .* not Tensor", f", {turned}", ""),
        ("two numbers, .* None", turned, "None"),
        right=movement,
    )


def test_parity():
    accepts(checks.check_parity, (Right, merged_weight))
    refuses(
        checks.check_parity,
        ("output: yours and PEFT's differ", (mutant(Right, *norm_of_W), merged_weight)),
        ("gradient of A: yours and PEFT's differ", (mutant(Right, *not_detached), merged_weight)),
        ("merged weight: yours", (Right, lambda W, m, A, B, s: W + s * B @ A)),
    )
