"""Exported files are the model: llama.cpp itself is the judge, on tiny models; each fault has its name."""

import json
import math
import subprocess
import sys
import warnings

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import dequantize, quantize
from helpers import complains, relative, tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from spark_ft import (
    AdapterConfig,
    adapters_disabled,
    add_adapters,
    exact_match,
    export_adapter,
    export_gguf,
    export_safetensors,
    generate,
    load_adapters,
    load_model,
    merge_adapters,
    perplexity,
    save_adapters,
    serve,
    verify_gguf,
)
from spark_ft.adapters import adapted_layers
from spark_ft.cli import main as cli
from spark_ft.embedded import _embedded_gguf
from spark_ft.export import gguf as writing
from spark_ft.export import tokens as tokenizing
from spark_ft.export import verify as verifying
from spark_ft.export.reader import read_gguf
from spark_ft.export.verify import PROMPTS, TEXTS
from spark_ft.export.weights import Weights
from spark_ft.files import ROOT
from spark_ft.lab.kitchen import kitchen_adapter, tickets
from spark_ft.models import load_tokenizer

DEFAULTS = verify_gguf.__kwdefaults__
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = tokenizing.PRE_TOKENIZERS["llama-bpe"][0][0]
QWEN2 = tokenizing.PRE_TOKENIZERS["qwen2"][0][0]
by_words = pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(expression):
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(expression), "isolated"), byte_level])


SPLITTERS = {
    "gpt-2": by_words,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), by_words]),
    "qwen2": split(QWEN2),
    "llama-bpe": split(LLAMA3),
}


def small_tokenizer(kind="smollm", splitter=None, **model):
    """A byte-level BPE of 600 tokens, trained on the texts where ways of splitting differ."""
    model = {"ignore_merges": kind == "llama-bpe", **model}
    backend = Tokenizer(models.BPE(**model))
    backend.pre_tokenizer, backend.decoder = splitter or SPLITTERS[kind], decoders.ByteLevel()
    special = ["<|end|>", "<|im_start|>", "<|im_end|>", "<|bos|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        TEXTS * 9, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=special)
    )
    state = json.loads(backend.to_str())
    state["model"].update(model)  # the trainer forgets ignore_merges
    backend = Tokenizer.from_str(json.dumps(state))
    options = {"eos_token": "<|im_end|>", "pad_token": "<|end|>"}
    if kind == "llama-bpe":  # as in Llama 3, every text begins with it
        options["bos_token"] = "<|bos|>"
        backend.post_processor = TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 3)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **options)
    tokenizer.add_tokens(["<think>"])  # not special: a user may write it
    tokenizer.chat_template = ("{{ bos_token }}" if kind == "llama-bpe" else "") + CHATML
    return tokenizer


def small_model(kind="llama", **changes):
    model = tiny_model(kind, **{"vocab_size": 608, "eos_token_id": 2, **changes})
    with torch.no_grad():  # likely tokens are clearly likely, so that rounding cannot change the answer
        model.get_output_embeddings().weight.mul_(4)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def adapter(folder, model, config=None, std=0.05, seed=1):
    """An adapter that changes the model, saved; and the model with it on."""
    torch.manual_seed(seed)
    add_adapters(model, config or AdapterConfig(rank=4, alpha=8))
    torch.manual_seed(seed)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.normal_(std=std)
            if hasattr(layer, "magnitude"):
                layer.magnitude.mul_(0.95 + 0.1 * torch.rand(layer.magnitude.shape))
    return save_adapters(model, folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory, tokenizer):
    """A folder with a base, a folder with a LoRA adapter, and the model with it on."""
    base, model = tmp_path_factory.mktemp("base"), small_model()
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    return base, adapter(tmp_path_factory.mktemp("adapter"), model), model


def on(base, folder):
    """A fresh model with the adapter on."""
    return load_adapters(load_model(base)[0], folder)


def right(said):
    """Random weights amplify rounding more than trained ones: these limits are three times the real ones."""
    texts = len(TEXTS)
    assert (said.tokens, said.texts) == (said.prompts, (texts, texts)), str(said)
    assert said.mean < 0.01, str(said)
    assert said.largest < 0.15, str(said)
    assert all("answers unlike" in fault for fault in said.faults), str(said)


# --- whole models, judged by llama.cpp ------------------------------------------------------------
def rope(kind, **more):
    return {"rope_parameters": {"rope_theta": 1e4, "rope_type": kind, **more}}


LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
KINDS = [
    ("llama", "smollm", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("llama", "llama-bpe", rope("llama3", factor=8.0, **LLAMA3_ROPE)),
    ("llama", "gpt-2", rope("linear", factor=2.0)),
    ("qwen2", "qwen2", {"tie_word_embeddings": False}),
    ("qwen3", "qwen2", rope("yarn", factor=4.0, original_max_position_embeddings=32)),
]


@pytest.mark.parametrize(("kind", "pre", "changes"), KINDS)
def test_llama_cpp_computes_what_transformers_does(kind, pre, changes, tmp_path):
    model, tokenizer = small_model(kind, **changes), small_tokenizer(pre)
    torch.manual_seed(0)
    with torch.no_grad():  # biases and norms start as 0 and 1, where a mistake would not show
        for p in model.parameters():
            if p.dim() == 1:
                p.add_(torch.randn(p.shape) * 0.1)
    if "rope_parameters" in changes:  # positions matter
        plain = type(model)(type(model.config)(**{**model.config.to_dict(), **rope("default")}))
        plain.load_state_dict(model.state_dict())
        ids = torch.arange(3, 99)[None]
        assert relative(plain.eval()(ids).logits, model(ids).logits) > 0.05
    path = export_gguf(model, None, tmp_path / "m.gguf", tokenizer=tokenizer)
    said = verify_gguf(path, model, tokenizer, prompts=PROMPTS[:3], max_tokens=12)
    right(said)


def test_a_tuned_model_passes_whole_in_every_way_that_it_can_be_exported(small, tokenizer, tmp_path):
    """From disk with its adapter, merged in memory, through safetensors: the same bytes."""
    base, folder, model = small
    path = export_gguf(base, folder, tmp_path / "a.gguf")
    said = verify_gguf(path, model, tokenizer, prompts=PROMPTS[:4], max_tokens=12)
    right(said)
    assert said.update == pytest.approx(1, abs=1e-3)
    assert adapted_layers(model)  # verifying leaves it on
    whole = path.read_bytes()
    merged = merge_adapters(on(base, folder))
    assert export_gguf(merged, None, tmp_path / "b.gguf", tokenizer=tokenizer).read_bytes() == whole
    saved = export_safetensors(base, folder, tmp_path / "merged")
    assert export_gguf(saved, None, tmp_path / "c.gguf").read_bytes() != whole  # by its name
    again = AutoModelForCausalLM.from_pretrained(saved)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), merged.parameters(), strict=True))
    assert read_gguf(path).fields["general.name"] == base.name


# --- an adapter alone -----------------------------------------------------------------------------
def test_an_adapter_alone_on_the_base_is_the_model_with_rslora_too(small, tokenizer, tmp_path):
    base, folder, model = small
    whole = export_gguf(base, None, tmp_path / "base.gguf")
    config = AdapterConfig(rank=4, alpha=8, targets=("q_proj", "k_proj", "down_proj", "lm_head"), rslora=True)
    root = small_model()
    for place, with_it in ((folder, model), (adapter(tmp_path / "rs", root, config), root)):
        alone = export_adapter(base, place, tmp_path / "adapter.gguf")
        said = verify_gguf(whole, with_it, tokenizer, adapter=alone, prompts=PROMPTS[:2], max_tokens=8)
        right(said)
        assert said.update == pytest.approx(1, abs=1e-3)
    assert read_gguf(alone).fields["adapter.lora.alpha"] == 16  # 8 · √4, over rank 4


# --- each fault has a name ------------------------------------------------------------------------
def test_every_fault_is_told_by_name(small, tokenizer, tmp_path, monkeypatch):
    base, folder, model = small

    def faults(path, **options):
        said = verify_gguf(path, model, tokenizer, prompts=PROMPTS[:1], max_tokens=4, **options)
        assert not said.ok
        assert f"✗ {said.faults[0]}" in str(said)
        return " ".join(said.faults)

    whole = export_gguf(base, None, tmp_path / "base.gguf")
    assert "the file holds the base: the adapter was never applied" in faults(whole)
    weak = tmp_path / "weak"
    weak.mkdir()
    for file in folder.iterdir():
        (weak / file.name).write_bytes(file.read_bytes())
    fields = json.loads((weak / "adapter_config.json").read_text())
    (weak / "adapter_config.json").write_text(
        json.dumps({**fields, "lora_alpha": 0.9 * fields["lora_alpha"]})
    )
    for said in (
        faults(export_gguf(base, weak, tmp_path / "weak.gguf")),
        faults(export_gguf(base, weak, tmp_path / "weak8.gguf", "q8_0")),
        faults(whole, adapter=export_adapter(base, weak, tmp_path / "weak-alone.gguf")),
    ):
        assert "holds 90% of the adapter's update: alpha" in said
    other = adapter(tmp_path / "other", small_model(), seed=7)
    assert "holds other numbers: another adapter" in faults(export_gguf(base, other, tmp_path / "o.gguf"))
    stranger = export_gguf(small_model(seed=3), None, tmp_path / "s.gguf", tokenizer=tokenizer)
    assert "is not the base of the model" in faults(stranger, adapter=tmp_path / "weak-alone.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(writing, "in_llama_order", lambda tensor, *_: tensor)
        said = faults(export_gguf(base, folder, tmp_path / "qk.gguf"))
        assert "the weights of Q and K are in transformers' order of rows" in said
        said = faults(whole, adapter=export_adapter(base, folder, tmp_path / "qk-alone.gguf"))
        assert "lora_B of Q and K are in transformers' order of rows" in said
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "pre_tokenizer", lambda tokenizer: "qwen2")
        said = faults(export_gguf(base, folder, tmp_path / "pre.gguf"))
        assert "another pre-tokenizer (tokenizer.ggml.pre)" in said
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "chat_template", CHATML.replace("assistant", "waiter"))
        said = faults(export_gguf(base, folder, tmp_path / "template.gguf"))  # has the tokenizer's own
        assert "the chat template differs" in said
    config = merge_adapters(on(base, folder))
    config.config.rms_norm_eps = 0.5
    said = faults(export_gguf(config, None, tmp_path / "eps.gguf", tokenizer=tokenizer))
    assert "a wrong setting in the file looks like that" in said


def test_a_plain_model_is_held_to_the_file_too(small, tokenizer, tmp_path):
    base, folder, _ = small
    merged = merge_adapters(on(base, folder))
    said = verify_gguf(
        export_gguf(base, None, tmp_path / "b.gguf"), merged, tokenizer, prompts=PROMPTS[:1], max_tokens=4
    )
    assert "off the model's: an export of the base, or of another adapter" in said.faults[0]
    assert said.update is None
    complains(
        (
            verify_gguf,
            (tmp_path / "b.gguf", load_model(quantize="nf4")[0], tokenizer),
            "the model is in 4 bits",
        )
    )


# --- what a file holds ----------------------------------------------------------------------------
def test_the_embedded_tokenizers_fields_are_made_as_the_embedded_file_has_them(tmp_path):
    model, tokenizer = small_model(vocab_size=49152, hidden_size=32, head_dim=8), load_tokenizer()
    made = read_gguf(export_gguf(model, None, tmp_path / "a.gguf", tokenizer=tokenizer)).fields
    theirs = read_gguf(_embedded_gguf()).fields
    assert {key for key in theirs if key.startswith("tokenizer.")} <= made.keys()
    wrong = [key for key in made if key.startswith("tokenizer.") and made[key] != theirs.get(key)]
    assert not wrong


@pytest.mark.parametrize("dtype", ["f16", "bf16", "q8_0", "q5_0", "q4_0", "q4_1"])
def test_every_type_holds_the_merged_weights_to_its_own_precision(small, tmp_path, dtype):
    base, folder, _ = small
    merged = merge_adapters(on(base, folder))
    file = read_gguf(export_gguf(base, folder, tmp_path / "a.gguf", dtype))
    most = {"f16": 3e-4, "bf16": 2e-3, "q8_0": 0.008, "q5_0": 0.06, "q4_0": 0.12, "q4_1": 0.1}[dtype]
    for ours, theirs, least in (
        ("mlp.down_proj", "ffn_down", most / 5),
        ("self_attn.v_proj", "attn_v", most / 5),
        ("self_attn.q_proj", "attn_q", most / 5),
        ("input_layernorm", "attn_norm", -1),  # exact
    ):
        W = merged.model.layers[1].get_submodule(ours).weight.detach()
        if theirs == "attn_q":  # heads of 16 rows; llama.cpp turns neighbours, transformers i and i + 8
            order = [16 * head + i + 8 * half for head in range(4) for i in range(8) for half in (0, 1)]
            W = W[order]
        assert least < relative(file.read(f"blk.1.{theirs}.weight"), W) <= most * (least > 0)
    kinds = {name: kind.name for name, (_, kind, _) in file.tensors.items()}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    small_ends = dtype in ("q5_0", "q4_0", "q4_1")
    assert kinds["output.weight"] == ("Q8_0" if small_ends else dtype.upper())


def test_an_adapted_head_that_is_the_embedding_too_becomes_a_head_of_its_own(tokenizer, tmp_path):
    base, model = tmp_path / "base", small_model(tie_word_embeddings=True)
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    folder = adapter(tmp_path / "a", model, AdapterConfig(rank=4, targets=("lm_head", "q_proj")))
    right(
        verify_gguf(
            export_gguf(base, folder, tmp_path / "a.gguf"),
            model,
            tokenizer,
            prompts=PROMPTS[:1],
            max_tokens=6,
        )
    )
    again = AutoModelForCausalLM.from_pretrained(export_safetensors(base, folder, tmp_path / "m")).eval()
    ids = torch.arange(3, 30)[None]
    assert torch.allclose(again(ids).logits, model(input_ids=ids).logits, atol=1e-3)
    complains((export_adapter, (base, folder, tmp_path / "b.gguf"), "the head, which is the embedding too"))


def test_a_model_in_memory_has_the_tokenizer_of_its_base():
    model, tokenizer = load_model()
    assert Weights(model, None).tokenizer().get_vocab() == tokenizer.get_vocab()


# --- from 4 bits ----------------------------------------------------------------------------------
def test_from_4_bits_it_goes_back_to_the_originals_or_says_what_that_costs(small, tokenizer, tmp_path):
    base, folder, _ = small
    whole = export_safetensors(base, folder, tmp_path / "whole") / "model.safetensors"

    def exported(model, adapter_folder=None):
        file = export_safetensors(model, adapter_folder, tmp_path / "x", tokenizer=tokenizer)
        return (file / "model.safetensors").read_bytes()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert exported(load_model(base, quantize="nf4")[0], folder) == whole.read_bytes()
    in_4_bits = merge_adapters(load_adapters(load_model(base, quantize="nf4")[0], folder))
    with pytest.warns(UserWarning, match=r"merged into a model in 4 bits, and the original weights are gone"):
        assert exported(in_4_bits) != whole.read_bytes()
    trained = load_model(base, quantize="nf4")[0]
    with torch.no_grad():
        trained.model.norm.weight.add_(0.1)
    nowhere = load_model(base, quantize="nf4")[0]
    nowhere.config._name_or_path = str(tmp_path / "gone")
    complains(
        (exported, (trained,), '"model.norm.weight" of the model is not that of'),
        (exported, (nowhere,), "its original weights cannot be read from", "gone"),
    )


def test_the_grid_that_the_originals_came_from_is_refused_and_only_that(tokenizer, tmp_path):
    model = small_model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.copy_(torch.from_numpy(dequantize(quantize(p.numpy(), Type.Q4_1), Type.Q4_1)))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", model, std=0.001)
    merged = merge_adapters(on(tmp_path / "base", folder))
    says = ("already lie on the grid of q4_1", "Take another type: f16, bf16, q8_0, q5_0, q4_0")
    path = tmp_path / "a.gguf"
    complains(
        (export_gguf, (tmp_path / "base", folder, path, "q4_1"), *says),
        (lambda: export_gguf(merged, None, path, "q4_1", tokenizer=tokenizer), (), *says),
    )
    assert not path.exists()
    for dtype in ("q4_0", "q5_0", "q8_0", "f16"):
        export_gguf(tmp_path / "base", folder, path, dtype)
    export_gguf(tmp_path / "base", None, path, "q4_1")  # nothing is merged, nothing is lost


# --- refusals and failures ------------------------------------------------------------------------
def test_what_is_not_known_is_refused_by_name_and_leaves_no_file(small, tokenizer, tmp_path):
    base, folder, model = small
    dora = adapter(tmp_path / "dora", small_model(), AdapterConfig("dora", rank=2))
    spm = small_tokenizer(byte_fallback=True)
    odd = small_tokenizer(splitter=pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), by_words]))
    nfkc = small_tokenizer()
    nfkc.backend_tokenizer.normalizer = normalizers.NFKC()
    bare = small_tokenizer()
    bare.chat_template = None
    out = tmp_path / "out"

    def export(what, given=tokenizer, dtype="f16", name="a.gguf"):
        return export_gguf(what, None, out / name, dtype, tokenizer=given)

    extra = small_model()
    extra.model.layers[0].gate = torch.nn.Linear(2, 2)
    large = small_model()
    large.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    narrow = small_model(hidden_size=48, head_dim=12)
    complains(
        (export, (model,), "has an adapter attached and not merged", "merge_adapters", "save_adapters"),
        (export_adapter, (base, dora, out / "a.gguf"), "a dora adapter has no place", "merge it instead"),
        (export, (base, None, "q6_k"), 'dtype="q6_k" is unknown', "q4_0"),
        (export, (base, None, "f16", "a.bin"), "must end in .gguf"),
        (export, (tiny_model("gemma2"),), 'a "gemma2" model; llama, qwen2, qwen3 are known', "convert_hf"),
        (export, (small_model(hidden_act="gelu"),), "hidden_act=gelu"),
        (export, (small_model("qwen2", use_sliding_window=True, max_window_layers=0),), "sliding-window"),
        (export, (small_model(**rope("dynamic", factor=2.0)),), "rope_type=dynamic"),
        (export, (small_model(**rope("yarn", factor=2.0, beta_fast=9)),), '"beta_fast" of rope_parameters'),
        (export, (base, spm), "BPE with byte fallback (SentencePiece)", "convert_hf_to_gguf"),
        (export, (base, odd), "splits text in a way that is not known here", "Whitespace"),
        (export, (base, nfkc), "splits text in a way that is not known here"),
        (export, (base, bare), "no chat template"),
        (
            export,
            (small_model(vocab_size=500), tokenizer),
            "tokens, the model 500 rows",
        ),
        (export, (extra,), "tensors unknown to llama: model.layers.0.gate.bias"),
        (export, (large,), "blk.0.ffn_up.weight holds a number too large for f16; take bf16"),
        (export, (narrow, tokenizer, "q8_0"), "its rows of 48 do not divide by 32; take f16 or bf16"),
        (export_gguf, (torch.nn.Linear(2, 2), None, out / "a.gguf"), "has no config"),
        (export_safetensors, (base, None, out / "m", "q8_0"), 'dtype="q8_0" is unknown'),
    )
    assert not list(out.rglob("*"))
    out.mkdir(exist_ok=True)
    (out / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds other things than an exported model"):
        export_safetensors(base, folder, out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]


def test_an_export_that_is_stopped_leaves_the_old_file_and_nothing_else(small, tmp_path, monkeypatch):
    base, folder, _ = small
    paths = export_gguf(base, folder, tmp_path / "a.gguf"), export_safetensors(base, folder, tmp_path / "m")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    read, count = Weights.read, iter(range(100))

    def stopped(self, name):
        if next(count) % 8 == 7:
            raise KeyboardInterrupt
        return read(self, name)

    monkeypatch.setattr(Weights, "read", stopped)
    for export, path in zip((export_gguf, export_safetensors), paths, strict=True):
        with pytest.raises(KeyboardInterrupt):
            export(base, None, path)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_file_that_is_no_gguf_or_cut_off_is_told_so(small, tmp_path):
    base, *_ = small
    path = export_gguf(base, None, tmp_path / "a.gguf")
    whole, names = path.read_bytes(), []
    for i, content in enumerate((b"{}", whole[:-70], whole[:9000], whole[:30], b"GGUF\x09" + whole[5:])):
        names.append(tmp_path / f"{i}.gguf")
        names[-1].write_bytes(content)
    words = ("not a GGUF file", "cut off at byte", "damaged or cut off", "damaged or cut off", "version 9")
    complains(*((read_gguf, (name,), word) for name, word in zip(names, words, strict=True)))
    with pytest.raises(FileNotFoundError, match="no such file; export_gguf writes one"):
        read_gguf(tmp_path / "none.gguf")


@pytest.mark.slow
def test_an_export_needs_one_tensor_over_nothing(tmp_path):
    """The embedded model: 538 MB in fp32, 113 of them the embedding, which is also converted to 57."""
    code = (
        "import resource; from spark_ft.models import load_tokenizer; t = load_tokenizer()\n"
        "from spark_ft.export.gguf import export_gguf; from spark_ft.export.weights import Weights\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000\n"
        "Weights(None, None); before = peak()\n"
        f"export_gguf(None, None, {str(tmp_path / 'a.gguf')!r}, tokenizer=t); print(peak() - before)"
    )
    said = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, cwd=ROOT, check=True)
    assert float(said.stdout.split()[-1]) < 300  # measured: 221


def test_the_command_writes_shows_a_bar_verifies_and_says_what_is_wrong(small, tmp_path, capsys, monkeypatch):
    base, folder, _ = small
    monkeypatch.setitem(verifying.LIMITS, "F16", (0.02, 0.3, 1e-3))  # of random weights
    monkeypatch.setattr(verifying.verify_gguf, "__kwdefaults__", {**DEFAULTS, "prompts": PROMPTS[:2]})
    given = ["--model", str(base), "--adapter", str(folder)]
    path = tmp_path / "out" / "kitchen.gguf"
    assert cli(["export", str(path), *given, "--modelfile"]) == 0
    said = capsys.readouterr()
    assert "kitchen.gguf (f16): 100%" in said.err
    assert "✓ the file is the model" in said.out
    assert f"cd {path.parent}\nollama create kitchen -f Modelfile" in said.out
    assert path.read_bytes() == export_gguf(base, folder, tmp_path / "same.gguf").read_bytes()
    assert (path.parent / "Modelfile").is_file()
    assert cli(["export", str(tmp_path / "a.gguf"), *given, "--alone"]) == 0
    assert read_gguf(tmp_path / "a.gguf").fields["general.type"] == "adapter"
    assert cli(["export", str(tmp_path / "folder"), *given, "--dtype", "bf16"]) == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "folder").dtype == torch.bfloat16
    assert cli(["export", str(path), *given, "--dtype", "q6_k"]) == 1
    assert 'spark-ft export: dtype="q6_k" is unknown' in capsys.readouterr().err
    monkeypatch.setattr(writing, "in_llama_order", lambda tensor, *_: tensor)
    assert cli(["export", str(path), *given]) == 1
    assert "✗ the weights of Q and K" in capsys.readouterr().out


# --- the embedded model, tuned to write kitchen tickets -------------------------------------------
@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """Its adapter's folder, the model with it on, and the merged F16 file."""
    folder, model = kitchen_adapter(), load_model()[0]
    path = export_gguf(None, folder, tmp_path_factory.mktemp("kitchen") / "kitchen.gguf")
    return folder, load_adapters(model, folder), path


def orders(number):
    return [row["prompt"] for row in tickets("test")[:number]]


@pytest.mark.timeout(1800)  # the adapter is trained once, by whoever needs it first
@pytest.mark.slow
def test_the_tuned_model_is_its_file_and_so_is_its_adapter_on_the_base(kitchen, tmp_path):
    folder, model, path = kitchen
    questions = [*orders(10), *PROMPTS[:10]]
    base = export_gguf(None, None, tmp_path / "base.gguf")
    for file, alone in ((path, None), (base, export_adapter(None, folder, tmp_path / "alone.gguf"))):
        said = verify_gguf(file, model, load_tokenizer(), prompts=questions, adapter=alone)
        print(said)
        assert said.ok, str(said)
        assert said.greedy >= 19
        assert said.mean <= 0.003
        assert said.largest <= 0.05


@pytest.mark.slow
def test_a_dora_and_an_adapter_for_4_bits_are_their_files_merged_into_the_originals(tmp_path):
    model, tokenizer = load_model()
    folder = adapter(tmp_path / "dora", model, AdapterConfig("dora", rank=8), std=0.003)
    in_4_bits = load_model(quantize="nf4")[0]
    for base in (None, in_4_bits):
        path = export_gguf(base, folder, tmp_path / "a.gguf")
        said = verify_gguf(path, model, tokenizer, prompts=PROMPTS[:5], max_tokens=24)
        print(said)
        assert said.ok, str(said)


@pytest.mark.timeout(1800)  # the adapter is trained once, by whoever needs it first
@pytest.mark.slow
def test_tickets_from_the_server_are_tickets_from_transformers(kitchen):
    _, model, path = kitchen
    ours = generate(model, load_tokenizer(), orders(40), max_new_tokens=64, batch_size=40)
    with serve(path) as server:
        theirs = [server.chat(order, max_tokens=64).text for order in orders(40)]
    assert sum(exact_match(theirs, ours)) >= 38


@pytest.mark.timeout(1800)  # the adapter is trained once, by whoever needs it first
@pytest.mark.slow
def test_q4_0_of_the_tuned_model_keeps_what_it_learned_and_q4_1_is_refused(kitchen, tmp_path):
    folder, model, _ = kitchen
    rows = tickets("validation")[:24]

    def loss(model):
        return math.log(perplexity(model, load_tokenizer(), rows))

    tuned = loss(model)
    with adapters_disabled(model):
        base = loss(model)
    file = read_gguf(export_gguf(None, folder, tmp_path / "a.gguf", "q4_0"))
    plain = load_model()[0]
    _, name_of = writing.names_in_gguf(plain.config, "")
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(writing.in_own_order(file.read(name_of(name)), name.rpartition(".")[0], plain.config))
    kept = (base - loss(plain)) / (base - tuned)
    print(f"held-out loss: base {base:.3f}, tuned {tuned:.4f}, kept in q4_0 {kept:.1%}")
    assert kept >= 0.95
    complains((export_gguf, (None, folder, tmp_path / "b.gguf", "q4_1"), "already lie on the grid of q4_1"))
