"""Preference losses in `train`: the formula on plain rows, the kept reference, and one step's numbers."""

import copy
import json
import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from helpers import complains, pair_batch, thumb_batch, tiny_llama, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from spark_ft import (
    AdapterConfig,
    ReferenceLogps,
    TrainConfig,
    adapters_disabled,
    add_adapters,
    feedback_loss,
    merge_adapters,
    neftune,
    preference_loss,
    train,
    with_prompt,
)
from spark_ft import preferences as pr
from spark_ft.adapters import adapted_layers
from spark_ft.methods.preference import dpo_loss, ipo_loss, kto_loss, orpo_loss, simpo_loss
from spark_ft.reference import Fingerprint, _hashes
from spark_ft.scoring import evaluating, head_path

PAIR_LOSSES = (dpo_loss, ipo_loss, partial(simpo_loss, beta=2.5), partial(orpo_loss, weight=0.7))


def adapted(model=None, seed=3, **changes):
    """A tiny model with adapters that have moved, so that the policy is not the reference."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = add_adapters(model or tiny_llama(), AdapterConfig(**{"rank": 4, **changes}))
        for layer in adapted_layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.1)
    return model


def config(steps=3, **changes):
    return TrainConfig(**{"steps": steps, "progress": False, "learning_rate": 1e-2, "eps": 1e-3, **changes})


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


def gradient(model):
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@torch.no_grad()
def plain_logps(model, batch, side, prompt=False):
    """From whole logits in float64: Σ log p of the answer's tokens, or of all but the first; counts."""
    model, rows = copy.deepcopy(model).double(), with_prompt(batch, side)
    model.set_attn_implementation("eager")
    with evaluating(model):
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    if prompt:
        rows["labels"] = torch.where(rows["attention_mask"] > 0, rows["input_ids"], -100)
    ids = rows["labels"][:, 1:]
    logps = logits[:, :-1].log_softmax(-1).gather(2, ids.clamp(min=0)[..., None])[..., 0] * (ids >= 0)
    return logps.sum(1), (ids >= 0).sum(1)


def plain(model, batch, sides):
    """For each side: policy, reference, tokens."""
    with adapters_disabled(model):
        before = [plain_logps(model, batch, side)[0] for side in sides]
    return [(*plain_logps(model, batch, side), ref) for side, ref in zip(sides, before, strict=True)]


# --- the formula, on plain rows --------------------------------------------------------------------------
def test_a_pair_loss_is_its_function_on_plain_rows_and_so_are_its_metrics():
    model, batch = adapted(), pair_batch()
    (w, w_n, ref_w), (r, r_n, ref_r) = plain(model, batch, ("chosen", "rejected"))
    whole, whole_n = plain_logps(model, batch, "chosen", prompt=True)
    refs, means = (ref_w, ref_r), (w / w_n, r / r_n)
    nll = -whole.sum() / whole_n.sum()
    for loss, given, beta in (
        (dpo_loss, (w, r, *refs), 0.1),
        (ipo_loss, (*means, ref_w / w_n, ref_r / r_n), 0.1),
        (PAIR_LOSSES[2], means, 2.5),
        (PAIR_LOSSES[3], (*means, nll), 1),
    ):
        total, count, metrics = preference_loss(loss)(model, batch)
        assert count == 3
        assert total.item() == pytest.approx(loss(*given).sum().item(), rel=1e-5)
        zero = given[2:] if len(given) == 4 else (0, 0)
        ours = [beta * (x - ref) for x, ref in zip(given[:2], zero, strict=True)]
        expected = {
            "chosen_reward": ours[0].mean(),
            "rejected_reward": ours[1].mean(),
            "margin": (ours[0] - ours[1]).mean(),
            "accuracy": (ours[0] > ours[1]).double().mean(),
            "chosen_logp": w.sum() / w_n.sum(),
            "rejected_logp": r.sum() / r_n.sum(),
            "kl": (w + r - ref_w - ref_r).mean() / 2 if len(given) == 4 else torch.tensor(math.nan),
            "length": (w_n + r_n).double().mean() / 2,
        }
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4, nan_ok=True), name


def test_a_thumb_loss_is_its_function_on_plain_rows_and_so_are_its_metrics():
    model, batch = adapted(seed=5), thumb_batch(seed=2)
    (y, n, ref), (mis, _, ref_mis) = plain(model, batch, ("completion", "mismatched"))
    kl, up = (mis - ref_mis).mean(), batch["desirable"]
    assert kl > 0.1  # or the clamp would hide it
    loss = partial(kto_loss, beta=0.2, undesirable_weight=0.3)
    total, count, metrics = feedback_loss(loss)(model, batch)
    assert count == 4
    assert total.item() == pytest.approx(loss(y, ref, up, kl).sum().item(), rel=1e-5)
    rewards = 0.2 * (y - ref)
    expected = {
        "chosen_reward": rewards[up].mean(),
        "rejected_reward": rewards[~up].mean(),
        "margin": rewards[up].mean() - rewards[~up].mean(),
        "accuracy": ((rewards > 0.2 * kl) == up).double().mean(),
        "chosen_logp": y[up].sum() / n[up].sum(),
        "rejected_logp": y[~up].sum() / n[~up].sum(),
        "kl": kl,
        "length": n.double().mean(),
    }
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-4), name
    batch["desirable"] = torch.ones(4, dtype=torch.bool)
    total, _, metrics = feedback_loss(loss)(model, batch)
    missing = {name for name, value in metrics.items() if value.isnan()}
    assert missing == {"rejected_reward", "rejected_logp", "margin"}
    assert total.isfinite()


def test_the_gradient_is_that_of_the_function_on_plain_rows():
    for loss, batch in (*((x, pair_batch()) for x in PAIR_LOSSES), (kto_loss, thumb_batch(seed=2))):
        made, found = (feedback_loss if loss is kto_loss else preference_loss), []
        packed = adapted()
        plain = copy.deepcopy(packed).double()
        plain.set_attn_implementation("eager")
        for model in (packed, plain):
            value, count, _ = made(loss)(model, batch)
            (value / count).backward()
            found.append(gradient(model).double())
        ours, theirs = found
        assert (ours - theirs).norm() < 1e-5 * theirs.norm(), loss


# --- a learner's own function ----------------------------------------------------------------------------
def test_a_function_of_ones_own_gets_what_its_names_ask_for_and_sums_unless_told():
    given = {}

    def mine(rejected, chosen, beta=0.3):
        given.update(chosen=chosen, rejected=rejected)
        return beta * (rejected - chosen)

    model, batch = adapted(), pair_batch()
    total, _, metrics = preference_loss(mine)(model, batch)
    (w, n, _), (r, _, _) = plain(model, batch, ("chosen", "rejected"))
    assert torch.allclose(given["chosen"].double(), w, rtol=1e-5)
    assert total.item() == pytest.approx(0.3 * (r - w).sum().item(), rel=1e-4)
    assert metrics["chosen_reward"].item() == pytest.approx(0.3 * w.mean().item(), rel=1e-5)
    preference_loss(mine, per_token=True)(model, batch)
    assert torch.allclose(given["chosen"].double(), w / n, rtol=1e-5)
    partly = partial(partial(simpo_loss, beta=3), gamma=0)
    for loss in (ipo_loss, partly, orpo_loss, mine, dpo_loss):
        assert preference_loss(loss).per_token is (loss not in (mine, dpo_loss))
    bound = preference_loss(partial(orpo_loss, nll=0.0))
    assert bound(model, batch)[0].isfinite()
    assert bound.wants == ["chosen", "rejected"]


def test_what_cannot_be_given_or_would_move_the_reference_is_refused_with_the_mend():
    batch = pair_batch()
    free, bare = adapted(), tiny_llama().requires_grad_(False)

    def mean(chosen, rejected):
        return (rejected - chosen).mean()

    free.model.norm.weight.requires_grad_(True)
    mend = "give reference=ReferenceLogps(a frozen copy of the model)"
    complains(
        (preference_loss, (lambda chosen, rejected, margin: chosen,), 'wants "margin"', "functools.partial"),
        (
            preference_loss,
            (kto_loss,),
            'kto_loss wants "policy", which is none of chosen, rejected',
        ),
        (
            feedback_loss,
            (dpo_loss,),
            'dpo_loss wants "chosen", which is none of policy, reference',
        ),
        (preference_loss, (lambda ref_chosen, ref_rejected: ref_chosen,), "teaches nothing"),
        (preference_loss(mean), (free, batch), "mean returned () for 3 examples; return a loss for each"),
        (preference_loss(dpo_loss), (free, batch), "model.norm.weight trains beside the adapters", mend),
        (preference_loss(dpo_loss), (bare, batch), "without adapters the model has no reference", mend),
    )
    assert preference_loss(simpo_loss)(tiny_llama(), batch)[0].isfinite()  # needs none
    frozen = tiny_llama()
    loss = preference_loss(dpo_loss, reference=ReferenceLogps(frozen))
    total, count, _ = loss(tiny_llama(), batch)
    assert total.item() / count == pytest.approx(math.log(2), rel=1e-5)
    assert loss(tiny_llama(seed=1), batch)[0].item() != pytest.approx(total.item(), rel=1e-3)


# --- the reference ---------------------------------------------------------------------------------------
@contextmanager
def passes(model):
    """The rows of every pass through the model, and whether gradients, adapters and training were on."""
    seen, layer = [], next(iter(adapted_layers(model).values()))

    def note(backbone, args, kwargs):
        seen.append((torch.is_grad_enabled(), layer.enabled, backbone.training))

    handle = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def test_the_reference_is_computed_once_per_sequence_in_eval_without_gradients_and_adapters():
    model, loss = adapted().train(), preference_loss(dpo_loss)
    first, second = pair_batch(), pair_batch(seed=1)
    policy, reference = (True, True, True), (False, False, False)
    head_path(model)  # which takes a pass of its own, once
    mixed = {name: torch.cat([first[name][:1], x[:2]]) for name, x in second.items()}
    for batch, expected in ((first, [reference, policy]), (first, [policy]), (mixed, [reference, policy])):
        with passes(model) as seen:
            loss(model, batch)
        assert seen == expected
    assert len(loss.reference.kept) == 2 * 3 + 2 * 2
    assert model.training
    moved = {**first, "prompt_ids": first["prompt_ids"].clone()}  # one token goes from prompt to answer
    whole = loss.reference(model, [first], ("chosen",))
    assert torch.equal(whole[0], loss.reference(model, [moved], ("chosen",))[0])
    kept, thumbs = len(loss.reference.kept), feedback_loss(kto_loss, reference=loss.reference)
    for expected in ([reference, (False, True, False), policy], [(False, True, False), policy]):
        with passes(model) as seen:  # KTO's mismatched pairs are scored by the policy in every step
            thumbs(model, thumb_batch())
        assert seen == expected
    assert len(loss.reference.kept) == kept + 8


def test_where_the_prompt_ends_belongs_to_the_key():
    ids, mask = torch.tensor([[5, 6, 7, 8]]), torch.ones(1, 4, dtype=torch.long)

    def split(at):
        parts = {"prompt": slice(at), "chosen": slice(at, 4)}
        return {
            f"{name}_{x}": y[:, cut] for name, cut in parts.items() for x, y in (("ids", ids), ("mask", mask))
        }

    keys = [_hashes(split(at), "chosen", b"") for at in (1, 2, 3)]
    assert len({key for (key,) in keys}) == 3


def test_weights_that_changed_in_any_way_are_another_reference_and_adapters_are_not():
    model, look = adapted(), Fingerprint()
    before = look(model)
    train(model, lambda _: pair_batch(), preference_loss(dpo_loss), config(2))
    assert look(model) == before == Fingerprint()(model) == look(copy.deepcopy(model))

    def in_place(x):
        x.mul_(2)

    def behind_the_back(x):  # no version is counted
        x.data[0, 1] += 1e-3

    def swapped(x):
        x.data[[0, 1]] = x.data[[1, 0]]

    def negated(x):
        x.data.neg_()

    seen, weight = {before}, model.model.layers[1].mlp.down_proj.base.weight
    for change in (in_place, behind_the_back, swapped, negated):
        with torch.no_grad():
            change(weight)
        seen.add(look(model))
        assert look(model) == Fingerprint()(model)
    model.model.layers[0].mlp.up_proj.base.weight = nn.Parameter(torch.zeros(48, 32), requires_grad=False)
    seen.add(look(model))
    merge_adapters(model)
    seen |= {look(x) for x in (adapted(model), tiny_llama(seed=1))}
    seen.add(look(model.double()))
    assert len(seen) == 9


def test_a_large_weight_written_behind_the_back_is_seen_at_once_or_where_it_is_one_number_in_64_steps():
    model, look = nn.Linear(600, 600, bias=False), Fingerprint()
    before = look(model)
    model.weight.data[3, :128] += 1e-3
    assert look(model) != before
    before = look(model)
    model.weight.data[5, 7] += 1e-3
    assert {look(model) for _ in range(64)} - {before}


def test_a_stale_reference_is_never_used():
    model, batch, loss = adapted(), pair_batch(), preference_loss(dpo_loss)
    loss(model, batch)
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.base.weight.data.add_(0.05)
    assert loss(model, batch)[0].item() == preference_loss(dpo_loss)(model, batch)[0].item()
    merge_adapters(model)
    adapted(model, seed=9)
    assert loss(model, batch)[0].item() == preference_loss(dpo_loss)(model, batch)[0].item()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_neither_dropout_nor_neftune_reaches_the_reference_or_the_kl_and_dropout_is_to_be_asked_for(kind):
    targets = "all-linear" if kind == "llama" else ("lm_head",)
    # gpt2 drops by itself, 0.1 in three places
    model = adapted(tiny_model(kind), targets=targets, dropout=0.5).eval()
    batch, thumbs = pair_batch(), thumb_batch()
    (quiet,), kto = ReferenceLogps()(model, [batch], ("chosen", "rejected")), feedback_loss(kto_loss)
    (still,) = kto.whole_step(model, [thumbs], lambda x: x)
    value = preference_loss(dpo_loss)(model, batch)[0]
    model.train()
    with neftune(model, 15.0):
        assert torch.equal(ReferenceLogps()(model, [batch], ("chosen", "rejected"))[0], quiet)
        (loud,) = kto.whole_step(model, [thumbs], lambda x: x)
        assert torch.equal(loud["of_step"], still["of_step"])
        assert preference_loss(dpo_loss)(model, batch)[0] != value  # the noise is in the policy
    model.train()
    drawn = {preference_loss(dpo_loss, dropout=True)(model, batch)[0].item() for _ in range(3)}
    assert len(drawn) == 3
    assert preference_loss(dpo_loss)(model, batch)[0].item() == pytest.approx(value.item(), rel=1e-6)


def test_dropout_stays_off_where_a_layer_is_computed_again():
    grads = []
    for checkpointed in (False, True):
        model = adapted(dropout=0.5).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        preference_loss(dpo_loss)(model, pair_batch())[0].backward()
        grads.append(gradient(model))
    assert (grads[0] - grads[1]).norm() < 1e-5 * grads[0].norm()


# --- a step in parts, in processes, and resumed ----------------------------------------------------------
def thumbs_of(step):
    """KL and thumbs that differ much from part to part."""
    return thumb_batch((5, 9, 6, 5, 7, 8), (1, 4, 7, 2, 9, 3), (1, 1, 1, 0, 0, 1), seed=step % 2)


def pairs_of(step):
    return pair_batch((5, 9, 6, 5, 20, 8), (1, 4, 7, 2, 9, 3), (3, 9, 1, 5, 5, 5), seed=step % 2)


EVERY = [*((preference_loss, loss, pairs_of) for loss in PAIR_LOSSES), (feedback_loss, kto_loss, thumbs_of)]


@pytest.mark.parametrize(("made", "loss", "batches"), EVERY)
@pytest.mark.parametrize("parts", [2, 4, 6])
def test_accumulation_gives_what_one_big_batch_gives(made, loss, batches, parts):
    found = []
    for n in (1, parts):
        model = adapted(seed=5)
        history = train(model, batches, made(loss), config(gradient_accumulation_steps=n))
        found.append((history, weights(model)))
    (one, w), (many, v) = found
    assert (w - v).norm() <= 1e-5 * w.norm()
    assert many.losses == pytest.approx(one.losses, rel=1e-5)
    assert set(one.metrics) == set(pr.METRICS)
    for name, values in one.metrics.items():
        assert len(values) == 3
        assert many.metrics[name] == pytest.approx(values, rel=1e-3, abs=1e-6, nan_ok=True), name


@pytest.mark.parametrize(("made", "loss", "batches"), EVERY)
def test_two_processes_give_what_one_gives(made, loss, batches):
    """Each process with its own rows; what is summed over both is first recorded of each, then given."""
    model, batch = adapted(seed=5), batches(0)
    halves = [{name: x[half] for name, x in batch.items()} for half in (slice(0, 2), slice(2, 6))]
    sent = [[], []]
    for mine, half in zip(sent, halves, strict=True):
        made(loss).whole_step(model, [half], lambda x, mine=mine: mine.append(x.clone()) or x)
    sums = [[a + b for a, b in zip(*sent, strict=True)] for _ in halves]
    total, values = 0.0, {}
    for half, theirs in zip(halves, sums, strict=True):
        (part,) = made(loss).whole_step(model, [half], lambda x, theirs=theirs: theirs.pop(0))
        value, _, metrics = made(loss)(model, part)
        total += value.item()
        values = {name: values.get(name, 0) + x.item() for name, x in metrics.items()}
    made(loss).whole_step(model, [], lambda x, mine=sent[0]: mine.pop(0))  # a process without rows joins in
    assert not sent[0]
    value, _, metrics = made(loss)(model, batch)
    assert total == pytest.approx(value.item(), rel=1e-5)
    for name, x in metrics.items():
        assert values[name] == pytest.approx(x.item(), rel=1e-4, nan_ok=True), name


class Stop(Exception): ...


@pytest.mark.parametrize(("made", "loss"), [(preference_loss, dpo_loss), (feedback_loss, kto_loss)])
def test_a_resumed_run_keeps_its_references_and_metrics_and_ends_bit_for_bit_the_same(made, loss, tmp_path):
    batches = pairs_of if made is preference_loss else thumbs_of

    def regrouped(step):  # each sequence meets others in every epoch, so that its last bit would differ
        order = torch.randperm(12, generator=torch.Generator().manual_seed(step // 3))[4 * (step % 3) :][:4]
        both = [batches(0), batches(1)]
        return {name: torch.cat([x[name] for x in both])[order] for name in both[0]}

    def until(step):
        if step == 5:
            raise Stop
        return regrouped(step)

    run = {"checkpoint_every": 2, "steps": 9}
    whole, model = adapted(), adapted()
    expected = train(whole, regrouped, made(loss), config(**run, checkpoint_dir=tmp_path / "whole"))
    with pytest.raises(Stop):
        train(model, until, made(loss), config(**run, checkpoint_dir=tmp_path / "cut"))
    again = adapted(seed=7)
    with passes(again) as seen:
        history = train(again, regrouped, made(loss), config(**run, checkpoint_dir=tmp_path / "cut"))
    assert seen.count((False, False, False)) == 0  # the run before had met all rows
    assert torch.equal(weights(again), weights(whole))
    assert history.losses == expected.losses
    assert json.dumps(history.metrics) == json.dumps(expected.metrics)  # NaN is NaN there
    assert all(len(values) == 9 for values in history.metrics.values())


def test_a_checkpoint_from_before_there_were_metrics_is_resumed(tmp_path):
    run = {"steps": 4, "checkpoint_every": 2, "checkpoint_dir": tmp_path, "keep_checkpoints": 5}
    train(adapted(), pairs_of, preference_loss(dpo_loss), config(**run))
    (tmp_path / "step-000004.safetensors").unlink()
    path = tmp_path / "step-000002.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    history = json.loads(header["history"])
    del history["metrics"]
    tensors = {name: x for name, x in load_file(path).items() if not name.startswith("loss.")}
    save_file(tensors, path, {**header, "history": json.dumps(history)})
    history = train(adapted(), pairs_of, preference_loss(dpo_loss), config(**run))
    margins = history.metrics["margin"]
    assert [math.isnan(x) for x in margins] == [True, True, False, False]


def test_dpo_starts_at_log_2_and_raises_the_margin():
    model = add_adapters(tiny_llama(), AdapterConfig(rank=4))
    history = train(model, lambda _: pair_batch(), preference_loss(dpo_loss), config(12))
    assert history.losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert history.metrics["margin"][0] == history.metrics["kl"][0] == 0
    assert history.metrics["margin"][-1] > 1
    assert history.metrics["accuracy"][-1] == 1
    assert history.metrics["length"] == [3.5] * 12
