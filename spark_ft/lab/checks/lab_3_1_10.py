"""Checks of lab 3.1.10: merging one tensor at a time, rows in pairs, a stream, a Modelfile, averaging."""

import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from spark_ft.lab.checks import call, check, require, require_close, require_pair

# ── Exercise 1: merge, tensor by tensor ─────────────────────────────────────────────────────────────────────


class _Disk(Mapping):
    """Named tensors that are copied on each look-up, as from disk, and that remember what was read when."""

    def __init__(self, tensors: dict[str, Tensor]):
        self.tensors, self.read = tensors, []

    def __getitem__(self, name: str) -> Tensor:
        self.read.append(name)
        return self.tensors[name].clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors  # Mapping's own would read the tensor


def _base(dtype: torch.dtype) -> dict[str, Tensor]:
    shapes = {
        "model.embed_tokens.weight": (12, 6),
        "model.layers.0.self_attn.q_proj.weight": (8, 6),
        "model.layers.0.self_attn.q_proj.bias": (8,),
        "model.layers.0.self_attn.v_proj.weight": (4, 6),
        "model.layers.10.self_attn.v_proj.weight": (4, 6),
        "model.layers.1.mlp.down_proj.weight": (6, 10),
        "model.layers.1.input_layernorm.weight": (6,),
        "model.norm.weight": (6,),
    }
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def _notes(base: Mapping[str, Tensor], layers: Iterable[str], rank: int) -> dict[str, Tensor]:
    notes = {}
    for layer in layers:
        out, into = base[f"{layer}.weight"].shape
        notes[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(rank, into)
        notes[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(out, rank)
    return notes


@check
def check_merged(answer: Callable[..., Iterable]) -> str:
    """Every tensor once, W + scaling · B A where there is a note, one tensor in memory at a time."""
    noted = (
        ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
        ("model.layers.0.self_attn.v_proj", "model.layers.10.self_attn.v_proj"),
        (),
    )
    for layers, rank, scaling in zip(noted, (3, 2, 1), (1.7, 0.4, 2.0), strict=True):
        base = _base(torch.float32)
        adapter, disk = _notes(base, layers, rank), _Disk(base)
        what = f"merged(…) with notes on {len(layers)} layers"
        given = call(answer, what, disk, adapter, scaling, may_change=[disk])
        _require_lazy(given, disk, what)
        _require_tensors(_collected(given, what), base, adapter, layers, scaling, what)
        _require_once(disk, what)
    base = _base(torch.bfloat16)
    layers = noted[0]
    adapter, disk = _notes(base, layers, 2), _Disk(base)
    what = "merged(…) with weights in bf16 and notes in fp32"
    found = _collected(call(answer, what, disk, adapter, 0.5), what)
    for layer in layers:
        W, A, B = (x.float() for x in (base[f"{layer}.weight"], *_ab(adapter, layer)))
        require_close(found[f"{layer}.weight"], W + 0.5 * B @ A, f"{layer} in bf16", tolerance=2e-2)
    return "every tensor once and one at a time, with W + scaling · B A where a note lies; bf16 too"


def _ab(adapter: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    return tuple(adapter[f"base_model.model.{layer}.lora_{end}.weight"] for end in "AB")


def _require_lazy(given: Any, disk: _Disk, what: str) -> None:
    require(given is not None, f"{what} is None: yield (name, tensor) in the loop")
    eager = f"{what}: all tensors are read before the first is handed on; write yield inside of the loop"
    require(not isinstance(given, dict | list | tuple), eager)
    require(
        inspect.isgenerator(given) or isinstance(given, Iterator),
        f"{what} is {type(given).__name__}; yield (name, tensor) in the loop",
    )
    require(len(disk.read) <= 1, eager)


def _collected(given: Iterator, what: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for item in _safely(given, what):
        pair = isinstance(item, tuple | list) and len(item) == 2
        require(
            pair and isinstance(item[0], str) and isinstance(item[1], Tensor),
            f"{what} yields {_kinds(item)}; yield (name, tensor), in this order",
        )
        require(item[0] not in found, f"{what} yields {item[0]} twice")
        found[item[0]] = item[1].clone()
    return found


def _kinds(item: Any) -> str:
    if isinstance(item, tuple | list):
        return f"({', '.join(type(part).__name__ for part in item)})"
    return f"a {type(item).__name__}"


def _safely(given: Iterator, what: str) -> Iterator:
    """What a generator yields; an exception in its body is told like any other of the answer's."""
    done = object()
    while (item := call(next, f"the next item of {what}", given, done)) is not done:
        yield item


def _require_tensors(found, base, adapter, layers, scaling, what) -> None:
    missing = [name for name in base if name not in found]
    only = set(found) == {f"{layer}.weight" for layer in layers}
    require(
        not (missing and only and layers),
        f"{what} yields merged tensors alone; a file needs every tensor, those without a note too",
    )
    extra = [name for name in found if name not in base]
    if extra:
        named = (
            "keep the base's own names" if "base_model" in extra[0] or ".lora_" in extra[0] else "whole names"
        )
        short = extra[0] in {name.removesuffix(".weight") for name in base}
        raise_ = "yield the whole name, with its .weight" if short else named
        require(False, f"{what} yields {extra[0]}, which is no tensor of the base; {raise_}")
    require(not missing, f"{what} leaves out {missing[:1]}; yield every tensor, those without a note too")
    for name, W in base.items():
        layer = name.removesuffix(".weight")
        if layer not in layers or name.endswith(".bias"):
            require_close(found[name], W, f"{name}, without a note", {
                "it is scaled": scaling * W,
                "it is all zeros; yield W as it is": torch.zeros_like(W),
            })  # fmt: skip
            continue
        A, B = _ab(adapter, layer)
        BA, r = B @ A, len(A)
        require_close(found[name], W + scaling * BA, f"{name} with a note", {
            "the update is missing: is the note's name right?": W,
            "that is the update alone; add it to W": scaling * BA,
            "scaling is missing": W + BA,
            "it is divided by scaling; multiply": W + BA / scaling,
            "the update is subtracted": W - scaling * BA,
            "W is scaled too; only B A is": scaling * (W + BA),
            "scaling is applied twice": W + scaling**2 * BA,
            "it is divided by the rank; scaling is α/r already": W + scaling / r * BA,
            "it is multiplied by the rank; scaling is α/r already": W + scaling * r * BA,
            "the update is added twice": W + 2 * scaling * BA,
            "W is multiplied by the update; add it": W * (scaling * BA),
        })  # fmt: skip


def _require_once(disk: _Disk, what: str) -> None:
    twice = [name for name in disk.read if disk.read.count(name) > 1]
    require(
        not twice,
        f"{what} reads {twice[:1]} from disk more than once; keep it in a variable",
    )


# ── Exercise 2: queries and keys, in pairs ──────────────────────────────────────────────────────────────────


@check
def check_in_pairs(answer: Callable[[Tensor, int], Tensor]) -> str:
    """Row i of each head's first half, then row i of its second half, and so on."""
    for heads, size, into in ((3, 4, 5), (1, 6, 3), (9, 64, 8), (2, 2, 1)):
        W = torch.randn(heads * size, into)
        what = f"in_pairs of {heads} heads with {size} rows each"
        out = call(answer, what, W, heads, mends={"view": "take reshape: a transposed tensor has no view"})
        require_close(out, W[_dealt(heads, size)], what, _pairing(W, heads, size))
    W = torch.randn(2 * 8, 4).bfloat16()
    out = call(answer, "in_pairs in bf16", W, 2)
    require_close(out, W[_dealt(2, 8)], "in_pairs in bf16", tolerance=0, dtype=torch.bfloat16)
    return "the halves of each head dealt one by one, for 1, 2, 3 and 9 heads; in bf16 too"


def _dealt(heads: int, size: int) -> list[int]:
    """Where each new row comes from."""
    half = size // 2
    return [head * size + side * half + i for head in range(heads) for i in range(half) for side in (0, 1)]


def _pairing(W: Tensor, heads: int, size: int) -> dict[str, Tensor]:
    half = size // 2
    undone = [head * size + 2 * i + side for head in range(heads) for side in (0, 1) for i in range(half)]
    other = [head * size + side * half + i for head in range(heads) for i in range(half) for side in (1, 0)]
    swapped = [head * size + (i + half) % size for head in range(heads) for i in range(size)]
    by_head = W.reshape(heads, size, -1).transpose(0, 1).reshape(W.shape)
    sides = W.reshape(heads, 2, half, -1).transpose(0, 1).reshape(W.shape)
    whole = W[_dealt(1, heads * size)]
    columns = W.reshape(len(W), -1).T.reshape(W.shape) if W.shape[0] != 1 else W
    return {
        "the rows are as they were; is the swapped tensor used?": W,
        "that is the way back, from pairs to halves; reshape to (heads, 2, half, in) first": W[undone],
        "in each pair the second half comes first": W[other],
        "the halves changed places as wholes; deal them row by row": W[swapped],
        "all heads are dealt as one; each head by itself": whole,
        "the heads are mixed with the rows": by_head,
        "the heads are mixed with the halves; swap dimensions 1 and 2, not 0 and 1": sides,
        "rows and columns are mixed": columns,
    }


# ── Exercise 3: a stream ────────────────────────────────────────────────────────────────────────────────────


def _line(delta: dict, **more) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": delta}], **more}).encode() + b"\n"


def _stream(texts: Iterable[str]) -> list[bytes]:
    """A streamed answer as servers send it: a role first, comments and empty lines between, an end."""
    lines = [_line({"role": "assistant", "content": None}), b"\n", b": keep-alive\n", b"event: message\n"]
    for text in texts:
        lines += [_line({"content": text}), b"\n"]
    return [*lines, _line({}, usage={"total_tokens": 7}), b"\n", b"data: [DONE]\n", b"\n"]


@check
def check_pieces(answer: Callable[[Iterable[bytes]], Iterable[str]]) -> str:
    """The text of every line that has some, as soon as it is there, and nothing else."""
    for texts in (
        ["Two", " green", " curries", "."],
        ['{"table": 4,', ' "dish": "crème brûlée"}', " data: [DONE]", "\n"],
        ["  ", "0", "data: "],
        [],
    ):
        what = f"pieces of {len(texts)} texts"
        given = call(answer, what, iter(_stream(texts)))
        require(given is not None, f"{what} is None: yield each piece")
        late = f"{what} is {type(given).__name__}: the text comes only at the end; yield each piece"
        require(not isinstance(given, str | list | tuple), late)
        require(isinstance(given, Iterator), f"{what} is {type(given).__name__}; yield each piece")
        _require_pieces(list(_safely(given, what)), texts, what)
    _require_at_once(answer)
    after = [_line({"content": "a"}), b"data: [DONE]\n", _line({"content": "b"})]
    found = list(_safely(call(answer, "pieces", iter(after)), "pieces"))
    require(found == ["a"], "after data: [DONE] the stream is over; return there")
    return "every piece as soon as it is there, and no role, comment, empty line or end as text"


def _require_pieces(found: list, texts: list[str], what: str) -> None:
    odd = [piece for piece in found if not isinstance(piece, str)]
    require(
        not odd,
        f"{what} yields {type((odd or [0])[0]).__name__}; yield a delta's content, and only if there is some",
    )
    require("" not in found, f"{what} yields empty texts; leave them out")
    if found == texts:
        return
    require("".join(found) != "".join(texts), f"{what}: the text is right, but not cut as it came")
    require(
        [text.strip() for text in texts] != found, f"{what}: blanks are lost; strip the line, not the text"
    )
    kept = [text for text in texts if text.strip()]
    require(found != kept, f"{what}: pieces that are blank are lost; they are part of the text")
    require(
        not texts or len(found) >= len(texts),
        f"{what}: {len(found)} came; is one lost, or the end too early?",
    )
    raise_ = next((a for a, b in zip(found, [*texts, None], strict=False) if a != b), "")
    require(False, f"{what}: {raise_!r:.60} is not what was sent")


def _require_at_once(answer: Callable) -> None:
    read = []

    def slowly() -> Iterator[bytes]:
        for number, line in enumerate(_stream(["a", "b", "c"])):
            read.append(number)
            yield line

    given = call(answer, "pieces", slowly())
    first = next(_safely(given, "pieces"), None)
    require(
        first == "a" and len(read) <= 5,
        f"{len(read)} lines are read before the first piece comes; yield it inside of the loop",
    )


# ── Exercise 4: a Modelfile ─────────────────────────────────────────────────────────────────────────────────

_INSTRUCTION = re.compile(r'([A-Za-z]+)[ \t]+("""(?:.|\n)*?"""|[^\n]*)(?:\n|$)')


@check
def check_modelfile(answer: Callable[..., str]) -> str:
    """FROM, TEMPLATE, SYSTEM and PARAMETER, read as Ollama reads them."""
    template = "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n"
    for file, system, stops in (
        ("kitchen.gguf", "You take orders.\nBe short.", ["<|end|>"]),
        ("model-q4_0.gguf", None, ["<|im_end|>", 'a "quoted" stop', "line\nbreak"]),
        ("a.gguf", "", []),
    ):
        what = f"the Modelfile for {file}"
        text = call(answer, what, file, template, system, stops)
        require(text is not None, f"{what} is None; is a return missing?")
        require(
            isinstance(text, str),
            f'{what} is {type(text).__name__}, not one text; join the lines with "\\n"',
        )
        _require_instructions(_parsed(text, what), text, file, template, system, stops, what)
    return "FROM, TEMPLATE, SYSTEM and PARAMETER for three files; quotes and line breaks in stops"


def _parsed(text: str, what: str) -> list[tuple[str, str]]:
    """(instruction, value) in order; values in three quotes without them."""
    found, place, text = [], 0, text.strip("\n") + "\n"
    while place < len(text):
        if text[place] == "\n":
            place += 1
            continue
        match = _INSTRUCTION.match(text, place)
        line = text[place:].split("\n")[0]
        mend = 'texts with line breaks stand in """, and stops in JSON\'s quotes'
        require(match, f"{what}: Ollama cannot read the line {line!r:.60}; {mend}")
        name, value = match[1].upper(), match[2].strip()
        known = name in ("FROM", "TEMPLATE", "SYSTEM", "PARAMETER")
        require(known, f"{what}: Ollama knows no instruction {match[1]!r:.30}; {mend}")
        found.append((name, value[3:-3] if value.startswith('"""') and len(value) >= 6 else value))
        place = match.end()
    return found


def _require_instructions(found, text, file, template, system, stops, what) -> None:
    def of(name: str) -> list[str]:
        return [value for each, value in found if each == name]

    for name, count in (("FROM", 1), ("TEMPLATE", 1), ("SYSTEM", int(system is not None))):
        require(len(of(name)) >= count, f"{what}: {name} is missing")
        if name == "SYSTEM" and not count and of(name):
            require(
                False, f"{what}: system is None, so there is no SYSTEM line; {of(name)[0]!r:.30} stands there"
            )
        require(len(of(name)) == count, f"{what}: {name} stands there {len(of(name))} times")
    require(
        of("FROM")[0].strip('"') == f"./{file}",
        f"{what}: FROM {of('FROM')[0]}; with ./{file} Ollama takes the file beside it",
    )
    for name, right in (("TEMPLATE", template), ("SYSTEM", system)):
        if right is None or of(name)[0] == right:
            continue
        require(
            of(name)[0].strip() != right.strip(),
            f"{what}: {name} has other blanks or line breaks at its ends; the model sees them",
        )
        require(False, f"{what}: {name} is {of(name)[0]!r:.40}, not the text that came in")
    parameters = [value.split(None, 1) for value in of("PARAMETER")]
    require(all(len(each) == 2 for each in parameters), f"{what}: PARAMETER needs a name and a value")
    for name, value in (("temperature", "0"), ("num_ctx", "4096")):
        given = [each[1] for each in parameters if each[0] == name]
        require(given, f"{what}: PARAMETER {name} is missing")
        require(given in ([value], [f"{value}.0"]), f"{what}: PARAMETER {name} is {given}, not {value}")
    given = [each[1] for each in parameters if each[0] == "stop"]
    right = [json.dumps(stop) for stop in stops]
    also = [json.dumps(stop, ensure_ascii=False) for stop in stops]
    if given in (right, also):
        return
    require(
        len(given) == len(stops), f"{what}: {len(given)} stop lines for {len(stops)} stops; one line for each"
    )
    plain = [f'"{stop}"' for stop in stops]
    require(
        given != plain and given != stops,
        f'{what}: a stop with " in it ends too early; json.dumps escapes it',
    )
    require(sorted(given) != sorted(right), f"{what}: the stops stand in another order")
    require(False, f"{what}: stop {given[0]:.40} is not {right[0]:.40}; json.dumps makes that of it")


# ── Exercise 5: averaging ───────────────────────────────────────────────────────────────────────────────────


@check
def check_average(answer: Callable[[list], tuple[Tensor, Tensor]]) -> str:
    """One pair whose product is the mean of the products."""
    for ranks, into, out in (((2, 2, 2), 7, 5), ((1, 4), 6, 6), ((3,), 4, 9), ((2, 3, 1, 2), 5, 8)):
        As, Bs = [torch.randn(r, into) for r in ranks], [torch.randn(out, r) for r in ranks]
        what = f"average of ranks {', '.join(map(str, ranks))}"
        mend = "ranks may differ, so they cannot be added; put them beside one another with torch.cat"
        given = call(
            answer, what, list(zip(As, Bs, strict=True)), mends={"stack": mend, "size of tensor": mend}
        )
        A, B = require_pair(given, f"{what} should be two tensors, (A, B)")
        n, products = len(ranks), torch.stack([b @ a for a, b in zip(As, Bs, strict=True)])
        require(
            A.ndim == B.ndim == 2 and A.shape[1] == into and B.shape[0] == out and len(A) == B.shape[1],
            f"{what}: A {tuple(A.shape)} and B {tuple(B.shape)}; A is (rank, {into}), B ({out}, rank)",
        )
        mistakes = {
            "that is the sum; divide by the number of adapters": products.sum(0),
            "it is divided by the number of adapters twice; divide A or B": products.sum(0) / n**2,
            "that is the first adapter alone": products[0],
            "that is the last adapter alone": products[-1],
            "it is divided by the whole rank; divide by the number of adapters": products.sum(0) / sum(ranks),
            "it is divided by √n": products.sum(0) / n**0.5,
        }
        if len(set(ranks)) == 1:
            apart = torch.stack(Bs).mean(0) @ torch.stack(As).mean(0)
            mistakes["the As and the Bs are averaged apart; their product is not the mean"] = apart
        mixed = (torch.cat(Bs[::-1], 1) @ torch.cat(As)) / n if len(set(ranks)) == 1 else products.sum(0)
        mistakes["As and Bs stand in different orders"] = mixed
        require_close(B.double() @ A.double(), products.double().mean(0), f"B A of {what}", mistakes)
        require(
            len(A) <= sum(ranks),
            f"{what}: rank {len(A)} is more than the {sum(ranks)} that all notes have together",
        )
    return "B A is the mean of the products, for one to four adapters of equal and of other ranks"
