"""Every check of lab 3.1.1 passes the right answer and names each wrong one that people really give."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spark_ft.lab.checks import CheckFailed
from spark_ft.lab.checks import lab_3_1_1 as checks
from spark_ft.methods.lora import LoRALinear


def refuse(check, match, *answers):
    with pytest.raises(CheckFailed, match=match):
        check(*answers)


# ── exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def draw(*shape):
    return torch.empty(*shape).uniform_(-1, 1) / math.sqrt(shape[-1])


def test_init_right(capsys):
    checks.check_init_adapter(lambda i, o, r: (draw(r, i), torch.zeros(o, r)))
    checks.check_init_adapter(lambda i, o, r: (torch.randn(r, i) / math.sqrt(i), torch.zeros(o, r)))
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda i, o, r: (torch.zeros(o, r), draw(r, i)), "A and B are swapped; A reads"),
        (lambda i, o, r: (torch.zeros(r, i), draw(o, r)), "A is zero and B is random: A and B are swapped"),
        (lambda i, o, r: (torch.zeros(r, i), torch.zeros(o, r)), "both zero"),
        (lambda i, o, r: (draw(r, i), draw(o, r)), "both random"),
        (lambda i, o, r: (draw(i, r), torch.zeros(r, o)), r"should be \(4, 64\) and \(48, 4\)"),
        (lambda i, o, r: (torch.randn(r, i), torch.zeros(o, r)), "A's entries spread by"),
        (lambda i, o, r: (draw(r, i) * 0.01, torch.zeros(o, r)), "A's entries spread by"),
        (lambda i, o, r: (torch.full((r, i), 0.1), torch.zeros(o, r)), "A's entries spread by"),
        (lambda i, o, r: draw(r, i), "two tensors"),
        (lambda i, o, r: None, "two tensors"),
    ],
)
def test_init_mutants(mutant, message):
    refuse(checks.check_init_adapter, message, mutant)


def test_init_with_a_fixed_seed():
    def mutant(i, o, r):
        return torch.randn(r, i, generator=torch.Generator().manual_seed(0)) / math.sqrt(i), torch.zeros(o, r)

    refuse(checks.check_init_adapter, "same at every call", mutant)


# ── exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_update_right(capsys):
    checks.check_lora_update(lambda x, A, B, alpha: alpha / len(A) * (x @ A.T) @ B.T)
    checks.check_lora_update(lambda x, A, B, alpha: F.linear(x, alpha / A.shape[0] * B @ A))
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda x, A, B, alpha: alpha * x @ A.T @ B.T, "scaled by alpha, not alpha / rank"),
        (lambda x, A, B, alpha: x @ A.T @ B.T, "not scaled"),
        (lambda x, A, B, alpha: alpha / math.sqrt(len(A)) * x @ A.T @ B.T, "rsLoRA"),
        (lambda x, A, B, alpha: (alpha / len(A)) ** 2 * x @ A.T @ B.T, "twice"),
        (lambda x, A, B, alpha: len(A) / alpha * x @ A.T @ B.T, "upside down"),
        (
            lambda x, A, B, alpha: alpha / B.shape[0] * x @ A.T @ B.T,
            "off by up to|divided by the width|shape",
        ),
        (lambda x, A, B, alpha: alpha / x.shape[-1] * x @ A.T @ B.T, "divided by the width"),
        (lambda x, A, B, alpha: alpha / len(A) * x @ A @ B, "transposes are forgotten"),
        (lambda x, A, B, alpha: alpha / len(A) * x @ B.T @ A.T, "A and B are swapped"),
        (lambda x, A, B, alpha: alpha / len(A) * x @ (A @ B).T, "A and B are swapped"),
        (lambda x, A, B, alpha: alpha / len(A) * x @ B @ A, "B before A"),
        (lambda x, A, B, alpha: alpha / len(A) * x @ A.T @ B, "A is transposed, B is not"),
        (lambda x, A, B, alpha: alpha / len(A) * x @ A @ B.T, "B is transposed, A is not"),
        (lambda x, A, B, alpha: x + alpha / len(A) * x @ A.T @ B.T, "off by up to"),
        (lambda x, A, B, alpha: x.expand(3, 5, 9) @ A.T @ B.T, "PyTorch says"),
        (lambda x, A, B, alpha: None, "is a return missing"),
    ],
)
def test_update_mutants(mutant, message):
    refuse(checks.check_lora_update, message, mutant)


# ── exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parameters_right(capsys):
    checks.check_lora_parameters(lambda shapes, r: sum(r * (o + i) for o, i in shapes))
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (lambda shapes, r: sum(r * o * i for o, i in shapes), "rank whole matrices"),
        (lambda shapes, r: sum(o * i for o, i in shapes), "full matrices"),
        (lambda shapes, r: sum(r * r for _ in shapes), "rank × rank is not an adapter"),
        (lambda shapes, r: sum(2 * r * i for _, i in shapes), "square matrices only"),
        (lambda shapes, r: sum(2 * r * o for o, _ in shapes), "square matrices only"),
        (lambda shapes, r: sum(r * i for _, i in shapes), "only A"),
        (lambda shapes, r: sum(r * o for o, _ in shapes), "only B"),
        (lambda shapes, r: sum(o + i for o, i in shapes), "times the rank"),
        (lambda shapes, r: r * sum(shapes[0]) if shapes else 0, "only one matrix"),
        (lambda shapes, r: sum(r * (o + i) for o, i in shapes) or None, "returned None"),
        (lambda shapes, r: sum(r * (o + i) + o for o, i in shapes), "but should be"),
    ],
)
def test_parameters_mutants(mutant, message):
    refuse(checks.check_lora_parameters, message, mutant)


# ── exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Right(nn.Module):
    def __init__(self, base, rank, alpha, dropout=0.0):
        super().__init__()
        self.base, self.merged = base, False
        self.freeze()
        self.lora_A = nn.Parameter(draw(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling, self.p = self.scale(alpha, rank), dropout

    def freeze(self):
        self.base.requires_grad_(False)

    def scale(self, alpha, rank):
        return alpha / rank

    def drop(self, x):
        return F.dropout(x, self.p, self.training)

    def forward(self, x):
        return self.base(x) + self.scaling * self.drop(x) @ self.lora_A.T @ self.lora_B.T


def changed(**methods):
    return type("Mutant", (Right,), methods)


def after_init(change):
    def init(self, base, rank, alpha, dropout=0.0):
        Right.__init__(self, base, rank, alpha, dropout)
        change(self)

    return changed(__init__=init)


def swap(self):
    self.lora_A, self.lora_B = nn.Parameter(self.lora_B.detach()), nn.Parameter(self.lora_A.detach())


def zero_A_random_B(self):
    self.lora_A, self.lora_B = (
        nn.Parameter(torch.zeros_like(self.lora_A)),
        nn.Parameter(draw(*self.lora_B.shape)),
    )


def both_zero(self):
    self.lora_A = nn.Parameter(torch.zeros_like(self.lora_A))


def both_random(self):
    self.lora_B = nn.Parameter(draw(*self.lora_B.shape))


def plain_tensors(self):
    A = self.lora_A.detach()
    del self.lora_A
    self.lora_A = A


def transposed(self):
    self.lora_A, self.lora_B = nn.Parameter(self.lora_A.detach().T), nn.Parameter(self.lora_B.detach().T)


def dropout_on_base(self, x):
    x = self.drop(x)
    return self.base(x) + self.scaling * x @ self.lora_A.T @ self.lora_B.T


@pytest.mark.parametrize("layer", [Right, LoRALinear])
def test_layer_right(layer, capsys):
    checks.check_lora_linear(layer)
    assert "✓" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (changed(scale=lambda self, alpha, rank: alpha), "scaled by alpha, not alpha / rank"),
        (changed(scale=lambda self, alpha, rank: 1.0), "not scaled"),
        (changed(scale=lambda self, alpha, rank: alpha / math.sqrt(rank)), "√rank"),
        (after_init(swap), "swapped"),
        (after_init(zero_A_random_B), "lora_A is zero and lora_B is random"),
        (after_init(both_zero), "both zero"),
        (after_init(both_random), "does not start at zero"),
        (after_init(plain_tensors), "make it an nn.Parameter"),
        (after_init(transposed), r"should be \("),
        (changed(freeze=lambda self: None), "base.bias, base.weight still trains"),
        (changed(freeze=lambda self: self.base.weight.requires_grad_(False)), "base.bias still trains"),
        (changed(forward=dropout_on_base), "dropout acts on the base's path"),
        (changed(drop=lambda self, x: F.dropout(x, self.p)), "active in eval mode"),
        (changed(drop=lambda self, x: x), "does nothing in training"),
        (
            changed(drop=lambda self, x: x * (torch.rand_like(x) >= self.p) if self.training else x),
            "0[.][45]. of itself on average",
        ),
        (
            changed(
                forward=lambda self, x: (
                    self.base(x) + self.drop(self.scaling * x @ self.lora_A.T @ self.lora_B.T)
                )
            ),
            "on the update's output",
        ),
        (
            changed(
                forward=lambda self, x: (
                    self.base(x) + self.scaling * self.drop(x @ self.lora_A.T) @ self.lora_B.T
                )
            ),
            "between A and B",
        ),
        (
            changed(forward=lambda self, x: self.scaling * x @ self.lora_A.T @ self.lora_B.T),
            "base's output is missing",
        ),
        (changed(forward=lambda self, x: self.base(x)), "the update is missing"),
        (
            changed(
                forward=lambda self, x: x @ (self.base.weight + self.scaling * self.lora_B @ self.lora_A).T
            ),
            "the bias is lost",
        ),
        (
            changed(
                forward=lambda self, x: (
                    self.base(x) + self.scaling * x @ (self.lora_B @ self.lora_A).T.detach()
                )
            ),
            "carries no gradient",
        ),
        (
            changed(
                forward=lambda self, x: (
                    self.base(x) + self.scaling * x @ self.lora_A.detach().T @ self.lora_B.T
                )
            ),
            "lora_A gets no gradient",
        ),
        (
            changed(forward=lambda self, x: self.base(x) + self.scaling * x @ self.lora_A @ self.lora_B),
            "off by|PyTorch says",
        ),
        (
            changed(forward=lambda self, x: self.base(x) + self.scaling * x @ self.lora_B @ self.lora_A),
            "off by|PyTorch says",
        ),
    ],
)
def test_layer_mutants(mutant, message):
    refuse(checks.check_lora_linear, message, mutant)


# ── exercise 5 ──────────────────────────────────────────────────────────────────────────────────────────────────────────


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


def adding(update, flag=True, guard=True):
    @torch.no_grad()
    def mutant(layer):
        if not (guard and layer.merged):
            layer.base.weight += update(layer)
            layer.merged = layer.merged or flag

    return mutant


def right(layer):
    return layer.scaling * layer.lora_B @ layer.lora_A


def test_merge_right(capsys):
    checks.check_merge(merge, unmerge)
    assert "✓" in capsys.readouterr().out


def with_a_graph(layer):
    if not layer.merged:
        layer.base.weight += right(layer)
        layer.merged = True


def with_a_hidden_graph(layer):
    if not layer.merged:
        layer.base.weight.add_(right(layer))
        layer.merged = True


def a_new_parameter(layer):
    if not layer.merged:
        layer.base.weight = nn.Parameter((layer.base.weight + right(layer)).detach())
        layer.merged = True


@torch.no_grad()
def forgets_the_update(layer):
    merge(layer)
    layer.lora_B.zero_()


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (adding(right, guard=False), "added twice"),
        (adding(right, flag=False), "counts twice"),
        (adding(lambda layer: layer.lora_B @ layer.lora_A), "alpha / rank is missing"),
        (adding(lambda layer: -right(layer)), "taken away, not added"),
        (adding(lambda layer: layer.scaling * layer.lora_A @ layer.lora_B), "A B instead of B A"),
        (adding(lambda layer: right(layer).T), "transposed"),
        (adding(lambda layer: 0.0), "nothing was added"),
        (adding(lambda layer: right(layer) - layer.base.weight), "the update alone"),
        (lambda layer: None, "nothing was added"),
        (with_a_graph, "inside torch.no_grad"),
        (with_a_hidden_graph, "inside torch.no_grad"),
        (a_new_parameter, "inside torch.no_grad"),
        (forgets_the_update, "lora_B after merge"),
    ],
)
def test_merge_mutants(mutant, message):
    refuse(checks.check_merge, message, mutant, unmerge)


def taking(update, flag=False, guard=True):
    @torch.no_grad()
    def mutant(layer):
        if layer.merged or not guard:
            layer.base.weight -= update(layer)
            layer.merged = flag

    return mutant


@pytest.mark.parametrize(
    ("mutant", "message"),
    [
        (taking(right, guard=False), "taken away twice"),
        (taking(right, flag=True), "merged should be False"),
        (taking(lambda layer: -right(layer)), "added the update again"),
        (taking(lambda layer: layer.lora_B @ layer.lora_A), "alpha / rank is missing in unmerge"),
        (lambda layer: None, "unmerge did nothing"),
        (taking(lambda layer: 0.0), "unmerge did nothing"),
    ],
)
def test_unmerge_mutants(mutant, message):
    refuse(checks.check_merge, message, merge, mutant)


# ── parity ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_parity_right(capsys):
    checks.check_parity(Right, merge)
    checks.check_parity(LoRALinear, LoRALinear.merge)
    assert capsys.readouterr().out.count("✓") == 2


@pytest.mark.parametrize(
    ("layer", "fold", "message"),
    [
        (changed(scale=lambda self, alpha, rank: alpha), merge, "output: your layer and PEFT's differ"),
        (Right, adding(lambda layer: layer.lora_B @ layer.lora_A), "merged weight: your layer"),
    ],
)
def test_parity_mutants(layer, fold, message):
    refuse(checks.check_parity, message, layer, fold)


def test_every_check_lets_a_stub_pass(capsys):
    def stub(*_):
        raise NotImplementedError("your turn (exercise 1)")

    for check in (
        checks.check_init_adapter,
        checks.check_lora_update,
        checks.check_lora_parameters,
        checks.check_lora_linear,
    ):
        check(stub)
    checks.check_merge(stub, stub)
    checks.check_parity(stub, stub)
    assert capsys.readouterr().out.count("not attempted yet") == 6
