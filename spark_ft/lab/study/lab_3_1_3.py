"""What lab 3.1.3 shows: shaken passes and tickets, norms, padding, references, and stored runs with noise."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from spark_ft.adapters import AdapterConfig, adapters_disabled, add_adapters
from spark_ft.data.batches import collate_preferences, collate_sft, with_prompt
from spark_ft.data.records import read_records
from spark_ft.embedded import EMBEDDED
from spark_ft.evaluation import generate
from spark_ft.files import ROOT
from spark_ft.lab import plots
from spark_ft.lab.checks import is_stub
from spark_ft.lab.experiments.lab_3_1_3 import SETTINGS
from spark_ft.lab.experiments.runner import Measurement
from spark_ft.lab.study import show_table
from spark_ft.methods.neftune import neftune, neftune_noise
from spark_ft.models import load_model
from spark_ft.scoring import Batch, packed_row, sequence_logps, sft_loss
from spark_ft.stats import Estimate, mean_interval, paired_difference
from spark_ft.training import History, TrainConfig, train

ALPHA = 5.0
ALPHAS, CONTROL = SETTINGS["alphas"], SETTINGS["alpha of the control"]
READ, HELD, LENGTH = "loss on rows read", "held-out loss", "tokens an answer"
SHORT = TrainConfig(20, SETTINGS["learning_rate"], warmup_steps=3, progress=False)

Manager = Callable[[nn.Module, float], AbstractContextManager]


def fresh_model():
    """The embedded model with a new adapter, and its tokenizer; texts in padded rows, as in transformers."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    model.cpu().set_attn_implementation("sdpa")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        add_adapters(model, AdapterConfig(rank=16))
    return model, tokenizer


def train_noisy(manager: Manager, batches: Callable[[int], Batch]) -> History:
    """The lab's short run of seed 0 inside of a context manager's block."""
    model, _ = fresh_model()
    with manager(model, ALPHA):
        return train(model, batches, sft_loss, SHORT)


# ── what noise does ─────────────────────────────────────────────────────────────────────────────────────────


def show_passes(model: nn.Module, batch: Batch, times: int = 3) -> None:
    """The loss of the same batch, pass after pass: in training, in evaluation, and after the block."""

    def losses() -> list[float]:
        sums = [sft_loss(model, batch) for _ in range(times)]
        return [(total / count).item() for total, count in sums]

    with neftune(model, ALPHA):
        found = {"in the block, training": (model.train() and losses())}
        found["in the block, evaluation"] = model.eval() and losses()
    found["after the block, training"] = model.train() and losses()
    model.eval()
    show_table(
        [
            {"": where, **{f"pass {i + 1}": f"{loss:.4f}" for i, loss in enumerate(each)}}
            for where, each in found.items()
        ],
        f"loss of the same {len(batch['labels'])} tickets, nats per token; α = {ALPHA:g}",
    )
    quiet = {loss for where, each in found.items() if where != "in the block, training" for loss in each}
    assert len(quiet) == 1
    assert len(set(found["in the block, training"])) == times


@contextmanager
def shaken(model: nn.Module, alpha: float):
    """Shakes whatever the model reads, in evaluation too, but not what it writes."""

    def shake(layer, inputs, out: Tensor) -> Tensor:
        return neftune_noise(out, alpha) if out.shape[1] > 1 else out

    handle = model.get_input_embeddings().register_forward_hook(shake)
    try:
        yield
    finally:
        handle.remove()


def show_shaken(model: nn.Module, tokenizer, row: Mapping[str, str], alpha: float) -> None:
    """An order, the ticket that the model writes in silence, and the one after a shaken order."""
    chat = [{"role": "user", "content": row["prompt"]}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    embeddings = model.get_input_embeddings()(torch.tensor([ids]))
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        noise = (neftune_noise(embeddings, alpha) - embeddings).norm(dim=-1).mean()
        quiet = generate(model, tokenizer, [row["prompt"]], max_new_tokens=48)[0]
        with shaken(model, alpha):
            loud = generate(model, tokenizer, [row["prompt"]], max_new_tokens=48)[0]
    print(f"order        {row['prompt'].splitlines()[-1]}\nin silence   {quiet}\nα = {alpha:<9g}{loud}")
    share = (noise / embeddings.norm(dim=-1).mean()).item()
    print(f"noise on a token: {share:.0%} of the token's own norm, on average")


def show_zero(rows: Sequence[dict]) -> None:
    """Two steps without NEFTune, with α = 0, and with a hook that draws noise and adds none of it."""

    @contextmanager
    def draws_and_adds_nothing(model: nn.Module):
        hook = lambda layer, inputs, out: out + 0 * torch.empty_like(out).uniform_(-1, 1)  # noqa: E731
        handle = model.get_input_embeddings().register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def losses(noise: Callable[[nn.Module], AbstractContextManager]) -> list[float]:
        model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
        torch.manual_seed(0)
        add_adapters(model, AdapterConfig(rank=4, dropout=0.2))
        batch = collate_sft(rows[:2], tokenizer)
        with noise(model):
            return train(model, lambda step: batch, sft_loss, TrainConfig(2, 2e-3, progress=False)).losses

    found = {
        "no NEFTune": losses(nullcontext),
        "α = 0": losses(lambda model: neftune(model, 0)),
        "draws, adds nothing": losses(draws_and_adds_nothing),
    }
    for name, each in found.items():
        print(f"{name:<21}" + "  ".join(f"{loss:.6f}" for loss in each))
    assert found["α = 0"] == found["no NEFTune"], "α = 0 must be the baseline, bit for bit"
    assert found["draws, adds nothing"] != found["no NEFTune"]


def show_norms(lengths: Sequence[int] = (8, 32, 128, 512), width: int = 576, draws: int = 20) -> None:
    """The measured norm of the noise on a whole text and on one word, over the text's length."""
    generator = torch.Generator().manual_seed(0)

    def norms(length: int, bound: float) -> tuple[float, float]:
        noise = torch.empty(draws, length, width).uniform_(-bound, bound, generator=generator)
        return noise.flatten(1).norm(dim=1).mean().item(), noise.norm(dim=-1).mean().item()

    right = {n: norms(n, ALPHA / math.sqrt(n * width)) for n in lengths}
    wrong = {n: norms(n, ALPHA / math.sqrt(width)) for n in lengths}
    theory = ALPHA / math.sqrt(3)
    assert all(abs(whole / theory - 1) < 0.05 for whole, _ in right.values())
    fig, axes = plots.figure(
        f"Divided by √(L·d), a whole text's noise has the norm α/√3 = {theory:.2f}, however long it is",
        x="tokens of the text, L",
        columns=2,
        width=9.0,
        height=3.2,
        caption=f"α = {ALPHA:g}, d = {width}; mean of {draws} draws per point",
    )
    for ax, part, name in zip(axes, (0, 1), ("on the whole text", "on one word"), strict=True):
        ax.plot(lengths, [right[n][part] for n in lengths], **plots.LINE["yours"], label="α / √(L·d)")
        ax.plot(lengths, [wrong[n][part] for n in lengths], **plots.LINE["package"], label="√L forgotten")
        ax.set(xscale="log", yscale="log", ylabel="norm of the noise", title=name)
        ax.set_xticks(lengths, [str(n) for n in lengths])
        ax.minorticks_off()
        ax.legend()
    first, last = right[lengths[0]], right[lengths[-1]]
    plots.show(
        fig,
        alt=f"On a whole text the noise's norm stays at {theory:.2f}; with √L forgotten it rises to "
        f"{wrong[lengths[-1]][0]:.0f}. On one word it falls from {first[1]:.2f} to {last[1]:.2f}.",
    )


def show_padding(model: nn.Module, tokenizer, rows: Sequence[dict], draws: int = 20) -> None:
    """Norm of the noise on three texts' own tokens, with the rectangle's length and with their own."""
    by_length = sorted(rows, key=lambda row: len(row["prompt"]))
    batch = collate_sft([by_length[0], by_length[len(rows) // 2], by_length[-1]], tokenizer)
    own, real = batch["attention_mask"].sum(1), batch["attention_mask"].bool()
    found = {}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        embeddings = model.get_input_embeddings()(batch["input_ids"])
        for name, lengths in (("L of the rectangle", None), ("L of the text", own)):
            noise = [(neftune_noise(embeddings, ALPHA, lengths) - embeddings) for _ in range(draws)]
            norms = [(each * real[..., None]).flatten(1).norm(dim=1) for each in noise]
            found[name] = torch.stack(norms).mean(0)
    show_table(
        [
            {
                "tokens of the text": str(own[i].item()),
                "of the rectangle": str(real.shape[1]),
                **{f"noise with {name}": f"{norms[i]:.2f}" for name, norms in found.items()},
            }
            for i in range(len(own))
        ],
        f"norm of the noise on a text's own tokens, α = {ALPHA:g}; mean of {draws} draws",
    )


# ── the reference ───────────────────────────────────────────────────────────────────────────────────────────


def four_answers(tokenizer) -> Batch:
    """Four cooking questions with an answer each, one padded row per text."""
    pairs = read_records(ROOT / "data" / "kitchen_preferences" / "train.jsonl", "preference")[:4]
    return with_prompt(collate_preferences(pairs, tokenizer), "chosen")


def show_references(
    model: nn.Module, answers: Batch, yours: Callable[[nn.Module, Batch], Tensor], calls: int = 3
) -> float:
    """How far references are from the clean one, by call; returns the scatter under transformers' hook."""

    def usual(model: nn.Module, batch: Batch) -> Tensor:
        with torch.no_grad(), adapters_disabled(model):
            return sequence_logps(model, batch)[0]

    mode = model.training
    clean = usual(model.eval(), answers)
    hook = activate_neftune(model.train(), ALPHA)
    found = {"usual, transformers' hook": [usual(model, answers) - clean for _ in range(calls)]}
    try:
        found["yours, transformers' hook"] = [yours(model, answers) - clean for _ in range(calls)]
    except Exception as error:
        stub = isinstance(error, NotImplementedError) and is_stub(error)
        print(f"your reference {'is not written yet' if stub else 'raises an error'}, so it is not shown")
    deactivate_neftune(model, hook)
    with neftune(model, ALPHA):
        found["usual, spark_ft's neftune"] = [usual(model, answers) - clean for _ in range(calls)]
    model.train(mode)
    assert not any(each.any() for each in found["usual, spark_ft's neftune"])
    scatter = torch.stack(found["usual, transformers' hook"]).std().item()
    show_table(
        [
            {"reference": name, **{f"call {i + 1}": f"{x.abs().max():.2f}" for i, x in enumerate(each)}}
            for name, each in found.items()
        ],
        f"distance from the clean reference, at most of 4 answers (nats); α = {ALPHA:g}, in training mode",
    )
    return scatter


# ── stored runs ─────────────────────────────────────────────────────────────────────────────────────────────

Stored = Mapping[str, Measurement]


def _level(stored: Measurement, run: int | str, key: str) -> Estimate:
    return mean_interval(stored.values(run, key))


def show_by_heart(stored: Stored) -> None:
    """Loss on rows read and on held-out rows over α, for both sets."""
    tickets, answers = stored["tickets"], stored["answers"]
    gap = {a: _level(answers, a, HELD).value - _level(answers, a, READ).value for a in ALPHAS}
    last = ALPHAS[-1]
    fig, axes = plots.figure(
        f"Noise makes learning by heart harder: the answers' gap is {gap[0]:.1f} nats at α = 0, "
        f"{gap[last]:.1f} at {last}",
        x="α",
        columns=2,
        width=9.5,
        caption="48 rows read four times, 64 held out, all losses without noise; gap: held-out less "
        f"rows read; mean and 95% t interval; {tickets.origin()}",
    )
    said = []
    for ax, (kind, alphas) in zip(axes, (("tickets", [*ALPHAS, CONTROL]), ("answers", ALPHAS)), strict=True):
        for key, role, label in ((READ, "package", "rows read"), (HELD, "yours", "held-out rows")):
            points = [_level(stored[kind], alpha, key) for alpha in alphas]
            below = [min(p.value - p.low, 0.95 * p.value) for p in points]  # a log scale has no zero
            spread = [below, [p.high - p.value for p in points]]
            values = [p.value for p in points]
            ax.errorbar(range(len(alphas)), values, yerr=spread, capsize=3, label=label, **plots.LINE[role])
            each = ", ".join(f"{v:.2f} at {a}" for a, v in zip(alphas, values, strict=True))
            said.append(f"{kind}, {label}: {each}")
        ax.set_xticks(range(len(alphas)), [str(alpha) for alpha in alphas])
        ax.set_ylabel(f"{kind}: loss (nats per token)")
    untrained = _level(tickets, "untrained", HELD).value
    axes[0].axhline(untrained, color=plots.COLORS["reference"], linestyle="--", label="held-out, untrained")
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, None)
    for ax in axes:
        ax.legend(fontsize=8)
    plots.show(fig, alt=f"Loss over α. {'; '.join(said)}.")


def _change(stored: Measurement, key: str, run: int | str, against: int | str = 0) -> Estimate:
    return paired_difference(stored.values(run, key), stored.values(against, key))


def show_changes(stored: Stored) -> dict[str, str]:
    """What noise changed, seed by seed: held-out losses and the answers' length; and a table of all."""
    panels = {
        ("tickets", HELD): "tickets: held-out loss (nats)",
        ("answers", HELD): "answers: held-out loss (nats)",
        ("answers", LENGTH): "answers: tokens written",
    }
    changes = {
        (*panel, alpha): _change(stored[panel[0]], panel[1], alpha)
        for panel in panels
        for alpha in ALPHAS[1:]
    }
    words = {HELD: ("worse", "better"), LENGTH: ("longer", "shorter")}
    told = {key: change.verdict(*words[key[1]]) for key, change in changes.items()}
    seen = {
        kind: [f"α = {a} {told[kind, HELD, a]}" for a in ALPHAS[1:] if told[kind, HELD, a] in words[HELD]]
        for kind in stored
    }
    claims = "; ".join(f"{kind}: {', '.join(each) or 'cannot tell'}" for kind, each in seen.items())
    fig, axes = plots.figure(
        f"Held-out loss with noise, less without: {claims}",
        x="α",
        columns=3,
        width=10.0,
        caption="difference to α = 0, seed by seed: mean and 95% t interval, dots are seeds; "
        f"{stored['answers'].origin()}",
    )
    for ax, ((kind, key), label) in zip(axes, panels.items(), strict=True):
        base = stored[kind].values(0, key)
        for i, alpha in enumerate(ALPHAS[1:]):
            seeds = [a - b for a, b in zip(stored[kind].values(alpha, key), base, strict=True)]
            ax.plot([i + 0.15] * len(seeds), seeds, ".", color=plots.COLORS["other"])
            change = changes[kind, key, alpha]
            spread = [[change.value - change.low], [change.high - change.value]]
            ax.errorbar(i, change.value, yerr=spread, capsize=3, **plots.LINE["yours"])
        ax.axhline(0, color=plots.INK, linewidth=0.8)
        ax.set_xticks(range(len(ALPHAS) - 1), [str(alpha) for alpha in ALPHAS[1:]])
        ax.set_xlim(-0.5, len(ALPHAS) - 1.5)
        ax.set_ylabel(label)
    said = (
        f"{kind}, {key}, α {a}: {c.signed()}, {told[kind, key, a]}" for (kind, key, a), c in changes.items()
    )
    plots.show(fig, alt=f"Paired differences to no noise. {'; '.join(said)}.")
    return {
        f"{kind}, α={a}": f"{c.value:+.3f}, {told[kind, key, a]}"
        for (kind, key, a), c in changes.items()
        if key == HELD
    }


def show_gentle(answers: Measurement) -> dict[str, str]:
    """Noise and a gentler rate, held against each other on the answers."""
    best = min(ALPHAS[1:], key=lambda alpha: _change(answers, HELD, alpha).value)
    pairs = {
        f"α = {best} − none, hot rate": (best, 0),
        "none, gentle rate − none, hot rate": ("0, gentle", 0),
        f"α = {best}, hot rate − none, gentle rate": (best, "0, gentle"),
        "α = 15 − none, gentle rate": ("15, gentle", "0, gentle"),
    }
    found = {name: _change(answers, HELD, *pair) for name, pair in pairs.items()}
    told = {name: change.verdict("worse", "better") for name, change in found.items()}
    show_table(
        [
            {"difference": name, "held-out loss": change.signed(), "verdict": told[name]}
            for name, change in found.items()
        ],
        f"answers, nats per token, by seed; mean and 95% t interval; hot: {SETTINGS['learning_rate']:g}, "
        f"gentle: {SETTINGS['gentle learning_rate']:g}; {answers.origin()}",
    )
    return {name: f"{found[name].value:+.3f}, {told[name]}" for name in list(pairs)[1:]}


def show_drowned(tickets: Measurement) -> float:
    """The control: noise that drowns the words; returns the most tickets right, in percent."""
    right = {alpha: tickets.values(alpha, "exact match") for alpha in (0, CONTROL)}
    show_table(
        [
            {
                "": name,
                "held-out loss": _level(tickets, run, HELD),
                "tickets right, seed by seed": ", ".join(f"{x:.0%}" for x in right.get(run, [])) or "–",
            }
            for name, run in (
                ("untrained", "untrained"),
                ("no noise", 0),
                (f"words drowned, α = {CONTROL}", CONTROL),
            )
        ],
        f"64 held-out tickets; mean and 95% t interval; {tickets.origin()}",
    )
    assert max(right[CONTROL]) == 0, "noise that drowns the words must teach nothing, or it never arrived"
    return 100 * max(right[CONTROL])


def show_shared(rows: Sequence[dict]) -> None:
    """How many tokens of a batch are computed without noise, and with it."""
    model, tokenizer = load_model(EMBEDDED, dtype=torch.float32)
    batch = collate_sft(rows[:4], tokenizer)
    quiet = packed_row(model.train(), batch)
    with neftune(model, ALPHA):
        loud = packed_row(model, batch)
    if quiet is None:
        print("on this device batches are padded, and nothing is shared either way")
        return
    every = int(batch["attention_mask"].sum())
    print(
        f"4 tickets, {every} tokens: {quiet.ids.shape[1]} computed without noise, {loud.ids.shape[1]} with it"
    )
