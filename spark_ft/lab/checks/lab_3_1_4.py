"""Checks of lab 3.1.4: the mask, the loss, the mean over parts, the rate, the training loop, the judge."""

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spark_ft.lab.checks import call, check, require, require_close, require_gradient, require_tensor

# ── Exercise 1: the mask ────────────────────────────────────────────────────────────────────────────────────


@check
def check_label_mask(answer: Callable[[list[int], list[int]], list[int]]) -> str:
    """−100 for the prompt, the completion as it is; rows with the stop token inside the prompt too."""
    stop = 2
    for prompt, completion in (
        ([1, 9, 4, 2], [7, 8, stop]),
        ([5], [stop]),
        ([2, 2, 3], [6, 2, 6, stop]),
        ([7, 8, 2], [7, 8, 2]),
        ([3, 1, 4, 1, 5, 9, 2, 6], [5, 3, 0, stop]),
    ):
        what = f"for the prompt {prompt} and the completion {completion}"
        given = call(answer, f"label_mask {what}", list(prompt), list(completion))
        require(given is not None, "label_mask returned None; is a return missing?")
        kind = isinstance(given, Tensor) or (isinstance(given, Sequence) and not isinstance(given, str))
        require(kind, f"label_mask returned {type(given).__name__} {what}; return a list")
        _require_labels([_number(label) for label in given], prompt, completion, stop, what)
    return "the whole completion trains, its stop token included, and nothing of the prompt does"


def _number(label: Any) -> Any:
    return label.item() if isinstance(label, Tensor) and label.numel() == 1 else label


def _require_labels(labels: list, prompt: list[int], completion: list[int], stop: int, what: str) -> None:
    n, right = len(prompt), [-100] * len(prompt) + completion
    odd = [label for label in labels if not isinstance(label, int) or isinstance(label, bool)]
    require(not odd, f"a label is {odd[:1]} {what}; every label is one whole number")
    if labels == right:
        return
    found = {
        "the prompt trains too; its labels are −100": prompt + completion,
        "only the completion's labels are there; the prompt needs one −100 per token": completion,
        "only the prompt's −100 are there; the completion's ids come after them": [-100] * n,
        "the completion is masked and the prompt trains; it is the other way round": (
            prompt + [-100] * len(completion)
        ),
        "nothing trains: the completion keeps its ids": [-100] * len(right),
        "the stop token is masked, so the model never learns to stop; go by position, not by value": (
            [-100] * n + [-100 if token == stop else token for token in completion]
        ),
        "the last token, which says stop, is masked; the model would never learn to stop": (
            [-100] * n + completion[:-1] + [-100]
        ),
        "the labels are shifted by one; the loss does that, in exercise 2": (
            [-100] * (n - 1) + completion + [-100]
        ),
        "the first token of the completion is masked": [-100] * (n + 1) + completion[1:],
        "the last token of the prompt trains": [-100] * (n - 1) + prompt[-1:] + completion,
        "the mask is 0, and 0 is a token's id; use −100": [0] * n + completion,
        "the mask is −1; cross-entropy leaves out −100": [-1] * n + completion,
        "the mask is 100, without the minus": [100] * n + completion,
        "the completion comes first; the prompt does": completion + [-100] * n,
        "that is a mask of ones; return the completion's own ids": [-100] * n + [1] * len(completion),
        "that is a mask of zeros and ones; return labels": [0] * n + [1] * len(completion),
        "tokens that are in the prompt too are masked; go by position, not by value": (
            [-100] * n + [-100 if token in prompt else token for token in completion]
        ),
    }
    for message, wrong in found.items():
        require(labels != wrong, f"{what[4:]}: {message}")
    require(
        len(labels) == len(right),
        f"{len(labels)} labels {what}; there is one for each of the {len(right)} tokens",
    )
    require(False, f"the labels are {labels} {what}; right is {right}")


# ── Exercise 2: the loss ────────────────────────────────────────────────────────────────────────────────────


@check
def check_completion_loss(answer: Callable[[Tensor, Tensor], Tensor]) -> str:
    """The mean of −log p over the labelled positions, each predicted one position earlier; its gradient."""
    for length, vocab, prompt in ((6, 11, 2), (9, 50, 8), (5, 7, 1), (7, 13, 0), (40, 5, 20)):
        logits = (3 * torch.randn(length, vocab)).requires_grad_()
        labels = torch.randint(vocab, (length,))
        labels[:prompt] = -100
        if length > 30:
            labels[25:28] = -100  # a gap, as in a chat of several turns
        what = f"the loss of {(labels[1:] != -100).sum()} labelled tokens out of {length}"
        loss = call(answer, what, logits, labels, mends={
            "size": "drop the last row of logits and the first label, so that both have the same length",
            "out of bounds": "−100 is no token: let cross_entropy leave it out",
            "index": "−100 is no token: let cross_entropy leave it out",
        })  # fmt: skip
        right, mistakes = _losses(logits, labels)
        require_close(loss, right, what, mistakes)
        require_gradient(loss, {"logits": logits}, right, "the loss")
    logits, labels = torch.randn(8, 30).bfloat16(), torch.randint(30, (8,))
    loss = call(answer, "the loss of logits in bf16", logits, labels)
    require_close(loss, _losses(logits.float(), labels)[0], "the loss of logits in bf16", tolerance=2e-2)
    return "the mean of −log p over the labelled tokens, each predicted one position earlier; gradient too"


def _losses(logits: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The right loss by a loop, and what known mistakes give."""
    logps, length = logits.log_softmax(-1), len(labels)
    places = [t for t in range(1, length) if labels[t] != -100]
    losses = torch.stack([-logps[t - 1, labels[t]] for t in places])
    probabilities = torch.stack([logits.softmax(-1)[t - 1, labels[t]] for t in places])
    scores = torch.stack([logits[t - 1, labels[t]] for t in places])
    twice = torch.stack([-logps.exp().log_softmax(-1)[t - 1, labels[t]] for t in places])
    own = [t for t in range(length) if labels[t] != -100]
    mistakes = {
        "not shifted: row t of the logits predicts token t + 1": F.cross_entropy(logits, labels),
        "that is the sum; return the mean": losses.sum(),
        "averaged over every position, the masked ones too": losses.sum() / (length - 1),
        "averaged over all rows of the logits, the masked ones too": losses.sum() / length,
        "the sign is wrong: a loss is −log p": -losses.mean(),
        "that is the mean probability; the loss is −log p": probabilities.mean(),
        "that is −p; the loss is −log p": -probabilities.mean(),
        "that is the mean of the scores, without a softmax": scores.mean(),
        "that is minus the mean of the scores, without a softmax": -scores.mean(),
        "the softmax is applied twice; cross_entropy has one inside": twice.mean(),
        "the first label that counts is dropped": losses[1:].mean() if len(losses) > 1 else losses.sum() * 0,
        "the last label is dropped": losses[:-1].mean() if len(losses) > 1 else losses.sum() * 0,
        "the logarithm has another base; take the natural one": losses.mean() / math.log(2),
        "the root of the mean square": losses.square().mean().sqrt(),
        "one loss per token; return their mean": losses,
        "that is the perplexity, exp(loss)": losses.mean().exp(),
    }
    if length > 2:
        back = [t for t in own if t + 1 < length]
        if back:
            other = torch.stack([-logps[t + 1, labels[t]] for t in back]).mean()
            mistakes["shifted the wrong way: row t predicts token t + 1, not t − 1"] = other
        far = [t for t in own if t >= 2]
        if far:
            two = torch.stack([-logps[t - 2, labels[t]] for t in far]).mean()
            mistakes["shifted by two positions"] = two
    return losses.mean(), mistakes


@check
def check_loss_parity(answer: Callable, model: nn.Module, batch: dict[str, Tensor]) -> str:
    """completion_loss on a real model's logits, beside spark_ft's loss and transformers' own."""
    from spark_ft.scoring import sft_loss

    for row in range(2):
        length = int(batch["attention_mask"][row].sum())
        alone = {key: tensor[row : row + 1, :length].to(model.device) for key, tensor in batch.items()}
        with torch.no_grad():
            total, count = sft_loss(model, alone)
            theirs = model(**alone)
            yours = answer(theirs.logits[0], alone["labels"][0])
        require_close(total / count, theirs.loss, "spark_ft's loss", tolerance=1e-5)
        require_close(yours, theirs.loss, f"your loss of row {row}, beside transformers' own", tolerance=1e-5)
    losses = f"{yours:.4f}, {total / count:.4f}, {theirs.loss:.4f}"
    return f"yours, spark_ft's and transformers' loss agree on real rows ({losses})"


# ── Exercise 3: a large batch in small parts ────────────────────────────────────────────────────────────────


@check
def check_accumulated_loss(answer: Callable[[list[tuple[Tensor, int]]], Tensor]) -> str:
    """The loss of one big batch from parts with different numbers of tokens, and its gradient."""
    for counts in ((12, 40, 5), (6, 6), (1, 2, 90), (7,), (0, 4, 9), (30, 1, 1, 1)):
        losses = [torch.rand(n) for n in counts]
        sums = [part.sum().requires_grad_() for part in losses]
        what = f"the loss of parts with {', '.join(map(str, counts))} tokens"
        mends = {"division by zero": "a part may have no labelled token; divide once, at the end"}
        got = call(answer, what, list(zip(sums, counts, strict=True)), mends=mends)
        right = torch.stack(sums).sum() / sum(counts)
        means = torch.stack([total / max(n, 1) for total, n in zip(sums, counts, strict=True)])
        totals, n = torch.stack(sums), len(counts)
        if isinstance(got, Tensor) and got.isnan().any() and 0 in counts:
            require(False, f"{what} is nan: a part may have no labelled token; divide once, at the end")
        require_close(got, right, what, {
            "a mean of means: a token in a short part counts more than one in a long part": means.mean(),
            "a sum of means: it grows with the number of parts": means.sum(),
            "divided by the number of parts; divide by the number of tokens": totals.sum() / n,
            "that is the sum; divide by the number of tokens": totals.sum(),
            "that is the number of tokens": torch.tensor(float(sum(counts))),
            "divided twice, by the parts and by the tokens": totals.sum() / n / sum(counts),
            "that is the first part alone": means[0],
            "that is the last part alone": means[-1],
            "the last sum is divided by all tokens; add up all sums": totals[-1] / sum(counts),
            "divided by the last part's tokens; add up all counts": totals.sum() / max(counts[-1], 1),
            "divided by the first part's tokens; add up all counts": totals.sum() / max(counts[0], 1),
            "divided by the tokens of the longest part": totals.sum() / max(counts),
            "upside down: the sum over the tokens, not the tokens over the sum": sum(counts) / totals.sum(),
        })  # fmt: skip
        real = {f"part {i + 1}": total for i, total in enumerate(sums) if counts[i]}
        require_gradient(got, real, right, "the mean loss")
    return "one big batch's loss, however the tokens are split; a gradient for every part"


# ── Exercise 4: the learning rate ───────────────────────────────────────────────────────────────────────────


def _rate(step: int, steps: int, peak: float, warmup: int, *, first: int = 1, fall: Callable | None = None):
    """The right rate; `first` and `fall` make wrong ones."""
    if step < warmup:
        return peak * (step + first) / warmup
    progress = (step - warmup) / (steps - warmup)
    return peak * (fall(progress) if fall else (1 + math.cos(math.pi * progress)) / 2)


def _whole(step: int, steps: int, peak: float, warmup: int) -> float:
    """The cosine over all steps, warm-up included."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * step / steps)) / 2


def _to_last(step: int, steps: int, peak: float, warmup: int) -> float:
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - 1 - warmup))) / 2


RATES: dict[str, Callable[..., float]] = {
    "the first step's rate is 0, so it learns nothing; count from step + 1": partial(_rate, first=0),
    "there is no warm-up: the first steps have the peak rate": lambda step, steps, peak, warmup: (
        peak if step < warmup else _rate(step, steps, peak, warmup)
    ),
    "there is no warm-up: the cosine starts at step 0": lambda step, steps, peak, warmup: (
        peak * (1 + math.cos(math.pi * step / steps)) / 2
    ),
    "the rate stays at its peak after warm-up; it falls along half a cosine": partial(
        _rate, fall=lambda p: 1.0
    ),
    "it falls in a straight line after warm-up, not along half a cosine": partial(
        _rate, fall=lambda p: 1 - p
    ),
    "that is a whole cosine, which rises again; half of one is cos(π · progress)": partial(
        _rate, fall=lambda p: (1 + math.cos(2 * math.pi * p)) / 2
    ),
    "π is missing in the cosine": partial(_rate, fall=lambda p: (1 + math.cos(p)) / 2),
    "the 1 + is missing, so the rate gets negative": partial(_rate, fall=lambda p: math.cos(math.pi * p)),
    "the division by 2 is missing after warm-up": partial(_rate, fall=lambda p: 1 + math.cos(math.pi * p)),
    "1 − cos rises; it is 1 + cos": partial(_rate, fall=lambda p: (1 - math.cos(math.pi * p)) / 2),
    "that is a quarter of a cosine": partial(_rate, fall=lambda p: math.cos(math.pi * p / 2)),
    "progress counts the warm-up too; it is (step − warmup) / (steps − warmup)": _whole,
    "progress reaches 1 at the last step, which then learns nothing; divide by steps − warmup": _to_last,
    "progress is divided by steps, not by steps − warmup": lambda step, steps, peak, warmup: (
        _rate(step, steps, peak, warmup)
        if step < warmup
        else peak * (1 + math.cos(math.pi * (step - warmup) / steps)) / 2
    ),
    "warm-up is one step too long: at step warmup − 1 the rate is the peak": (
        lambda step, steps, peak, warmup: (
            peak * (step + 1) / (warmup + 1) if step < warmup else _rate(step, steps, peak, warmup)
        )
    ),
    "the peak is missing in the warm-up": lambda step, steps, peak, warmup: (
        (step + 1) / warmup if step < warmup else _rate(step, steps, peak, warmup)
    ),
    "the peak is missing after warm-up": lambda step, steps, peak, warmup: (
        _rate(step, steps, peak, warmup) if step < warmup else _rate(step, steps, 1.0, warmup)
    ),
    "that is the factor alone; multiply by peak": lambda step, steps, peak, warmup: (
        _rate(step, steps, 1.0, warmup)
    ),
    "the rate is the peak in every step": lambda step, steps, peak, warmup: peak,
}  # fmt: skip


@check
def check_learning_rate(answer: Callable[[int, int, float, int], float]) -> str:
    """A straight rise to the peak, then half a cosine towards 0, at every step of four schedules."""
    for steps, peak, warmup in ((80, 2e-3, 8), (20, 3.0, 5), (12, 0.5, 1), (30, 1e-4, 0)):
        setting = f"with steps={steps}, peak={peak}, warmup={warmup}"
        got = []
        for step in range(steps):
            what = f"the rate of step {step} {setting}"
            mends = {"division by zero": "without warm-up no step is below it; ask `step < warmup` first"}
            value = require_tensor(call(answer, what, step, steps, peak, warmup, mends=mends), what, ())
            got.append(value.double().item())
        right = [_rate(step, steps, peak, warmup) for step in range(steps)]
        if _same(got, right, peak):
            continue
        for message, wrong in RATES.items():
            expected = [wrong(step, steps, peak, warmup) for step in range(steps)] if warmup else right
            require(not _same(got, expected, peak), f"{setting[5:]}: {message}")
        step = next(i for i in range(steps) if abs(got[i] - right[i]) > 1e-6 * peak)
        above = ", above its peak" if got[step] > 1.000001 * peak else ""
        require(False, f"the rate of step {step} {setting} is {got[step]:.4g}{above}, not {right[step]:.4g}")
    return "it warms up in a straight line and falls along half a cosine, for four schedules"


def _same(got: list[float], expected: list[float], peak: float) -> bool:
    return all(abs(a - b) <= 1e-6 * peak for a, b in zip(got, expected, strict=True))


# ── Exercise 5: the training loop ───────────────────────────────────────────────────────────────────────────


class _Tiny(nn.Module):
    """A frozen layer, and two that train; in double precision."""

    def __init__(self):
        super().__init__()
        self.frozen, self.lower, self.upper = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.double()
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.upper(torch.tanh(self.lower(self.frozen(x))))


RIGHT = partial(torch.optim.AdamW, betas=(0.9, 0.99), weight_decay=0.0)
CLIP = partial(nn.utils.clip_grad_norm_, max_norm=1.0)


class _Run:
    """A start, batches and rates that every loop of one case gets; loops are compared by what they leave."""

    def __init__(self, steps: int):
        self.steps, self.asked, self.rated = steps, [], []
        self.model = _Tiny()
        self.start = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        scales = [1.0 if step % 2 else 30.0 for step in range(steps + 1)]  # clipped and not, by turns
        self.data = [(torch.randn(8, 5).double(), s * torch.randn(8, 3).double()) for s in scales]

    def again(self) -> _Tiny:
        """The model as at the start."""
        self.model.load_state_dict(self.start)
        self.model.zero_grad()
        self.model.train()
        self.asked, self.rated = [], []
        return self.model

    def batches(self, step: int) -> tuple[Tensor, Tensor]:
        self.asked.append(step)
        return self.data[step]

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return (model(x) - y).square().mean()

    def rate(self, step: int) -> float:
        self.rated.append(step)
        return 0.03 * (step + 1) / self.steps

    def left(self, losses: Sequence[float]) -> Tensor:
        """What a loop left: its losses and the weights, as one vector."""
        weights = [p.detach().flatten() for p in self.model.parameters()]
        return torch.cat([torch.tensor([float(loss) for loss in losses]).double(), *weights])


def _loop(
    run: _Run,
    *,
    optimizer: Callable = RIGHT,
    clip: Callable | None = CLIP,
    rate: Callable | None = lambda run, step: run.rate(step),
    batch: Callable = lambda step: step,
    clear: bool = True,
    fresh: bool = False,
    sign: int = 1,
    moved: bool = True,
    told: str = "before",
) -> list[float]:
    """The loop; its options make the wrong ones."""
    model = run.again()
    trained = [p for p in model.parameters() if p.requires_grad]
    adam, losses = optimizer(trained), []
    for step in range(run.steps):
        if fresh:
            adam = optimizer(trained)
        if rate:
            for group in adam.param_groups:
                group["lr"] = rate(run, step)
        data = run.batches(batch(step))
        loss = run.loss(model, data)
        (sign * loss).backward()
        if clip:
            clip(trained)
        if moved:
            adam.step()
        if clear:
            adam.zero_grad()
        losses.append((loss if told == "before" else run.loss(model, data)).item())
    return losses


ADAMW = torch.optim.AdamW
LOOPS: dict[str, dict[str, Any]] = {
    "gradients pile up: PyTorch adds new ones to the old; clear them after each step": {"clear": False},
    "no weight changes: optimizer.step() has to stand between backward() and zero_grad()": {"moved": False},
    "gradients are not clipped: clip_grad_norm_(…, 1.0) stands before the step": {"clip": None},
    "every gradient is clipped by itself; clip the norm of all together: clip_grad_norm_": {
        "clip": partial(nn.utils.clip_grad_value_, clip_value=1.0)
    },
    "each parameter's norm is clipped by itself; give clip_grad_norm_ all of them at once": {
        "clip": lambda trained: [nn.utils.clip_grad_norm_(p, 1.0) for p in trained]
    },
    "the rate is never set: write rate(step) into each param_group's \"lr\"": {"rate": None},
    "the rate of step 0 is kept; set rate(step) in every step": {"rate": lambda run, step: run.rate(0)},
    "the rate is one step ahead: rate(step), counted from 0": {"rate": lambda run, step: run.rate(step + 1)},
    "the rate is one step late; set it before the optimizer's step": {
        "rate": lambda run, step: run.rate(max(0, step - 1))
    },
    "AdamW's weight decay is 0.01 if you do not say 0.0": {"optimizer": partial(ADAMW, betas=(0.9, 0.99))},
    "AdamW's betas are (0.9, 0.999) if you do not say (0.9, 0.99)": {
        "optimizer": partial(ADAMW, weight_decay=0.0)
    },
    "AdamW has its own betas and weight decay; say betas=(0.9, 0.99), weight_decay=0.0": {"optimizer": ADAMW},
    "a new optimizer in every step forgets its moments; make one, before the loop": {"fresh": True},
    "that is SGD; make an AdamW": {"optimizer": partial(torch.optim.SGD, lr=1e-3)},
    "every step takes batch 0; ask batches(step)": {"batch": lambda step: 0},
    "batches are one ahead: the first step is 0": {"batch": lambda step: step + 1},
    "it climbs: the loss is minimised, so take loss.backward() as it is": {"sign": -1},
    "each loss is measured after its step; return the one whose gradient you took": {"told": "after"},
}  # fmt: skip


@check
def check_fine_tune(answer: Callable[..., list[float]]) -> str:
    """The losses and the weights that the loop leaves, on a small model with a frozen layer."""
    for steps in (7, 1):
        run = _Run(steps)
        right = run.left(_loop(run))
        what = f"fine_tune with {steps} step{'s' if steps > 1 else ''}"
        model = run.again()
        losses = call(
            answer, what, model, run.batches, run.loss, steps, run.rate, may_change=[model], mends={
                "empty parameter list": "does anything require gradients?",
                "does not require grad": "take parameters with requires_grad alone, and keep gradients on",
                "scalar": "the loss is one number already",
                "backward through the graph": "compute the loss anew in every step",
            },
        )  # fmt: skip
        _require_losses(losses, steps, what)
        frozen = model.frozen.weight
        still = torch.equal(frozen, run.start["frozen.weight"])
        require(still, f"{what}: a frozen weight changed; train only what has requires_grad")
        require(not frozen.requires_grad, f"{what}: it switched requires_grad on; leave it alone")
        given, asked = run.left(losses), list(run.asked)
        if _near(given, right):
            continue
        for message, options in LOOPS.items():
            if steps == 1 and message.startswith(("batches", "the rate is one step late")):
                continue
            other = run.left(_loop(run, **options))
            require(not _near(given, other), f"{what}: {message}")
        require(asked == list(range(steps)), f"{what}: it asks for batches {asked[:9]}; ask for each once")
        same = _near(given[:steps], right[:steps])
        which = "the losses are right, the weights are not" if same else "its losses are not right"
        step = next((i for i in range(steps) if abs(given[i] - right[i]) > 1e-6 * right[i].abs()), steps)
        where = "" if same else f", from step {step} on: {given[step]:.5g}, not {right[step]:.5g}"
        require(False, f"{what}: {which}{where}; compare the five points one by one")
    return "losses and weights of 7 steps are right: rate, gradients, clipping, step, clearing"


def _require_losses(losses: Any, steps: int, what: str) -> None:
    require(losses is not None, f"{what} returned None; return the list of losses")
    one = isinstance(losses, float | int) or (isinstance(losses, Tensor) and losses.dim() == 0)
    require(not one or steps == 1, f"{what} returned one number; return the loss of every step, in a list")
    kind = isinstance(losses, list | tuple | Tensor)
    require(kind, f"{what} returned {type(losses).__name__}; return the list of losses")
    require(len(losses) == steps, f"{what} returned {len(losses)} losses; one for each of the {steps} steps")
    for loss in losses:
        graph = isinstance(loss, Tensor) and loss.requires_grad
        require(not graph, f"{what}: a loss still holds its graph, and so its memory; append loss.item()")
        number = require_tensor(loss, f"a loss of {what}")
        require(number.numel() == 1, f"a loss of {what} has shape {tuple(number.shape)}; it is one number")


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a - b).abs() <= 1e-6 * (1 + b.abs())).all())


# ── Exercise 6: the judge ───────────────────────────────────────────────────────────────────────────────────

WANTED = {"table": 7, "items": [{"qty": 2, "dish": "crème brûlée", "no": "nuts"}, {"qty": 1, "dish": "tea"}]}
TEXT = json.dumps(WANTED, ensure_ascii=False, separators=(",", ":"))
JUDGED: list[tuple[str, bool, str]] = [
    (TEXT, True, "the same text"),
    (json.dumps(WANTED, indent=2), True, "the same ticket over several lines, é written as \\u00e9"),
    (json.dumps({"items": WANTED["items"], "table": 7}), True, "the same ticket, its keys in another order"),
    (f"  {TEXT}\n", True, "the same ticket with spaces around it"),
    (TEXT.replace("7", "8", 1), False, "another table"),
    (TEXT.replace('"qty":2', '"qty":3'), False, "another number of a dish"),
    (TEXT.replace("brûlée", "brulee"), False, "a dish without its accents"),
    (TEXT.replace("tea", "Tea"), False, "a dish with a capital letter"),
    (json.dumps({**WANTED, "items": WANTED["items"][:1]}), False, "a ticket that lacks an item"),
    (json.dumps({**WANTED, "items": [*WANTED["items"], {"qty": 1}]}), False, "an item too many"),
    (json.dumps({**WANTED, "note": "rush"}), False, "a key too many"),
    (json.dumps({"table": 7}), False, "a ticket without items"),
    (TEXT[:-2], False, "half a ticket"),
    (f"Here is the ticket: {TEXT}", False, "words before the JSON"),
    (f"{TEXT} Enjoy!", False, "words after the JSON"),
    (f"```json\n{TEXT}\n```", False, "a ticket in Markdown's fences"),
    (TEXT.replace('"', "'"), False, "Python's quotes in place of JSON's"),
    ("", False, "an empty answer"),
    ("I am sorry, I cannot do that.", False, "an excuse"),
    ("null", False, "null"),
    ("[]", False, "an empty list"),
]  # fmt: skip


@check
def check_same_ticket(answer: Callable[[str, str], bool]) -> str:
    """JSON of the same content, and nothing else; no answer raises."""
    for text, right, which in JUDGED:
        for wanted in (TEXT, json.dumps(WANTED, indent=1, sort_keys=True)):
            what = f"same_ticket of {which}"
            given = call(answer, what, text, wanted, mends=None if right else {"": "return False there"})
            require(given is not None, f"{what} is None; return True or False")
            require(
                isinstance(given, bool) or type(given).__name__ == "bool_",
                f"{what} is {type(given).__name__}; return True or False",
            )
            if bool(given) != right:
                said = f"{which} counts as right" if given else f"{which} counts as wrong"
                exact = "; compare the contents, not the texts" if not given else ""
                require(False, f"{said}{exact}: {text!r:.60}")
    return f"{len(JUDGED)} answers judged right: other spaces and orders of keys pass, and nothing else"
