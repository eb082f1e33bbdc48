"""The plan of a step against the same step on real tensors, known numbers, and this process."""

import functools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from helpers import pair_batch, thumb_batch, tiny_llama, tiny_model, token_batch
from torch import nn

from spark_ft import ReferenceLogps, dpo_loss, feedback_loss, kto_loss, preference_loss
from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.cli import main as cli
from spark_ft.experts import quantize_model
from spark_ft.memory import trace as t
from spark_ft.memory import tracker
from spark_ft.memory.machine import DGX_SPARK_SPEED, Machine, free_at_once, measure
from spark_ft.memory.plan import METHODS, TASKS, plan_step, plan_training
from spark_ft.memory.shapes import SHAPES, known_config
from spark_ft.memory.tracker import Tracker, real_tensors
from spark_ft.models import load_model
from spark_ft.scoring import sft_loss
from spark_ft.training import TrainConfig, train

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA_70B = functools.partial(plan_training, known_config("Llama-3.3-70B"), "qlora", adapter_dtype=BF16)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
DENSE = ("llama", "qwen3", "gemma2", "gemma3_text", "granite", "cohere", "phi3", "mistral", "smollm3", "glm4")
EXPERT_KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "olmoe")


def counted(model, batch, loss=sft_loss, accumulates=False) -> Tracker:
    """The real step under the tracker: weights and moments first, as they are there when a step begins."""
    with Tracker() as tracker:
        for tensor in {id(x): x for module in model.modules() for x in real_tensors(module)}.values():
            tracker.count(tensor, "held")
        trained = [p for p in model.parameters() if p.requires_grad]
        held = [torch.zeros_like(p) for p in trained for _ in range(2)]
        for p in trained if accumulates else ():
            p.grad = torch.zeros_like(p)
        value, _ = loss(model, batch)
        value.backward()
    model.zero_grad(set_to_none=True)
    del held
    return tracker


def trained_by(method, model, targets="all-linear"):
    if method == "qlora":
        quantize_model(model)
    if method != "full":
        add_adapters(model, AdapterConfig(method.removeprefix("q"), rank=4, targets=targets))
    return model.train()


def prepared(kind, method, checkpointing, layers=4):
    """A tiny model of a kind, ready to be trained by a method."""
    several = {} if kind in ("gemma3_text", "gpt_oss") else {"num_hidden_layers": layers}
    targets = ATTENTION if kind in EXPERT_KINDS else "all-linear"
    model = trained_by(method, tiny_model(kind, **several), targets)
    if checkpointing:
        model.activation_checkpointing_enable()
    return model


def far_apart(method, kinds):
    """Plan over real step − 1 where they differ, by kind and checkpointing."""
    apart = {}
    for kind in kinds:
        for checkpointing in (False, True):
            model, batch = prepared(kind, method, checkpointing), token_batch()
            trained = [p for p in model.parameters() if p.requires_grad]
            sft_loss(model, batch)[0].backward()  # what is kept from step to step is there
            torch.optim.SGD(trained, lr=0.0).step()
            model.zero_grad(set_to_none=True)
            plan, real = plan_step(model, batch), counted(model, batch)
            apart[kind, checkpointing] = plan.peak / real.peak - 1
            assert plan.flops == real.flops, (kind, checkpointing)
    print(method, {key: f"{value:+.2%}" for key, value in apart.items() if value})
    return {key: value for key, value in apart.items() if abs(value) >= 0.01}


@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_the_real_step(method):
    assert not far_apart(method, ("llama", "qwen3_moe"))


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_plan_is_the_real_step_for_every_kind_of_model(method):
    differs = {  # by more than 1%: tiny experts, of whose dequantizing a plan leaves out the pieces, for one
        "dora": {("smollm3", False)},
        "qlora": {("mixtral", False), ("olmoe", False)},
    }.get(method, set())
    assert far_apart(method, DENSE + EXPERT_KINDS).keys() <= differs


@pytest.mark.parametrize("packed", [True, False])
def test_rows_of_other_lengths_and_accumulation_are_planned_too(packed):
    model = add_adapters(tiny_llama(packed=packed, num_hidden_layers=5), AdapterConfig(rank=4)).train()
    for rows, length in ((1, 9), (3, 40), (2, 130)):
        batch = token_batch(rows=rows, length=length)
        assert plan_step(model, batch).peak == counted(model, batch).peak
        assert plan_step(model, batch, sft_loss, 2).peak >= plan_step(model, batch, sft_loss, rows).peak
    batch = token_batch(rows=1)
    two = {key: torch.cat([x, x]) for key, x in batch.items()}
    assert plan_step(model, two, sft_loss, 2).peak == counted(model, batch, accumulates=True).peak


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("made", "batch"), [(preference_loss, pair_batch()), (feedback_loss, thumb_batch())])
def test_a_step_on_pairs_or_thumbs_is_planned_with_its_reference_and_leaves_nothing_behind(
    made, batch, checkpointing
):
    model = add_adapters(tiny_llama(vocab_size=5_000, num_hidden_layers=4), AdapterConfig(rank=4)).train()
    if checkpointing:
        model.activation_checkpointing_enable()
    function = dpo_loss if made is preference_loss else kto_loss
    loss = made(function)
    plan = plan_step(model, batch, loss)
    assert not loss.reference.kept, "a plan has no numbers to keep"
    loss(model, batch)  # the weights' checksums, 512 bytes a tensor, are there from then on
    loss.reference.kept.clear()
    real = counted(model, batch, lambda *step: loss(*step)[:2])
    assert plan.peak == pytest.approx(real.peak, rel=0.01)
    assert plan.flops == real.flops  # the reference's pass among them, and the policy's for KTO's KL
    kept, value = dict(loss.reference.kept), loss(model, batch)[0].item()
    plan_step(model, batch, loss)
    assert loss.reference.kept == kept
    assert loss(model, batch)[0].item() == value  # bit for bit
    frozen = made(function, reference=ReferenceLogps(tiny_llama(vocab_size=5_000, num_hidden_layers=4)))
    assert plan_step(model, batch, frozen).terms[t.REFERENCE] > 0
    assert not frozen.reference.kept


def test_the_task_plans_pairs_and_thumbs_of_a_shape_alone():
    settings = {"batch_size": 2, "length": 30, "rank": 4, "dtype": FP32, "device": "cpu", "completion": 12}
    plan = functools.partial(plan_training, tiny_llama(num_hidden_layers=6).config, **settings)
    sft, pairs, thumbs = (plan("lora", task=task) for task in TASKS)
    assert sft.flops < thumbs.flops < pairs.flops
    model = trained_by("lora", tiny_llama(num_hidden_layers=6))
    model.activation_checkpointing_enable()
    batch = pair_batch((18, 18), (12, 12), (12, 12), shared=0)
    loss = preference_loss(dpo_loss)
    loss(model, batch)
    loss.reference.kept.clear()
    assert pairs.peak == pytest.approx(counted(model, batch, lambda *step: loss(*step)[:2]).peak, rel=0.01)
    for task in ("preference", "feedback"):
        assert plan("full", task=task).terms[t.REFERENCE] > 0


def test_the_embedded_model_is_planned_to_the_byte_and_left_as_it_was(embedded):
    model, batch = load_model()[0], token_batch(rows=4, length=60, vocab=40_000)
    add_adapters(model, AdapterConfig(dropout=0.1)).train()
    torch.manual_seed(0)
    loss = sft_loss(model, batch)[0].item()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    plan = plan_step(model, batch)
    assert torch.equal(torch.get_rng_state(), before)
    assert sft_loss(model, batch)[0].item() == loss  # bit for bit
    assert all(p.grad is None for p in model.parameters())
    assert plan.peak == counted(model, batch).peak


@pytest.mark.parametrize("method", METHODS)
def test_a_shape_alone_gives_the_plan_of_the_real_model(method):
    config = tiny_llama(num_hidden_layers=6).config
    settings = {"batch_size": 2, "length": 30, "rank": 4, "checkpointing": False}
    plan = plan_training(config, method, **settings, dtype=FP32, device="cpu")
    model = trained_by(method, tiny_llama(num_hidden_layers=6))
    ids = torch.arange(30).remainder(7).repeat(2, 1)
    ids[:, 0] = torch.tensor([1, 2])
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
    real = counted(model.train(), batch)
    assert plan.peak == pytest.approx(real.peak, rel=0.01)


def test_a_module_that_is_no_language_model_is_planned_too_and_a_loss_that_cheats_is_not():
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    batch = {"x": torch.randn(16, 8)}

    def loss(model, batch):
        return model(batch["x"]).square().sum(), 16

    assert plan_step(model, batch, loss).peak == counted(model, batch, loss).peak
    with pytest.raises(ValueError, match="does not use the model that it is given"):
        plan_step(model, batch, lambda _, batch: loss(model, batch))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_known_shape_has_the_published_size_and_is_found_under_the_names_that_hubs_use(tmp_path):
    from transformers import AutoModelForCausalLM

    published = {  # billions, from the models' own pages
        "SmolLM2-135M": 0.1345, "SmolLM2-360M": 0.3618, "SmolLM2-1.7B": 1.711, "SmolLM3-3B": 3.075,
        "Llama-3.2-1B": 1.236, "Llama-3.2-3B": 3.213, "Llama-3.1-8B": 8.030, "Llama-3.1-70B": 70.554,
        "Llama-3.3-70B": 70.554, "Mistral-7B-v0.3": 7.248, "Mistral-Nemo-12B": 12.248,
        "Mistral-Small-24B": 23.572, "Phi-4": 14.660, "Phi-4-mini": 3.836, "Gemma-3-270M": 0.2681,
        "Gemma-3-1B": 0.9999, "Gemma-3-4B": 3.880, "Gemma-3-12B": 11.766, "Gemma-3-27B": 27.009,
        "Qwen2.5-0.5B": 0.494, "Qwen2.5-1.5B": 1.544, "Qwen2.5-3B": 3.086, "Qwen2.5-7B": 7.616,
        "Qwen2.5-14B": 14.770, "Qwen2.5-32B": 32.764, "Qwen2.5-72B": 72.706,
        "DeepSeek-R1-Distill-Qwen-1.5B": 1.777, "Qwen3-0.6B": 0.596, "Qwen3-1.7B": 1.721,
        "Qwen3-4B": 4.022, "Qwen3-8B": 8.191, "Qwen3-14B": 14.768, "Qwen3-32B": 32.762,
        "Qwen3-30B-A3B": 30.532, "Qwen3-235B-A22B": 235.094, "gpt-oss-20b": 20.915,
        "gpt-oss-120b": 116.829, "Mixtral-8x7B": 46.703,
    }  # fmt: skip
    assert published.keys() == SHAPES.keys()
    for name, billions in published.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(known_config(name))
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3), name
    for name, known in {
        "meta-llama/Llama-3.3-70B-Instruct": "Llama-3.3-70B",
        "unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit": "Llama-3.1-8B",
        "Qwen/Qwen3-4B-Instruct-2507": "Qwen3-4B",
        "Qwen/Qwen3-Coder-30B-A3B-Instruct": "Qwen3-30B-A3B",
        "unsloth/Qwen3-30B-A3B-Thinking-2507-GGUF": "Qwen3-30B-A3B",
        "Qwen/Qwen2.5-Coder-32B-Instruct": "Qwen2.5-32B",
        "mistralai/Mistral-Small-3.2-24B-Instruct-2506": "Mistral-Small-24B",
        "mistralai/Mistral-Nemo-Instruct-2407": "Mistral-Nemo-12B",
        "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": "Llama-3.3-70B",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "Qwen2.5-7B",
        "google/gemma-3-27b-it": "Gemma-3-27B",
        "openai/gpt-oss-120b": "gpt-oss-120b",
        "unsloth/gpt-oss-20b-BF16": "gpt-oss-20b",
        "microsoft/phi-4": "Phi-4",
        "smollm2-135m": "SmolLM2-135M",
    }.items():
        assert known_config(name).to_dict() == known_config(known).to_dict(), name
    known_config("Qwen3-8B").save_pretrained(tmp_path)
    assert known_config(tmp_path).num_hidden_layers == 36
    with pytest.raises(ValueError, match=r'"Llama-9-1B" is neither a folder .* gpt-oss-20b'):
        known_config("Llama-9-1B")


def near(gigabytes):
    return pytest.approx(gigabytes * 1e9, rel=0.03)


def test_70b_qlora_term_by_term_and_its_floor():
    plan = LLAMA_70B(length=2048)
    terms = {t.LINEAR: 35.31, t.EMBEDDINGS: 4.20, t.ADAPTERS: 0.41, t.MOMENTS: 0.83, t.CHECKPOINTS: 2.7}
    for name, gigabytes in terms.items():
        assert plan.terms[name] == near(gigabytes), name
    assert plan.terms[t.CONTEXT] == t.CUDA_CONTEXT_BYTES
    assert sum(plan.terms.values()) == plan.peak == plan.total
    assert plan.where == "backward of the last layer"
    assert plan.peak == near(45.5)
    assert LLAMA_70B(length=512).peak == near(43.3)
    assert plan.moments["backward of the first layer"][t.GRADIENTS] == near(0.41)
    without = plan.peak - plan.terms[t.EMBEDDINGS]
    assert without < 0.92 * plan.peak  # the control: a plan that forgets the embeddings is wrong by a tenth
    short = LLAMA_70B(length=512)  # on a DGX Spark its floor is its products, not its bytes
    assert short.flops == pytest.approx(213e12, rel=0.03)
    assert short.floor(DGX_SPARK_SPEED) == pytest.approx(2.29, rel=0.03)
    assert short.floor(Machine("all bytes", 1e30, 273e9)) == pytest.approx(0.44, rel=0.05)


def test_attention_is_counted_without_torchs_own_formula_which_before_2_13_knows_no_shared_keys(monkeypatch):
    config = tiny_llama().config  # four heads share two keys
    plans = [plan_training(config, "lora", length=30, device=device) for device in ("cuda", "cpu")]
    for packet in [packet for packet in tracker.flop_registry if "attention" in str(packet)]:
        monkeypatch.delitem(tracker.flop_registry, packet)
    for plan in plans:
        device = plan.settings["device"]
        assert plan_training(config, "lora", length=30, device=device).flops == plan.flops
    assert tracker._attention_flop((2, 4, 30, 8), (2, 2, 30, 8), (2, 2, 30, 8)) == 2 * 4 * (4 * 30 * 30 * 8)


def test_mixtures_of_experts_in_nf4_are_planned():
    for name, gigabytes in (("Qwen3-30B-A3B", 19.7), ("gpt-oss-20b", 16.6), ("gpt-oss-120b", 71.2)):
        plan = plan_training(known_config(name), "qlora", length=2048)
        assert plan.terms[t.EXPERTS] > 10 * plan.terms[t.LINEAR]
        assert plan.peak == pytest.approx(gigabytes * 1e9, rel=0.01), name


def test_each_setting_moves_its_own_terms():
    plan = functools.partial(plan_training, known_config("Qwen3-0.6B"), "lora", length=256)
    base = plan()
    assert plan(rank=32).terms[t.ADAPTERS] == 2 * base.terms[t.ADAPTERS]
    assert plan(adapter_dtype=BF16).terms[t.MOMENTS] == base.terms[t.MOMENTS] / 2
    assert plan(checkpointing=False).terms[t.SAVED] > 5 * base.terms[t.CHECKPOINTS]
    assert plan(length=512).terms[t.CHECKPOINTS] == 2 * base.terms[t.CHECKPOINTS]
    one, two = (it.moments["backward of the last layer"][t.RECOMPUTED] for it in (base, plan(batch_size=2)))
    assert two == pytest.approx(2 * one, rel=0.01)
    assert plan(gradient_accumulation_steps=4).terms[t.GRADIENTS] == base.terms[t.ADAPTERS]
    assert plan(device="cpu").terms.get(t.CONTEXT, 0) == 0
    small = functools.partial(plan_training, known_config("Qwen3-0.6B"), length=64)
    assert t.DEQUANTIZED in small("qlora", dtype=FP32).terms
    assert t.REFERENCE in small("full", task="preference").terms
    assert t.REFERENCE not in plan(task="preference").terms
    both = plan(length=1024, loss=whole_logits), plan(length=1024)
    whole, chunked = (it.moments["the output head"][t.LOGITS] for it in both)
    assert whole > 8 * chunked


def whole_logits(model, batch):
    """transformers' own loss, which keeps the logits of every position."""
    return model(**batch, use_cache=False).loss, 1


def test_what_cannot_be_planned_is_named_by_the_command_in_one_line(capsys, tmp_path):
    for arguments, says in (
        ({"method": "lorra"}, 'method="lorra" is unknown; choose one of full, lora, dora, qlora'),
        ({"task": "chat"}, 'task="chat" is unknown'),
        ({"device": "tpu"}, 'device="tpu" is unknown'),
        ({"batch_size": 0}, "batch_size=0, .*: each must be at least 1"),
        ({"length": 0}, "length=0"),
    ):
        with pytest.raises(ValueError, match=says):
            plan_training(known_config("SmolLM2-135M"), **arguments)
    (tmp_path / "config.json").write_text('{"model_type": "llama",')
    assert cli(["plan", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert cli(["plan", "Mixtral"]) == 1
    assert "Qwen3-30B-A3B" in capsys.readouterr().err


def test_a_plan_and_the_command_print_the_terms_the_peak_the_fit_and_the_floor(capsys):
    print(LLAMA_70B(length=512))
    assert cli(["plan", "openai/gpt-oss-20b", "--method", "qlora", "--seq", "512"]) == 0
    said = capsys.readouterr().out
    assert "linear layers                35.31     32.89" in said
    assert "method qlora, rank 16, adapters bf16, linear layers nf4" in said
    for part in ("backward of the last layer", "experts", "a DGX Spark    fits", "s a step at least"):
        assert part in said


# A process of its own trains once on a few tokens (libraries load, workspaces are made), then twice on many.
# glibc is told to give freed memory back at once: with holes in its heap the process is larger.


def process_bytes(method, length):
    """(what the process took beside what it held before, what the plan says), in a process of its own."""
    free_at_once()
    model = load_model(dtype=FP32, quantize="nf4" if method == "qlora" else None)[0]
    if method == "full":
        model.requires_grad_(True)
    else:
        add_adapters(model, AdapterConfig(method.removeprefix("q")))
    for p in model.parameters():
        p.sum()  # weights are mapped from disk until they are read
    few, many = (token_batch(rows=2, length=n, vocab=40_000) for n in (16, length))
    settings = TrainConfig(2, progress=False, learning_rate=1e-6, ignore_budget=True)
    train(model, lambda _: few, sft_loss, settings)
    with measure("cpu", process=True) as process:
        train(model, lambda _: many, sft_loss, settings)
    plan = plan_step(model.train(), many)
    weights = sum(plan.moments[t.START].get(kind, 0) for kind in t.WEIGHTS)
    return process.extra, plan.peak - weights


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it is known to the byte on Linux alone")
@pytest.mark.parametrize(("method", "length"), [("full", 256), ("lora", 64), ("lora", 384), ("qlora", 256)])
def test_the_plan_is_within_a_tenth_of_what_a_fresh_process_takes(method, length):
    with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
        process, planned = fresh.submit(process_bytes, method, length).result()
    print(f"{method} 2 × {length}: planned {planned / 1e6:.0f} MB, the process took {process / 1e6:.0f}")
    assert planned == pytest.approx(process, rel=0.1)
