"""Adapters on whole models: PEFT reads ours and we read PEFT's, to the same logits; a refusal changes nothing."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from spark_ft.adapters import (
    METHODS,
    AdapterConfig,
    adapted_layers,
    adapters_disabled,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from spark_ft.files import write_atomically
from spark_ft.methods.lora import LoRALinear

IDS = torch.tensor([[5, 17, 40, 8, 61, 3], [9, 9, 2, 70, 71, 1]])
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def relative(ours, theirs) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def filled(model, seed=1):
    """Give every B numbers, so that the adapters do something."""
    g = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        layer.lora_B.data.normal_(std=0.1, generator=g)
    return model


def state(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}, {
        name: p.requires_grad for name, p in model.named_parameters()
    }


def assert_unchanged(model, before):
    tensors, trains = state(model)
    assert trains == before[1]
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)


CONFIGS = [
    AdapterConfig(rank=4),
    AdapterConfig(rank=2, alpha=5.5, targets=("q_proj", "v_proj"), rslora=True),
    AdapterConfig(rank=3, targets=("model.layers.1.mlp.down_proj", "o_proj"), dropout=0.2),
]


# --- putting them on -----------------------------------------------------------------------------------------------


def test_all_linear_is_every_linear_layer_but_the_head(tiny_llama):
    model = add_adapters(tiny_llama(), AdapterConfig(rank=2))
    expected = {f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ATTENTION} | {
        f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in MLP
    }
    assert set(adapted_layers(model)) == expected


def test_names_match_a_whole_path_or_its_end_after_a_dot(tiny_llama):
    model = add_adapters(
        tiny_llama(), AdapterConfig(rank=2, targets=("layers.0.self_attn.q_proj", "mlp.up_proj"))
    )
    assert sorted(adapted_layers(model)) == [
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert set(adapted_layers(add_adapters(tiny_llama(), AdapterConfig(rank=2, targets="q_proj")))) == {
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    with pytest.raises(
        ValueError, match='target "proj" matches no linear layer'
    ):  # an end, but not after a dot
        add_adapters(tiny_llama(), AdapterConfig(rank=2, targets=("proj",)))


def test_everything_but_the_adapters_is_frozen_and_the_new_model_computes_what_the_old_one_did(tiny_llama):
    model = tiny_llama()
    before = logits(model)
    assert add_adapters(model, AdapterConfig(rank=4, dropout=0.5)) is model
    assert torch.equal(logits(model), before)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.lora_{ab}" for name in adapted_layers(model) for ab in "AB"}
    assert not any(layer.training for layer in adapted_layers(model).values())  # the model was in eval mode
    assert all(layer.training for layer in adapted_layers(model.train()).values())


def test_a_plain_torch_model_takes_adapters_too():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    assert set(adapted_layers(add_adapters(model, AdapterConfig(rank=2, targets=("0",))))) == {"0"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"targets": ("q_proj", "w_proj")},
            r'target "w_proj" matches no linear layer of the model; it has .*q_proj',
        ),
        ({"targets": ("embed_tokens",)}, 'target "embed_tokens" matches no linear layer'),
        (
            {"rank": 17, "targets": ("q_proj", "k_proj")},
            r"rank=17 is larger than model.layers.0.self_attn.k_proj \(16×32\)",
        ),
        ({"rank": 0}, r"rank=0 does not fit"),
        ({"dropout": 1.0}, r"dropout=1.0 is not a probability"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_and_the_model_is_unchanged(tiny_llama, config, message):
    model = tiny_llama()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        add_adapters(model, AdapterConfig(**config))
    assert_unchanged(model, before)
    assert not hasattr(model, "adapter_config")


def test_configs_that_mean_nothing_are_refused():
    with pytest.raises(ValueError, match=r'targets is empty; use "all-linear" or names'):
        AdapterConfig(targets=())
    with pytest.raises(ValueError, match=r'method="lokr" is unknown; choose one of lora'):
        AdapterConfig(method="lokr")
    with pytest.raises(ValueError, match='targets="all-linear" finds no linear layer in this ReLU'):
        add_adapters(nn.ReLU(), AdapterConfig())


def test_adapters_twice_are_refused_and_the_first_ones_stay(tiny_llama):
    model = filled(add_adapters(tiny_llama(), AdapterConfig(rank=2)))
    before = state(model)
    with pytest.raises(ValueError, match="has adapters already; merge them first"):
        add_adapters(model, AdapterConfig(rank=4, targets=("q_proj",)))
    assert_unchanged(model, before)


# --- taking them off -----------------------------------------------------------------------------------------------


def test_disabled_computes_the_base_exactly_and_restores_even_after_an_exception(tiny_llama):
    base = logits(tiny_llama())
    model = filled(add_adapters(tiny_llama(), AdapterConfig(rank=4)))
    adapted = logits(model)
    assert relative(adapted, base) > 0.01
    with adapters_disabled(model) as same:
        assert same is model
        assert torch.equal(logits(model), base)
        with adapters_disabled(model):
            pass
        assert torch.equal(logits(model), base)  # the inner block put back what it found
    assert torch.equal(logits(model), adapted)
    with pytest.raises(ZeroDivisionError), adapters_disabled(model):
        raise ZeroDivisionError
    assert torch.equal(logits(model), adapted)


def test_merging_gives_a_plain_model_with_the_same_logits(tiny_llama):
    model = filled(add_adapters(tiny_llama(), AdapterConfig(rank=4, rslora=True)))
    adapted = logits(model)
    assert merge_adapters(model) is model
    assert relative(logits(model), adapted) < 1e-5
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    assert set(model.state_dict()) == set(tiny_llama().state_dict())
    add_adapters(model, AdapterConfig(rank=2))  # and it can be adapted again


@pytest.mark.parametrize(
    "act", [merge_adapters, lambda m: save_adapters(m, "x"), lambda m: adapters_disabled(m).__enter__()]
)
def test_without_adapters_there_is_nothing_to_merge_save_or_disable(tiny_llama, act, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match="the model has no adapters; put them on with add_adapters or load_adapters"
    ):
        act(tiny_llama())
    assert list(tmp_path.iterdir()) == []


def test_merging_an_adapted_head_that_is_also_the_embedding_is_refused(tiny_llama):
    model = filled(
        add_adapters(
            tiny_llama(tie_word_embeddings=True), AdapterConfig(rank=4, targets=("q_proj", "lm_head"))
        )
    )
    before = state(model)
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model.embed_tokens"):
        merge_adapters(model)
    assert_unchanged(model, before)
    untied = filled(add_adapters(tiny_llama(), AdapterConfig(rank=4, targets=("lm_head",))))
    adapted = logits(untied)
    assert relative(logits(merge_adapters(untied)), adapted) < 1e-5


# --- PEFT reads ours -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_what_we_save_to_the_same_logits(tiny_llama, config, tmp_path):
    from peft import PeftModel

    model = filled(add_adapters(tiny_llama(), config))
    assert save_adapters(model, tmp_path / "a") == tmp_path / "a"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    base = tiny_llama(packed=False)
    unadapted = logits(base)
    theirs = PeftModel.from_pretrained(base, tmp_path / "a").eval()
    assert relative(logits(theirs), logits(model)) < 1e-6
    assert relative(unadapted, logits(model)) > 0.01
    assert sum("lora_" in name for name, _ in theirs.named_parameters()) == 2 * len(adapted_layers(model))


def test_what_we_save_says_what_it_is(tiny_llama, tmp_path):
    model = tiny_llama()
    model.config._name_or_path = "some/model"
    save_adapters(filled(add_adapters(model, CONFIGS[1])), tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["base_model_name_or_path"] == "some/model"
    assert (fields["r"], fields["lora_alpha"], fields["use_rslora"], fields["target_modules"]) == (
        2,
        5.5,
        True,
        ["q_proj", "v_proj"],
    )
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 32)
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].shape == (32, 2)
    assert len(tensors) == 8


# --- we read PEFT's ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"target_modules": ["q_proj", "v_proj"]}, torch.float32),
        ({"target_modules": "all-linear", "lora_dropout": 0.1}, torch.float32),
        ({"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5.5}, torch.float32),
        ({"target_modules": r".*layers\.1\..*(up|down)_proj"}, torch.float32),
        ({"target_modules": ["gate_proj"], "layers_to_transform": [1]}, torch.float32),
        ({"target_modules": ["q_proj", "k_proj"]}, torch.bfloat16),
    ],
)
def test_we_load_what_peft_saved_to_the_same_logits(tiny_llama, options, dtype, tmp_path):
    from peft import LoraConfig, get_peft_model

    theirs = get_peft_model(
        tiny_llama(packed=False), LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    ).eval()
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data.normal_(std=0.1)
            p.data = p.data.to(dtype)
    theirs.save_pretrained(tmp_path)
    if dtype == torch.bfloat16:  # PEFT would compute in bf16; ours are fp32 whatever the file's precision
        assert all(t.dtype == dtype for t in load_file(tmp_path / "adapter_model.safetensors").values())
        theirs.float()
    model = load_adapters(tiny_llama(), tmp_path)
    assert relative(logits(model), logits(theirs)) < 1e-6
    assert relative(logits(model), logits(tiny_llama())) > 0.01
    assert all(layer.lora_A.dtype == torch.float32 for layer in adapted_layers(model).values())


@pytest.mark.parametrize("config", CONFIGS)
def test_ours_come_back_bit_for_bit_also_over_adapters_of_the_same_shape(tiny_llama, config, tmp_path):
    model = filled(add_adapters(tiny_llama(), config))
    save_adapters(model, tmp_path)
    again = load_adapters(tiny_llama(), tmp_path)
    assert_unchanged(again, state(model))
    assert again.adapter_config.dropout == config.dropout
    over = filled(add_adapters(tiny_llama(), config), seed=2)
    assert not torch.equal(logits(over), logits(model))
    load_adapters(over, tmp_path)
    assert torch.equal(logits(over), logits(model))


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny_llama, tmp_path):
    """A folder with adapters of rank 4 on q_proj and v_proj."""
    model = add_adapters(tiny_llama(), AdapterConfig(rank=4, targets=("q_proj", "v_proj")))
    return save_adapters(filled(model), tmp_path / "a")


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refuses(model, folder, message, kind=ValueError):
    before = state(model)
    with pytest.raises(kind, match=message):
        load_adapters(model, folder)
    assert_unchanged(model, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
        ("alpha_pattern", {"q_proj": 8}),
        ("bias", "all"),
        ("lora_bias", True),
        ("fan_in_fan_out", True),
        ("layer_replication", [[0, 2], [0, 2]]),
        ("trainable_token_indices", [1]),
        ("target_parameters", ["w"]),
    ],
)
def test_what_peft_can_and_we_cannot_is_refused_by_name(tiny_llama, saved, field, value):
    edit(saved, **{field: value})
    refuses(
        tiny_llama(),
        saved,
        rf'adapter_config.json: "{field}" is {re.escape(repr(value))}, which is not supported here',
    )


def test_other_kinds_of_adapter_are_refused_by_name(tiny_llama, saved):
    edit(saved, peft_type="IA3")
    refuses(tiny_llama(), saved, r"peft_type is 'IA3'; only \"LORA\" adapters can be loaded here")
    edit(saved, peft_type="LORA", r="four")
    refuses(tiny_llama(), saved, r"\"r\" is 'four', not a number")
    edit(saved, r=4, use_dora=True)  # with no magnitudes in the file, where DoRA is known
    refuses(tiny_llama(), saved, "lora_magnitude_vector|needs" if "dora" in METHODS else '"use_dora" is true')


def test_an_adapter_of_another_model_or_shape_is_refused(tiny_llama, saved):
    refuses(tiny_llama(num_hidden_layers=1), saved, r'adapts "model.layers.1.*", which this model has not')
    refuses(
        tiny_llama(hidden_size=64),
        saved,
        r'"model.layers.0.self_attn.q_proj" has .* it belongs to another model or rank',
    )
    refuses(nn.Sequential(nn.Linear(32, 32)), saved, "it is an adapter of another model")
    edit(saved, r=8)
    refuses(tiny_llama(), saved, r"has .* where this model needs .* it belongs to another model or rank")


def test_a_missing_or_foreign_tensor_is_refused(tiny_llama, saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    whole = dict(tensors)
    del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    save_file(tensors, file)
    refuses(tiny_llama(), saved, r'"model.layers.0.self_attn.q_proj" has \{.lora_A')
    save_file({**whole, "base_model.model.model.embed_tokens.weight": torch.zeros(97, 32)}, file)
    refuses(tiny_llama(), saved, "adapts .*, which this model has not")
    save_file({}, file)
    refuses(tiny_llama(), saved, "holds no adapter")


def test_other_adapters_on_the_model_are_not_overwritten(tiny_llama, saved):
    for config in (
        AdapterConfig(rank=4, targets=("q_proj",)),
        AdapterConfig(rank=2, targets=("q_proj", "v_proj")),
        AdapterConfig(rank=4, alpha=8, targets=("q_proj", "v_proj")),
        AdapterConfig(rank=4, rslora=True, targets=("q_proj", "v_proj")),
    ):
        refuses(
            filled(add_adapters(tiny_llama(), config)),
            saved,
            "the model has other adapters already; merge_adapters first",
        )


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_damaged_files_are_named(tiny_llama, saved, name):
    file = saved / name
    whole = file.read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        b"",
        b"\x00\xff garbage" * 9,
        b"[]" if name.endswith("json") else b"[]" * 20,
    ):
        file.write_bytes(damaged)
        refuses(tiny_llama(), saved, rf"{name}: (damaged|not valid JSON|not a JSON object)")
    file.unlink()
    refuses(tiny_llama(), saved, rf"{name}: no such file; an adapter folder holds", FileNotFoundError)


# --- writing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write(temporary):
        temporary.write_text("half of the n")
        raise failure

    with pytest.raises(type(failure)):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_killed_half_way_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    code = """
import os, signal, sys
from pathlib import Path
from spark_ft.adapters import write_atomically
def write(path):
    path.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
write_atomically(Path(sys.argv[1]), write)
"""
    killed = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a.txt"], env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert killed.returncode == -9
    assert (tmp_path / "a.txt").read_text() == "old"


def test_saving_over_an_adapter_that_fails_half_way_leaves_the_old_one(tiny_llama, saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = filled(add_adapters(tiny_llama(), AdapterConfig(rank=4, targets=("q_proj", "v_proj"))), seed=5)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spark_ft.adapters.save_file", full)
    with pytest.raises(OSError, match=r"adapter_model.safetensors: no disk space to write it; free some"):
        save_adapters(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


# --- the embedded model --------------------------------------------------------------------------------------------


def test_one_sft_batch_of_the_embedded_model_has_pefts_and_transformers_loss_and_gradient(tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from spark_ft.data.batches import collate_sft
    from spark_ft.data.records import read_records
    from spark_ft.embedded import embedded_folder
    from spark_ft.files import ROOT
    from spark_ft.models import load_model
    from spark_ft.scoring import sft_loss

    model, tokenizer = load_model()
    torch.manual_seed(0)
    add_adapters(model, AdapterConfig(rank=16, alpha=32))
    g = torch.Generator().manual_seed(0)
    for layer in adapted_layers(model).values():
        layer.lora_B.data.normal_(
            std=0.01, generator=g
        )  # at B = 0 the gradient of A would be 0 on both sides
    save_adapters(model, tmp_path)
    batch = collate_sft(read_records(ROOT / "data/kitchen_tickets/train.jsonl", "sft")[:3], tokenizer)
    assert (batch["attention_mask"] == 0).any()  # there is padding to get wrong

    total, count = sft_loss(model, batch)
    assert count == (batch["labels"] != -100).sum()
    loss = total / count
    loss.backward()
    base = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).eval()
    their_loss = theirs(**batch, use_cache=False).loss
    their_loss.backward()

    assert abs(loss - their_loss) <= 1e-5 * their_loss
    grads = dict(theirs.named_parameters())
    pairs = [
        (getattr(layer, part).grad, grads[f"base_model.model.{name}.{part}.default.weight"].grad)
        for name, layer in adapted_layers(model).items()
        for part in ("lora_A", "lora_B")
    ]
    assert len(pairs) == 2 * 30 * 7
    ours, hf = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
    assert relative(ours, hf) <= 1e-5
    assert sum(p.grad is not None for p in model.parameters()) == len(pairs)
