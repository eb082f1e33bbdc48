"""Adapters on whole models: PEFT reads ours, we read PEFT's, same logits; a refusal changes nothing."""

import ast
import dataclasses
import json
import re
from collections import OrderedDict
from typing import get_args, get_type_hints

import pytest
import torch
from helpers import relative, tiny_llama, tiny_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from spark_ft import (
    AdapterConfig,
    adapters_disabled,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
)
from spark_ft.adapters import adapted_layers
from spark_ft.data.batches import collate_sft
from spark_ft.data.records import read_records
from spark_ft.embedded import embedded_folder
from spark_ft.experts import put_nf4
from spark_ft.files import ROOT, sha256, write_atomically
from spark_ft.methods.lora import LoRALinear
from spark_ft.methods.nf4 import NF4Linear, NF4Tensor
from spark_ft.models import load_model
from spark_ft.scoring import sft_loss

IDS = torch.tensor([[5, 17, 40, 8, 61, 3], [9, 9, 2, 70, 71, 1]])
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
CONFIGS = [
    AdapterConfig(rank=4),
    AdapterConfig(rank=2, alpha=5.5, targets=("q_proj", "v_proj"), rslora=True),
    AdapterConfig(rank=3, targets=("model.layers.1.mlp.down_proj", "o_proj"), dropout=0.2),
    AdapterConfig("dora", rank=4, alpha=6),
]


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits.float()


@torch.no_grad()
def filled(model, seed=1, std=0.1):
    """Give every B and magnitude numbers, so that the adapters do something."""
    g = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(model).values():
        layer.lora_B.normal_(std=std, generator=g)
        if hasattr(layer, "magnitude"):
            layer.magnitude.mul_(0.5 + torch.rand(layer.magnitude.shape, generator=g))
    return model


def state(model):
    return (
        {name: p.detach().clone() for name, p in model.state_dict().items()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: module.training for name, module in model.named_modules()},
    )


def assert_unchanged(model, before):
    after = state(model)
    assert after[1:] == before[1:]
    assert after[0].keys() == before[0].keys()
    assert all(torch.equal(after[0][name], before[0][name]) for name in after[0])


def refused(model, act, message, kind=ValueError):
    """Require that this raises, and that the model is as it was; the message."""
    before, config = state(model), getattr(model, "adapter_config", None)
    with pytest.raises(kind, match=message) as refusal:
        add_adapters(model, act) if isinstance(act, AdapterConfig) else act(model)
    assert_unchanged(model, before)
    assert getattr(model, "adapter_config", None) is config
    return str(refusal.value)


def named_instead(message):
    """The targets that a refusal names as its mend."""
    return ast.literal_eval(re.search(r"name the others, targets=(\(.*\))$", message)[1])


def merges_to_the_same_logits(model, tolerance=1e-4):
    with adapters_disabled(model):
        before = logits(model)
    adapted = logits(filled(model))
    assert relative(adapted, before) > 1e-3
    assert merge_adapters(model) is model
    assert relative(logits(model), adapted) < tolerance
    assert not adapted_layers(model)
    assert not hasattr(model, "adapter_config")


# --- putting them on ------------------------------------------------------------------------------
def test_all_linear_is_every_linear_layer_but_the_head_and_names_match_paths_or_their_ends_after_a_dot():
    def adapted(targets):
        return set(adapted_layers(add_adapters(tiny_llama(), AdapterConfig(rank=2, targets=targets))))

    ends = [*(f"self_attn.{name}" for name in ATTENTION), *(f"mlp.{name}" for name in MLP)]
    every = {f"model.layers.{i}.{end}" for i in (0, 1) for end in ends}
    assert adapted("all-linear") == every
    assert adapted("up_proj") == {name for name in every if "up_proj" in name}
    some = {"model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    assert adapted(("layers.0.self_attn.q_proj", "mlp.up_proj")) == some
    with pytest.raises(ValueError, match='target "proj" matches no linear layer'):  # an end, not after a dot
        adapted("proj")
    plain = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    assert set(adapted_layers(add_adapters(plain, AdapterConfig(rank=2, targets=("0",))))) == {"0"}
    with torch.device("meta"):
        assert adapted("all-linear") == every


def test_everything_but_the_adapters_is_frozen_and_the_new_model_computes_what_the_old_one_did():
    model = tiny_llama()
    before = logits(model)
    assert add_adapters(model, AdapterConfig(rank=4, dropout=0.5)) is model
    assert torch.equal(logits(model), before)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.lora_{ab}" for name in adapted_layers(model) for ab in "AB"}
    assert not any(layer.training for layer in adapted_layers(model).values())  # the model was in eval mode
    assert all(layer.training for layer in adapted_layers(model.train()).values())


def test_the_run_on_four_tokens_leaves_no_trace():
    """It draws dropout's numbers in training mode; adapters drawn after it start from the same ones."""
    model = tiny_llama(attention_dropout=0.5)
    model.model.layers[0].train()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(3)
    add_adapters(model, AdapterConfig(rank=2, targets=("q_proj",)))
    torch.manual_seed(3)
    for layer in adapted_layers(model).values():
        plain = nn.Linear(32, 32, device="meta").to_empty(device="cpu")  # it draws nothing
        assert torch.equal(layer.lora_A, LoRALinear(plain, 2).lora_A)
        assert not layer.base._forward_hooks
    assert {name: model.get_submodule(name).training for name in modes} == modes


def test_a_config_that_does_not_fit_or_means_nothing_is_refused():
    for wrong, message in (
        ({"targets": ()}, 'targets is empty; use "all-linear" or names'),
        ({"method": "lokr"}, 'method="lokr" is unknown; choose one of lora'),
        ({"rank": 0}, "rank=0 is not a whole number above 0"),
        ({"rank": "16"}, "rank='16' is not a whole number above 0"),
        ({"alpha": float("nan")}, "alpha=nan is not a number"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability below 1"),
    ):
        with pytest.raises(ValueError, match=message):
            AdapterConfig(**wrong)
    for targets, message in (
        (("q_proj", "w_proj"), 'target "w_proj" matches no linear layer of the model; it has .*q_proj'),
        ("embed_tokens", r'"embed_tokens" matches model.embed_tokens \(Embedding\) and no linear layer'),
        ("k_proj", r"rank=17 is larger than model.layers.0.self_attn.k_proj \(16×32\); choose at most 16"),
    ):
        refused(tiny_llama(), AdapterConfig(rank=17, targets=targets), message)
    adapted = filled(add_adapters(tiny_llama(), AdapterConfig(rank=2)))
    refused(adapted, AdapterConfig(rank=4, targets="q_proj"), "has adapters already; merge them first")
    refused(nn.ReLU(), AdapterConfig(), 'targets="all-linear" finds no linear layer in this ReLU')
    refused(tiny_model("gpt2"), AdapterConfig(), "no linear layer in this GPT2LMHeadModel.*Conv1D")
    refused(tiny_model("gpt2"), AdapterConfig(targets="c_attn"), r"transformer.h.0.attn.c_attn \(Conv1D\)")


# --- what cannot be adapted -----------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "gpt_oss", "phimoe"])
def test_all_linear_on_a_mixture_of_experts_names_the_share_out_of_reach(kind):
    model = tiny_model(kind)
    message = refused(model, AdapterConfig(rank=2), r"leaves out \d\d% of the weights.*experts\.gate_up_proj")
    share = int(re.search(r"(\d+)%", message)[1])
    inside = [p for n, p in model.named_parameters() if not re.search("embed|lm_head", n) and p.dim() > 1]
    linear = [m.weight for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    linear += [m.weight for m in model.modules() if type(m).__name__ == "PhimoeTopKRouter"]
    assert share == round(100 - 100 * sum(p.numel() for p in linear) / sum(p.numel() for p in inside))
    targets = named_instead(message)
    assert targets == tuple(sorted(ATTENTION))
    assert add_adapters(model, AdapterConfig(rank=2, targets=targets)).adapter_config.targets == targets
    merges_to_the_same_logits(model)


def test_a_mixture_in_4_bits_is_refused_alike_and_a_merge_makes_all_of_it_bf16():
    model = tiny_model("mixtral")
    for name in [n for n, p in model.named_parameters() if re.search(r"(proj\.weight|experts\.\w+)$", n)]:
        put_nf4(model, name)
    message = refused(model, AdapterConfig(rank=2), r"leaves out 8\d% of the weights.*experts\.gate_up_proj")
    add_adapters(model, AdapterConfig(rank=2, targets=named_instead(message)))
    merges_to_the_same_logits(model, tolerance=0.05)
    assert not [m for m in model.modules() if isinstance(m, NF4Tensor)]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_class_that_is_not_known_to_hold_a_plain_weight_is_refused_by_name_and_share():
    for end, share, first in (("proj", 14, "self_attn.q_proj"), ("up_proj", 2, "mlp.up_proj")):
        model = tiny_llama()
        for name, layer in list(model.named_modules()):
            if name.endswith(end):
                model.set_submodule(name, Doubled(layer.in_features, layer.out_features))
        why = rf"{share} of 14 targets cannot be adapted \(Doubled\); model.layers.0.{first}: its "
        message = refused(model, AdapterConfig(rank=2), why)
    assert named_instead(message) == tuple(sorted({*ATTENTION, *MLP} - {"up_proj"}))


def test_layers_that_share_a_weight_are_refused_and_both_are_named():
    def net(share):
        layers = {name: nn.Linear(8, 8, bias=False) for name in "abc"}
        if share == "quantized":
            layers = {name: NF4Linear.from_linear(layer) for name, layer in layers.items()}
        if share == "whole":
            layers["b"] = layers["a"]
        layers["b"].weight = layers["a"].weight
        model = nn.Module()
        for name, layer in layers.items():
            model.add_module(name, layer)
        return model

    for share in ("weight", "whole", "quantized"):
        for targets in ("all-linear", "a"):  # one of them alone is refused too
            config = AdapterConfig(rank=2, targets=targets)
            refused(net(share), config, r"of \d targets cannot be adapted.*; a: it shares its weight with b")
        add_adapters(net(share), AdapterConfig(rank=2, targets=("c",)))
    add_adapters(tiny_llama(tie_word_embeddings=True), AdapterConfig(rank=2))  # the head is no target


@pytest.mark.parametrize("kind", ["jamba", "mamba"])
def test_a_layer_whose_weight_is_taken_without_a_call_is_refused_and_the_others_merge(kind):
    config = AdapterConfig(rank=2, targets=("in_proj", "x_proj", "dt_proj", "out_proj"))
    found = refused(tiny_model(kind), config, r"dt_proj: the model takes its weight and does not call it")
    model = add_adapters(tiny_model(kind), AdapterConfig(rank=2, targets=named_instead(found)))
    assert model.adapter_config.targets == ("in_proj", "out_proj", "x_proj")
    merges_to_the_same_logits(model)


@pytest.mark.parametrize("kind", ["llama", "falcon", "falcon_h1", "bloom", "opt", "gemma2"])
def test_what_is_accepted_merges_to_the_same_logits(kind):
    merges_to_the_same_logits(add_adapters(tiny_model(kind), AdapterConfig(rank=2, rslora=True)))


# --- taking them off ------------------------------------------------------------------------------
def test_disabled_computes_the_base_exactly_and_restores_even_after_an_exception():
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


def test_a_merge_into_4_bits_rounds_the_sum_to_bf16_once():
    model = nn.Sequential(*(NF4Linear.from_linear(nn.Linear(64, size)) for size in (64, 8)))
    filled(add_adapters(model, AdapterConfig(rank=4, targets=("0",))))
    sums = model[0].base.weight.dequantize(torch.float32) + model[0].delta_weight()
    assert torch.equal(merge_adapters(model)[0].weight, sums.bfloat16())
    assert [type(layer) for layer in model] == [nn.Linear, nn.Linear]


def test_no_adapters_and_an_adapted_head_that_is_also_the_embedding_cannot_be_merged(tmp_path):
    nothing = "the model has no adapters; put them on with add_adapters or load_adapters"
    save, disable = lambda m: save_adapters(m, tmp_path), lambda m: adapters_disabled(m).__enter__()
    for act in (merge_adapters, save, disable):
        with pytest.raises(ValueError, match=nothing):
            act(tiny_llama())
    with pytest.raises(ValueError, match="no adapter_config; put the adapters on with add_adapters"):
        save_adapters(nn.Sequential(LoRALinear(nn.Linear(8, 8), 2)), tmp_path)
    assert list(tmp_path.iterdir()) == []
    config = AdapterConfig(rank=4, targets=("q_proj", "lm_head"))
    model = filled(add_adapters(tiny_llama(tie_word_embeddings=True), config))
    refused(model, merge_adapters, r"lm_head shares its weight with model.embed_tokens")
    merges_to_the_same_logits(add_adapters(tiny_llama(), AdapterConfig(rank=4, targets=("lm_head",))), 1e-5)


# --- PEFT reads ours ------------------------------------------------------------------------------
def read_by_peft(base, folder):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


def parts(model):
    """How many tensors of adapters a model has."""
    return sum("lora_" in name or name.endswith("magnitude") for name, _ in model.named_parameters())


@pytest.mark.parametrize("config", CONFIGS)
def test_peft_loads_what_we_save_to_the_same_logits(config, tmp_path):
    model = filled(add_adapters(tiny_llama(), config))
    assert save_adapters(model, tmp_path / "a") == tmp_path / "a"
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    fields, base = json.loads((tmp_path / "a" / files[0]).read_text()), tiny_llama(packed=False)
    assert (fields["r"], fields["task_type"]) == (config.rank, "CAUSAL_LM")
    unadapted = logits(base)
    theirs = read_by_peft(base, tmp_path / "a")
    assert relative(logits(theirs), logits(model)) < (1e-6 if config.method == "lora" else 1e-5)
    assert relative(unadapted, logits(model)) > 0.01
    assert parts(theirs) == parts(model)
    merges_to_the_same_logits(model)


class Net(nn.Sequential):
    """The short names "0" and "fc" stand for more than one module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        inner = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8)))
        self.blocks = nn.Sequential(inner)
        self.merger = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 8)


@pytest.mark.parametrize(
    ("adapted", "saved"),
    [
        ("all-linear", ["blocks.0.fc", "fc", "merger.0", "merger.2"]),  # "0" is a block too
        (("merger.2", "fc"), ["2", "fc"]),
        (("blocks.0.fc", "merger.0"), ["blocks.0.fc", "merger.0"]),
        ("^fc", r"fc"),  # the whole path "fc" is the end of another one: an expression
    ],
)
def test_where_a_short_name_is_ambiguous_peft_still_finds_our_layers_and_no_others(adapted, saved, tmp_path):
    model = Net()
    if adapted == "^fc":
        inner, model.blocks[0].fc = model.blocks[0].fc, nn.Identity()
        add_adapters(model, AdapterConfig(rank=2, targets=("fc",)))
        model.blocks[0].fc = inner
    else:
        add_adapters(model, AdapterConfig(rank=2, targets=adapted))
    save_adapters(filled(model), tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == saved
    theirs, x = read_by_peft(Net(), tmp_path), torch.randn(5, 8)
    assert torch.allclose(theirs(x), model(x), atol=1e-6)
    assert not torch.allclose(Net()(x), model(x), atol=1e-3)
    assert parts(theirs) == parts(model)
    assert torch.equal(load_adapters(Net(), tmp_path)(x), model(x))


# --- we read PEFT's -------------------------------------------------------------------------------
def saved_by_peft(folder, model=None, std=0.1, dtype=None, **options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"r": 4, "task_type": "CAUSAL_LM", **options})
    theirs = get_peft_model(model or tiny_llama(packed=False), config)
    for name, p in theirs.eval().named_parameters():
        if "lora_" in name:
            p.data = p.data.normal_(std=std).to(dtype or p.dtype)
    theirs.save_pretrained(folder)
    return theirs.float()


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": "all-linear", "lora_dropout": 0.1},
        {"target_modules": "all-linear", "use_rslora": True, "lora_alpha": 5.5},
        {"target_modules": r".*layers\.1\..*(up|down)_proj", "use_dora": True},
        {"target_modules": ["gate_proj"], "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "q_proj"], "fan_in_fan_out": True},
        {"target_modules": ["lm_head"], "tied": True},  # the head is the embedding
        {"target_modules": ["q_proj", "k_proj"], "dtype": torch.bfloat16},
    ],
)
@pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning", "ignore:Setting `save_embedding:UserWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_w:UserWarning")
def test_we_load_what_peft_saved_to_the_same_logits(options, tmp_path):
    tied = {"tie_word_embeddings": options.pop("tied", False)}
    theirs = saved_by_peft(tmp_path, tiny_llama(packed=False, **tied), **options)
    in_file = {t.dtype for t in load_file(tmp_path / "adapter_model.safetensors").values()}
    assert in_file == {options.get("dtype", torch.float32)}  # ours are fp32 whatever the file's precision
    model = load_adapters(tiny_llama(**tied), tmp_path)
    assert relative(logits(model), logits(theirs)) < (1e-5 if options.get("use_dora") else 1e-6)
    assert relative(logits(model), logits(tiny_llama(**tied))) > 0.01
    assert all(layer.lora_A.dtype == torch.float32 for layer in adapted_layers(model).values())


@pytest.mark.parametrize("config", CONFIGS)
def test_ours_come_back_bit_for_bit_also_over_adapters_of_the_same_shape(config, tmp_path):
    model = filled(add_adapters(tiny_llama(), config))
    save_adapters(model, tmp_path)
    again = load_adapters(tiny_llama(), tmp_path)
    assert_unchanged(again, state(model))
    assert again.adapter_config.dropout == config.dropout
    over = filled(add_adapters(tiny_llama(), config), seed=2)
    assert not torch.equal(logits(over), logits(model))
    load_adapters(over, tmp_path)
    assert torch.equal(logits(over), logits(model))


# --- refusals -------------------------------------------------------------------------------------
@pytest.fixture
def saved(tmp_path):
    """A folder with adapters of rank 4 on q_proj and v_proj."""
    model = add_adapters(tiny_llama(), AdapterConfig(rank=4, targets=("q_proj", "v_proj")))
    return save_adapters(filled(model), tmp_path / "a")


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rename(folder, change, extra=()):
    file = folder / "adapter_model.safetensors"
    save_file({**{change(name): t for name, t in load_file(file).items()}, **dict(extra)}, file)


def refuses(folder, message, kind=ValueError, **changes):
    refused(tiny_llama(**changes), lambda model: load_adapters(model, folder), message, kind)


# Fields of LoraConfig: those that say nothing once A and B are known, those that must be empty, others.
FREE = """task_type peft_version revision base_model_name_or_path megatron_core auto_mapping loftq_config
    eva_config corda_config lora_ga_config inference_mode fan_in_fan_out runtime_config target_modules
    exclude_modules layers_pattern layers_to_transform qalora_group_size"""
EMPTY = """rank_pattern alpha_pattern modules_to_save trainable_token_indices target_parameters use_qalora
    lora_bias layer_replication alora_invocation_tokens ensure_weight_tying velora_config monteclora_config
    use_bdlora arrow_config kasa_config megatron_config"""
STARTS = [True, False, None, "gaussian", "eva", "orthogonal", "mica"]
BAD_STARTS = ["pissa", "pissa_niter_[number of iters]", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"]
NEW = "a field of next year's PEFT"
FIELDS = {
    **{field: ([None, True, "x", ["y"], {"a": 1}], []) for field in FREE.split()},
    **{field: ([None, False, [], {}], [True, ["w"], {"a": 1}]) for field in EMPTY.split()},
    NEW: ([None, False, [], {}], [True, "x"]),
    "bias": (["none", None], ["all", "lora_only"]),
    "peft_type": (["LORA"], ["IA3", None]),
    "r": ([4], [0, 4.0, "four", None]),
    "lora_alpha": ([32, 32.0], ["many", None, float("nan")]),
    "lora_dropout": ([0, 0.3, None], [1.0, "x"]),
    "use_rslora": ([False, None], ["yes"]),
    "use_dora": ([False, None], ["yes"]),
    "init_lora_weights": (STARTS, BAD_STARTS),
}


def test_every_field_that_peft_knows_is_used_or_harmless_or_refused_by_name(saved):
    from peft import LoraConfig

    assert {field.name for field in dataclasses.fields(LoraConfig)} == FIELDS.keys() - {NEW}
    literals = [get_args(part) for part in get_args(get_type_hints(LoraConfig)["init_lora_weights"])]
    assert {start for starts in literals for start in starts} <= {*STARTS, *BAD_STARTS}
    expected, config = logits(load_adapters(tiny_llama(), saved)), (saved / "adapter_config.json").read_text()
    for field, (harmless, harmful) in FIELDS.items():
        for value in harmless:
            edit(saved, **{field: value})
            assert torch.equal(logits(load_adapters(tiny_llama(), saved)), expected), (field, value)
        for value in harmful:
            edit(saved, **{field: value})
            name = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}.get(field, f'"{field}"')
            refuses(saved, f"adapter_config.json: {name}")
        (saved / "adapter_config.json").write_text(config)


@pytest.mark.filterwarnings("ignore:.*eva:UserWarning")
def test_a_start_that_changes_the_base_is_refused_and_any_other_loads_to_pefts_logits(tmp_path):
    for start in STARTS:
        theirs = saved_by_peft(tmp_path, target_modules=["q_proj"], init_lora_weights=start)
        assert relative(logits(load_adapters(tiny_llama(), tmp_path)), logits(theirs)) < 1e-6, start
    for start in ("pissa", "olora"):
        saved_by_peft(tmp_path, target_modules=["q_proj"], init_lora_weights=start)
        refuses(tmp_path, f"\"init_lora_weights\" is '{start}', a start that changes the base too")


def test_an_adapters_own_name_is_no_obstacle_but_two_in_a_file_or_another_on_the_model_are(saved):
    for change in ({"targets": ("q_proj",)}, {"rank": 2}, {"alpha": 8}, {"rslora": True}):
        config = AdapterConfig(**{"rank": 4, "targets": ("q_proj", "v_proj"), **change})
        model = filled(add_adapters(tiny_llama(), config))
        why = "the model has other adapters already; merge_adapters first|another model or rank"
        refused(model, lambda model: load_adapters(model, saved), why)
    expected = logits(load_adapters(tiny_llama(), saved))
    whole = load_file(saved / "adapter_model.safetensors")
    rename(saved, lambda name: name.replace(".weight", ".default.weight"))
    assert torch.equal(logits(load_adapters(tiny_llama(), saved)), expected)
    rename(saved, str, whole)
    refuses(saved, r'holds lora_[AB] of "model.layers.\d.self_attn.\w_proj" twice')


@pytest.mark.filterwarnings("ignore:Setting `save_embedding:UserWarning")
def test_an_adapted_embedding_and_a_changed_base_weight_are_refused_for_the_true_reason(saved, tmp_path):
    saved_by_peft(tmp_path, target_modules=["embed_tokens", "q_proj"])
    refuses(tmp_path, r'adapts the embedding "model.embed_tokens" \(lora_embedding_A\)')
    key = "base_model.model.model.embed_tokens.weight"
    own = tiny_llama().get_input_embeddings().weight.data
    for precision in (torch.float32, torch.bfloat16):  # rounded, but not trained
        rename(saved, str, {key: own.to(precision)})
        load_adapters(tiny_llama(), saved)
    for other in (own + 0.01, torch.cat([own, own[:3]])):
        rename(saved, str, {key: other})
        refuses(saved, r'holds "base.*embed_tokens.weight", unlike this model\'s own; if it was')


def test_an_adapter_of_another_model_or_with_other_tensors_is_refused(saved):
    file = saved / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: t for name, t in tensors.items() if "0.self_attn.q_proj.lora_B" not in name}, file)
    refuses(saved, r'"model.layers.0.self_attn.q_proj" has \{.lora_A')
    for foreign in ("wte.weight", "layers.0.self_attn.q_proj.lora_B.bias"):
        foreign = f"base_model.model.model.{foreign}"
        save_file({**tensors, foreign: torch.zeros(97, 32)}, file)
        refuses(saved, f'holds "{foreign}", which this model does not have')
    save_file({}, file)
    refuses(saved, "holds no adapter")
    save_file(tensors, file)
    refuses(saved, r'adapts "model.layers.1.*" as a linear layer, which is missing here', num_hidden_layers=1)
    other = r'"model.layers.0.self_attn.q_proj" has .* belongs to another model or rank'
    refuses(saved, other, hidden_size=64)
    refused(nn.Linear(32, 32), lambda model: load_adapters(model, saved), "it is an adapter of another model")
    edit(saved, r=8)
    refuses(saved, r"has .* where this model needs .* it belongs to another model or rank")
    edit(saved, r=4, use_dora=True)  # with no magnitudes in the file
    refuses(saved, "needs .*lora_magnitude_vector")
    rename(saved, lambda name: name.replace("self_attn.q_proj", "input_layernorm"))
    refuses(saved, r'adapts "model.layers.0.input_layernorm" .* class LlamaRMSNorm here')


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_damaged_files_are_named(saved, name):
    file = saved / name
    whole = file.read_bytes()
    empty = b"[]" if name.endswith("json") else b"[]" * 20
    for damaged in (whole[: len(whole) // 2], b"", b"\x00\xff garbage" * 9, empty):
        file.write_bytes(damaged)
        refuses(saved, rf"{name}: (damaged|not valid JSON|not a JSON object)")
    file.unlink()
    refuses(saved, rf"{name}: no such file; an adapter folder holds", FileNotFoundError)


# --- writing --------------------------------------------------------------------------------------
@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, failure):
    path = tmp_path / "a.txt"

    def write(temporary):
        temporary.write_text("half of the n")
        raise failure

    path.write_text("old")
    with pytest.raises(type(failure)):
        write_atomically(path, write)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert [p.read_text() for p in tmp_path.iterdir()] == ["new"]
    assert sha256(path) == "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"


def test_saving_over_an_adapter_that_fails_half_way_leaves_the_old_one(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    model = filled(add_adapters(tiny_llama(), AdapterConfig(rank=4, targets=("q_proj", "v_proj"))), seed=5)

    def full(tensors, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("spark_ft.adapters.save_file", full)
    with pytest.raises(OSError, match=r"adapter_model.safetensors: no disk space to write it; free some"):
        save_adapters(model, saved)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


# --- the embedded model ---------------------------------------------------------------------------
def test_one_sft_batch_of_the_embedded_model_has_pefts_and_transformers_loss_and_gradient(tmp_path):
    model, tokenizer = load_model()
    torch.manual_seed(0)
    # at B = 0 the gradient of A would be 0 on both sides
    filled(add_adapters(model, AdapterConfig(rank=16, alpha=32)), seed=0, std=0.01)
    save_adapters(model, tmp_path)
    batch = collate_sft(read_records(ROOT / "data/kitchen_tickets/train.jsonl", "sft")[:3], tokenizer)
    assert (batch["attention_mask"] == 0).any()  # there is padding to get wrong
    total, count = sft_loss(model, batch)
    assert count == (batch["labels"] != -100).sum()
    base = AutoModelForCausalLM.from_pretrained(embedded_folder(), dtype=torch.float32)
    theirs = read_by_peft(base, tmp_path)
    for name, p in theirs.named_parameters():
        p.requires_grad_("lora_" in name)
    loss, their_loss = total / count, theirs(**batch, use_cache=False).loss
    assert abs(loss - their_loss) <= 1e-5 * their_loss
    loss.backward()
    their_loss.backward()
    trained = {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == 2 * 30 * 7
    found = [theirs.get_parameter(f"base_model.model.{name}.default.weight") for name in trained]
    assert relative(torch.cat([*trained.values()]), torch.cat([p.grad.flatten() for p in found])) <= 1e-5
