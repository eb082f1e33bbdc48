"""One training loop for every lab, on accelerate: AdamW, warm-up, accumulation, clipping, history, exact
resume."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from spark_ft.files import write_atomically
from spark_ft.memory.guard import Guard
from spark_ft.scoring import Batch
from spark_ft.scoring import sft_loss as sft_loss  # the loss that most runs give to `train`

Loss = Callable[[nn.Module, Batch], tuple]


def cosine(progress: float) -> float:
    """Learning-rate factor that falls from 1 to 0 along half a cosine; `progress` runs from 0 to 1 after
    warm-up."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def linear(progress: float) -> float:
    """Learning-rate factor that falls from 1 to 0 in a straight line."""
    return 1.0 - progress


def constant(progress: float) -> float:
    """Learning-rate factor that stays at 1."""
    return 1.0


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Args:
        steps: optimizer steps.
        learning_rate: the peak, after warm-up. LoRA: 1e-4 to 2e-3; full fine-tuning: ten times less.
        warmup_steps: steps over which the rate rises to its peak.
        schedule: factor on the rate as a function of progress: `cosine`, `linear`, `constant`, or your own.
        gradient_accumulation_steps: parts that each step's batch is computed in; more saves memory, the
            result is the same.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        weight_decay, betas, eps: AdamW's.
        seed: seeds torch's generator at the start (dropout).
        checkpoint_dir: folder to write checkpoints to and to resume from; None writes none.
        checkpoint_every: steps between checkpoints; one is always written at the end.
        keep_checkpoints: how many to keep.
        progress: show a progress bar (in a notebook or terminal) or a line now and then (in a log).
        ignore_budget: train even if the plan says that memory will not do.
    """

    steps: int
    learning_rate: float = 2e-4
    warmup_steps: int = 0
    schedule: Callable[[float], float] = cosine
    gradient_accumulation_steps: int = 1
    max_grad_norm: float | None = 1.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    seed: int = 0
    checkpoint_dir: str | os.PathLike | None = None
    checkpoint_every: int = 50
    keep_checkpoints: int = 2
    progress: bool = True
    ignore_budget: bool = False

    def __post_init__(self):
        for name in ("steps", "gradient_accumulation_steps", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate}; it must be above 0")

    def rate(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * self.schedule(
            (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        )


@dataclass
class History:
    """What happened at each optimizer step: one entry a step in each list."""

    losses: list[float] = field(default_factory=list)  # mean over the step's completion tokens (or pairs)
    learning_rates: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)  # before clipping
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # tokens of the step's batch, padding not counted
    metrics: dict[str, list[float]] = field(default_factory=dict)  # what the loss measures beside itself

    @property
    def steps(self) -> list[int]:
        return list(range(1, len(self.losses) + 1))

    @property
    def seconds_per_step(self) -> float:
        """Median over the steps, the first (which warms up) left out where there are others."""
        times = sorted(self.seconds[1:] or self.seconds)
        return times[len(times) // 2] if times else math.nan


def train(model: nn.Module, batches: Callable[[int], Batch], loss: Loss, config: TrainConfig) -> History:
    """Train the model's trainable parameters in place.

    The gradient of a step is that of Σ loss / Σ count over the whole step's batch, so accumulation over
    parts, and several processes (`accelerate launch`), give what one big batch gives. With `checkpoint_dir`,
    a killed run that is started again goes on from its last checkpoint, and on the same CPU and thread count
    ends with the same weights, bit for bit.

    Args:
        model: a model with parameters that require gradients; left in eval mode.
        batches: step → that step's whole batch, a dict of tensors with one row an example. A function of the
            step alone.
        loss: (model, batch) → (sum over tokens or pairs, how many); `sft_loss` is one. It may also have
            `whole_step(model, parts, everywhere)`: called once a step with the parts that the batch is
            computed in (of this process), it returns them with what depends on all of them, a number per
            row; `everywhere` adds a tensor up over the processes. It may also have `metrics`, names: then it
            returns a dict too, of what its part adds to each of the step's numbers, kept in
            `History.metrics`. And it may have `kept()`, tensors by name, which a checkpoint stores, and
            `keep(tensors)`, which takes them back.
        config: see `TrainConfig`.

    Raises:
        ValueError: nothing to train, nothing to learn from in a batch, or the checkpoint belongs to another
            run.
        FloatingPointError: the loss is not a finite number.
        MemoryError: the next step needs more memory than is there; says which term of its plan to cut, and
            how.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(
            "nothing to train: no parameter requires gradients; "
            "call add_adapters(model, AdapterConfig()) first"
        )
    accelerator = Accelerator(cpu=next(iter(parameters.values())).device.type == "cpu")
    optimizer = torch.optim.AdamW(
        parameters.values(),
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    optimizer.zero_grad()  # an interrupted step may have left some
    torch.manual_seed(config.seed)
    history = History()
    if config.checkpoint_dir is not None:
        history = _resume(Path(config.checkpoint_dir), parameters, optimizer, config, loss) or history
    model.train()
    guard = Guard(model, loss, config.gradient_accumulation_steps * accelerator.num_processes)
    first = len(history.losses)
    try:
        for step in _progress(range(first, config.steps), config, accelerator, history):
            batch = batches(step)
            if not config.ignore_budget:
                guard.check(batch)
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = config.rate(step)
            total, count, measured = _accumulate(
                model, batch, loss, config.gradient_accumulation_steps, accelerator
            )
            if count == 0:
                raise ValueError(
                    f"step {step}: the batch has nothing to learn from; every label is masked out"
                )
            if not math.isfinite(total):
                raise FloatingPointError(
                    f"step {step}: the loss is {total}; lower learning_rate={config.learning_rate}"
                )
            for p in parameters.values():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
                if accelerator.num_processes > 1:
                    p.grad = accelerator.reduce(p.grad, reduction="sum")
                p.grad /= count
            clip = math.inf if config.max_grad_norm is None else config.max_grad_norm
            norm = nn.utils.clip_grad_norm_(parameters.values(), clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            guard.stepped()
            history.losses.append(total / count)
            history.learning_rates.append(config.rate(step))
            history.grad_norms.append(norm.item())
            history.tokens.append(_tokens(batch))
            for name, value in measured.items():
                history.metrics.setdefault(name, [math.nan] * step).append(value)
            history.seconds.append(time.perf_counter() - started)
            done = step + 1
            if config.checkpoint_dir is not None and (
                done % config.checkpoint_every == 0 or done == config.steps
            ):
                if accelerator.is_main_process:
                    _save_checkpoint(
                        Path(config.checkpoint_dir), parameters, optimizer, history, config, loss
                    )
                accelerator.wait_for_everyone()
    finally:
        model.eval()
    return history


def _accumulate(
    model, batch: Batch, loss: Loss, count_of_parts: int, accelerator: Accelerator
) -> tuple[float, int, dict[str, float]]:
    """Backward of every part of the batch that falls to this process; the loss's sum, its count and its
    metrics over all processes."""
    device = next(model.parameters()).device
    processes = accelerator.num_processes
    rows = torch.arange(len(next(iter(batch.values()))))
    shares = rows.tensor_split(count_of_parts * processes)[accelerator.process_index :: processes]
    parts = [{key: x[share].to(device) for key, x in batch.items()} for share in shares if len(share)]

    def everywhere(x: Tensor) -> Tensor:
        return accelerator.reduce(x, reduction="sum") if processes > 1 else x

    if hasattr(loss, "whole_step"):
        parts = loss.whole_step(model, parts, everywhere)
    names = getattr(loss, "metrics", ())
    total = torch.zeros(2 + len(names), dtype=torch.float64, device=device)
    for part in parts:
        value, count, *rest = loss(model, part)
        value.backward()  # not accelerate's: it would divide by what the environment says
        numbers = value.detach(), count, *(rest[0][name] for name in names)
        total += torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in numbers])
    value, count, *measured = everywhere(total).tolist()
    return value, int(count), dict(zip(names, measured, strict=True))


def _tokens(batch: Batch) -> int:
    return sum(int(tensor.sum()) for name, tensor in batch.items() if name.endswith("_mask"))


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None


def _progress(steps: range, config: TrainConfig, accelerator: Accelerator, history: History) -> Iterator[int]:
    """A bar where something redraws it, a line about every tenth of the way where the output is a log.

    With SPARK_FT_PROGRESS=1, as `make lab` sets it, a run that asks for no bar gets one in a notebook too,
    once it has taken five seconds.
    """
    late = not config.progress and os.environ.get("SPARK_FT_PROGRESS") == "1" and _in_notebook()
    if not ((config.progress or late) and accelerator.is_main_process):
        yield from steps
    elif sys.stdout.isatty() or _in_notebook():
        bar = tqdm(
            steps,
            initial=steps.start,
            total=steps.stop,
            file=sys.stdout,
            unit="step",
            ncols=80,
            mininterval=1.0,
            delay=5.0 if late else 0.0,
        )
        for step in bar:
            yield step
            bar.set_postfix_str(f"loss {history.losses[-1]:.4f}", refresh=False)
    else:
        every = max(1, config.steps // 10)
        for step in steps:
            yield step
            if (step + 1) % every == 0 or step + 1 == config.steps:
                seconds = history.seconds_per_step
                print(
                    f"step {step + 1}/{config.steps}  loss {history.losses[-1]:.4f}  {seconds:.2f} s/step",
                    flush=True,
                )


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────
# One safetensors file, put in place by one rename: parameters, both AdamW moments by name, the generators'
# bytes; the step, the history and the settings in its header. accelerate's own folders are pickles, and are
# not bit-exact by default.


def _settings(config: TrainConfig) -> dict:
    """What a checkpoint's run and the run that resumes it must agree on."""
    left_out = ("checkpoint_dir", "checkpoint_every", "keep_checkpoints", "progress", "ignore_budget")
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in left_out}
    values["schedule"] = getattr(config.schedule, "__name__", repr(config.schedule))
    return json.loads(json.dumps(values))


def _save_checkpoint(folder: Path, parameters, optimizer, history, config: TrainConfig, loss: Loss) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    kept = loss.kept() if hasattr(loss, "kept") else {}
    tensors = {"generator.cpu": torch.get_rng_state()} | {f"loss.{name}": x for name, x in kept.items()}
    if torch.cuda.is_available():
        tensors["generator.cuda"] = torch.cuda.get_rng_state()
    for name, p in parameters.items():
        tensors[f"parameter.{name}"] = p.detach().contiguous()
        for key, value in optimizer.state[p].items():
            tensors[f"{key}.{name}"] = value.contiguous()
    header = {
        "history": json.dumps(asdict(history)),
        "settings": json.dumps(_settings(config)),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
    target = folder / f"step-{len(history.losses):06d}.safetensors"
    write_atomically(target, lambda path: save_file(tensors, path, header))
    for old in [
        *_checkpoints(folder)[: -config.keep_checkpoints],
        *folder.glob(".step-*"),
    ]:  # .step-*: of a killed write
        old.unlink()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _resume(folder: Path, parameters, optimizer, config: TrainConfig, loss: Loss) -> History | None:
    """Put the newest checkpoint's state in place and return its history; None if there is none."""
    if not (found := _checkpoints(folder)):
        return None
    path = found[-1]
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged ({error}); delete it to resume from the checkpoint before"
        ) from error
    if not header or not {"history", "settings", "threads"} <= header.keys():
        raise ValueError(
            f"{path}: damaged (no checkpoint of a run); delete it to resume from the checkpoint before"
        )
    then, now = json.loads(header["settings"]), _settings(config)
    if different := [
        f"{key} {then.get(key)!r}, now {now[key]!r}" for key in now if then.get(key) != now[key]
    ]:
        raise ValueError(
            f"{path}: belongs to a run with other settings ({'; '.join(different)}); "
            "choose another checkpoint_dir, or delete this one to start anew"
        )
    shapes = {
        key.removeprefix("parameter."): t.shape for key, t in tensors.items() if key.startswith("parameter.")
    }
    if shapes != {name: p.shape for name, p in parameters.items()}:
        raise ValueError(
            f"{path}: belongs to a model with other trainable parameters; choose another checkpoint_dir"
        )
    if header["threads"] != str(torch.get_num_threads()):
        print(f"{path.name} was written with {header['threads']} threads, now {torch.get_num_threads()}: "
              "the run goes on, but not bit for bit", flush=True)  # fmt: skip
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(tensors[f"parameter.{name}"])
            optimizer.state[p] = {
                key: tensors[f"{key}.{name}"].to(p.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
    torch.set_rng_state(tensors["generator.cpu"])
    if "generator.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["generator.cuda"])
    kept = {key.removeprefix("loss."): x for key, x in tensors.items() if key.startswith("loss.")}
    if kept and hasattr(loss, "keep"):
        loss.keep(kept)
    return History(**json.loads(header["history"]))
