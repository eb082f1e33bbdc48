"""A real llama.cpp server in a child process; Ollama's API against a stand-in that refuses what it does."""

import hashlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import psutil
import pytest
import torch
from helpers import complains
from test_export import CHATML, adapter, small_model, small_tokenizer

from spark_ft import (
    AdapterConfig,
    Ollama,
    export_adapter,
    export_gguf,
    serve,
    write_modelfile,
)
from spark_ft.export.ollama import chat_template, commands
from spark_ft.files import ROOT


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with base.gguf and three adapters alone, of other ranks and layers; and the tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("served"), small_tokenizer()
    export_gguf(small_model(), None, folder / "base.gguf", tokenizer=tokenizer)
    for seed, (name, config) in enumerate({
        "kitchen": AdapterConfig(rank=4, alpha=8),
        "grams": AdapterConfig(rank=2, alpha=8, targets=("q_proj", "down_proj")),
        "polite": AdapterConfig(rank=3, alpha=8, targets=("k_proj", "v_proj", "o_proj")),
    }.items()):  # fmt: skip
        place = adapter(folder / name, small_model(), config, std=0.4, seed=seed)
        export_adapter(small_model(), place, folder / f"{name}.gguf")
    return folder, tokenizer


@pytest.fixture
def seen(tmp_path, monkeypatch):
    """Put servers in here: at the end no child, port or temporary file may be left of them."""
    ours, temporary = psutil.Process(), tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before, servers = {child.pid for child in ours.children(True)}, []
    yield servers
    assert {child.pid for child in ours.children(True)} <= before
    assert not list(temporary.iterdir())
    for server in servers:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", int(server.url.split(":")[2])), 1)


def test_a_server_answers_streams_and_counts_and_leaves_nothing(served, seen):
    folder, _ = served
    with serve(folder / "base.gguf", context=512) as server:
        seen.append(server)
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", server.url)
        answer = server.chat("What is there to eat?", max_tokens=12)
        assert (answer.tokens, answer.ended, answer.kept_tokens) == (12, False, 0)
        assert min(answer.prefill, answer.decode, answer.prompt_tokens) > 0
        stream = server.stream([{"role": "user", "content": "What is there to eat?"}], max_tokens=12)
        pieces = list(stream)
        assert len(pieces) > 3
        assert "".join(pieces) == stream.answer.text == answer.text
        assert stream.answer.kept_tokens > 0  # of the same prompt
        other = http.client.HTTPConnection("127.0.0.1", int(server.url.split(":")[2]))
        other.request("GET", "/health", headers={"Origin": "http://elsewhere.example"})
        allowed = other.getresponse().getheader("Access-Control-Allow-Origin")
        assert allowed not in ("*", "http://elsewhere.example")  # a page in the browser may not ask it
        other.close()
        warm = {server.chat("Tea?", max_tokens=8, temperature=2.0).text for _ in range(4)}
        assert len(warm) > 1
        complains(
            (server.post, ("/v1/chat/completions", {"messages": "?"}), "the server refuses the request (4"),
            (lambda: server.chat("Tea?", adapter="kitchen"), (), 'no adapter "kitchen"; there are none'),
        )
    with pytest.raises(RuntimeError, match=r"does not answer .*; it runs only inside its `with serve"):
        server.chat("Tea?")


def test_it_ends_after_an_exception_and_in_the_middle_of_a_stream(served, seen):
    folder, _ = served
    unread = []

    def breaks():
        with serve(folder / "base.gguf", context=512) as server:
            seen.append(server)
            unread.append(iter(server.stream("Count.", max_tokens=400)))
            next(unread[0])
            1 / 0  # noqa: B018

    with pytest.raises(ZeroDivisionError) as kept:
        breaks()
    with pytest.raises(RuntimeError, match=r"the stream broke off"):
        list(unread[0])
    assert kept.value.__traceback__  # a traceback that is held keeps nothing alive


def test_it_ends_with_the_process_that_started_it_even_if_that_is_killed(served):
    folder, _ = served
    code = (
        "import sys, time; from spark_ft import serve\n"
        f"with serve({str(folder / 'base.gguf')!r}, context=512) as server:\n"
        "    print(server.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    child = psutil.Process(int(parent.stdout.readline()))
    assert child.is_running()
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running()


def test_adapters_are_chosen_per_request_and_the_global_switch_keeps_a_stale_cache(served):
    folder, tokenizer = served
    files = {name: folder / f"{name}.gguf" for name in ("kitchen", "grams", "polite")}
    order = torch.randint(4, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Two soups."}], return_dict=False)
    with serve(folder / "base.gguf", files, context=512) as server:
        assert server.adapters == ("kitchen", "grams", "polite")

        def asked(name):
            return server.complete(ids, adapter=name, max_tokens=6)

        first = {name: asked(name) for name in (None, *files)}
        assert len({tuple(said.tokens) for said in first.values()}) == 4
        for name in [[None, *files][i] for i in order]:
            again = asked(name)
            assert again.tokens == first[name].tokens
            pairs = zip(again.logps, first[name].logps, strict=True)
            assert all(abs(a - b) < 0.01 for a, b in pairs if None not in (a, b))
        with serve(folder / "base.gguf", context=512) as plain:  # they start at 0: the base is the base
            assert plain.complete(ids, max_tokens=6) == first[None]
        body = {"prompt": ids, "n_predict": 6, "temperature": 0.0, "n_probs": 1, "return_tokens": True}

        def globally(kitchen, cached=True):
            scales = (kitchen, 0.0, 0.0)
            server.post("/lora-adapters", [{"id": i, "scale": scale} for i, scale in enumerate(scales)])
            said = server.post("/completion", {**body, "cache_prompt": cached})
            return [token["logprob"] for token in said["completion_probabilities"]][:1]

        globally(1.0, cached=False)
        stale = globally(0.0)  # with the kitchen's keys and values of the prompt
        assert abs(stale[0] - first[None].logps[0]) > 0.01, "the base's own"
        globally(1.0)
        assert asked(None).tokens == first[None].tokens  # a request's own scales win over the global ones


def test_what_cannot_be_served_is_told_before_llama_cpp_starts(served, seen, tmp_path, monkeypatch):
    folder, _ = served
    base, alone = folder / "base.gguf", folder / "kitchen.gguf"
    qwen = export_gguf(small_model("qwen3"), None, tmp_path / "qwen.gguf", tokenizer=small_tokenizer())

    def starts(*arguments):
        with serve(*arguments):
            pass

    def broken(path, old, new):
        (tmp_path / "broken.gguf").write_bytes(path.read_bytes().replace(old, new))
        return tmp_path / "broken.gguf"

    complains(
        (starts, (alone,), 'of type "adapter" where a model belongs'),
        (starts, (base, {"x": base}), 'of type "model" where an adapter belongs'),
        (starts, (qwen, {"x": alone}), 'the adapter "x" is for a llama model', "is a qwen3"),
    )
    with pytest.raises(RuntimeError, match=r"llama.cpp does not start with .*broken.gguf: .*output_norm"):
        starts(broken(base, b"output_norm.weight", b"output_nrom.weight"))
    monkeypatch.setattr("spark_ft.export.server.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"xllamacpp, .* is not installed: pip install .*llama-server -m"):
        starts(base)


# --- Ollama ---------------------------------------------------------------------------------------
def go(template, messages):
    """Go's text/template, as much of it as a chat needs; raises for anything else, as Go does."""
    parts, place = re.split(r"\{\{ ?(.*?) ?\}\}", template), 0

    def block(message, shown):
        """Text up to an else or end; (text, the action that ended it)."""
        nonlocal place
        text = ""
        while place < len(parts):
            literal, action = parts[place], parts[place + 1] if place + 1 < len(parts) else None
            place += 2
            text += literal
            if action is None or action == "end" or action.startswith("else"):
                return text, action
            if action == ".Content":
                text += message["content"]
            elif action == "range .Messages":
                start = place
                for one in messages:
                    place = start
                    text += block(one, True)[0]
            elif action.startswith("if eq .Role "):
                chosen, done, ends = "", False, action
                while ends != "end":
                    role = re.fullmatch(r'(?:else )?if eq \.Role "(\w+)"', ends)[1]
                    inner, ends = block(message, True)
                    if role == message["role"] and not done:
                        chosen, done = inner, True
                text += chosen
            else:
                raise ValueError(f"template: function {action!r} not defined")
        return text, None

    return block(None, True)[0]


class StandIn(BaseHTTPRequestHandler):
    """What an Ollama of 2026 takes and refuses; it keeps the text that a chat is rendered to."""

    def log_message(self, *_):
        pass

    def reply(self, status, *lines):
        self.send_response(status)
        body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.reply(200, {"version": "0.34.1"})

    def do_HEAD(self):
        self.reply(200 if self.path.split("/")[-1] in self.server.blobs else 404)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path.startswith("/api/blobs/"):
            digest = self.path.split("/")[-1]
            if digest != "sha256:" + hashlib.sha256(body).hexdigest():
                return self.reply(400, {"error": "digest mismatch"})
            self.server.blobs[digest] = body
            return self.reply(201)
        asked = json.loads(body)
        asked.pop("modelfile", None)  # ignored in silence
        if self.path == "/api/create":
            return self.create(asked)
        messages, model = asked["messages"], self.server.models[asked["model"]]
        if messages[0]["role"] != "system" and "system" in model:
            messages = [{"role": "system", "content": model["system"]}, *messages]
        self.server.rendered.append(go(model["template"], messages))
        self.reply(200, {"message": {"role": "assistant", "content": "soup"}, "done": True})

    def create(self, asked):
        files = asked.get("files", {})
        for bad, says in (
            ("adapters" in asked, "adapters are not supported"),
            ("quantize" in asked, "quantization is only supported for safetensors"),
            (not files and "from" not in asked, "neither 'from' or 'files' was specified"),
            (any(os.path.isabs(n) or ".." in n for n in files), "file name must be relative"),
            (
                not all(re.fullmatch("sha256:[0-9a-f]{64}", d) for d in files.values()),
                "invalid digest format",
            ),
            (not isinstance(asked.get("parameters", {}).get("stop", []), list), "stop must be a list"),
        ):
            if bad:
                return self.reply(400, {"error": says})
        lines = [{"status": "parsing GGUF"}]
        for digest in files.values():
            if digest not in self.server.blobs:
                return self.reply(200, *lines, {"error": f"blob {digest} does not exist"})
            if not self.server.blobs[digest].startswith(b"GGUF"):
                return self.reply(200, *lines, {"error": "unknown type"})
        go(asked["template"], [{"role": "user", "content": ""}])
        self.server.models[asked["model"]] = asked
        self.reply(200, *lines, {"status": "success"})


@pytest.fixture
def ollama():
    server = ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    server.blobs, server.models, server.rendered = {}, {}, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server, Ollama(f"127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


DEFAULT = "You cook in grams."
WITH_DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    + DEFAULT
    + "<|im_end|>\n{% endif %}"
    + CHATML
)
# Qwen 3's way: only the last answer shows that it thought
THINKS = CHATML.replace(
    "{{ m['content'] }}",
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)
CHATS = [
    [{"role": "user", "content": "Hi."}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Soup?"}],
    [
        {"role": "user", "content": "One tea"},
        {"role": "assistant", "content": "Hot?"},
        {"role": "user", "content": "yes\n\nplease"},
    ],
]


@pytest.mark.parametrize(
    ("kind", "template", "default"),
    [
        ("smollm", CHATML, None),
        ("smollm", WITH_DEFAULT, DEFAULT),
        ("qwen2", THINKS, None),
        ("llama-bpe", "{{ bos_token }}" + WITH_DEFAULT, DEFAULT),
    ],
)
def test_ollama_renders_what_the_tokenizer_does(kind, template, default, served, ollama, tmp_path):
    folder, _ = served
    server, client = ollama
    tokenizer = small_tokenizer(kind)
    tokenizer.chat_template = template
    path = tmp_path / "m.gguf"
    path.write_bytes((folder / "base.gguf").read_bytes())
    client.create("kitchen", path, tokenizer)
    assert server.models["kitchen"].get("system") == default
    text = write_modelfile(path, tokenizer).read_text()
    assert text.startswith('FROM ./m.gguf\nTEMPLATE """')
    assert go(re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1], CHATS[1]) == go(
        server.models["kitchen"]["template"], CHATS[1]
    )
    assert (f'SYSTEM """{default}"""' in text) == (default is not None)
    assert 'PARAMETER stop "<|im_end|>"\n' in text
    for chat in CHATS:
        assert client.chat("kitchen", chat) == "soup"
        ours = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert server.rendered[-1] == ours.removeprefix("<|bos|>")  # which Ollama adds by itself
    assert "ollama create m -f Modelfile" in commands("m", tmp_path / "Modelfile")


def test_the_embedded_models_template_has_its_own_system_prompt(tokenizer):
    found = chat_template(tokenizer)
    assert found.default_system == "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    for chat in CHATS[1:2]:
        ours = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert go(found.go(), chat) == found.render(chat) == ours


def test_what_ollama_refuses_comes_out_in_its_own_words(served, ollama, monkeypatch):
    folder, tokenizer = served
    server, client = ollama
    base = folder / "base.gguf"
    assert client.version() == "0.34.1"
    client.create("a", base, tokenizer, system="Be short.", parameters={"temperature": 1})
    assert server.models["a"]["system"] == "Be short."
    assert server.models["a"]["parameters"] == {"temperature": 1, "num_ctx": 4096, "stop": ["<|im_end|>"]}
    assert len(server.blobs) == 1
    twisted = small_tokenizer()
    twisted.chat_template = CHATML.replace("m['content']", "m['content'] | upper")
    complains(
        (
            client.create,
            ("b", folder / "kitchen.gguf", tokenizer),
            "an adapter alone, which Ollama no longer",
        ),
        (write_modelfile, (base, twisted), "does more than put something before and after each turn"),
        (lambda: client.create("b", base, tokenizer, parameters={"stop": "x"}), (), "stop must be a list"),
    )
    with monkeypatch.context() as patch:  # an error can come as a line of a stream that began well
        patch.setattr(StandIn, "do_HEAD", lambda self: self.reply(200))
        server.blobs.clear()
        complains(
            (client.create, ("b", base, tokenizer), "Ollama refuses /api/create: blob sha256:", "exist")
        )
    for body, says in (
        ({"model": "b", "modelfile": "FROM ./a.gguf"}, "neither 'from' or 'files' was specified"),
        ({"model": "b", "files": {"/a.gguf": "sha256:" + "0" * 64}}, "file name must be relative"),
        ({"model": "b", "from": "a", "adapters": {}}, "adapters are not supported"),
    ):
        complains((client._checked, ("POST", "/api/create", body), says))
    assert Ollama("127.0.0.1:9").version() is None
