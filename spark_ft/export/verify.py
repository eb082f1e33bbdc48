"""Is the file the model? llama.cpp and transformers on the same prompts, and the numbers in the file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from spark_ft.adapters import adapted_layers
from spark_ft.export.gguf import in_own_order, names_in_gguf
from spark_ft.export.reader import GGUFFile, read_gguf
from spark_ft.export.server import Chat, Server, require_kind, serve
from spark_ft.methods.nf4 import NF4Tensor
from spark_ft.scoring import evaluating

PROMPTS = (
    "Name three things to see in Paris.",
    "How do I boil an egg?",
    "What is 17 + 25?",
    "Write one sentence about the sea.",
    "Order for table 4: two green curries, hot, no peanuts; one jasmine tea.",
    "Order for table 11: one coconut soup, medium, hold the shrimp.",
    "How much flour do I need for pancakes for four people?",
    "Translate into French: good morning.",
    "Why is the sky blue?",
    "List the days of the week.",
    "What does a gradient tell you?",
    "Give me a recipe for tomato soup.",
    "Who wrote Romeo and Juliet?",
    "Explain photosynthesis to a child.",
    "What is the opposite of cold?",
    "Write a haiku about rain.",
    "How long does rice take to cook?",
    "Which planet is the largest?",
    "Correct this sentence: she go to school.",
    "What can I make with eggs, spinach and cheese?",
)
# Where ways of splitting text differ: digits, fractions, contractions, spaces, scripts, signs, code.
TEXTS = (
    "1234567890 12 345 6.78",
    "add ½ cup, ¼ tsp, 2⅔ oz",
    "I'll say it's YOU'RE We've",
    "two  spaces   three\tand a tab",
    "line\n\nbreaks\r\n  indented\n",
    "naïve café, Grüße, Łódź, São",
    "東京で寿司を食べる。안녕하세요",
    "Привет, как дела? مرحبا",
    "🍜 and 👩‍🍳 and ✓",
    "for (i=0; i<10; i++) { x[i] += 3.14e-2; }",
    "https://example.org/a?b=c&d=1#e",
    '{"table": 11, "items": [{"dish": "soup"}]}',
    "snake_case camelCase CONSTANT_9",
    "!!! ... --- *** ???",
    " leading and trailing ",
)
# Of the file's type: mean and largest |Δ log-probability| that rounding explains, and how far its numbers may
# be from the model's, ‖F − W‖/‖W‖. Quantized files are computed with rounded activations too (None: told, not
# judged).
LIMITS = {
    "F16": (0.003, 0.05, 1e-3),
    "BF16": (0.02, 0.3, 5e-3),
    "Q8_0": (None, None, 0.02),
    "Q5_0": (None, None, 0.1),
    "Q4_0": (None, None, 0.2),
    "Q4_1": (None, None, 0.2),
}
GREEDY = 0.95  # share of the prompts whose greedy text is equal, or parts at a tie within that largest Δ


@dataclass(frozen=True)
class Verification:
    """What `verify_gguf` found; print it.

    Attributes:
        kind: the type of the file's matrices; prompts: how many were asked.
        tokens, texts: how many chats and bare texts became the same tokens, of how many.
        greedy: prompts whose greedy text is the model's own; mean, largest: |Δ log-probability| per token.
        update: how much of the adapter's update the file holds, 1 is all of it; None for a plain model.
        faults: what differs, each with what looks like that; none if the file is the model.
    """

    path: Path
    kind: str
    prompts: int
    tokens: int
    texts: tuple[int, int]
    greedy: int
    mean: float
    largest: float
    update: float | None
    faults: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.faults

    def __str__(self) -> str:
        update = "" if self.update is None else f"\n  of the update    {self.update:.0%} is in the file"
        said = "\n".join(f"  ✗ {fault}" for fault in self.faults) or "  ✓ the file is the model"
        return (
            f"{self.path.name} ({self.kind}) against the model, {self.prompts} prompts\n"
            f"  same tokens      {self.tokens} of {self.prompts} chats, "
            f"{self.texts[0]} of {self.texts[1]} texts\n"
            f"  same greedy text {self.greedy} of {self.prompts}\n"
            f"  |Δ log p|        {self.mean:.4f} on average, {self.largest:.3f} at most{update}\n{said}"
        )


def verify_gguf(
    path: str | os.PathLike,
    model: nn.Module,
    tokenizer,
    *,
    adapter: str | os.PathLike | None = None,
    prompts: Sequence[Chat] = PROMPTS,
    max_tokens: int = 32,
) -> Verification:
    """Run llama.cpp on a GGUF file and hold it to the model that it should be.

    The server turns each prompt into tokens through its own template and answers greedily. One forward pass
    of the model along that answer tells whether it would have written the same, and each token's
    log-probability. Then the numbers of some layers are read from the file: they tell which fault it is.

    Args:
        path: a model in GGUF.
        model: what the file should be, in memory, in fp32 for F16's limits: with its adapter on (then faults
            of the adapter are told by name), or merged.
        adapter: a GGUF LoRA file; then `path` is its base.
        prompts: chats of the kind that the adapter learned show more.
        max_tokens: of each answer.

    Raises:
        ValueError: the model is in 4 bits, which is not what was exported; and see `serve`.
    """
    if any(isinstance(module, NF4Tensor) for module in model.modules()):
        raise ValueError(
            "the model is in 4 bits, and an export holds W + ΔW of the original weights; load it without "
            'quantize="nf4", and the adapter with load_adapters'
        )
    require_kind(path, "a model")
    file = read_gguf(path)
    kind = file.tensors["blk.0.attn_q.weight"][1].name
    if kind not in LIMITS:
        raise ValueError(f"{path} is in {kind}; {', '.join(LIMITS)} can be verified")
    with serve(path, {} if adapter is None else {"adapter": adapter}) as server:
        tokens, texts, faults = _tokens(server, tokenizer, prompts)
        greedy, ties, gaps = _answers(server, model, tokenizer, prompts, max_tokens, adapter and "adapter")
    update, wrong = _numbers(file, model, kind, None if adapter is None else read_gguf(adapter))
    mean, largest = gaps.mean().item(), gaps.max().item()
    explained = sum(below <= (LIMITS[kind][1] or 0) for below in ties)
    faults += wrong or _behaviour(kind, len(prompts), explained, mean, largest)
    shares = (len(prompts), tokens, texts, greedy)
    return Verification(Path(path), kind, *shares, mean, largest, update, tuple(faults))


def _tokens(server: Server, tokenizer, prompts) -> tuple[int, tuple[int, int], list[str]]:
    """Chats and texts that become the same tokens, and what to say of others."""
    faults, same = [], 0
    for chat in prompts:
        text, theirs = server.rendered(chat)
        ours = _ids(tokenizer, chat)
        same += ours == theirs
        if ours != theirs and not faults:
            written = tokenizer.decode(ours)
            bos = tokenizer.bos_token or ""
            what = (
                "the chat template differs" if written.removeprefix(bos) != text.removeprefix(bos) else _SPLIT
            )
            faults.append(f"{chat!r:.60} becomes other tokens: {what}")
    right = [t for t in TEXTS if server.tokens(t) == tokenizer(t, add_special_tokens=False)["input_ids"]]
    if wrong := [text for text in TEXTS if text not in right]:
        faults.append(f"{wrong[0]!r} becomes other tokens: {_SPLIT}")
    return same, (len(right), len(TEXTS)), faults


_SPLIT = "the file names another pre-tokenizer (tokenizer.ggml.pre) than the model was trained with"


def _ids(tokenizer, chat: Chat) -> list[int]:
    messages = [{"role": "user", "content": chat}] if isinstance(chat, str) else list(chat)
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@torch.no_grad()
def _answers(
    server: Server, model, tokenizer, prompts, max_tokens: int, adapter: str | None
) -> tuple[int, list[float], Tensor]:
    """Prompts whose greedy answer the model would write too; by how much each answer's least likely choice is
    below the model's own, which is 0 or a near tie; and |Δ log-probability| of every token."""
    greedy, ties, gaps = 0, [], []
    with evaluating(model):
        for chat in prompts:
            ids = _ids(tokenizer, chat)
            said = server.complete(ids, adapter=adapter, max_tokens=max_tokens)
            row = torch.tensor([[*ids, *said.tokens]], device=model.device)
            logps = model(input_ids=row).logits[0, len(ids) - 1 :].float().log_softmax(-1).cpu()
            greedy += logps.argmax(-1).tolist()[: len(said.tokens)] == said.tokens
            ours = logps[range(len(said.tokens)), said.tokens]
            ties.append((logps[: len(ours)].amax(-1) - ours).max().item() if said.tokens else 0.0)
            pairs = zip(ours.tolist(), said.logps, strict=True)
            gaps += [abs(our - their) for our, their in pairs if their is not None]
    return greedy, ties, torch.tensor(gaps or [0.0])


def _behaviour(kind: str, prompts: int, explained: int, mean: float, largest: float) -> list[str]:
    """What to say of a file whose numbers are right where they were read; `explained`: answers that rounding
    explains."""
    usual, most, _ = LIMITS[kind]
    if usual is None or (explained >= GREEDY * prompts and mean <= usual and largest <= most):
        return []
    return [
        f"it answers unlike the model (rounding to {kind} explains {usual} on average and {most} at most), "
        "though the numbers that were read agree: a wrong setting in the file looks like that (rotary "
        "embedding, epsilon, heads), or a layer that was not read"
    ]


# ── the numbers in the file ───────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Layer:
    """What a file holds of a layer's update, beside what it should hold.

    `as_stored` is in the file's own order of rows, `noise` the norm of what rounding explains.
    """

    name: str
    found: Tensor
    as_stored: Tensor
    update: Tensor
    size: float  # ‖W‖
    noise: float

    def fits(self, found: Tensor) -> bool:
        return bool((found - self.update).norm() <= self.noise)


def _numbers(file: GGUFFile, model: nn.Module, kind: str, lora: GGUFFile | None) -> tuple[float | None, list]:
    """How much of the update is in the file, and what the numbers of some layers say is wrong."""
    _, name_of = names_in_gguf(model.config, file.path.name)
    adapted, layers = adapted_layers(model), []
    blocks = sorted({int(path.split(".")[2]) for path in adapted if path.startswith("model.layers.")})
    blocks = blocks or range(model.config.num_hidden_layers)
    inside = tuple(f"model.layers.{blocks[i]}." for i in (0, len(blocks) // 2, -1))
    for path, module in model.named_modules():
        chosen = path in adapted or (type(module) is nn.Linear and path.rpartition(".")[0] not in adapted)
        if not chosen or not (path.startswith(inside) or (path == "lm_head" and path in adapted)):
            continue
        name = name_of(f"{path}.weight")
        W = module.weight.detach().float().cpu()
        apart = path in adapted and not module.merged
        update = module.delta_weight().detach().float().cpu() if apart else torch.zeros_like(W)
        stored, limit = file.read(name), LIMITS[kind][2]
        found = in_own_order(stored, path, model.config)
        if lora is None:
            layers.append(
                _Layer(path, found - W, stored - W, update, W.norm().item(), limit * W.norm().item())
            )
            continue
        if (found - W).norm() > limit * W.norm():
            return None, [f"{file.path.name} is not the base of the model: {path} holds other numbers"]
        if path in adapted:
            layers.append(_of_adapter(lora, name, path, update, model.config))
    return _judge(layers, lora is not None, {layer.name for layer in layers} & adapted.keys())


def _of_adapter(lora: GGUFFile, name: str, path: str, update: Tensor, config) -> _Layer:
    if f"{name}.lora_a" not in lora.tensors:
        nothing = torch.zeros_like(update)
        return _Layer(path, nothing, nothing, update, update.norm().item(), 1e-3 * update.norm().item())
    A, B = lora.read(f"{name}.lora_a"), lora.read(f"{name}.lora_b")
    scale = lora.fields["adapter.lora.alpha"] / len(A)
    found = scale * in_own_order(B, path, config) @ A
    return _Layer(path, found, scale * B @ A, update, update.norm().item(), 1e-3 * update.norm().item())


def _judge(layers: list[_Layer], alone: bool, adapted: set[str]) -> tuple[float | None, list[str]]:
    turned = [layer for layer in layers if not layer.fits(layer.found) and layer.fits(layer.as_stored)]
    if turned:
        which = "lora_B of Q and K" if alone else "the weights of Q and K"
        kept = "the answers change little, since the update is small" if alone else "the answers are noise"
        return None, [
            f"{which} are in transformers' order of rows, where llama.cpp pairs them for its rotary "
            f"embedding ({turned[0].name}); {kept}"
        ]
    if not adapted:
        off = max(layers, key=lambda layer: layer.found.norm().item() / layer.size)
        if off.fits(off.found):
            return None, []
        share = off.found.norm().item() / off.size
        return None, [
            f"{off.name} is {share:.1%} off the model's: an export of the base, or of another adapter, looks "
            "like that; put the adapter on the model (load_adapters) to be told which"
        ]
    layers = [layer for layer in layers if layer.name in adapted]
    dot = sum((layer.found * layer.update).sum().item() for layer in layers)
    squares = sum(layer.update.square().sum().item() for layer in layers)
    if not squares:
        return None, []  # an adapter that changes nothing
    share = dot / squares
    numbers = sum(layer.update.numel() for layer in layers)
    noise = sum(layer.noise**2 for layer in layers) ** 0.5
    blur = max(0.02, 5 * noise / (squares * numbers) ** 0.5)  # of the share, by rounding
    rest = sum((layer.found - share * layer.update).square().sum().item() for layer in layers) ** 0.5
    if rest > max(noise, 1e-3 * squares**0.5):
        worst = max(layers, key=lambda layer: (layer.found - layer.update).norm().item() / layer.noise)
        return share, [f"{worst.name} holds other numbers: another adapter, or another base"]
    if abs(share) <= blur:
        return share, ["the file holds the base: the adapter was never applied"]
    if abs(share - 1) > blur:
        why = "alpha, the rank, or rsLoRA's root was taken wrong; or the base already lay on the file's grid"
        return share, [f"the file holds {share:.0%} of the adapter's update: {why}"]
    return share, []
