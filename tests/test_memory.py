"""The plan against autograd, against known numbers and against this machine; the machine's memory against fakes of others."""

import contextlib
import functools
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spark_ft.memory import machine
from spark_ft.memory import plan as memory
from spark_ft.adapters import AdapterConfig, add_adapters
from spark_ft.cli import main as cli
from spark_ft.data.chat import IGNORE
from spark_ft.memory.machine import DGX_SPARK, GIB, MemoryBudget, budget, measure
from spark_ft.memory.plan import (
    MemoryPlan,
    cut,
    fits,
    nf4_bytes,
    plan_step,
    plan_training,
    refuse_over_budget,
)
from spark_ft.memory.shapes import SHAPES, known_config
from spark_ft.methods.nf4 import DENSE, NF4Linear, quantize_nf4
from spark_ft.models import load_model
from spark_ft.scoring import sft_loss, use_packed_attention
from spark_ft.training import TrainConfig, train

BF16, FP32 = torch.bfloat16, torch.float32
LLAMA_70B = functools.partial(plan_training, known_config("Llama-3.3-70B"), "qlora", adapter_dtype=BF16)


def batch(rows=3, length=37, learned=7, vocabulary=97, same=0, padding=0):
    """Rows that begin with `same` equal tokens and then differ; the second ends in padding."""
    ids = torch.randint(8, vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    ids[:, :same] = 5
    ids[:, same] = torch.arange(rows) % 3 + 3
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, : length - learned] = IGNORE
    if padding:
        labels[1, -padding:], mask[1, -padding:] = IGNORE, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


# --- what is kept for backward -------------------------------------------------------------------------------------


def tiny(
    kind, layers, method="lora", packed=True, dtype=FP32, adapter_dtype=FP32, targets="all-linear", mlp=112
):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 96, "intermediate_size": mlp, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {} if kind == "qwen2" else {"head_dim": 32}
    config = AutoConfig.for_model(
        kind, **shape, vocab_size=97, num_hidden_layers=layers, tie_word_embeddings=False
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    if packed:
        use_packed_attention(model)
    if method == "qlora":
        for name, module in list(model.named_modules()):
            if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
                model.set_submodule(name, NF4Linear.from_linear(module))
    if method != "full":
        add_adapters(model, AdapterConfig(method.removeprefix("q"), rank=3, targets=targets))
        for p in model.parameters():
            p.data = p.data.to(adapter_dtype if p.requires_grad else dtype)
    return model.train()


def saved_bytes(model, rows) -> int:
    """Bytes of all memory that autograd keeps for backward, parameters not counted: what the plan is held to."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (
                tensor,
                storage.nbytes(),
            )  # the tensor too, or its address could be used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sft_loss(model, rows)
    return sum(size for _, size in kept.values())


def kept_a_layer(make, rows) -> tuple[float, float]:
    """(measured, planned) bytes that one more decoder layer keeps."""
    two, four = make(2), make(4)
    measured = (saved_bytes(four, rows) - saved_bytes(two, rows)) / 2
    plans = [plan_step(model, rows).terms for model in (two, four)]
    name = memory.SAVED if memory.SAVED in plans[0] else memory.CHECKPOINTS
    return measured, (plans[1][name] - plans[0][name]) / 2


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_layer_keeps_what_the_plan_says_to_the_byte(kind, method, dtypes):
    measured, planned = kept_a_layer(lambda layers: tiny(kind, layers, method, True, *dtypes), batch())
    assert measured == planned


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "kind_of_batch", [{}, {"padding": 5}, {"same": 9}], ids=["plain", "padding", "shared"]
)
def test_a_layer_keeps_what_the_plan_says_however_rows_are_computed(kind_of_batch, packed, dtype):
    measured, planned = kept_a_layer(
        lambda layers: tiny("llama", layers, "lora", packed, dtype), batch(**kind_of_batch)
    )
    assert measured == planned


@pytest.mark.parametrize(
    "targets", [("q_proj", "v_proj"), ("o_proj", "down_proj"), ("gate_proj",)], ids="+".join
)
@pytest.mark.parametrize("method", ["lora", "dora", "qlora"])
def test_a_layer_keeps_only_what_its_adapters_want(method, targets):
    measured, planned = kept_a_layer(lambda layers: tiny("llama", layers, method, targets=targets), batch())
    assert measured == planned


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_checkpointed_layer_keeps_its_input_alone(method):
    def make(layers):
        model = tiny("llama", layers, method)
        model.activation_checkpointing_enable()
        return model

    measured, planned = kept_a_layer(make, batch())
    assert measured == planned == 3 * 37 * 96 * 4


def tensor_peak(step) -> int:
    """The most bytes that torch's CPU allocator handed out at once in `step()`, as its profiler saw them."""
    from torch.profiler import ProfilerActivity, profile

    with (
        contextlib.redirect_stderr(io.StringIO()),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace,
    ):
        step()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = torch.tensor(
        [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    ).cumsum(0)
    return int(held.max())


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=["fp32", "mixed", "bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_backward_takes_a_recomputed_layer_and_what_passes_through_it(method, dtypes):
    model = tiny("llama", 3, method, True, *dtypes, mlp=512)
    model.activation_checkpointing_enable()
    rows = batch(rows=4, length=128, learned=1)
    sft_loss(model, rows)[0].backward()
    model.zero_grad()
    loss = sft_loss(model, rows)[0]
    terms = plan_step(model, rows).terms
    gradient_of_output = terms[memory.CHECKPOINTS] / 4  # of which the plan counts one a layer and one more
    planned = (
        terms[memory.RECOMPUTED] + terms[memory.PASSING] + gradient_of_output
    )  # NF4 blocks this small are never the most
    assert tensor_peak(loss.backward) == pytest.approx(planned, rel=0.03)


# --- the plan of a shape -------------------------------------------------------------------------------------------

PUBLISHED = {  # parameters by each model's page on the hub (safetensors); those with tied embeddings as loaded
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Llama-3.1-70B": 70_553_706_496,
    "Llama-3.3-70B": 70_553_706_496,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-1.7B": 1_720_574_976,
    "Qwen3-4B": 4_022_468_096,
    "Qwen3-8B": 8_190_735_360,
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-32B": 32_762_123_264,
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_known_shape_has_the_published_number_of_parameters(name):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(known_config(name))
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]
    terms = plan_training(known_config(name), "full", dtype=BF16).terms
    weights = terms[memory.LINEAR] + terms[memory.EMBEDDINGS] + terms[memory.NORMS]
    assert weights == pytest.approx(2 * PUBLISHED[name], abs=1000)  # and RoPE's frequencies


@pytest.mark.parametrize("name", ["meta-llama/Llama-3.3-70B-Instruct", "Qwen/Qwen3-8B-Base", "smollm2-135m"])
def test_a_shape_is_found_under_its_hub_id(name):
    assert known_config(name).model_type in ("llama", "qwen3")


def test_a_folder_with_a_config_is_a_shape_too(tmp_path):
    known_config("Qwen3-0.6B").save_pretrained(tmp_path)
    assert plan_training(known_config(tmp_path)).terms == plan_training(known_config("Qwen3-0.6B")).terms


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError,
        match=r'"Mixtral" is neither a folder with a config.json nor .*: SmolLM2-135M, .*Qwen3-32B',
    ):
        known_config("Mixtral")


def near(gb):
    """Within 3% of a number of GB that is given to one decimal."""
    return pytest.approx(gb * 1e9, rel=0.03)


@pytest.mark.parametrize(("length", "checkpoints", "total"), [(512, 0.7, 43), (2048, 2.7, 46)])
def test_70b_qlora_term_by_term(length, checkpoints, total):
    """NF4 with double quantization, r16 on all linear layers, one row; adapters, gradients and moments in bf16."""
    plan = LLAMA_70B(length=length, whole_matrices=True)
    terms = plan.terms
    assert terms[memory.LINEAR] == near(35.3)
    assert terms[memory.EMBEDDINGS] == near(4.2)
    assert (
        terms[memory.ADAPTERS] + terms[memory.GRADIENTS] + terms[memory.MOMENTS]
        == 207_093_760 * 8
        == near(1.7)
    )
    assert terms[memory.CHECKPOINTS] == near(checkpoints)
    assert terms[memory.DEQUANTIZED] == 8192 * 28672 * 2 == near(0.47)
    assert (
        LLAMA_70B().terms[memory.DEQUANTIZED] == 8 * DENSE["cuda"]
    )  # of ours: codes, fp32, and the block before in bf16
    assert terms[memory.CONTEXT] == near(0.7)
    if length == 2048:
        assert terms[memory.RECOMPUTED] + terms[memory.DEQUANTIZED] == near(1.2)
    assert plan.total == near(total)
    assert plan.peak == near(total)


@pytest.mark.parametrize(("length", "peak"), [(512, 50), (2048, 57)])
def test_70b_qlora_with_everything_else_in_fp32_and_all_logits_kept(length, peak):
    whole = {"whole_matrices": True, "logit_rows": None}
    plan = plan_training(known_config("Llama-3.3-70B"), "qlora", length=length, dtype=FP32, **whole)
    assert plan.peak == near(peak)


def test_a_plan_without_the_embeddings_is_wrong():
    """The control of the table above: leaving a term out must show."""
    assert LLAMA_70B(whole_matrices=True).total - LLAMA_70B().terms[memory.EMBEDDINGS] != near(46)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(64, 64), (5, 13), (512, 300)])
def test_nf4_bytes_are_those_of_an_nf4_tensor(shape, double_quant):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert nf4_bytes(weight.numel(), double_quant) == quantize_nf4(weight, double_quant=double_quant).nbytes


def test_nf4_takes_4_127_bits_a_number_or_4_5():
    assert 8 * nf4_bytes(2**24) / 2**24 == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), rel=1e-5)
    assert 8 * nf4_bytes(2**24, double_quant=False) / 2**24 == 4.5


@pytest.mark.parametrize("method", ["full", "lora", "dora", "qlora"])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_planned_shape_and_a_real_model_agree(method, checkpointing):
    """Up to RoPE's frequencies, which are buffers and always fp32."""
    model = tiny("qwen3", 3, method)
    if checkpointing:
        model.activation_checkpointing_enable()
    real = plan_step(model, batch())
    planned = plan_training(
        model.config,
        method,
        batch_size=3,
        length=37,
        completion=7,
        rank=3,
        checkpointing=checkpointing,
        dtype=FP32,
        device="cpu",
    )
    assert planned.terms == real.terms | {memory.NORMS: planned.terms[memory.NORMS]}
    assert planned.terms[memory.NORMS] == pytest.approx(real.terms[memory.NORMS], abs=256)


def test_each_setting_moves_its_own_terms():
    def changed(**settings):
        before, after = (
            plan_training(known_config("Qwen3-8B")),
            plan_training(known_config("Qwen3-8B"), **settings),
        )
        return {
            name: size / before.terms[name]
            for name, size in after.terms.items()
            if size != before.terms.get(name)
        }

    twice = pytest.approx(2)
    assert changed(rank=32) == {memory.ADAPTERS: twice, memory.GRADIENTS: twice, memory.MOMENTS: twice}
    assert changed(adapter_dtype=BF16, gradient_dtype=FP32, moment_dtype=FP32).keys() == {
        memory.ADAPTERS, memory.RECOMPUTED, memory.PASSING,
    }  # fmt: skip
    assert changed(moments=1) == {memory.MOMENTS: 0.5}
    assert changed(moments=0) == {memory.MOMENTS: 0}
    assert changed(device="cpu").keys() == {memory.CONTEXT}
    grows = {memory.CHECKPOINTS, memory.RECOMPUTED, memory.PASSING, memory.LOGITS}
    assert (
        changed(length=4096).keys()
        == changed(batch_size=2).keys()
        == changed(task="preference").keys()
        == grows
    )
    assert changed(completion=1024).keys() == {memory.LOGITS}
    assert changed(gradient_accumulation_steps=8) == {}


def test_gradients_stay_beside_activations_only_where_parts_are_accumulated():
    at_once, in_parts = (LLAMA_70B(gradient_accumulation_steps=parts) for parts in (1, 8))
    assert in_parts.peak - at_once.peak == in_parts.terms[memory.GRADIENTS]


def test_full_fine_tuning_with_a_reference_holds_a_second_model():
    config = known_config("Qwen3-0.6B")
    alone, pair = (plan_training(config, "full", task=task).terms for task in ("sft", "preference"))
    assert pair[memory.REFERENCE] == alone[memory.LINEAR] + alone[memory.EMBEDDINGS] + alone[memory.NORMS]
    assert memory.REFERENCE not in plan_training(config, "lora", task="preference").terms


def test_planning_draws_no_random_numbers():
    state = torch.get_rng_state()
    memory._on_meta.cache_clear()
    plan_training(known_config("Qwen3-0.6B"), "dora")
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"method": "prefix"}, 'method="prefix" is unknown; choose one of full, lora, dora, qlora'),
        ({"task": "rl"}, 'task="rl" is unknown; choose one of sft, preference'),
        ({"device": "tpu"}, 'device="tpu" is unknown; choose one of cuda, cpu'),
        ({"length": 0}, "length is 0; it must be at least 1"),
        ({"targets": ("q_prj",)}, 'target "q_prj" matches no linear layer'),
    ],
)
def test_bad_settings_are_named(arguments, says):
    with pytest.raises(ValueError, match=says):
        plan_training(known_config("Qwen3-0.6B"), **arguments)


def test_a_model_of_another_kind_is_refused():
    from transformers import GPT2Config

    with pytest.raises(
        ValueError, match='model_type="gpt2" cannot be planned for; llama, mistral, qwen2, qwen3 can'
    ):
        plan_training(GPT2Config(), targets=("lm_head",))


def test_a_plan_prints_terms_sum_and_settings():
    printed = str(MemoryPlan({"weights": 3 * GIB, "none": 0, "logits": 10**9}, 4 * 10**9, {"method": "lora"}))
    assert printed.splitlines() == [
        "                                GB       GiB",
        "weights                       3.22      3.00",
        "logits                        1.00      0.93",
        "─" * 44,
        "sum                           4.22      3.93",
        "most at one moment            4.00      3.73",
        "method lora",
    ]


# --- this machine --------------------------------------------------------------------------------------------------
# A process of its own loads and reads the model, trains it once on a few tokens (libraries load, workspaces are made), and
# then trains two steps under `measure`. Weights and adapters are there before, so the plan's own count of them is added. glibc
# is told to give freed memory back at once: with holes in its heap, the process takes 1.9 GB for 1.4 (LoRA, 2 × 512 tokens),
# and four times as much with checkpointing.


def training(method, length):
    from spark_ft.bench.harness import Side

    machine.free_at_once()
    model = load_model(dtype=FP32, quantize="nf4" if method == "qlora" else None)[0]
    model.requires_grad_(True) if method == "full" else add_adapters(
        model, AdapterConfig(method.removeprefix("q"))
    )
    for p in model.parameters():
        p.sum()  # weights are mapped from disk until they are read
    few, many = batch(2, 8, 4, 40_000), batch(2, length, length // 2, 40_000)

    def steps(rows):
        train(model, lambda _: rows, sft_loss, TrainConfig(2, progress=False, learning_rate=1e-6))

    steps(few)
    return Side(lambda: steps(many), None)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux", reason="what a process holds is known to the byte on Linux alone"
)
@pytest.mark.parametrize("length", [128, 512, 1024])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_the_plan_is_within_a_tenth_of_what_a_fresh_process_takes(method, length):
    from spark_ft.bench.harness import peak_extra_bytes

    shape = {"batch_size": 2, "length": length, "completion": length // 2, "checkpointing": False}
    plan = plan_training(known_config("SmolLM2-135M"), method, **shape, dtype=FP32, device="cpu")
    here = sum(plan.terms[kind] for kind in (memory.LINEAR, memory.EMBEDDINGS, memory.NORMS, memory.ADAPTERS))
    measured = here + peak_extra_bytes(functools.partial(training, method, length), 1)
    planned, before = plan.peak / 1e6, here / 1e6
    print(
        f"{method} 2 × {length}: planned {planned:.0f} MB, measured {measured / 1e6:.0f}, {before:.0f} of it before"
    )
    assert plan.peak == pytest.approx(measured, rel=0.1)


# --- what the machine has ------------------------------------------------------------------------------------------


def system(monkeypatch, total, available):
    monkeypatch.setattr(
        machine.psutil, "virtual_memory", lambda: SimpleNamespace(total=total, available=available)
    )


def gpu(monkeypatch, integrated, total, free, cached=0):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(
        name="a name that says nothing", is_integrated=integrated, total_memory=total
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: cached + 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1000)


@pytest.fixture
def container(monkeypatch, tmp_path):
    """A root folder of its own; returns a function that writes files into it."""
    monkeypatch.setattr(machine, "_ROOT", tmp_path)

    def write(files):
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(str(text))

    return write


def version_2(folder, limit, used, cache):
    stat = f"anon 5\ninactive_file {cache}\nactive_file 7\n"
    return {f"{folder}/memory.max": limit, f"{folder}/memory.current": used, f"{folder}/memory.stat": stat}


def version_1(folder, limit, used, cache):
    stat = f"inactive_file 1\ntotal_inactive_file {cache}\n"
    return {
        f"{folder}/memory.limit_in_bytes": limit,
        f"{folder}/memory.usage_in_bytes": used,
        f"{folder}/memory.stat": stat,
    }


def test_a_gb10_with_a_full_page_cache_has_what_the_kernel_calls_available(monkeypatch, container):
    # after a 60 GB file was written: MemFree, and so CUDA's free, 41.5 GiB; MemAvailable 115.7
    gpu(monkeypatch, True, round(119.7 * GIB), round(41.5 * GIB))
    system(monkeypatch, round(119.7 * GIB), round(115.7 * GIB))
    container(
        {"proc/self/cgroup": "0::/\n", **version_2("sys/fs/cgroup", 10 * GIB, GIB, 0)}
    )  # holds no CUDA memory
    room = budget()
    assert (room.device, room.unified) == ("cuda:0", True)
    assert room.free == round(115.7 * GIB)
    assert room.available == round(115.7 * GIB) - 8 * GIB
    assert room.total == round(119.7 * GIB)


def test_a_unified_gpu_that_cannot_tell_its_memory_goes_by_the_system(monkeypatch):
    gpu(monkeypatch, True, 0, 0)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: (_ for _ in ()).throw(RuntimeError("not supported"))
    )
    system(monkeypatch, 120 * GIB, 100 * GIB)
    assert budget().available == 92 * GIB


def test_a_discrete_card_goes_by_the_driver_and_by_what_torch_has_cached(monkeypatch):
    gpu(monkeypatch, False, 80 * GIB, 70 * GIB, cached=3 * GIB)
    system(monkeypatch, 500 * GIB, 400 * GIB)
    room = budget("cuda")
    assert (room.unified, room.total, room.free, room.available) == (
        False,
        80 * GIB,
        73 * GIB,
        73 * GIB - GIB // 2,
    )
    assert budget("cuda:0", reserve=0).available == 73 * GIB


def test_a_processor_goes_by_what_the_kernel_calls_available(monkeypatch, container):
    system(monkeypatch, 16 * GIB, 10 * GIB)
    container({})
    assert budget("cpu") == MemoryBudget("cpu", False, 16 * GIB, 10 * GIB, GIB // 2)


@pytest.mark.parametrize(
    ("cgroup", "files"),
    [
        ("0::/\n", version_2("sys/fs/cgroup", 8 * GIB, 5 * GIB, 2 * GIB)),
        (
            "0::/user/me\n",
            version_2("sys/fs/cgroup/user", 8 * GIB, 5 * GIB, 2 * GIB),
        ),  # a parent's limit holds
        (
            "0::/host/path\n",
            version_2("sys/fs/cgroup", 8 * GIB, 5 * GIB, 2 * GIB),
        ),  # the path outside is not here
        (
            "12:cpu:/x\n4:memory:/docker/1\n0::/\n",
            version_1("sys/fs/cgroup/memory/docker/1", 8 * GIB, 5 * GIB, 2 * GIB),
        ),
        (
            "0::/a/b\n",
            version_2("sys/fs/cgroup/a", 8 * GIB, 5 * GIB, 2 * GIB)
            | version_2("sys/fs/cgroup/a/b", "max", 4 * GIB, 0),
        ),
    ],
    ids=["v2", "parent", "other path", "v1", "no limit below"],
)
def test_a_container_has_the_room_under_its_limit(monkeypatch, container, cgroup, files):
    system(monkeypatch, 64 * GIB, 60 * GIB)
    container({"proc/self/cgroup": cgroup, **files})
    room = budget("cpu")
    assert (room.total, room.free) == (
        8 * GIB,
        5 * GIB,
    )  # 8 − 5, and 2 of page cache that goes when room is needed


def test_the_machine_may_have_less_than_the_container_may_take(monkeypatch, container):
    system(monkeypatch, 4 * GIB, 3 * GIB)
    container({"proc/self/cgroup": "0::/\n", **version_2("sys/fs/cgroup", 8 * GIB, GIB, 0)})
    assert (budget("cpu").total, budget("cpu").free) == (4 * GIB, 3 * GIB)


def test_what_is_unknown_is_unknown(monkeypatch, container):
    container({})
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: (_ for _ in ()).throw(OSError("no /proc")))
    room = budget("cpu")
    assert (room.total, room.free, room.available) == (None, None, None)
    assert "an unknown amount available" in str(room)
    assert fits(MemoryPlan({}, 1, {}), room).startswith("unknown")
    gpu(monkeypatch, False, 0, 0)
    monkeypatch.setattr(
        torch.cuda, "mem_get_info", lambda _: (_ for _ in ()).throw(RuntimeError("not supported"))
    )
    assert budget("cuda").available is None
    assert budget("mps").available is None


def test_more_in_reserve_than_is_free_leaves_nothing_not_less(monkeypatch, container):
    container({})
    system(monkeypatch, GIB, GIB)
    assert budget("cpu", reserve=2 * GIB).available == 0


# --- what a block took ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anonymous", [False, True])
def test_measure_sees_memory_that_is_gone_again(anonymous):
    with measure("cpu", anonymous) as quiet:
        sum(range(1000))
    with measure("cpu", anonymous) as greedy:
        held = torch.ones(50_000_000)
        del held
    assert greedy.extra == pytest.approx(200e6, rel=0.1)
    assert quiet.extra < 10e6


def test_measure_samples_where_the_kernel_keeps_no_mark(monkeypatch):
    monkeypatch.setattr(machine, "_reset_high_water_mark", lambda: False)
    with measure("cpu") as memory_of_block:
        held = torch.ones(50_000_000)
        for _ in range(20):
            held += 1
        del held
    assert memory_of_block.extra == pytest.approx(200e6, rel=0.1)


def test_a_mapped_file_is_not_anonymous(tmp_path):
    torch.from_file(str(tmp_path / "numbers"), True, 25_000_000).fill_(1.0)
    with measure("cpu") as resident, measure("cpu", anonymous=True) as anonymous:
        mapped = torch.from_file(str(tmp_path / "numbers"), False, 25_000_000)
        mapped.sum()
    assert resident.extra > 90e6
    assert anonymous.extra < 20e6


def test_measure_on_cuda_is_the_allocators_peak(monkeypatch):
    said = []
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: said.append("reset"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 350)
    with measure("cuda") as memory_of_block:
        said.append("block")
    assert (memory_of_block.extra, said) == (250, ["reset", "block"])


# --- refusing ------------------------------------------------------------------------------------------------------


def left(monkeypatch, size):
    monkeypatch.setattr(memory, "budget", lambda device: MemoryBudget("cpu", False, 64 * GIB, size, 0))


def test_train_refuses_what_does_not_fit_and_names_the_term_to_cut(monkeypatch):
    model, rows = tiny("llama", 4), batch(rows=8, length=64)
    before = [p.clone() for p in model.parameters()]
    left(monkeypatch, 1_000_000)
    with pytest.raises(MemoryError) as refused:
        train(model, lambda _: rows, sft_loss, TrainConfig(1, progress=False))
    assert "saved activations" in str(refused.value)
    assert "activation_checkpointing_enable" in str(refused.value)
    assert "ignore_budget=True" in str(refused.value)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not model.training
    assert (
        len(train(model, lambda _: rows, sft_loss, TrainConfig(1, progress=False, ignore_budget=True)).losses)
        == 1
    )


def test_parts_that_fit_are_not_refused(monkeypatch):
    model, rows = tiny("llama", 4), batch(rows=8, length=64)
    whole, parts = (plan_step(model, rows, n).peak for n in (1, 8))
    assert parts < whole / 4
    left(monkeypatch, (whole + parts) // 2)
    with pytest.raises(MemoryError):
        refuse_over_budget(model, rows, 1)
    refuse_over_budget(model, rows, 8)


def test_nothing_is_refused_where_something_is_unknown(monkeypatch):
    left(monkeypatch, None)
    refuse_over_budget(tiny("llama", 2), batch())
    left(monkeypatch, 1)
    refuse_over_budget(nn.Linear(2, 2), {"x": torch.ones(3, 2)})  # a model of no known kind
    refuse_over_budget(tiny("llama", 2), {"x": torch.ones(3, 2)})  # a batch of no known kind


def test_pairs_are_planned_as_two_rows_with_their_prompt():
    ids = {
        f"{name}_ids": torch.ones(3, n, dtype=torch.long)
        for name, n in (("prompt", 11), ("chosen", 5), ("rejected", 7))
    }
    rows = ids | {name.replace("ids", "mask"): torch.ones_like(tensor) for name, tensor in ids.items()}
    plan = plan_step(tiny("llama", 2), rows | {"row": torch.arange(3)})
    assert plan.settings["tokens"] == 3 * (11 + 5 + 11 + 7)
    assert plan.settings["rows"] == 6


def test_the_largest_term_that_can_be_cut():
    def plan(method, rows=2, **terms):
        layers = "nf4" if method == "qlora" else "bf16"
        return MemoryPlan(terms, 0, {"method": method, "linear layers": layers, "rows": rows})

    assert cut(plan("lora", **{memory.LINEAR: 9, memory.LOGITS: 1})).endswith(
        'load the model in 4 bits (quantize="nf4")'
    )
    assert "logits" in cut(plan("qlora", **{memory.LINEAR: 9, memory.LOGITS: 1}))
    assert cut(plan("full", **{memory.LINEAR: 9, memory.MOMENTS: 8})).endswith(
        "train adapters instead (add_adapters)"
    )
    assert cut(plan("qlora", 1, **{memory.CHECKPOINTS: 3, memory.ADAPTERS: 9})).endswith("shorten the rows")
    assert cut(plan("qlora", 2, **{memory.CHECKPOINTS: 3})).endswith("compute fewer rows at once")


def test_a_check_changes_nothing_and_draws_nothing(monkeypatch):
    model, rows, asked = tiny("llama", 2), batch(), []
    left(monkeypatch, GIB)
    state = torch.get_rng_state()
    refuse_over_budget(model, rows)
    assert torch.equal(torch.get_rng_state(), state)
    train(model, lambda step: asked.append(step) or rows, sft_loss, TrainConfig(2, progress=False))
    assert asked == [0, 1]


# --- the commands --------------------------------------------------------------------------------------------------


def test_the_command_plan(capsys):
    assert (
        cli(["plan", "Llama-3.3-70B", "--method", "qlora", "--seq", "2048", "--adapter-dtype", "bf16"]) == 0
    )
    said = capsys.readouterr().out
    plan = LLAMA_70B()
    assert str(plan) in said
    here = plan_training(known_config("Llama-3.3-70B"), "qlora", adapter_dtype=BF16, device="cpu")
    assert f"this machine   {fits(here, budget('cpu'))[:8]}" in said
    assert f"a DGX Spark    {fits(plan, DGX_SPARK)}" in said


def test_the_command_plan_says_what_does_not_fit(capsys):
    assert cli(["plan", "Llama-3.3-70B", "--method", "full"]) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert "does not fit" in said
    assert "train adapters instead" in said


def test_the_command_plan_lists_what_it_knows(capsys):
    assert cli(["plan", "Mixtral"]) == 1
    assert 'spark-ft plan: "Mixtral" is neither' in capsys.readouterr().err
