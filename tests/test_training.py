"""The loop: exact resume after kill -9, one gradient however computed, steps by hand, clear errors."""

import json
import math
import os
import pickletools
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers import complains
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from spark_ft import AdapterConfig, add_adapters, training
from spark_ft.scoring import sft_loss
from spark_ft.training import TrainConfig, constant, cosine, linear, train


class Line(nn.Module):
    """Three weights; the loss of a row x is x · w, so its gradient is x itself."""

    def __init__(self, start=(1.0, -2.0, 0.5)):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(start))


def dot_loss(model, batch):
    return (batch["x"] @ model.w).sum(), len(batch["x"])


def square_loss(model, batch):
    return ((batch["x"] @ model.w - 1) ** 2).sum(), len(batch["x"])


def rows(*values):
    return {"x": torch.tensor(values, dtype=torch.float32)}


def numbered(step, n=4, width=3):
    g = torch.Generator().manual_seed(step)
    return {"x": torch.randn(n, width, generator=g)}


def config(steps=3, **changes):
    return TrainConfig(**{"steps": steps, "progress": False, "schedule": constant, **changes})


# --- the step, by hand -----------------------------------------------------------------------------------
def test_the_first_adamw_step_by_hand():
    # Σ loss / count over the rows (3, −4, 0) and (1, 0, 0) has the gradient (2, −2, 0). Adam's first
    # corrected moments are g and g², so w moves by −lr · g/(|g| + eps); decay shrinks w by lr · wd first.
    model, run = Line(), config(1, learning_rate=0.1, weight_decay=0.5)
    history = train(model, lambda _: rows([3, -4, 0], [1, 0, 0]), dot_loss, run)
    decayed = torch.tensor([1.0, -2.0, 0.5]) * (1 - 0.1 * 0.5)
    assert torch.allclose(model.w, decayed - 0.1 * torch.tensor([1.0, -1.0, 0.0]), atol=1e-6)
    # (3 + 8) and 1, over two rows; the norm is that of (2, −2, 0) before clipping to 1
    assert history.losses == [pytest.approx(6.0)]
    assert history.grad_norms == [pytest.approx(math.sqrt(8))]


def test_clipping_scales_the_gradient_down_to_the_norm_and_never_up():
    # large eps makes Adam's first step lr · g/(|g| + eps) tell how large g was
    cases = (1, 10, (0.6, 0.8)), (2.5, 10, (1.5, 2)), (None, 10, (30, 40)), (1, 0.01, (0.03, 0.04))
    for most, scale, g in cases:
        model, g = Line((0.0, 0.0, 0.0)), torch.tensor([*g, 0])
        run = config(1, learning_rate=1.0, eps=1.0, max_grad_norm=most, weight_decay=0.0)
        train(model, lambda _, scale=scale: rows([3 * scale, 4 * scale, 0]), dot_loss, run)
        assert torch.allclose(model.w, -g / (g.abs() + 1), atol=1e-5), (most, scale)


def test_the_whole_run_is_torchs_adamw_on_the_mean_loss():
    model, twin = Line(), Line()
    settings = {"learning_rate": 0.05, "warmup_steps": 2, "schedule": cosine, "max_grad_norm": 0.7}
    run = config(7, **settings, weight_decay=0.1, betas=(0.8, 0.9))
    train(model, numbered, square_loss, run)
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1.0, weight_decay=0.1, betas=(0.8, 0.9))
    for step in range(7):
        optimizer.param_groups[0]["lr"] = run.rate(step)
        optimizer.zero_grad()
        total, count = square_loss(twin, numbered(step))
        (total / count).backward()
        nn.utils.clip_grad_norm_(twin.parameters(), 0.7)
        optimizer.step()
    assert torch.allclose(model.w, twin.w, rtol=1e-6, atol=1e-7)


# --- rates -----------------------------------------------------------------------------------------------
def test_rates_by_hand_and_the_history_of_them():
    def rates(**changes):
        run = TrainConfig(**{"steps": 6, "learning_rate": 8.0, **changes})
        return [run.rate(step) for step in range(run.steps)]

    assert rates(schedule=constant) == [8.0] * 6
    assert rates(schedule=constant, warmup_steps=4) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    # two steps of warm-up, then progress 0, ¼, ½, ¾ of the other four
    assert rates(schedule=linear, warmup_steps=2) == [4.0, 8.0, 8.0, 6.0, 4.0, 2.0]
    r = math.sqrt(0.5)
    assert rates(schedule=cosine, warmup_steps=2) == pytest.approx([4, 8, 8, 4 * (1 + r), 4, 4 * (1 - r)])
    assert rates(schedule=lambda p: (1 - p) ** 2, steps=2) == [8.0, 2.0]
    assert rates(warmup_steps=6) == pytest.approx([8 * k / 6 for k in range(1, 7)])
    assert (cosine(0), cosine(0.5), cosine(1)) == pytest.approx((1, 0.5, 0))
    run = config(4, learning_rate=0.4, warmup_steps=2)
    batch = {**numbered(0, 2), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    history = train(Line(), lambda _: batch, dot_loss, run)
    assert history.learning_rates == [0.2, 0.4, 0.4, 0.4]
    assert (history.steps, history.tokens) == ([1, 2, 3, 4], [5] * 4)
    assert len(history.losses) == len(history.grad_norms) == len(history.seconds) == 4
    assert all(s > 0 for s in history.seconds)


# --- one gradient, however it is computed ----------------------------------------------------------------
def tokens(step, n=8):
    """Rows with unequal numbers of labels, so that a mean of means would differ from the mean."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(3, 97, (n, 10), generator=g)
    lengths = torch.randint(4, 11, (n, 1), generator=g)
    mask = (torch.arange(10) < lengths).long()
    labels = torch.where((torch.arange(10) >= 2) & mask.bool(), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(tiny_llama, dropout=0.0):
    torch.manual_seed(3)
    return add_adapters(tiny_llama(), AdapterConfig(rank=4, dropout=dropout))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("parts", [2, 3, 4, 8, 11])
def test_accumulation_gives_what_one_big_batch_gives(tiny_llama, parts):
    # 3 and 11 parts of 8 rows are uneven, some of 11 empty
    whole, split = adapted(tiny_llama), adapted(tiny_llama)
    one = train(whole, tokens, sft_loss, config(2, eps=1e-3))
    many = train(split, tokens, sft_loss, config(2, eps=1e-3, gradient_accumulation_steps=parts))
    assert (weights(whole) - weights(split)).norm() <= 1e-6 * weights(whole).norm()
    assert many.losses == pytest.approx(one.losses, rel=1e-6)
    assert many.grad_norms == pytest.approx(one.grad_norms, rel=1e-5)


def test_training_lowers_the_loss_moves_only_adapters_and_draws_dropout_by_the_seed(tiny_llama):
    model = adapted(tiny_llama, dropout=0.1)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    history = train(model, lambda _: tokens(0), sft_loss, config(30, learning_rate=1e-2))
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(p.grad is None for p in model.parameters())

    def losses(seed):
        return train(adapted(tiny_llama, 0.5), tokens, sft_loss, config(seed=seed, learning_rate=0.01)).losses

    assert losses(0) == losses(0) != losses(1)


def test_leftover_gradients_do_not_count_and_a_parameter_the_loss_does_not_reach_stays_put():
    model, fresh = Line(), Line()
    model.w.grad, model.unused = torch.full((3,), 100.0), nn.Parameter(torch.ones(2))
    one, other = (train(each, numbered, dot_loss, config(2)) for each in (model, fresh))
    assert one.grad_norms == other.grad_norms
    assert torch.equal(model.w, fresh.w)
    assert torch.equal(model.unused, torch.ones(2))


# --- errors ----------------------------------------------------------------------------------------------
def test_a_batch_whose_labels_are_all_masked_is_named_by_its_step(tiny_llama):
    def batches(step):
        batch = tokens(step)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)} if step == 1 else batch

    model = adapted(tiny_llama)
    with pytest.raises(ValueError, match="step 1: the batch has nothing to learn from; every label is"):
        train(model, batches, sft_loss, config())
    assert not model.training


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_weight(bad):
    model, twin = Line(), Line()

    def batches(step):
        return rows([bad, 0, 0]) if step == 2 else numbered(step)

    said = r"step 2: the loss is (nan|inf|-inf); lower learning_rate=0.01"
    with pytest.raises(FloatingPointError, match=said):
        train(model, batches, dot_loss, config(5, learning_rate=0.01))
    train(twin, batches, dot_loss, config(2, learning_rate=0.01))
    assert torch.equal(model.w, twin.w)


def test_settings_that_do_not_train_and_a_model_without_trainable_parameters_are_refused():
    def setting(name, value):
        return TrainConfig(**{"steps": 5, name: value})

    counts = ("steps", "gradient_accumulation_steps", "checkpoint_every", "keep_checkpoints")
    frozen = Line().requires_grad_(False)
    complains(
        *((setting, (name, 0), f"{name}=0; it must be at least 1") for name in counts),
        *((setting, ("learning_rate", r), f"rate={r}; it must be above 0") for r in (0, -1e-3, math.nan)),
        (train, (frozen, numbered, dot_loss, config()), "nothing to train: no", "; call add_adapters"),
    )


# --- checkpoints -----------------------------------------------------------------------------------------
def checkpointed(folder, steps=6, **changes):
    return config(steps, checkpoint_dir=folder, checkpoint_every=2, learning_rate=0.01, **changes)


class Stop(Exception): ...


def until(stop):
    """Batches that end the run when step `stop` asks for its batch."""

    def batches(step):
        if step == stop:
            raise Stop
        return numbered(step)

    return batches


def test_a_stopped_run_goes_on_from_its_checkpoint_and_the_history_is_whole(tmp_path):
    whole, asked, run = Line(), [], checkpointed(tmp_path / "a")
    expected = train(whole, numbered, square_loss, checkpointed(tmp_path / "whole"))
    with pytest.raises(Stop):
        train(Line(), until(5), square_loss, run)
    again = Line((9.0, 9.0, 9.0))  # its own weights do not matter
    history = train(again, lambda step: asked.append(step) or numbered(step), square_loss, run)
    assert asked == [4, 5]
    assert torch.equal(again.w, whole.w)
    assert history.losses == expected.losses
    assert history.grad_norms == expected.grad_norms
    assert [len(values) for name, values in vars(history).items() if name != "metrics"] == [6] * 5
    done = Line((9.0, 9.0, 9.0))  # and once more, when nothing is left to do
    assert train(done, until(0), square_loss, run).losses == expected.losses
    assert torch.equal(done.w, whole.w)


def test_checkpoints_are_pruned_to_the_last_and_are_safetensors_with_no_pickle(tmp_path):
    model = Line()
    train(model, numbered, square_loss, checkpointed(tmp_path, steps=7, keep_checkpoints=3))
    *_, path = paths = sorted(tmp_path.iterdir())
    assert [p.name for p in paths] == [f"step-00000{n}.safetensors" for n in (4, 6, 7)]
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"generator.cpu", "parameter.w", "exp_avg.w", "exp_avg_sq.w", "step.w"}
        assert torch.equal(file.get_tensor("parameter.w"), model.w)
        header = file.metadata()
    assert set(header) == {"history", "settings", "threads", "torch"}
    assert json.loads(header["settings"])["learning_rate"] == 0.01
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it says, these bytes are no pickle
        list(pickletools.genops(path.read_bytes()))


def test_a_checkpoint_of_another_run_or_model_is_refused(tmp_path):
    model, other, run = Line(), nn.Module(), checkpointed(tmp_path)
    train(Line(), numbered, square_loss, run)
    other.v = nn.Parameter(torch.zeros(3))
    changes = [
        ({"learning_rate": 0.02}, "learning_rate 0.01, now 0.02"),
        ({"steps": 9}, "steps 6, now 9"),
        ({"seed": 4}, "seed 0, now 4"),
        ({"schedule": linear}, "schedule 'constant', now 'linear'"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 1, now 2"),
    ]
    cases = [(model, TrainConfig(**{**vars(run), **change}), f"run with other settings ({said})")
             for change, said in changes]  # fmt: skip
    parameters = "belongs to a model with other trainable parameters; choose another checkpoint_dir"
    cases += [(it, run, parameters) for it in (Line((1.0, 2.0)), other)]
    file = "step-000006.safetensors: belongs to a "
    complains(*((train, (it, numbered, square_loss, how), file, said) for it, how, said in cases))
    assert torch.equal(model.w, Line().w)


def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path):
    whole, model, run = Line(), Line(), checkpointed(tmp_path)
    train(whole, numbered, square_loss, run)
    newest = tmp_path / "step-000006.safetensors"
    data, foreign = newest.read_bytes(), save({"w": torch.zeros(3)})  # safetensors, but not of our making
    for damaged in (data[: len(data) // 2], b"", b"\xff" * 99, foreign):
        newest.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"step-000006.safetensors: damaged .*; delete it to resume"):
            train(model, numbered, square_loss, run)
        assert torch.equal(model.w, Line().w)
    newest.unlink()  # as it says
    train(model, numbered, square_loss, run)
    assert torch.equal(model.w, whole.w)


def test_a_full_disk_stops_the_run_and_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    real, writes = training.save_file, []

    def full(tensors, path, header):
        writes.append(path)
        if len(writes) == 2:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        real(tensors, path, header)

    monkeypatch.setattr(training, "save_file", full)
    with pytest.raises(OSError, match=r"step-000004.safetensors: no disk space to write it; free some"):
        train(Line(), numbered, square_loss, checkpointed(tmp_path, keep_checkpoints=1))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002.safetensors"]
    model, whole = Line(), Line()
    train(model, numbered, square_loss, checkpointed(tmp_path))
    train(whole, numbered, square_loss, config(6, learning_rate=0.01))
    assert torch.equal(model.w, whole.w)


def test_another_number_of_threads_is_said(tmp_path, capsys):
    with pytest.raises(Stop):
        train(Line(), until(3), square_loss, checkpointed(tmp_path))
    (path,) = tmp_path.iterdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        train(Line(), numbered, square_loss, checkpointed(tmp_path))
    finally:
        torch.set_num_threads(threads)
    assert f"{path.name} was written with {threads} threads, now {threads + 1}" in capsys.readouterr().out


# --- progress --------------------------------------------------------------------------------------------
def test_progress_is_a_line_a_tenth_in_a_log_one_bar_on_a_terminal_and_nothing_without(capsys, monkeypatch):
    train(Line(), numbered, square_loss, config(40, progress=True))
    out = capsys.readouterr().out
    assert "\r" not in out
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/40" for n in range(4, 41, 4)]
    assert all("loss " in line and "s/step" in line for line in lines)
    train(Line(), numbered, square_loss, config(5))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train(Line(), numbered, square_loss, config(5, progress=True))
    assert "5/5" in capsys.readouterr().out


def test_a_long_run_in_a_notebook_shows_its_bar_where_make_lab_asks_for_it(monkeypatch):
    bars = []

    class Bar(training.tqdm):
        def __init__(self, *steps, **options):
            bars.append(options["delay"])
            super().__init__(*steps, **options)

    monkeypatch.setattr(training, "tqdm", Bar)
    monkeypatch.setattr(training, "_in_notebook", lambda: True)
    train(Line(), numbered, square_loss, config(2))
    monkeypatch.setenv("SPARK_FT_PROGRESS", "1")
    train(Line(), numbered, square_loss, config(2))
    train(Line(), numbered, square_loss, config(2, progress=True))
    assert bars == [5.0, 0.0]


# --- kill -9, and two processes --------------------------------------------------------------------------
# Every run below is a process of its own: a fork of one that has torch loaded, to spare the import's seconds.
RUNS = r"""
import json, os, random, signal, sys, time
from pathlib import Path
os.environ["OMP_NUM_THREADS"] = "1"
import torch
from safetensors.torch import load_file
from torch import nn
from spark_ft import training
from spark_ft.methods.lora import LoRALinear
from spark_ft.training import TrainConfig, cosine, train

folder = Path(sys.argv[1])
torch.set_num_threads(1)
import torch._dynamo  # which an optimizer imports, and takes two seconds

def make():
    torch.manual_seed(0)
    first, last = LoRALinear(nn.Linear(12, 16), 4, dropout=0.3), LoRALinear(nn.Linear(16, 5), 3, dropout=0.3)
    model = nn.Sequential(first, nn.Tanh(), last)
    for layer in (first, last):
        nn.init.normal_(layer.lora_B, std=0.1)
    return model

def batches(step):
    g = torch.Generator().manual_seed(step)
    keep = torch.rand(6, 1, generator=g) < 0.7
    keep[0] = True
    return {"x": torch.randn(6, 12, generator=g), "y": torch.randn(6, 5, generator=g), "keep": keep}

class Loss:
    # it takes the mean of y over the step off: a part that knew its own rows alone would learn another thing
    metrics = ("mean", "rows")

    def whole_step(self, model, parts, everywhere):
        sums = sum((torch.stack([x["y"].sum(), torch.tensor(x["y"].numel())]) for x in parts), torch.zeros(2))
        total, count = everywhere(sums)
        return [{**x, "mean": (total / count).expand(len(x["y"]))} for x in parts]

    def __call__(self, model, batch):
        kept, y = batch["keep"][:, 0], batch["y"] - batch["mean"][:, None]
        value = ((model(batch["x"][kept]) - y[kept]) ** 2).sum()
        found = {"mean": batch["mean"].sum() / 6, "rows": torch.tensor(len(kept))}
        return value, int(kept.sum()), found

loss = Loss()

def config(where, **changes):
    return TrainConfig(steps=40, learning_rate=1e-2, warmup_steps=3, checkpoint_dir=where, checkpoint_every=3,
                       progress=False, **changes)

def forked(work):
    pid = os.fork()
    if pid == 0:
        signal.alarm(240)  # should the parent be gone
        try:
            work()
            os._exit(0)
        except BaseException as error:
            import traceback; traceback.print_exc()
            os._exit(1)
    return pid

def fate(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def tensors(where):
    return load_file(where / "step-000040.safetensors")
"""

KILLS = r'''
def run_until(step, phase, say):
    """Train, and wait for the axe at `phase` of `step`."""
    def stop(here, now=True):
        if here == phase and now:
            os.write(say, b"x")
            time.sleep(60)
    def at(s):
        stop("batch", s == step)
        return batches(s)
    def slow_loss(model, batch):
        value = loss(model, batch)
        stop("loss", torch.equal(batch["x"], batches(step)["x"]))
        return value
    slow_loss.metrics, slow_loss.whole_step = loss.metrics, loss.whole_step
    save, replace = training.save_file, os.replace
    def half_written(values, path, header):
        save(values, path, header)
        if phase == "write" and len(json.loads(header["history"])["losses"]) > step:
            os.truncate(path, path.stat().st_size // 2)
            stop("write")
    def put(a, b):
        stop("before rename", int(Path(b).stem[5:]) > step)
        replace(a, b)
        stop("after rename", int(Path(b).stem[5:]) > step)
    training.save_file, os.replace = half_written, put
    train(make(), at, slow_loss, config(folder / "killed"))

whole = forked(lambda: train(make(), batches, loss, config(folder / "whole")))
assert fate(whole) == 0
draw = random.Random(20261123)
killed = []
for phase in ["batch", "write", "loss", "after rename", "before rename", "batch", "write", "loss"]:
    done = max([int(p.stem[5:]) for p in (folder / "killed").glob("step-*.safetensors")] or [0])
    if done >= 36:
        break
    step = draw.randrange(done, min(done + 9, 36))
    hear, say = os.pipe()
    pid = forked(lambda: run_until(step, phase, say))
    os.close(say)
    assert os.read(hear, 1) == b"x", "the run ended before it was killed"
    os.kill(pid, signal.SIGKILL)
    assert fate(pid) == -signal.SIGKILL
    killed.append([step, phase, done])
assert fate(forked(lambda: train(make(), batches, loss, config(folder / "killed")))) == 0
a, b = tensors(folder / "whole"), tensors(folder / "killed")
print(json.dumps({
    "killed": killed,
    "tensors": len(a),
    "equal": sum(torch.equal(a[k], b[k]) for k in a) if a.keys() == b.keys() else -1,
    "left": sorted(p.name for p in (folder / "killed").iterdir()),
}))
'''

TWO = r"""
import socket
def alone():
    # without dropout: two processes draw their own masks
    model = make().eval()
    train_in_eval(model, folder / "one", 1)
def train_in_eval(model, where, parts):
    model.train = lambda mode=True: model  # dropout stays off
    history = train(model, batches, loss, config(where, gradient_accumulation_steps=parts, eps=1e-4))
    history = json.dumps([history.losses, history.grad_norms, *history.metrics.values()])
    (where / f"history-{os.environ.get('RANK', 0)}.json").write_text(history)
assert fate(forked(alone)) == 0
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
def member(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
                      GLOO_SOCKET_IFNAME="lo")
    train_in_eval(make().eval(), folder / "two", 2)
    import torch.distributed as dist
    (folder / f"world-{rank}").write_text(str(dist.get_world_size()))
pids = [forked(lambda rank=rank: member(rank)) for rank in range(2)]
assert [fate(pid) for pid in pids] == [0, 0]
a, b = tensors(folder / "one"), tensors(folder / "two")
distance = {k: ((a[k] - b[k]).norm() / a[k].norm()).item() for k in a if k.startswith("parameter.")}
read = lambda where, rank: json.loads((folder / where / f"history-{rank}.json").read_text())
print(json.dumps({"worlds": [(folder / f"world-{r}").read_text() for r in (0, 1)], "distance": distance,
                  "one": read("one", 0), "two": [read("two", 0), read("two", 1)],
                  "files": sorted(p.name for p in (folder / "two").iterdir())}))
"""


def in_processes(tmp_path, script) -> dict:
    env = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-c", RUNS + script, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_run_killed_again_and_again_ends_with_the_same_weights_bit_for_bit(tmp_path):
    """kill -9, with dropout on: between and inside steps, in a checkpoint's writing, around its rename."""
    found = in_processes(tmp_path, KILLS)
    assert len(found["killed"]) >= 4
    assert len({phase for _, phase, _ in found["killed"]}) >= 4
    assert any(done > 0 for _, _, done in found["killed"]), "no run was resumed from a checkpoint"
    # two layers' A and B, each with two moments and a step; the generator
    assert found["tensors"] == 4 * 4 + 1
    assert found["equal"] == found["tensors"]
    assert found["left"] == ["step-000039.safetensors", "step-000040.safetensors"]


def test_two_processes_give_what_one_gives(tmp_path):
    found = in_processes(tmp_path, TWO)
    assert found["worlds"] == ["2", "2"]
    assert max(found["distance"].values()) <= 1e-5
    for history in found["two"]:
        for ours, alone in zip(history, found["one"], strict=True):
            assert ours == pytest.approx(alone, rel=1e-4)
    assert "step-000040.safetensors" in found["files"]


def test_no_setting_of_accelerate_from_outside_changes_the_result(monkeypatch):
    batch = numbered(0)
    plain = train(Line(), lambda _: batch, square_loss, config(1))
    for name, value in (("GRADIENT_ACCUMULATION_STEPS", "4"), ("MIXED_PRECISION", "fp16")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
        AcceleratorState._reset_state(reset_partial_state=True)
        told = train(Line(), lambda _: batch, square_loss, config(1))
        assert (told.losses, told.grad_norms) == (plain.losses, plain.grad_norms)
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
