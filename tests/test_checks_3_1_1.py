"""Every check of lab 3.1.1 passes the right answer and names each wrong one that people really give."""

import math

import torch
from helpers import accepts, refuses
from torch import nn
from torch.nn import functional as F

from spark_ft.lab.checks import lab_3_1_1 as checks
from spark_ft.methods.lora import LoRALinear


def draw(*shape):
    return torch.empty(*shape).uniform_(-1, 1) / math.sqrt(shape[-1])


def test_init():
    accepts(
        checks.check_init_adapter,
        lambda i, o, r: (draw(r, i), torch.zeros(o, r)),
        lambda i, o, r: (torch.randn(r, i) / math.sqrt(i), torch.zeros(o, r)),
    )
    refuses(
        checks.check_init_adapter,
        ("A and B are swapped; A", lambda i, o, r: (torch.zeros(o, r), draw(r, i))),
        ("A is zero and B is random: A and B are swapped", lambda i, o, r: (torch.zeros(r, i), draw(o, r))),
        ("both zero", lambda i, o, r: (torch.zeros(r, i), torch.zeros(o, r))),
        ("both random", lambda i, o, r: (draw(r, i), draw(o, r))),
        (r"should be \(4, 64\) and \(48, 4\)", lambda i, o, r: (draw(i, r), torch.zeros(r, o))),
        ("A's entries spread by", lambda i, o, r: (torch.randn(r, i), torch.zeros(o, r))),
        ("A's entries spread by", lambda i, o, r: (draw(r, i) * 0.01, torch.zeros(o, r))),
        ("same at every call", lambda i, o, r: (torch.manual_seed(0) and draw(r, i), torch.zeros(o, r))),
        ("two tensors", lambda i, o, r: draw(r, i)),
        ("two tensors", lambda i, o, r: None),
    )


def test_update():
    accepts(
        checks.check_lora_update,
        lambda x, A, B, alpha: alpha / len(A) * (x @ A.T) @ B.T,
        lambda x, A, B, alpha: F.linear(x, alpha / A.shape[0] * B @ A),
    )
    refuses(
        checks.check_lora_update,
        ("scaled by alpha, not alpha / rank", lambda x, A, B, alpha: alpha * x @ A.T @ B.T),
        ("not scaled", lambda x, A, B, alpha: x @ A.T @ B.T),
        ("rsLoRA", lambda x, A, B, alpha: alpha / math.sqrt(len(A)) * x @ A.T @ B.T),
        ("twice", lambda x, A, B, alpha: (alpha / len(A)) ** 2 * x @ A.T @ B.T),
        ("upside down", lambda x, A, B, alpha: len(A) / alpha * x @ A.T @ B.T),
        ("off by up to|divided by the width", lambda x, A, B, alpha: alpha / B.shape[0] * x @ A.T @ B.T),
        ("divided by the width", lambda x, A, B, alpha: alpha / x.shape[-1] * x @ A.T @ B.T),
        ("transposes are missing", lambda x, A, B, alpha: alpha / len(A) * x @ A @ B),
        ("A and B are swapped", lambda x, A, B, alpha: alpha / len(A) * x @ (A @ B).T),
        ("B comes before A", lambda x, A, B, alpha: alpha / len(A) * x @ B @ A),
        ("A is transposed, B is not", lambda x, A, B, alpha: alpha / len(A) * x @ A.T @ B),
        ("B is transposed, A is not", lambda x, A, B, alpha: alpha / len(A) * x @ A @ B.T),
        ("off by up to", lambda x, A, B, alpha: x + alpha / len(A) * x @ A.T @ B.T),
        ("PyTorch says.*x Aᵀ Bᵀ", lambda x, A, B, alpha: x.expand(3, 5, 9) @ A.T @ B.T),
        ("is a return missing", lambda x, A, B, alpha: None),
    )


def test_parameters():
    accepts(checks.check_lora_parameters, lambda shapes, r: sum(r * (o + i) for o, i in shapes))
    refuses(
        checks.check_lora_parameters,
        ("rank whole matrices", lambda shapes, r: sum(r * o * i for o, i in shapes)),
        ("full matrices", lambda shapes, r: sum(o * i for o, i in shapes)),
        ("rank × rank is not an adapter", lambda shapes, r: sum(r * r for _ in shapes)),
        ("2 · rank · in holds for square", lambda shapes, r: sum(2 * r * i for _, i in shapes)),
        ("2 · rank · out holds for square", lambda shapes, r: sum(2 * r * o for o, _ in shapes)),
        ("only A", lambda shapes, r: sum(r * i for _, i in shapes)),
        ("only B", lambda shapes, r: sum(r * o for o, _ in shapes)),
        ("times the rank", lambda shapes, r: sum(o + i for o, i in shapes)),
        ("only one matrix", lambda shapes, r: r * sum(shapes[0]) if shapes else 0),
        ("returned None", lambda shapes, r: sum(r * (o + i) for o, i in shapes) or None),
        ("but should be", lambda shapes, r: sum(r * (o + i) + o for o, i in shapes)),
        ("but should be", lambda shapes, r: str(sum(r * (o + i) for o, i in shapes))),
    )


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

    def low(self, x):
        return self.scaling * x @ self.lora_A.T @ self.lora_B.T

    def forward(self, x):
        return self.base(x) + self.low(self.drop(x))


def changed(**methods):
    return type("Mutant", (Right,), methods)


def starting_with(parts):
    """A layer whose A and B are made anew by `parts(A, B)`."""

    def init(self, base, rank, alpha, dropout=0.0):
        Right.__init__(self, base, rank, alpha, dropout)
        self.lora_A, self.lora_B = map(nn.Parameter, parts(self.lora_A.detach(), self.lora_B.detach()))

    return changed(__init__=init)


class PlainTensors(Right):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        A = self.lora_A.detach()
        del self.lora_A
        self.lora_A = A


def test_layer():
    accepts(checks.check_lora_linear, Right, LoRALinear)
    refuses(
        checks.check_lora_linear,
        ("scaled by alpha, not alpha / rank", changed(scale=lambda s, alpha, rank: alpha)),
        ("not scaled", changed(scale=lambda s, alpha, rank: 1.0)),
        ("√rank", changed(scale=lambda s, alpha, rank: alpha / math.sqrt(rank))),
        ("swapped: A is", starting_with(lambda A, B: (draw(*B.shape), 0 * A))),
        ("lora_A is zero and lora_B is random: they are swapped", starting_with(lambda A, B: (B, A))),
        ("both zero", starting_with(lambda A, B: (0 * A, B))),
        ("does not start at zero", starting_with(lambda A, B: (A, draw(*B.shape)))),
        (r"should be \(", starting_with(lambda A, B: (A.T, B.T))),
        ("only sees an nn.Parameter", PlainTensors),
        ("base.bias, base.weight still trains", changed(freeze=lambda s: None)),
        ("base.bias still trains", changed(freeze=lambda s: s.base.weight.requires_grad_(False))),
        ("dropout acts on the base", changed(forward=lambda s, x: Right.forward(s, F.dropout(x, s.p)))),
        ("active in eval mode", changed(drop=lambda s, x: F.dropout(x, s.p))),
        ("does nothing in training", changed(drop=lambda s, x: x)),
        ("0[.][45]. of itself", changed(drop=lambda s, x: x * F.dropout(x, s.p, s.training).ne(0))),
        ("on the update's output", changed(forward=lambda s, x: s.base(x) + s.drop(s.low(x)))),
        (
            "between A and B",
            changed(forward=lambda s, x: s.base(x) + s.scaling * s.drop(x @ s.lora_A.T) @ s.lora_B.T),
        ),
        ("base's output is missing", changed(forward=lambda s, x: s.low(x))),
        ("the update is missing", changed(forward=lambda s, x: s.base(x))),
        (
            "the bias is lost",
            changed(forward=lambda s, x: x @ (s.base.weight + s.scaling * s.lora_B @ s.lora_A).T),
        ),
        ("carries no gradient", changed(forward=lambda s, x: s.base(x) + s.low(x).detach())),
        ("lora_A gets no grad", changed(low=lambda s, x: s.scaling * x @ s.lora_A.detach().T @ s.lora_B.T)),
        ("off by|PyTorch says", changed(forward=lambda s, x: s.base(x) + x @ s.lora_A @ s.lora_B)),
        ("off by|PyTorch says", changed(forward=lambda s, x: s.base(x) + x @ s.lora_B @ s.lora_A)),
    )


def right(layer):
    return layer.scaling * layer.lora_B @ layer.lora_A


def adding(update, flag=True, guard=True):
    @torch.no_grad()
    def merge(layer):
        if not (guard and layer.merged):
            layer.base.weight += update(layer)
            layer.merged = layer.merged or flag

    return merge


def taking(update, flag=False, guard=True):
    @torch.no_grad()
    def unmerge(layer):
        if layer.merged or not guard:
            layer.base.weight -= update(layer)
            layer.merged = flag

    return unmerge


merge, unmerge = adding(right), taking(right)


def with_a_graph(layer):
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


def test_merge():
    accepts(checks.check_merge, (merge, unmerge))
    refuses(
        checks.check_merge,
        ("added twice", adding(right, guard=False)),
        ("counts twice", adding(right, flag=False)),
        ("alpha / rank is missing", adding(lambda layer: layer.lora_B @ layer.lora_A)),
        ("subtracted, not added", adding(lambda layer: -right(layer))),
        ("A B instead of B A", adding(lambda layer: layer.scaling * layer.lora_A @ layer.lora_B)),
        ("transposed", adding(lambda layer: right(layer).T)),
        ("the update alone", adding(lambda layer: right(layer) - layer.base.weight)),
        ("nothing was added", lambda layer: None),
        ("inside torch.no_grad", with_a_graph),
        ("inside torch.no_grad", a_new_parameter),
        ("lora_B after merge", forgets_the_update),
        answers=lambda merge: (merge, unmerge),
    )
    refuses(
        checks.check_merge,
        ("subtracted twice", taking(right, guard=False)),
        ("merged should be False", taking(right, flag=True)),
        ("added the update again", taking(lambda layer: -right(layer))),
        ("alpha / rank is missing in unmerge", taking(lambda layer: layer.lora_B @ layer.lora_A)),
        ("unmerge did nothing", lambda layer: None),
        answers=lambda unmerge: (merge, unmerge),
    )


def test_parity():
    accepts(checks.check_parity, (Right, merge), (LoRALinear, LoRALinear.merge))
    refuses(
        checks.check_parity,
        ("output: yours and PEFT's differ", (changed(scale=lambda s, alpha, rank: alpha), merge)),
        ("merged weight: yours", (Right, adding(lambda layer: layer.lora_B @ layer.lora_A))),
    )
