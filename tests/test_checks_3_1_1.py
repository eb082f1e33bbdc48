"""Every check of lab 3.1.1 passes the right answer and names each wrong one that people really give."""

import math

import torch
from helpers import accepts, mutant, refuses
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
        ("raised.*x Aᵀ Bᵀ", lambda x, A, B, alpha: x.expand(3, 5, 9) @ A.T @ B.T),
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
        self.base, self.merged = base.requires_grad_(False), False
        self.lora_A = nn.Parameter(draw(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank))
        self.scaling, self.drop = alpha / rank, nn.Dropout(dropout)

    def forward(self, x):
        return self.base(x) + self.scaling * self.drop(x) @ self.lora_A.T @ self.lora_B.T


def test_layer():
    accepts(checks.check_lora_linear, Right, LoRALinear)
    A, B = "draw(rank, base.in_features)", "torch.zeros(base.out_features, rank)"
    A_is, frozen = "self.lora_A = nn.Parameter", "base.requires_grad_(False)"
    update = "self.scaling * self.drop(x) @ self.lora_A.T @ self.lora_B.T"
    refuses(
        checks.check_lora_linear,
        ("scaled by alpha, not alpha / rank", "alpha / rank", "alpha"),
        ("not scaled", "alpha / rank", "1.0"),
        ("√rank", "alpha / rank", "alpha / math.sqrt(rank)"),
        ("swapped: A is", B, "torch.zeros(rank, base.in_features)", A, "draw(base.out_features, rank)"),
        ("lora_A is zero and lora_B is random: they are swapped", B, A, f"{A_is}({A})", f"{A_is}({B})"),
        ("both zero", A, "torch.zeros(rank, base.in_features)"),
        ("does not start at zero", B, "draw(base.out_features, rank)"),
        (r"should be \(", A, f"{A}.T", B, f"{B}.T"),
        ("only sees an nn.Parameter", f"{A_is}({A})", f"self.lora_A = {A}"),
        ("base.bias, base.weight still trains", frozen, "base"),
        ("base.bias still trains", frozen, "(base.weight.requires_grad_(False), base)[1]"),
        ("dropout acts on the base", "self.base(x)", "self.base(self.drop(x))"),
        ("active in eval mode", "self.drop(x)", "F.dropout(x, self.drop.p)"),
        ("does nothing in training", "self.drop(x)", "x"),
        ("0[.][45]. of itself", "self.drop(x)", "(x * self.drop(x).ne(0))"),
        ("on the update's output", update, f"self.drop({update.replace('self.drop(x)', 'x')})"),
        ("between A and B", "self.drop(x) @ self.lora_A.T", "self.drop(x @ self.lora_A.T)"),
        ("base's output is missing", "self.base(x) + ", ""),
        ("the update is missing", f" + {update}", ""),
        ("the bias is lost", "self.base(x)", "F.linear(x, self.base.weight)"),
        ("carries no gradient", update, f"({update}).detach()"),
        ("lora_A gets no grad", "self.lora_A.T", "self.lora_A.detach().T"),
        ("off by|raised", update, "x @ self.lora_A @ self.lora_B"),
        ("off by|raised", update, "x @ self.lora_B @ self.lora_A"),
        right=Right,
    )


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


def test_merge():
    update = "layer.scaling * layer.lora_B @ layer.lora_A"
    accepts(checks.check_merge, (merge, unmerge))
    refuses(
        checks.check_merge,
        ("added twice", "if not layer.merged", "if True"),
        ("counts twice", "layer.merged = True", "pass"),
        ("alpha / rank is missing", "layer.scaling * ", ""),
        ("subtracted, not added", "+=", "-="),
        ("A B instead of B A", "layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B"),
        ("transposed", update, f"({update}).T"),
        ("the update alone", "+= ", "+= -layer.base.weight + "),
        ("nothing was added", "+= ", "+= 0 * "),
        ("inside torch.no_grad", "@torch.no_grad()", ""),
        ("inside torch.no_grad", f"+= {update}", f"= nn.Parameter(layer.base.weight + {update})"),
        ("lora_B after merge", "layer.merged = True", "layer.merged = layer.lora_B.zero_() is not None"),
        answers=lambda merge: (merge, unmerge),
        right=merge,
    )
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


def test_parity():
    accepts(checks.check_parity, (Right, merge), (LoRALinear, LoRALinear.merge))
    refuses(
        checks.check_parity,
        ("output: yours and PEFT's differ", (mutant(Right, "alpha / rank", "alpha"), merge)),
        ("merged weight: yours", (Right, mutant(merge, "layer.scaling * ", ""))),
    )
