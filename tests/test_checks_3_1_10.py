"""Every check of lab 3.1.10 accepts right answers, and names what is wrong in wrong ones."""

import json

import numpy as np
import pytest
import torch
from helpers import accepts, refuses

from spark_ft.lab.checks import lab_3_1_10 as checks

# ── Exercise 1 ──────────────────────────────────────────────────────────────────────────────────────────────


def merged(weights, adapter, scaling):
    for name in weights:
        W = weights[name]
        layer = "base_model.model." + name.removesuffix(".weight")
        A = adapter.get(f"{layer}.lora_A.weight")
        B = adapter.get(f"{layer}.lora_B.weight")
        if A is not None:
            W = W + scaling * (B @ A)
        yield name, W


def merged_by_items(weights, adapter, scaling):
    for name, W in weights.items():
        key = f"base_model.model.{name[: -len('.weight')]}.lora_%s.weight"
        if name.endswith(".weight") and key % "A" in adapter:
            update = torch.zeros(W.shape).addmm_(adapter[key % "B"], adapter[key % "A"], alpha=scaling)
            W = (W.float() + update).to(W.dtype)
        yield name, W


def merged_in_place(weights, adapter, scaling):
    layers = {key.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for key in adapter}
    for name in weights:
        W = weights[name]
        layer = name.removesuffix(".weight")
        if layer in layers and not name.endswith(".bias"):
            A, B = (adapter[f"base_model.model.{layer}.lora_{end}.weight"] for end in "AB")
            W += (scaling * B @ A).to(W.dtype)
        yield name, W


def merged_as_generator_expression(weights, adapter, scaling):
    def one(name, W):
        key = "base_model.model." + name.replace(".weight", "")
        if f"{key}.lora_A.weight" not in adapter:
            return W
        return W.float() + scaling * adapter[f"{key}.lora_B.weight"] @ adapter[f"{key}.lora_A.weight"]

    return ((name, one(name, weights[name])) for name in weights)


def merged_as_map(weights, adapter, scaling):
    return map(lambda name: next(merged({name: weights[name]}, adapter, scaling)), weights)  # noqa: C417


def merged_by_matching_ends(weights, adapter, scaling):
    """Finds a note by the end of its name: layers.1 is in layers.10 too, so whole names are compared."""
    for name in weights:
        W = weights[name]
        for key in adapter:
            if key.endswith(".lora_A.weight") and key[17:-14] == name.removesuffix(".weight"):
                W = W + scaling * (adapter[key.replace("lora_A", "lora_B")] @ adapter[key])
        yield name, W


def forgets_bias(weights, adapter, scaling):
    for name, W in merged(weights, adapter, scaling):
        if not name.endswith("bias"):
            yield name, W


def matches_too_much(weights, adapter, scaling):
    for name in weights:
        W = weights[name]
        for key in adapter:
            if "lora_A" in key and key.split(".lora_A")[0].split("layers.")[-1][:1] in name and W.dim() == 2:
                B = adapter[key.replace("lora_A", "lora_B")]
                if (len(B), adapter[key].shape[1]) == tuple(W.shape):
                    W = W + scaling * (B @ adapter[key])
        yield name, W


MERGED = [
    merged, merged_by_items, merged_in_place, merged_as_generator_expression, merged_as_map,
    merged_by_matching_ends,
]  # fmt: skip
WRONG_MERGES = [
    ("scaling is missing", "scaling * (B @ A)", "B @ A"),
    ("divided by scaling", "scaling * (B @ A)", "(B @ A) / scaling"),
    ("subtracted", "W + scaling", "W - scaling"),
    ("update alone", "W + scaling", "scaling"),
    ("W is scaled too", "W + scaling * (B @ A)", "scaling * (W + B @ A)"),
    ("scaling is applied twice", "scaling * (B", "scaling * scaling * (B"),
    ("divided by the rank", "scaling * (B @ A)", "scaling / len(A) * (B @ A)"),
    ("multiplied by the rank", "scaling * (B @ A)", "scaling * len(A) * (B @ A)"),
    ("multiplied by the update", "W + scaling", "W * scaling"),
    ("twice", "W + scaling * (B @ A)", "W + 2 * scaling * (B @ A)"),
    ("cannot be multiplied|RuntimeError", "B @ A", "A @ B"),
    ("RuntimeError|off by", "B @ A", "(A.T @ B.T)"),
    ("name right", '"base_model.model." + ', '"" + '),
    ("name right", "base_model.model.", "base_model."),
    ("name right", '.removesuffix(".weight")', ""),
    ("TypeError", "lora_B.weight", "lora_b.weight"),
    ("without a note: it is scaled", "if A is not None:", "W = scaling * W if A is None else W\n"
     "        if A is not None:"),
    ("all zeros", "yield name, W", "yield name, W if A is not None else 0 * W"),
    ("alone; a file needs every", "yield name, W", "if A is not None: yield name, W"),
    ("which is no tensor of the base; keep", "yield name, W", "yield layer, W"),
    ("whole name", "yield name, W", 'yield name.removesuffix(".weight"), W'),
    (r"yields \(Tensor, str\)", "yield name, W", "yield W, name"),
    ("yields a Tensor", "yield name, W", "yield W"),
    ("yields a str", "yield name, W", "yield name"),
    ("twice", "yield name, W", "yield name, W\n        yield name, W"),
    ("None: yield", "yield name, W", "pass"),
    ("yield inside", "yield name, W", "return name, W"),
    ("reads .* more than once", "W = weights[name]", "W = weights[name]; weights[name]"),
    ("AttributeError", "name.removesuffix", "name.remove_suffix"),
    ("off by", "W = W + scaling * (B @ A)", "W = W + scaling * (B @ A).abs()"),
    ("leaves out .*", "yield name, W", "if W.dim() == 2: yield name, W"),
    ("yields .*str, ndarray", "yield name, W", "yield name, W.float().numpy()"),
]  # fmt: skip


def test_merged():
    accepts(checks.check_merged, *MERGED)
    refuses(checks.check_merged, *WRONG_MERGES, right=merged)
    refuses(
        checks.check_merged,
        ("before the first is handed on", lambda *a: list(merged(*a))),
        ("before the first is handed on", lambda *a: dict(merged(*a))),
        ("before the first is handed on", lambda w, a, s: iter([*merged(w, a, s)])),
        ("leaves out", forgets_bias),
        ("off by|without a note", matches_too_much),
        ("is int", lambda *a: 3),
    )


# ── Exercise 2 ──────────────────────────────────────────────────────────────────────────────────────────────


def in_pairs(W, heads):
    halves = W.reshape(heads, 2, -1, W.shape[-1])
    dealt = halves.transpose(1, 2)
    return dealt.reshape(W.shape)


def in_pairs_by_index(W, heads):
    size = len(W) // heads
    order = [
        h * size + side * size // 2 + i for h in range(heads) for i in range(size // 2) for side in (0, 1)
    ]
    return W[order]


def in_pairs_by_loop(W, heads):
    parts = []
    for head in W.chunk(heads):
        first, second = head.chunk(2)
        parts.append(torch.stack([first, second], dim=1).flatten(0, 1))
    return torch.cat(parts)


def in_pairs_by_slices(W, heads):
    out, size = torch.empty_like(W), len(W) // heads
    for head in range(heads):
        rows = W[head * size : (head + 1) * size]
        out[head * size : (head + 1) * size : 2] = rows[: size // 2]
        out[head * size + 1 : (head + 1) * size : 2] = rows[size // 2 :]
    return out


def in_pairs_by_permute(W, heads):
    return W.view(heads, 2, len(W) // heads // 2, -1).permute(0, 2, 1, 3).reshape(len(W), -1)


def in_pairs_written_back(W, heads):
    W.copy_(in_pairs(W.clone(), heads))
    return W


PAIRED = [in_pairs, in_pairs_by_index, in_pairs_by_loop, in_pairs_by_slices, in_pairs_by_permute]
WRONG_PAIRS = [
    ("as they were", "dealt.reshape", "halves.reshape"),
    ("way back", "heads, 2, -1", "heads, -1, 2"),
    ("second half comes first", "halves.transpose(1, 2)", "halves.flip(1).transpose(1, 2)"),
    ("as wholes", "halves.transpose(1, 2)", "halves.flip(1)"),
    ("heads are dealt as one", "heads, 2, -1", "1, 2, -1"),
    ("mixed|off by", "transpose(1, 2)", "transpose(0, 2)"),
    ("RuntimeError.*reshape: a transposed", "dealt.reshape", "dealt.view"),
    ("has shape", "dealt.reshape(W.shape)", "dealt"),
    ("has shape", "dealt.reshape(W.shape)", "dealt.flatten()"),
    ("is None", "return dealt", "dealt"),
    ("float32", "return dealt.reshape(W.shape)", "return dealt.reshape(W.shape).float()"),
    ("RuntimeError", "W.shape[-1])", "W.shape[0])"),
    ("mixed|off by", "transpose(1, 2)", "transpose(2, 3)"),
    ("not 0 and 1", "transpose(1, 2)", "transpose(0, 1)"),
]


def test_in_pairs():
    accepts(checks.check_in_pairs, *PAIRED)
    refuses(checks.check_in_pairs, *WRONG_PAIRS, right=in_pairs)
    refuses(
        checks.check_in_pairs,
        ("`W` was changed in place", in_pairs_written_back),
        ("is a list", lambda W, heads: list(in_pairs(W, heads))),
        ("off by|mixed", lambda W, heads: W[torch.randperm(len(W))]),
    )


# ── Exercise 3 ──────────────────────────────────────────────────────────────────────────────────────────────


def pieces(lines):
    for line in lines:
        if not line.startswith(b"data: "):
            continue
        data = line.removeprefix(b"data: ").strip()
        if data == b"[DONE]":
            return
        delta = json.loads(data)["choices"][0]["delta"]
        if delta.get("content"):
            yield delta["content"]


def pieces_of_text(lines):
    for line in map(bytes.decode, lines):
        if line[:6] != "data: ":
            continue
        if line[6:].strip() == "[DONE]":
            break
        for choice in json.loads(line[6:])["choices"]:
            if (piece := choice["delta"].get("content")) is not None and piece != "":
                yield piece


def pieces_inside(lines):
    def deltas():
        for line in lines:
            key, _, value = line.strip().partition(b": ")
            if key == b"data":
                if value == b"[DONE]":
                    return
                yield json.loads(value)["choices"][0]["delta"]

    return (delta["content"] for delta in deltas() if delta.get("content"))


PIECES = [pieces, pieces_of_text, pieces_inside]
WRONG_PIECES = [
    ("JSONDecodeError", 'if not line.startswith(b"data: "):', "if not line.strip():"),
    ("JSONDecodeError", 'if data == b"[DONE]":', "if not data:"),
    ("JSONDecodeError|stream is over", "return", "pass"),
    ("stream is over", "            return", "            continue"),
    ("NoneType", 'if delta.get("content"):', 'if "content" in delta:'),
    ("KeyError", 'if delta.get("content"):', "if True:"),
    ("KeyError", '["delta"]', '["message"]'),
    ("TypeError", '["choices"][0]', '["choices"]'),
    ("yields dict", 'yield delta["content"]', "yield delta"),
    ("JSONDecodeError", "json.loads(data)", "json.loads(line)"),
    ("blanks are lost", 'yield delta["content"]', 'yield delta["content"].strip()'),
    ("not cut as it came", 'yield delta["content"]', 'yield from delta["content"]'),
    ("TypeError", 'startswith(b"data: ")', 'startswith("data: ")'),
    ("end too early|stream is over|JSON", 'data == b"[DONE]"', 'b"[DONE]" in data'),
    ("at the end; yield", 'yield delta["content"]', 'return delta["content"]'),
    ("None: yield", 'yield delta["content"]', "print(end='')"),
    ("blank are lost", 'if delta.get("content"):', 'if (delta.get("content") or "").strip():'),
    ("what was sent|is lost|blanks", "yield delta", 'yield " " + delta'),
    ("is not what was sent", 'if delta.get("content"):', 'yield from [delta["role"]] if "role" in delta '
     'else []\n        if delta.get("content"):'),
]  # fmt: skip


def test_pieces():
    accepts(checks.check_pieces, *PIECES)
    refuses(checks.check_pieces, *WRONG_PIECES, right=pieces)
    refuses(
        checks.check_pieces,
        ("at the end; yield", lambda lines: "".join(pieces(lines))),
        ("at the end; yield", lambda lines: list(pieces(lines))),
        ("lines are read before the first", lambda lines: pieces(list(lines))),
        ("lines are read before the first", lambda lines: iter(list(pieces(lines)))),
        ("is lost|too early", lambda lines: (p for i, p in enumerate(pieces(lines)) if i)),
        ("empty texts", lambda lines: (p for piece in pieces(lines) for p in (piece, ""))),
    )


# ── Exercise 4 ──────────────────────────────────────────────────────────────────────────────────────────────


def modelfile(file, template, system, stops):
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""']
    if system is not None:
        lines.append(f'SYSTEM """{system}"""')
    lines += ["PARAMETER temperature 0", "PARAMETER num_ctx 4096"]
    for stop in stops:
        lines.append(f"PARAMETER stop {json.dumps(stop)}")
    return "\n".join(lines) + "\n"


def modelfile_as_text(file, template, system, stops):
    text = f'from ./{file}\n\ntemplate """{template}"""\nparameter num_ctx 4096\nPARAMETER temperature 0.0\n'
    for stop in stops:
        text += "PARAMETER stop " + json.dumps(stop, ensure_ascii=False) + "\n"
    return text if system is None else f'{text}SYSTEM """{system}"""'


WRONG_FILES = [
    (r"with \./", "FROM ./", "FROM "),
    (r"with \./", "FROM ./", "FROM /"),
    ("FROM is missing", 'f"FROM ./{file}", ', ""),
    ("TEMPLATE is missing", """f"FROM ./{file}", f'TEMPLATE \"""{template}\"""'""", 'f"FROM ./{file}"'),
    ("stand in \"{3}", 'TEMPLATE """{template}"""', "TEMPLATE {template}"),
    ("stand in \"{3}", 'TEMPLATE """{template}"""', 'TEMPLATE "{template}"'),
    ("TEMPLATE has other blanks", "{template}", "{template.strip()}"),
    ("TEMPLATE has other blanks", '"""{template}"""', '"""\\n{template}\\n"""'),
    ("TEMPLATE is .*not the text", "{template}", "{system}"),
    ("system is None, so", "if system is not None:", "if True:"),
    ("SYSTEM is missing", "if system is not None:", "if system:"),
    ("SYSTEM is missing", "if system is not None:", "if False:"),
    ("temperature is missing", '"PARAMETER temperature 0", ', ""),
    ("num_ctx is missing", ', "PARAMETER num_ctx 4096"', ""),
    ("temperature is .*not 0", "temperature 0", "temperature 0.8"),
    ("num_ctx is .*not 4096", "num_ctx 4096", "num_ctx 2048"),
    ("stop lines for|no instruction", "for stop in stops:", "for stop in stops[:1]:"),
    ("JSON|json", "{json.dumps(stop)}", "{stop}"),
    ("JSON|json", 'f"PARAMETER stop {json.dumps(stop)}"', "'PARAMETER stop \"' + stop + '\"'"),
    ("json.dumps", "{json.dumps(stop)}", "{stop!r}"),
    ("another order", "in stops:", "in stops[::-1]:"),
    ("json.dumps makes", "for stop in stops:", "for stop in [stops]:"),
    ("not one text", '"\\n".join(lines) + "\\n"', "lines"),
    ("no instruction|cannot read|FROM", '"\\n".join', '" ".join'),
    ("is None; is a return", 'return "', '"'),
    ("no instruction 'STOP'", "PARAMETER stop", "STOP"),
    ("no instruction 'SYS", "SYSTEM", "SYSTEMPROMPT"),
    ("FROM stands there 2 times", 'f"FROM ./{file}", ', 'f"FROM ./{file}", f"FROM ./{file}", '),
]


def test_modelfile():
    accepts(checks.check_modelfile, modelfile, modelfile_as_text)
    refuses(checks.check_modelfile, *WRONG_FILES, right=modelfile)


# ── Exercise 5 ──────────────────────────────────────────────────────────────────────────────────────────────


def average(adapters):
    A = torch.cat([A for A, B in adapters], dim=0)
    B = torch.cat([B for A, B in adapters], dim=1)
    return A, B / len(adapters)


def average_in_a(adapters):
    As, Bs = zip(*adapters, strict=True)
    return torch.vstack(As) / len(As), torch.hstack(Bs)


def average_by_svd(adapters):
    mean = sum(B.double() @ A.double() for A, B in adapters) / len(adapters)
    U, S, V = torch.linalg.svd(mean, full_matrices=False)
    rank = min(len(S), sum(len(A) for A, _ in adapters))
    return V[:rank], U[:, :rank] * S[:rank]


def average_in_numpy(adapters):
    n = len(adapters) ** 0.5
    return np.concatenate([A.numpy() / n for A, _ in adapters]), np.hstack(
        [B.numpy() / n for _, B in adapters]
    )


AVERAGES = [average, average_in_a, average_by_svd, average_in_numpy]
WRONG_AVERAGES = [
    ("sum; divide", "B / len(adapters)", "B"),
    ("twice", "return A, B / len", "return A / len(adapters), B / len"),
    ("whole rank", "len(adapters)", "len(A)"),
    ("√n", "len(adapters)", "len(adapters) ** 0.5"),
    ("different orders", "B for A, B in adapters", "B for A, B in adapters[::-1]"),
    ("A is \\(rank", "return A, B / len(adapters)", "return B / len(adapters), A"),
    ("A is", "dim=0", "dim=1"),
    ("A is", "dim=1", "dim=0"),
    ("two tensors", "return A, B / len(adapters)", "return B / len(adapters)"),
    ("first adapter", "adapters], dim=0", "adapters[:1]], dim=0", "adapters], dim=1", "adapters[:1]], dim=1",
     "/ len(adapters)", "/ 1"),
    ("two tensors", "return A, B / len(adapters)", "A, B"),
    ("ranks may differ|A is", "torch.cat([A for A, B in adapters], dim=0)", "sum(A for A, B in adapters)"),
    ("two tensors", "return A, B / len(adapters)", "return {'A': A, 'B': B}"),
]  # fmt: skip


def test_average():
    accepts(checks.check_average, *AVERAGES)
    refuses(checks.check_average, *WRONG_AVERAGES, right=average)
    refuses(
        checks.check_average,
        ("averaged apart", lambda ab: (sum(A for A, _ in ab) / len(ab), sum(B for _, B in ab) / len(ab))),
        (
            "averaged apart",
            lambda ab: (torch.stack([A for A, _ in ab]).mean(0), torch.stack([B for _, B in ab]).mean(0)),
        ),
        ("first adapter", lambda ab: ab[0]),
        ("last adapter", lambda ab: ab[-1]),
        (
            "rank .* is more than",
            lambda ab: (torch.eye(ab[0][0].shape[1]), sum(B @ A for A, B in ab) / len(ab)),
        ),
        ("A is \\(rank", lambda ab: (average(ab)[0].T, average(ab)[1].T)),
    )


@pytest.mark.slow
def test_right_answers_pass_a_hundred_times():
    for check, answers in (
        (checks.check_merged, MERGED),
        (checks.check_in_pairs, PAIRED),
        (checks.check_pieces, PIECES),
        (checks.check_modelfile, [modelfile, modelfile_as_text]),
        (checks.check_average, AVERAGES),
    ):
        accepts(check, *answers, times=100)
