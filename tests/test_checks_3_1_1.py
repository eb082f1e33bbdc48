"""Every check of lab 3.1.1 takes right answers of any spelling, and names what is wrong in wrong ones."""

import math

import numpy as np
import torch
from helpers import accepts, mutant, refuses, then, tiny_llama
from torch import nn
from torch.nn import functional as F

from spark_ft.adapters import AdapterConfig, adapted_layers, add_adapters
from spark_ft.lab.checks import lab_3_1_1 as checks
from spark_ft.lab.study import lab_3_1_1 as study
from spark_ft.methods.lora import LoRALinear


def also(right, act):
    """The right answer, before which `act` is called with the inputs."""
    return lambda *given: (act(*given), right(*given))[1]


def stub(*_):
    raise NotImplementedError("your turn (exercise 4)")


LEFT_BEHIND = (
    ("switched gradients off", lambda *_: torch.set_grad_enabled(False)),
    ("seeds torch's generator", lambda *_: torch.manual_seed(0)),
    ("default dtype", lambda *_: torch.set_default_dtype(torch.float64)),
)

# ── exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────


def cut(matrix, k):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def cut_by_sum(matrix, k):
    U, S, V = torch.svd(matrix)
    return sum(S[i] * torch.outer(U[:, i], V[:, i]) for i in range(k))


def cut_by_zeros(matrix, k):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    S[k:] = 0
    return U @ torch.diag(S) @ Vh


def cut_in_numpy(matrix, k):
    U, S, Vh = np.linalg.svd(matrix.numpy(), full_matrices=False)
    return (U[:, :k] * S[:k]) @ Vh[:k]


def share(matrix):
    squares = torch.linalg.svdvals(matrix) ** 2
    return squares.cumsum(0) / squares.sum()


def share_by_cuts(matrix):
    total = (matrix**2).sum()
    return torch.stack([(cut(matrix, k) ** 2).sum() / total for k in range(1, min(matrix.shape) + 1)])


def share_as_a_list(matrix):
    _, S, _ = torch.linalg.svd(matrix)
    return [(S[:k].norm() ** 2 / S.norm() ** 2).item() for k in range(1, len(S) + 1)]


def test_cut():
    shares = (share, share_by_cuts, share_as_a_list, study.share_kept)
    cuts = (cut, cut_by_sum, cut_by_zeros, cut_in_numpy, study.cut_to_rank)
    accepts(checks.check_cut, *((one, share) for one in cuts), *((cut, one) for one in shares), times=2)
    kept = "(U[:, :k] * S[:k]) @ Vh[:k]"
    refuses(
        checks.check_cut,
        ("weakest layers", kept, "(U[:, -k:] * S[-k:]) @ Vh[-k:]"),
        ("what is left out", kept, f"matrix - {kept}"),
        ("one layer too many", kept, "(U[:, :k+1] * S[:k+1]) @ Vh[:k+1]"),
        ("one layer too few", kept, "(U[:, :k-1] * S[:k-1]) @ Vh[:k-1]"),
        ("only the last of the k", kept, "S[k-1] * torch.outer(U[:, k-1], Vh[k-1])"),
        ("only the strongest", kept, "S[0] * torch.outer(U[:, 0], Vh[0])"),
        ("singular values are missing", kept, "U[:, :k] @ Vh[:k]"),
        ("values are squared", kept, "(U[:, :k] * S[:k] ** 2) @ Vh[:k]"),
        ("Vh's rows are the layers", kept, "(U[:, :k] * S[:k]) @ Vh[:, :k].T"),
        ("U's columns are the layers", kept, "(U[:k].T * S[:k]) @ Vh[:k]"),
        ("is transposed", kept, f"({kept}).T"),
        ("first k rows", kept, "torch.where(torch.arange(len(matrix))[:, None] < k, matrix, 0.0)"),
        ("whole matrix; nothing was cut", kept, "(U * S) @ Vh"),
        ("raised RuntimeError", kept, "U[:, :k] @ S[:k] @ Vh[:k]"),
        ("shape", kept, "U[:, :k] * S[:k]"),
        ("is None", f"return {kept}", kept),
        ("is a tuple", kept, "U[:, :k] * S[:k], Vh[:k]"),
        ("`matrix` was changed in place", f"return {kept}", f"matrix.copy_({kept})\n    return matrix"),
        answers=lambda wrong: (wrong, share),
        right=cut,
    )  # fmt: skip
    refuses(
        checks.check_cut,
        ("not squared", " ** 2", ""),
        ("each layer's own share", "squares.cumsum(0)", "squares"),
        ("share left out", "return ", "return 1 - "),
        ("root was taken", "squares.cumsum(0) / squares.sum()", "(squares.cumsum(0) / squares.sum()).sqrt()"),
        ("divide by the sum of all squares", " / squares.sum()", ""),
        ("divided by the largest", "squares.sum()", "squares[0]"),
        ("not by its square", "squares.sum()", "squares.sum().sqrt()"),
        ("in percent", "return ", "return 100 * "),
        ("begin with the strongest", "squares.cumsum(0)", "squares.flip(0).cumsum(0)"),
        ("begin with k=1", "squares.cumsum(0)", "torch.cat([squares[:0].sum()[None], squares.cumsum(0)])"),
        ("shape", "squares.cumsum(0)", "squares.sum()"),
        answers=lambda wrong: (cut, wrong),
        right=share,
    )
    refuses(
        checks.check_cut,
        ("full_matrices=False may be missing", (mutant(cut_by_zeros, "=False", "=True"), share)),
        *((said, (also(cut, act), share)) for said, act in LEFT_BEHIND),
    )


# ── exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────


def draw(*shape):
    return torch.empty(*shape).uniform_(-1, 1) / math.sqrt(shape[-1])


def test_init():
    generator = torch.Generator()
    accepts(
        checks.check_init_adapter,
        lambda i, o, r: (draw(r, i), torch.zeros(o, r)),
        lambda i, o, r: (torch.randn(r, i) / math.sqrt(i), torch.zeros(o, r)),
        lambda i, o, r: ((2 * torch.rand(r, i) - 1) / i**0.5, torch.zeros(o, r)),
        lambda i, o, r: [
            nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, i), a=math.sqrt(5))),
            nn.Parameter(torch.zeros((o, r))),
        ],
        times=200,
    )
    refuses(
        checks.check_init_adapter,
        ("A and B are swapped; A", lambda i, o, r: (torch.zeros(o, r), draw(r, i))),
        ("A is zero and B is random: A and B are swapped", lambda i, o, r: (torch.zeros(r, i), draw(o, r))),
        ("both zero", lambda i, o, r: (torch.zeros(r, i), torch.zeros(o, r))),
        ("both random", lambda i, o, r: (draw(r, i), draw(o, r))),
        ("both random", lambda i, o, r: (draw(r, i), torch.full((o, r), 1e-4))),
        (r"should be \(4, 64\) and \(48, 4\)", lambda i, o, r: (draw(i, r), torch.zeros(r, o))),
        ("A's entries spread by", lambda i, o, r: (torch.randn(r, i), torch.zeros(o, r))),
        ("A's entries spread by", lambda i, o, r: (draw(r, i) * 0.01, torch.zeros(o, r))),
        ("A's entries spread by", lambda i, o, r: (2 * torch.rand(r, i) - 1, torch.zeros(o, r))),
        ("A's entries spread by", lambda i, o, r: (draw(r, i) * (i / r) ** 0.5, torch.zeros(o, r))),
        ("one side of zero", lambda i, o, r: (torch.rand(r, i) / i**0.5, torch.zeros(o, r))),
        ("one side of zero|rows of A are equal", lambda i, o, r: (torch.ones(r, i) / i, torch.zeros(o, r))),
        ("all rows of A are equal", lambda i, o, r: (draw(1, i).repeat(r, 1), torch.zeros(o, r))),
        ("seeds torch", lambda i, o, r: (torch.manual_seed(0) and draw(r, i), torch.zeros(o, r))),
        ("same at every call", lambda i, o, r: (
            torch.rand(r, i, generator=generator.manual_seed(3)) / i**0.5 * 2 - i**-0.5, torch.zeros(o, r)
        )),
        ("int64", lambda i, o, r: (draw(r, i), torch.zeros(o, r, dtype=torch.long))),
        ("nan or inf", lambda i, o, r: (draw(r, i) / 0, torch.zeros(o, r))),
        ("two tensors", lambda i, o, r: draw(r, i)),
        ("two tensors", lambda i, o, r: None),
        ("raised TypeError", lambda i, o, r: (torch.zeros(r, i) + None, torch.zeros(o, r))),
    )  # fmt: skip


# ── exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────


def lora_update(x, A, B, alpha):
    rank = A.shape[0]
    return alpha / rank * (x @ A.T @ B.T)


def test_update():
    accepts(
        checks.check_lora_update,
        lora_update,
        lambda x, A, B, alpha: alpha / len(A) * (x @ A.T) @ B.T,
        lambda x, A, B, alpha: F.linear(F.linear(x, A), B) * (alpha / B.shape[1]),
        lambda x, A, B, alpha: F.linear(F.linear(x, alpha / A.shape[0] * A), B),
        lambda x, A, B, alpha: (B @ (A @ x[..., None]))[..., 0] * alpha / A.size(0),
        lambda x, A, B, alpha: (
            torch.einsum("...r,or->...o", torch.einsum("...i,ri->...r", x, A), B) * (alpha / A.shape[0])
        ),
        times=2,
    )
    rank, low = "alpha / rank * (x @ A.T @ B.T)", "x @ A.T @ B.T"
    refuses(
        checks.check_lora_update,
        ("scaled by alpha, not alpha / rank", "alpha / rank", "alpha"),
        ("not scaled", "alpha / rank * ", ""),
        ("alpha is missing", "alpha / rank", "1 / rank"),
        ("rsLoRA", "alpha / rank", "alpha / rank ** 0.5"),
        ("twice", "alpha / rank", "(alpha / rank) ** 2"),
        ("upside down", "alpha / rank", "rank / alpha"),
        ("whole numbers", "alpha / rank", "alpha // rank"),
        ("width of the output|width of x", "alpha / rank", "alpha / B.shape[0]"),
        ("width of x", "alpha / rank", "alpha / x.shape[-1]"),
        ("sign is wrong", "alpha / rank", "-alpha / rank"),
        ("transposes are missing", low, "x @ A @ B"),
        ("A and B are swapped", low, "x @ (A @ B).T"),
        ("B comes before A", low, "x @ B @ A"),
        ("A is transposed, B is not", low, "x @ A.T @ B"),
        ("B is transposed, A is not", low, "x @ A @ B.T"),
        ("x itself is added", rank, f"x + {rank}"),
        ("raised.*x Aᵀ Bᵀ", low, "x.expand(3, 5, 9) @ A.T @ B.T"),
        ("raised|shape", low, "torch.einsum('bi,ri,or->bo', x, A, B)"),
        ("as large as B A", rank, "x @ (alpha / rank * B @ A).T"),
        ("as large as B A", low, "F.linear(x, torch.einsum('or,ri->oi', B, A))"),
        ("as large as B A", low, "x @ (B[:, :, None] * A[None]).sum(1).T"),
        ("no gradient reaches A", "A.T", "A.detach().T"),
        ("no gradient reaches B", "B.T", "B.data.T"),
        ("no gradient reaches x", "x @", "x.detach() @"),
        ("carries no gradient", rank, f"({rank}).detach()"),
        ("it has no gradient", rank, f"({rank}).detach().numpy()"),
        ("bf16.*float32", rank, f"({rank}).float()"),
        ("`x` was changed in place", "return", "x.data.mul_(2)\n    return"),
        ("`B` was changed in place", "return", "B.data.mul_(alpha / rank)\n    return"),
        ("got a gradient", rank, f"(({rank}).sum().backward(), {rank})[1]"),
        ("is None", "return ", ""),
        ("shape", rank, f"({rank})[None]"),
        ("shape|one number", rank, f"({rank}).mean()"),
        right=lora_update,
    )
    refuses(checks.check_lora_update, *((said, also(lora_update, act)) for said, act in LEFT_BEHIND))


# ── exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────


class Right(nn.Module):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.merged = base.requires_grad_(False), False
        self.lora_A = nn.Parameter(draw(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling, self.drop = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        out = self.base(x)
        if self.merged:
            return out
        return out + self.scaling * self.drop(x) @ self.lora_A.T @ self.lora_B.T


class Functional(nn.Module):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.merged, self.p = base, False, dropout
        for parameter in base.parameters():
            parameter.requires_grad = False
        self.lora_A = nn.Parameter(torch.randn(rank, base.in_features) / math.sqrt(base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.weight.shape[0], rank))
        self.scaling = alpha / rank

    def forward(self, x):
        low = F.linear(F.dropout(x, self.p, training=self.training), self.lora_A)
        update = F.linear(low, self.lora_B) * self.scaling
        return self.base(x) + (0 if self.merged else 1) * update


class Submodules(nn.Module):
    """A mask by hand, and the base's numbers in place of its call."""

    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        base.weight.requires_grad_(False)
        if base.bias is not None:
            base.bias.requires_grad_(False)
        self.base, self.merged, self.p, self.scaling = base, False, dropout, alpha / rank
        A = nn.init.kaiming_uniform_(torch.empty(rank, base.in_features), a=5**0.5)
        self.lora_A, self.lora_B = nn.Parameter(A), nn.Parameter(A.new_zeros(base.out_features, rank))

    def forward(self, x):
        out = F.linear(x, self.base.weight, self.base.bias)
        if not self.merged:
            if self.training and self.p > 0:
                x = x * (torch.rand_like(x) >= self.p) / (1 - self.p)
            out = out + x @ self.lora_A.T @ self.lora_B.T * self.scaling
        return out


def test_layer():
    accepts(checks.check_lora_linear, Right, Functional, Submodules, LoRALinear, times=2)
    A, B = "draw(rank, base.in_features)", "torch.zeros(base.out_features, rank)"
    A_is, frozen = "self.lora_A = nn.Parameter", "base.requires_grad_(False)"
    update = "self.scaling * self.drop(x) @ self.lora_A.T @ self.lora_B.T"
    merged = "if self.merged:\n            return out"
    refuses(
        checks.check_lora_linear,
        ("self.scaling.*that is alpha", "alpha / rank", "alpha"),
        ("self.scaling", "alpha / rank", "1.0"),
        ("√rank", "alpha / rank", "alpha / math.sqrt(rank)"),
        ("upside down", "alpha / rank", "rank / alpha"),
        ("not scaled", "self.scaling * ", ""),
        ("twice", "self.scaling * ", "self.scaling ** 2 * "),
        ("no self.scaling", "self.scaling, ", "self.scale, ", "self.scaling * ", "self.scale * "),
        ("swapped: A is", B, "torch.zeros(rank, base.in_features)", A, "draw(base.out_features, rank)"),
        ("lora_A is zero and lora_B is random: lora_A and lora_B are swapped",
         B, A, f"{A_is}({A})", f"{A_is}({B})"),
        ("both zero", A, "torch.zeros(rank, base.in_features)"),
        ("does not start at zero", B, "draw(base.out_features, rank)"),
        ("lora_A's entries spread by", A, f"torch.{A.replace('draw', 'randn')}"),
        ("one side of zero", A, f"{A}.abs()"),
        (r"should be \(", A, f"{A}.T", B, f"{B}.T"),
        ("only sees an nn.Parameter", f"{A_is}({A})", f"self.lora_A = {A}"),
        ("no self.lora_A", "self.lora_A", "self.A"),
        ("base.bias, base.weight still trains", frozen, "base"),
        ("base.bias still trains", frozen, "(base.weight.requires_grad_(False), base)[1]"),
        ("don't copy it", frozen, "__import__('copy').deepcopy(base).requires_grad_(False)"),
        ("self.merged should be False", "self.merged = base.requires_grad_(False), False",
         "self.merged = base.requires_grad_(False), None"),
        ("added again", merged, ""),
        ("it is zero", "return out\n", "return 0 * out\n"),
        ("dropout acts on the base", "self.base(x)", "self.base(self.drop(x))"),
        ("active in eval mode", "self.drop(x)", "F.dropout(x, self.drop.p)"),
        ("does nothing in training", "self.drop(x)", "x"),
        ("0[.][45]. of itself", "self.drop(x)", "(x * self.drop(x).ne(0))"),
        ("on the update's output", update, f"self.drop({update.replace('self.drop(x)', 'x')})"),
        ("between A and B", "self.drop(x) @ self.lora_A.T", "self.drop(x @ self.lora_A.T)"),
        ("not kept", "nn.Dropout(dropout)", "nn.Dropout(1 - dropout if dropout else 0.0)"),
        ("use the argument's value", "nn.Dropout(dropout)", "nn.Dropout(0.5 if dropout else 0.0)"),
        ("every row drops the same", "self.drop(x)", "(x * self.drop(torch.ones(x.shape[-1])))"),
        ("base's output is missing", "return out +", "return"),
        ("should be its base's", "out = self.base(x)", "out = self.scaling * self.base(x)"),
        ("the update is missing", f" + {update}", ""),
        ("the update is subtracted", "out + ", "out - "),
        ("the bias is lost", "self.base(x)", "F.linear(x, self.base.weight)"),
        ("no gradient reaches lora_A", update, f"({update}).detach()"),
        ("carries no gradient", "return out +", "return out.detach() + 0 * out.detach() +", update,
         f"({update}).detach()"),
        ("no gradient reaches lora_A", "self.lora_A.T", "self.lora_A.detach().T"),
        ("no gradient reaches x|gradient of the output with respect to x", "self.base(x)",
         "self.base(x.detach())"),
        ("transposes are missing", "self.lora_A.T @ self.lora_B.T", "self.lora_A @ self.lora_B"),
        ("B comes before A", "self.lora_A.T @ self.lora_B.T", "self.lora_B @ self.lora_A"),
        ("as large as B A", update, "self.scaling * F.linear(self.drop(x), self.lora_B @ self.lora_A)"),
        ("changed in place", "return out +", "x.data.mul_(2)\n        return out +"),
        ("seeds torch", "return out +", "torch.manual_seed(0)\n        return out +"),
        ("switched gradients off", "return out +", "torch.set_grad_enabled(False)\n        return out +"),
        ("raised AttributeError.*super|raised AttributeError", "super().__init__()\n        ", ""),
        right=Right,
    )  # fmt: skip
    refuses(
        checks.check_lora_linear,
        ("not an nn.Module", lambda *_: torch.zeros(3)),
        ("no self.lora_A", lambda base, *_: base),
    )


# ── exercise 5 ──────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def merge(layer):
    if not layer.merged:
        layer.base.weight += layer.scaling * layer.lora_B @ layer.lora_A
        layer.merged = True


@torch.no_grad()
def unmerge(layer):
    if layer.merged:
        layer.base.weight -= layer.scaling * layer.lora_B @ layer.lora_A
        layer.merged = False


def merge_data(layer):
    if layer.merged:
        return
    layer.base.weight.data.add_(layer.lora_B.data @ layer.lora_A.data, alpha=layer.scaling)
    layer.merged = True


def unmerge_data(layer):
    if not layer.merged:
        return
    with torch.no_grad():
        layer.base.weight.copy_(layer.base.weight - layer.scaling * (layer.lora_B @ layer.lora_A))
    layer.merged = False


def leaves_gradients_off(layer):
    merge(layer)
    torch.set_grad_enabled(False)


class IgnoresMerged(Right):
    def forward(self, x):
        return self.base(x) + self.scaling * self.drop(x) @ self.lora_A.T @ self.lora_B.T


def test_merge():
    update = "layer.scaling * layer.lora_B @ layer.lora_A"
    accepts(
        checks.check_merge,
        (merge, unmerge),
        (merge, unmerge, Right),
        (merge_data, unmerge_data, Functional),
        (merge, unmerge, stub),
        times=2,
    )
    refuses(
        checks.check_merge,
        ("added twice", "if not layer.merged", "if True"),
        ("counts twice", "layer.merged = True", "pass"),
        ("alpha / rank is missing", "layer.scaling * ", ""),
        ("subtracted, not added", "+=", "-="),
        ("divided by rank once more", "layer.scaling", "layer.scaling / len(layer.lora_A)"),
        ("A B instead of B A", "layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B"),
        ("transposed", update, f"({update}).T"),
        ("the update alone", "+= ", "+= -layer.base.weight + "),
        ("nothing was added", "+= ", "+= 0 * "),
        ("nothing was added", "layer.base.weight += ", "weight = layer.base.weight + "),
        ("inside torch.no_grad", "@torch.no_grad()", ""),
        ("inside torch.no_grad", f"+= {update}", f"= nn.Parameter(layer.base.weight + {update})"),
        ("lora_B after merge", "layer.merged = True", "layer.merged = layer.lora_B.zero_() is not None"),
        ("merged should be True, not 1", "layer.merged = True", "layer.merged = 1"),
        ("took the update out again", "layer.merged = True", "layer.merged = True\n    else:\n        "
         "layer.base.weight -= layer.scaling * layer.lora_B @ layer.lora_A"),
        answers=lambda merge: (merge, unmerge),
        right=merge,
    )  # fmt: skip
    refuses(
        checks.check_merge,
        ("subtracted twice", "if layer.merged", "if True"),
        ("merged should be False", "layer.merged = False", "layer.merged = True"),
        ("added the update again", "-=", "+="),
        ("alpha / rank is missing in unmerge", "layer.scaling * ", ""),
        ("unmerge did nothing", "if layer.merged", "if False"),
        answers=lambda unmerge: (merge, unmerge),
        right=unmerge,
    )
    refuses(
        checks.check_merge,
        ("your own layer.*counts twice.*forward must return the base", (merge, unmerge, IgnoresMerged)),
        ("no self.scaling", (merge, unmerge, mutant(Right, "self.scaling", "self.scale"))),
        ("not an nn.Module", (merge, unmerge, lambda *_: 3)),
        ("switched gradients", (leaves_gradients_off, unmerge)),
    )


def test_parity():
    accepts(checks.check_parity, (Right, merge), (LoRALinear, LoRALinear.merge))
    refuses(
        checks.check_parity,
        ("output: yours and PEFT's differ", (mutant(Right, "alpha / rank", "alpha"), merge)),
        ("merged weight: yours", (Right, mutant(merge, "layer.scaling * ", ""))),
    )


# ── your layer in a model ───────────────────────────────────────────────────────────────────────────────────


def test_any_layer_starts_where_add_adapters_starts():
    models = [tiny_llama() for _ in range(3)]
    torch.manual_seed(7)
    add_adapters(models[0], AdapterConfig(rank=4))
    for model, layer in zip(models[1:], (Right, Functional), strict=True):
        torch.manual_seed(7)
        study.put_layers(model, layer, 4)
    for name, layer in adapted_layers(models[0]).items():
        for other in models[1:]:
            assert torch.equal(layer.lora_A, other.get_submodule(name).lora_A)
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in models]
    assert trained[0] == trained[1] == trained[2]


def test_a_wrong_or_missing_cut_is_replaced_and_said(capsys):
    example = (torch.randn(6, 9), 2)
    assert study._yours(cut, study.cut_to_rank, example) is cut
    for wrong, said in (
        (stub, "is not written yet"),
        (then(cut, lambda out: -out), "gives other numbers"),
        (lambda *_: 1 / 0, "raises an error"),
    ):
        assert study._yours(wrong, study.cut_to_rank, example) is study.cut_to_rank
        assert said in capsys.readouterr().out
