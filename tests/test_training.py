"""The loop: exact resume after kill -9, one gradient however it is computed, rates and steps derived by hand, clear errors."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from torch import nn

from spark_ft import training
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


# --- the step, by hand ---------------------------------------------------------------------------------------------


def test_the_first_adamw_step_by_hand():
    # Σ loss / count over the rows (3, −4, 0) and (1, 0, 0) has the gradient (2, −2, 0). At the first step Adam's corrected
    # moments are g and g², so w moves by −lr · g/(|g| + eps); weight decay shrinks w by lr · wd first.
    model = Line()
    history = train(
        model, lambda _: rows([3, -4, 0], [1, 0, 0]), dot_loss, config(1, learning_rate=0.1, weight_decay=0.5)
    )
    decayed = torch.tensor([1.0, -2.0, 0.5]) * (1 - 0.1 * 0.5)
    assert torch.allclose(model.w, decayed - 0.1 * torch.tensor([1.0, -1.0, 0.0]), atol=1e-6)
    # (3 + 8) and 1, over two rows; the norm is that of (2, −2, 0) before clipping to 1
    assert history.losses == [pytest.approx(6.0)]
    assert history.grad_norms == [pytest.approx(math.sqrt(8))]


def test_clipping_scales_the_gradient_down_to_the_norm_and_never_up():
    # large eps makes Adam's first step lr · g/(|g| + eps) tell how large g was
    def moved(max_grad_norm, scale):
        model = Line((0.0, 0.0, 0.0))
        train(
            model,
            lambda _: rows([3 * scale, 4 * scale, 0]),
            dot_loss,
            config(1, learning_rate=1.0, eps=1.0, max_grad_norm=max_grad_norm, weight_decay=0.0),
        )
        return -model.w.detach()

    def adam(g):
        return torch.tensor(g) / (torch.tensor(g).abs() + 1.0)

    assert torch.allclose(moved(1.0, 10), adam([0.6, 0.8, 0.0]), atol=1e-5)
    assert torch.allclose(moved(2.5, 10), adam([1.5, 2.0, 0.0]), atol=1e-5)
    assert torch.allclose(moved(None, 10), adam([30.0, 40.0, 0.0]), atol=1e-5)
    assert torch.allclose(moved(1.0, 0.01), adam([0.03, 0.04, 0.0]), atol=1e-5)


def test_the_whole_run_is_torchs_adamw_on_the_mean_loss():
    model, twin = Line(), Line()
    run = config(
        7,
        learning_rate=0.05,
        warmup_steps=2,
        schedule=cosine,
        weight_decay=0.1,
        betas=(0.8, 0.9),
        max_grad_norm=0.7,
    )
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


# --- rates ---------------------------------------------------------------------------------------------------------


def test_rates_by_hand():
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


def test_the_history_says_what_each_step_used():
    run = config(4, learning_rate=0.4, warmup_steps=2)
    batch = {**numbered(0, 2), "attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    history = train(Line(), lambda _: batch, dot_loss, run)
    assert history.learning_rates == [0.2, 0.4, 0.4, 0.4]
    assert history.steps == [1, 2, 3, 4]
    assert history.tokens == [5] * 4
    assert len(history.losses) == len(history.grad_norms) == len(history.seconds) == 4
    assert all(s > 0 for s in history.seconds)


# --- one gradient, however it is computed --------------------------------------------------------------------------


def tokens(step, n=8):
    """Rows with unequal numbers of labels, so that a mean of means would differ from the mean."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(3, 97, (n, 10), generator=g)
    lengths = torch.randint(4, 11, (n, 1), generator=g)
    mask = (torch.arange(10) < lengths).long()
    labels = torch.where((torch.arange(10) >= 2) & mask.bool(), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def adapted(tiny_llama, dropout=0.0):
    from spark_ft.adapters import AdapterConfig, add_adapters

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


def test_the_first_loss_is_the_mean_negative_log_probability(tiny_llama):
    batch = tokens(0)
    with torch.no_grad():
        plain = tiny_llama(packed=False)
        logps = torch.log_softmax(
            plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits, -1
        )
    by_hand = [
        -logps[b, t - 1, label].item()
        for b, row in enumerate(batch["labels"])
        for t, label in enumerate(row)
        if label != -100
    ]
    history = train(adapted(tiny_llama), tokens, sft_loss, config(1))
    assert history.losses[0] == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)
    assert history.tokens == [batch["attention_mask"].sum()]


def test_training_lowers_the_loss_and_leaves_the_model_in_eval_mode_with_only_adapters_moved(tiny_llama):
    model = adapted(tiny_llama, dropout=0.1)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    history = train(model, lambda _: tokens(0), sft_loss, config(30, learning_rate=1e-2))
    assert history.losses[-1] < 0.7 * history.losses[0]
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)
    assert all(p.grad is None for p in model.parameters())


def test_dropout_follows_the_seed(tiny_llama):
    first, same, other = (
        train(
            adapted(tiny_llama, dropout=0.5), tokens, sft_loss, config(3, seed=seed, learning_rate=0.01)
        ).losses
        for seed in (0, 0, 1)
    )
    assert first == same
    assert first != other


def test_gradients_left_over_from_an_interrupted_run_do_not_count():
    model, fresh = Line(), Line()
    model.w.grad = torch.full((3,), 100.0)
    assert (
        train(model, numbered, dot_loss, config(1)).grad_norms
        == train(fresh, numbered, dot_loss, config(1)).grad_norms
    )
    assert torch.equal(model.w, fresh.w)


def test_a_parameter_the_loss_does_not_reach_stays_put():
    model = Line()
    model.unused = nn.Parameter(torch.ones(2))
    train(model, numbered, dot_loss, config(2))
    assert torch.equal(model.unused, torch.ones(2))


# --- errors --------------------------------------------------------------------------------------------------------


def test_nothing_to_train_is_said_before_anything_starts():
    with pytest.raises(
        ValueError, match=r"nothing to train: no parameter requires gradients; call add_adapters"
    ):
        train(Line().requires_grad_(False), numbered, dot_loss, config())


def test_a_batch_whose_labels_are_all_masked_is_named_by_its_step(tiny_llama):
    def batches(step):
        batch = tokens(step)
        return {**batch, "labels": torch.full_like(batch["labels"], -100)} if step == 1 else batch

    model = adapted(tiny_llama)
    with pytest.raises(
        ValueError, match="step 1: the batch has nothing to learn from; every label is masked out"
    ):
        train(model, batches, sft_loss, config())
    assert not model.training


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_spoils_no_weight(bad):
    model, twin = Line(), Line()

    def batches(step):
        return rows([bad, 0, 0]) if step == 2 else numbered(step)

    with pytest.raises(
        FloatingPointError, match=r"step 2: the loss is (nan|inf|-inf); lower learning_rate=0.01"
    ):
        train(model, batches, dot_loss, config(5, learning_rate=0.01))
    train(twin, batches, dot_loss, config(2, learning_rate=0.01))
    assert torch.equal(model.w, twin.w)


@pytest.mark.parametrize(
    "name", ["steps", "gradient_accumulation_steps", "checkpoint_every", "keep_checkpoints"]
)
def test_zero_of_anything_is_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0; it must be at least 1"):
        TrainConfig(**{"steps": 5, name: 0})


@pytest.mark.parametrize("rate", [0, -1e-3, math.nan])
def test_a_learning_rate_that_does_not_learn_is_refused(rate):
    with pytest.raises(ValueError, match=r"learning_rate=.*; it must be above 0"):
        TrainConfig(5, learning_rate=rate)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def checkpointed(folder, steps=6, **changes):
    return config(steps, checkpoint_dir=folder, checkpoint_every=2, learning_rate=0.01, **changes)


class Stop(Exception):
    pass


def until(stop):
    """Batches that end the run when step `stop` asks for its batch."""

    def batches(step):
        if step == stop:
            raise Stop
        return numbered(step)

    return batches


def test_a_stopped_run_goes_on_from_its_checkpoint_and_the_history_is_whole(tmp_path):
    whole = Line()
    expected = train(whole, numbered, square_loss, checkpointed(tmp_path / "whole"))
    model, asked = Line(), []
    with pytest.raises(Stop):
        train(model, until(5), square_loss, checkpointed(tmp_path / "a"))
    again = Line((9.0, 9.0, 9.0))  # its own weights do not matter
    history = train(
        again, lambda step: asked.append(step) or numbered(step), square_loss, checkpointed(tmp_path / "a")
    )
    assert asked == [4, 5]
    assert torch.equal(again.w, whole.w)
    assert history.losses == expected.losses
    assert history.grad_norms == expected.grad_norms
    assert [len(values) for values in vars(history).values()] == [6] * 5
    # and once more, when nothing is left to do
    done = Line((9.0, 9.0, 9.0))
    assert train(done, until(0), square_loss, checkpointed(tmp_path / "a")).losses == expected.losses
    assert torch.equal(done.w, whole.w)


def test_checkpoints_are_pruned_and_one_is_written_at_the_end(tmp_path):
    train(Line(), numbered, square_loss, checkpointed(tmp_path, steps=7, keep_checkpoints=3))
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-00000{n}.safetensors" for n in (4, 6, 7)]


def test_a_checkpoint_is_one_safetensors_file_with_no_pickle(tmp_path):
    import pickletools

    model = Line()
    train(model, numbered, square_loss, checkpointed(tmp_path, steps=2))
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"generator.cpu", "parameter.w", "exp_avg.w", "exp_avg_sq.w", "step.w"}
        assert torch.equal(file.get_tensor("parameter.w"), model.w)
        header = file.metadata()
    assert set(header) == {"history", "settings", "threads", "torch"}
    assert json.loads(header["settings"])["learning_rate"] == 0.01
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it says, these bytes are no pickle
        list(pickletools.genops(path.read_bytes()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.02}, r"learning_rate 0.01, now 0.02"),
        ({"steps": 9}, r"steps 6, now 9"),
        ({"seed": 4}, r"seed 0, now 4"),
        ({"schedule": linear}, r"schedule 'constant', now 'linear'"),
        ({"gradient_accumulation_steps": 2}, r"gradient_accumulation_steps 1, now 2"),
    ],
)
def test_a_checkpoint_of_a_run_with_other_settings_is_refused(tmp_path, change, said):
    train(Line(), numbered, square_loss, checkpointed(tmp_path))
    model = Line()
    with pytest.raises(
        ValueError, match=rf"step-000006.safetensors: belongs to a run with other settings \({said}\)"
    ):
        train(model, numbered, square_loss, TrainConfig(**{**vars(checkpointed(tmp_path)), **change}))
    assert torch.equal(model.w, Line().w)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    train(Line(), numbered, square_loss, checkpointed(tmp_path))
    with pytest.raises(
        ValueError, match="belongs to a model with other trainable parameters; choose another checkpoint_dir"
    ):
        train(Line((1.0, 2.0)), numbered, square_loss, checkpointed(tmp_path))
    other = nn.Module()
    other.v = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="belongs to a model with other trainable parameters"):
        train(other, numbered, square_loss, checkpointed(tmp_path))


@pytest.mark.parametrize("damage", ["half", "empty", "garbage", "foreign"])
def test_a_damaged_checkpoint_is_named_with_the_way_out(tmp_path, damage):
    from safetensors.torch import save_file

    whole = Line()
    train(whole, numbered, square_loss, checkpointed(tmp_path))
    newest = tmp_path / "step-000006.safetensors"
    if damage == "foreign":  # safetensors, but not of our making
        save_file({"w": torch.zeros(3)}, newest)
    else:
        data = newest.read_bytes()
        newest.write_bytes({"half": data[: len(data) // 2], "empty": b"", "garbage": b"\xff" * 99}[damage])
    model = Line()
    with pytest.raises(ValueError, match=r"step-000006.safetensors: damaged .*; delete it to resume"):
        train(model, numbered, square_loss, checkpointed(tmp_path))
    assert torch.equal(model.w, Line().w)
    newest.unlink()  # as it says
    train(model, numbered, square_loss, checkpointed(tmp_path))
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


# --- progress ------------------------------------------------------------------------------------------------------


def test_in_a_log_progress_is_a_line_a_tenth_and_never_a_carriage_return(capsys):
    train(Line(), numbered, square_loss, config(40, progress=True))
    out = capsys.readouterr().out
    assert "\r" not in out
    lines = out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{n}/40" for n in range(4, 41, 4)]
    assert all("loss " in line and "s/step" in line for line in lines)


def test_on_a_terminal_progress_is_one_bar_with_the_loss(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    train(Line(), numbered, square_loss, config(5, progress=True))
    assert "5/5" in capsys.readouterr().out


def test_without_progress_nothing_is_printed(capfd):
    train(Line(), numbered, square_loss, config(5))
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")


# --- kill -9, and two processes ------------------------------------------------------------------------------------

# Every run below is a process of its own (a fork of one that has torch loaded, to spare the seconds of importing it).
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

def loss(model, batch):
    kept = batch["keep"][:, 0]
    return ((model(batch["x"][kept]) - batch["y"][kept]) ** 2).sum(), int(kept.sum())

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
def hang(say):
    os.write(say, b"x")
    time.sleep(60)

def run_until(step, phase, say):
    """Train, and wait for the axe at `phase` of `step`."""
    def stop(*_):
        hang(say)
    def at(s):
        if s == step and phase == "batch":
            stop()
        return batches(s)
    def slow_loss(model, batch):
        value = loss(model, batch)
        if phase == "loss" and torch.equal(batch["x"], batches(step)["x"]):
            stop()
        return value
    real = training.save_file
    def half_written(values, path, header):
        real(values, path, header)
        if phase == "write" and len(json.loads(header["history"])["losses"]) > step:
            os.truncate(path, path.stat().st_size // 2)
            stop()
    training.save_file = half_written
    replace = os.replace
    def put(a, b):
        if phase == "before rename" and int(Path(b).stem[5:]) > step:
            stop()
        replace(a, b)
        if phase == "after rename" and int(Path(b).stem[5:]) > step:
            stop()
    os.replace = put
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
    (where / f"history-{os.environ.get('RANK', 0)}.json").write_text(json.dumps([history.losses, history.grad_norms]))
assert fate(forked(alone)) == 0
with socket.socket() as s:
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
def member(rank):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo")
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
    env |= {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", RUNS + script, str(tmp_path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_a_run_killed_again_and_again_ends_with_the_same_weights_bit_for_bit(tmp_path):
    """kill -9, with dropout on, between and inside steps, in the middle of a checkpoint's writing and around its rename."""
    found = in_processes(tmp_path, KILLS)
    assert len(found["killed"]) >= 4
    assert len({phase for _, phase, _ in found["killed"]}) >= 4
    assert any(done > 0 for _, _, done in found["killed"]), "no run was resumed from a checkpoint"
    assert (
        found["tensors"] == 4 * 4 + 1
    )  # two layers' A and B, each with two moments and a step; the generator
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
