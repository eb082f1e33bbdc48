"""Every check of lab 3.1.2 passes the right answer and names each wrong one that people really give."""

import numpy as np
import torch
from helpers import accepts, mutant, refuses, then, tiny_llama
from torch import nn
from torch.nn import functional as F

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.lab.checks import lab_3_1_2 as checks
from spark_ft.lab.experiments import lab_3_1_2 as experiment
from spark_ft.lab.study import lab_3_1_2 as study
from spark_ft.lab.study.lab_3_1_1 import put_layers
from spark_ft.methods.dora import DoRALinear


def length(matrix):
    return torch.linalg.vector_norm(matrix, dim=1)


def also(right, act):
    """The right answer, before which `act` is called with the inputs."""
    return lambda *given: (act(*given), right(*given))[1]


LEFT_BEHIND = (
    ("switched gradients off", lambda *_: torch.set_grad_enabled(False)),
    ("seeds torch's generator", lambda *_: torch.manual_seed(0)),
    ("default dtype", lambda *_: torch.set_default_dtype(torch.float64)),
    ("was changed in place", lambda W, *_: W.mul_(2)),
)


def decompose(W):
    return length(W), F.normalize(W, dim=1)


def by_loop(W):
    lengths = torch.stack([row.dot(row).sqrt() for row in W])
    return lengths, torch.stack([row / n for row, n in zip(W, lengths, strict=True)])


def test_decompose():
    accepts(
        checks.check_decompose,
        decompose,
        by_loop,
        lambda W: (W.pow(2).sum(1).sqrt(), W / W.norm(dim=1, keepdim=True)),
        lambda W: [torch.einsum("oi,oi->o", W, W) ** 0.5, (W.T / W.norm(dim=1)).T],
        lambda W: (torch.hypot(W.norm(dim=-1), W.new_zeros(())), torch.diag(1 / W.norm(dim=1)) @ W),
        times=100,
    )
    refuses(checks.check_decompose, *((said, also(decompose, act)) for said, act in LEFT_BEHIND))
    refuses(
        checks.check_decompose,
        ("the two are swapped", lambda W: decompose(W)[::-1]),
        ("largest entry", lambda W: (W.abs().amax(1), decompose(W)[1])),
        ("one over the length", lambda W: (1 / length(W), decompose(W)[1])),
        ("sum of the row", lambda W: (W.sum(1), decompose(W)[1])),
        ("root was taken twice", lambda W: (length(W).sqrt(), decompose(W)[1])),
        ("length of the whole matrix", lambda W: (length(W), W / W.norm())),
        ("add up to one", lambda W: (length(W), F.normalize(W, p=1, dim=1))),
        ("signs are lost", lambda W: (length(W), decompose(W)[1].abs())),
        (r"m\[:, None\]", lambda W: (length(W), W / length(W)) if W.shape[0] != W.shape[1]
         else decompose(W)),
        ("two tensors", lambda W: None),
        ("nan or inf", lambda W: (length(W) / 0, W)),
    )  # fmt: skip
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


def by_einsum(W, A, B, s):
    cross = torch.einsum("or,or->o", torch.einsum("oi,ri->or", W, A), B)
    note = torch.einsum("or,rq,oq->o", B, A @ A.T, B)
    return (torch.einsum("oi,oi->o", W, W) + 2 * s * cross + s * s * note).clamp(min=0) ** 0.5


def by_halves(W, A, B, s):
    """(W Aᵀ + s/2 · B A Aᵀ) meets 2 s B once."""
    half = F.linear(W, A) + s / 2 * F.linear(B, A @ A.T)
    return torch.sqrt(length(W).square() + 2 * s * (half * B).sum(-1))


def through_an_identity(W, A, B, s):  # PEFT's way
    return length(W + s * (torch.eye(W.shape[1]) @ A.T @ B.T).T)


def test_row_norm():
    accepts(checks.check_row_norm, row_norm, in_one_sum, by_einsum, by_halves, times=100)
    refuses(checks.check_row_norm, *((said, also(row_norm, act)) for said, act in LEFT_BEHIND))
    refuses(
        checks.check_row_norm,
        ("squared in the middle", from_parts(lambda s, W2, cross, BA2: W2 + 2 * s * s * cross + s * s * BA2)),
        ("last term counts twice", from_parts(lambda s, W2, c, BA2: W2 + 2 * s * c + 2 * s * s * BA2)),
        ("W's own share is missing", from_parts(lambda s, W2, cross, BA2: 2 * s * cross + s * s * BA2)),
        ("not squared: the first", from_parts(lambda s, W2, c, BA2: W2.sqrt() + 2 * s * c + s * s * BA2)),
        ("norm of the whole matrix", lambda W, A, B, s: (W + s * B @ A).norm().expand(len(W))),
        ("as large as the weight", lambda W, A, B, s: length(W + s * (B[:, :, None] * A[None]).sum(1))),
        ("as large as the weight", lambda W, A, B, s: length(torch.addmm(W, B, A, alpha=s))),
        (
            "W A instead of W Aᵀ",
            lambda W, A, B, s: (
                length(W) ** 2 + 2 * s * (W @ A * B).sum(1) + s * s * parts(W, A, B)[2]
            ).sqrt(),
        ),
        (
            "Aᵀ A instead",
            lambda W, A, B, s: (
                (length(W) ** 2 + 2 * s * parts(W, A, B)[1] + s * s * (B @ (A.T @ A) * B).sum(1))
                .clamp(0)
                .sqrt()
            ),
        ),
        ("shape", lambda W, A, B, s: row_norm(W, A, B, s)[:, None]),
        ("shape", lambda W, A, B, s: row_norm(W, A, B, s).sum()),
        ("is None", lambda W, A, B, s: None),
    )
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
    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) * base.in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.magnitude = nn.Parameter(length(base.weight))
        self.scaling = alpha / rank

    def forward(self, x):
        n = length(self.base.weight + self.scaling * self.lora_B @ self.lora_A).detach()
        plain, low = F.linear(x, self.base.weight), x @ self.lora_A.T @ self.lora_B.T
        out = self.magnitude / n * (plain + self.scaling * low)
        return out if self.base.bias is None else out + self.base.bias


class OneMatrix(nn.Module):
    """The merged weight, made at every call."""

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base, self.scaling = base, alpha / rank
        for parameter in base.parameters():
            parameter.requires_grad = False
        bound = base.in_features**-0.5
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound))
        self.lora_B = nn.Parameter(torch.zeros(len(base.weight), rank))
        self.magnitude = nn.Parameter(base.weight.norm(dim=1).clone())

    def forward(self, x):
        V = self.base.weight + self.scaling * self.lora_B @ self.lora_A
        with torch.no_grad():
            n = V.norm(dim=1, keepdim=True)
        return F.linear(x, self.magnitude[:, None] * V / n, self.base.bias)


class Thin(Right):
    """The norm of exercise 2, and what is added to the base."""

    def forward(self, x):
        W, A, B, s = self.base.weight, self.lora_A, self.lora_B, self.scaling
        g = self.magnitude / row_norm(W, A, B, s).detach()
        return self.base(x) + (g - 1) * (x @ W.T) + g * s * F.linear(F.linear(x, A), B)


class WithDropout(Right):
    """An argument more than asked for is fine."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__(base, rank, alpha)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return super().forward(self.drop(x))


not_detached = ".detach()", ""
norm_of_W = " + self.scaling * self.lora_B @ self.lora_A)", ")"


def test_layer():
    first, volume = "nn.Parameter(length(base.weight))", "n = length("
    whole, out = "self.magnitude / n * (plain + self.scaling * low)", "plain + self.scaling * low"
    bias, frozen = "(0.0 if self.base.bias is None else self.base.bias)", "base.requires_grad_(False)"
    last = "return out if self.base.bias is None else out + self.base.bias"
    A, B = (
        "torch.randn(rank, base.in_features) * base.in_features**-0.5",
        "torch.zeros(base.out_features, rank)",
    )
    scaled = (
        "if len(n) == x.shape[-1]:\n            x, n = x * self.magnitude / n, self.magnitude\n        plain"
    )
    accepts(checks.check_dora_linear, Right, OneMatrix, Thin, WithDropout, DoRALinear, times=2)
    refuses(
        checks.check_dora_linear,
        ("the norm runs over the wrong axis", first, "nn.Parameter(length(base.weight.T))"),
        ("starts at zero", first, "nn.Parameter(0 * length(base.weight))"),
        ("it starts at one", first, "nn.Parameter(torch.ones(base.out_features))"),
        ("square root is missing", first, "nn.Parameter(length(base.weight) ** 2)"),
        ("length of the whole matrix", first, "nn.Parameter(base.weight.norm().repeat(len(base.weight)))"),
        ("sum of absolute", first, "nn.Parameter(base.weight.abs().sum(1))"),
        ("shape", first, "nn.Parameter(length(base.weight)[:, None])"),
        ("self.magnitude is Tensor: the optimizer only sees", f"self.magnitude = {first}",
         'self.register_buffer("magnitude", length(base.weight))'),
        ("no self.magnitude", "self.magnitude", "self.m"),
        ("no self.lora_B", "self.lora_B", "self.B"),
        ("no self.scaling", "self.scaling", "self.s"),
        ("that is alpha", "alpha / rank", "alpha"),
        ("upside down", "alpha / rank", "rank / alpha"),
        ("√rank", "alpha / rank", "alpha / rank**0.5"),
        ("base.bias, base.weight still trains|base.weight, base.bias still trains", frozen, "base"),
        ("base.bias still trains", frozen, "(base.weight.requires_grad_(False), base)[1]"),
        ("don't copy it", frozen, "__import__('copy').deepcopy(base).requires_grad_(False)"),
        ("both zero", A, "torch.zeros(rank, base.in_features)"),
        ("does not start at zero", B, "torch.randn(base.out_features, rank)"),
        ("lora_A's entries spread by", A, "torch.randn(rank, base.in_features)"),
        (r"should be \(", A, f"({A}).T", B, f"{B}.T"),
        ("the norm is not detached", *not_detached),
        ("the norm runs over the wrong axis", volume, f"{volume}torch.t(", ").detach()", ")).detach()"),
        ("the norm is that of W alone", *norm_of_W),
        ("norm is that of sBA alone|nan|base's, which", volume, f"{volume}0 * ", ),
        ("missing in the norm", "+ self.scaling * self.lora_B", "+ self.lora_B"),
        ("scaling is missing", "self.scaling * ", ""),
        ("only in the norm", "self.scaling * low", "low"),
        ("scaling is applied twice", "self.scaling * low", "self.scaling**2 * low"),
        ("magnitude has no effect", whole, f"self.magnitude / self.magnitude.detach() * ({out}) + 0 * n"),
        ("not divided by the norm", whole, f"self.magnitude * ({out})"),
        ("only the direction is there", whole, f"({out}) / n + 0 * self.magnitude"),
        ("the bias is scaled too", whole, "self.magnitude / n * (self.base(x) + self.scaling * low)",
         last, "return out"),
        ("the bias is lost", last, "return out"),
        ("the bias counts twice", last, f"return out + 2 * {bias}"),
        ("W x is missing", whole, "self.magnitude / n * self.scaling * low"),
        ("note's share is not scaled", whole, "self.magnitude / n * plain + self.scaling * low"),
        ("the base's share is not scaled", whole, "plain + self.magnitude / n * self.scaling * low"),
        ("appear only in the norm", whole, "self.magnitude / n * plain"),
        ("upside down", whole, f"n / self.magnitude * ({out})"),
        ("note is subtracted", "plain + self", "plain - self", "weight + self", "weight - self"),
        ("only the direction is there", "self.magnitude / n *", "self.magnitude / n**2 *"),
        ("no gradient reaches magnitude", "self.magnitude / ", "self.magnitude.detach() / "),
        ("no gradient reaches lora_A", "x @ self.lora_A.T", "x @ self.lora_A.detach().T"),
        ("no gradient reaches lora_B", "self.lora_B.T", "self.lora_B.data.T"),
        ("carries no gradient", last, f"return (out + {bias}).detach()"),
        ("gradient of the output with respect to x", "F.linear(x,", "F.linear(x.detach(),"),
        ("inputs, not the outputs", "plain,", f"{scaled},"),
        ("changed base.weight", "n = ", "self.base.weight.data += 0.01\n        n = "),
        ("was changed in place", "n = ", "x.data.mul_(2)\n        n = "),
        ("seeds torch", "n = ", "torch.manual_seed(0)\n        n = "),
        ("switched gradients off", "n = ", "torch.set_grad_enabled(False)\n        n = "),
        ("raised RuntimeError", "self.lora_B @ self.lora_A)", "self.lora_A @ self.lora_B)"),
        ("raised RuntimeError", "self.magnitude / n *", "(self.magnitude / n)[:, None] *"),
        ("is None", last, "out"),
        right=Right,
    )  # fmt: skip
    refuses(
        checks.check_dora_linear,
        ("not an nn.Module", lambda *_: torch.zeros(3)),
        ("no self.lora_A", lambda base, *_: base),
    )


def test_any_layer_starts_where_add_adapters_starts():
    ours, *theirs = (tiny_llama() for _ in range(3))
    torch.manual_seed(7)
    add_adapters(ours, AdapterConfig(method="dora", rank=4))
    for model, layer in zip(theirs, (Right, OneMatrix), strict=True):
        torch.manual_seed(7)
        put_layers(model, lambda base, rank, alpha, _, layer=layer: layer(base, rank, alpha), 4)
    for name, layer in adapted_layers(ours).items():
        for model in theirs:
            other = model.get_submodule(name)
            assert torch.equal(layer.lora_A, other.lora_A)
            assert torch.allclose(layer.magnitude, other.magnitude)


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
        lambda W, m, A, B, s: torch.einsum("o,oi->oi", m / length(W + s * B @ A), W + s * B @ A),
        lambda W, m, A, B, s: (F.normalize((W + s * (B @ A)).T, dim=0) * m).T,
        lambda W, m, A, B, s: m.unsqueeze(1) * torch.addmm(W, B, A, alpha=s).div(lengths(W + s * B @ A)),
        times=20,
    )
    refuses(checks.check_merged_weight, *((said, also(merged_weight, act)) for said, act in LEFT_BEHIND))
    refuses(
        checks.check_merged_weight,
        ("added after the scaling", from_rows(lambda m, V, W, note: m * W / lengths(W) + note)),
        ("the change, not the weight", from_rows(lambda m, V, W, note: m * V / lengths(V) - W)),
        ("added once more", from_rows(lambda m, V, W, note: W + m * V / lengths(V))),
        ("norm twice", from_rows(lambda m, V, W, note: m * V / lengths(V) ** 2)),
        ("upside down", from_rows(lambda m, V, W, note: lengths(V) / m * V)),
        ("whole matrix", from_rows(lambda m, V, W, note: m * V / V.norm())),
        ("note is subtracted", from_rows(lambda m, V, W, note: m * (W - note) / lengths(W - note))),
        ("multiplied by the norm", from_rows(lambda m, V, W, note: m * V * lengths(V))),
        ("is transposed", from_rows(lambda m, V, W, note: (m * V / lengths(V)).T)),
        (r"m\[:, None\]", lambda W, m, A, B, s: m / length(W + s * B @ A) * (W + s * B @ A)
         if len(W) != W.shape[1] else merged_weight(W, m, A, B, s)),
        ("bf16", then(merged_weight, lambda W: W.float())),
    )  # fmt: skip
    refuses(
        checks.check_merged_weight,
        ("not divided by the norm", from_rows(lambda m, V, W, note: m * V)),
        ("the norm is that of W alone", from_rows(lambda m, V, W, note: m / lengths(W) * V)),
        ("the direction alone", from_rows(lambda m, V, W, note: V / lengths(V))),
        ("that is LoRA's", from_rows(lambda m, V, W, note: V)),
        ("scaling is missing", lambda W, m, A, B, s: merged_weight(W, m, A, B, 1.0)),
        ("the note is missing", from_rows(lambda m, V, W, note: m * W / lengths(W))),
        ("off by up to", from_rows(lambda m, V, W, note: m * W / lengths(W) + 2 * note)),
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


def by_directions(before, after):
    (m, V), (m2, V2) = decompose(before), decompose(after)
    return torch.mean(torch.abs(m2 - m)), torch.mean(1 - torch.sum(V * V2, dim=1))


def by_rows(before, after):
    a, b = before.numpy(), after.numpy()
    lengths = np.sqrt((a * a).sum(1)), np.sqrt((b * b).sum(1))
    return np.abs(lengths[0] - lengths[1]).mean(), 1 - ((a * b).sum(1) / lengths[0] / lengths[1]).mean()


def test_movement():
    longer, turned = "(length(after) - length(before))", "(1 - cosine).mean()"
    accepts(
        checks.check_movement,
        movement,
        by_directions,
        by_rows,
        experiment.movement,
        then(movement, lambda pair: (pair[0].item(), pair[1].item())),
        then(movement, lambda pair: [value.numpy() for value in pair]),
        times=100,
    )
    refuses(checks.check_movement, *((said, also(movement, act)) for said, act in LEFT_BEHIND))
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
        ("one number per row", ".abs().mean()", ".abs()"),
        ("one number per row", turned, "1 - cosine"),
        ("whole matrix's length", f"{longer}.abs().mean()", "(after.norm() - before.norm()).abs()"),
        ("root of the mean square", ".abs().mean()", ".square().mean().sqrt()"),
        ("that is the median", ".abs().mean()", ".abs().median()"),
        ("largest change", ".abs().mean()", ".abs().max()"),
        ("squared lengths were subtracted", longer, "(length(after)**2 - length(before)**2)"),
        ("the sign is wrong", "1 - cosine", "cosine - 1"),
        (r"1 \+ cos", "1 - cosine", "1 + cosine"),
        ("one long row", "before, after, dim=1", "before.flatten(), after.flatten(), dim=0"),
        ("1 − cos²", "1 - cosine", "1 - cosine**2"),
        ("directions' difference", turned, "length(F.normalize(after) - F.normalize(before)).mean()"),
        ("loses wide turns", "1 - cosine", "1 - cosine.abs()"),
        ("two numbers, .* not Tensor", f", {turned}", ""),
        ("ΔD of .* is None", turned, "None"),
        right=movement,
    )


def test_parity():
    accepts(checks.check_parity, (Right, merged_weight), (OneMatrix, merged_weight), (Thin, merged_weight))
    refuses(
        checks.check_parity,
        ("output: yours and PEFT's differ", (mutant(Right, *norm_of_W), merged_weight)),
        ("gradient of A: yours and PEFT's differ", (mutant(Right, *not_detached), merged_weight)),
        ("merged weight: yours", (Right, lambda W, m, A, B, s: W + s * B @ A)),
    )


def test_a_wrong_or_missing_movement_is_said(capsys):
    weights = {"model.layers.14.self_attn.v_proj": torch.randn(6, 9)}

    def stub(*_):
        raise NotImplementedError("your turn (exercise 5)")

    for answer, said in (
        (movement, "ΔM 0.00e"),
        (stub, "is not written yet"),
        (lambda *_: 1, "raises an error"),
    ):
        study._say_yours(answer, weights, weights)
        assert said in capsys.readouterr().out
