"""A real llama.cpp server for as long as a `with` block lasts, asked over its OpenAI-style HTTP API."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse
from importlib.util import find_spec
from urllib.parse import urlsplit

from spark_ft.export.reader import read_gguf

Chat = str | Sequence[Mapping[str, str]]  # a user's turn, or a whole chat that ends with one
PATIENCE = 5.0  # seconds for the child to end by itself


@dataclass(frozen=True)
class Answer:
    """What the server wrote, and how fast.

    Attributes:
        text; ended (by itself, not cut off); tokens written; prompt tokens read anew, and those kept from the
        request before; prefill and decode: tokens per second of reading the prompt and of writing.
    """

    text: str
    ended: bool
    tokens: int
    prompt_tokens: int
    kept_tokens: int
    prefill: float
    decode: float


@dataclass(frozen=True)
class Completion:
    """New tokens, the log-probability of each, and whether an end token came after them.

    llama.cpp tells no log-probability of a token that ends inside a character: None.
    """

    tokens: list[int]
    logps: list[float | None]
    ended: bool


class Server:
    """A running server; `serve` makes it. `url` is its address, `adapters` the names that it knows."""

    def __init__(self, url: str, adapters: Sequence[str], pid: int):
        self.url, self.adapters, self.pid = url, tuple(adapters), pid

    def chat(
        self, chat: Chat, *, adapter: str | None = None, max_tokens: int = 256, temperature: float = 0.0
    ) -> Answer:
        """Ask and wait for the whole answer.

        Args:
            chat: a user's turn, or a list of {role, content}.
            adapter: a name of `adapters`; None is the model without any.
            max_tokens: where an answer that has not ended is cut off.
            temperature: 0 takes the likeliest token, so that the same question has the same answer.
        """
        said = self.post("/v1/chat/completions", self._body(chat, adapter, max_tokens, temperature))
        choice = said["choices"][0]
        return _answer(choice["message"]["content"] or "", choice["finish_reason"], said["timings"])

    def stream(
        self, chat: Chat, *, adapter: str | None = None, max_tokens: int = 256, temperature: float = 0.0
    ) -> "Stream":
        """Ask, and get the answer piece by piece as it is written; arguments as in `chat`."""
        body = {**self._body(chat, adapter, max_tokens, temperature), "stream": True}
        return Stream(*self._send("POST", "/v1/chat/completions", body))

    def lines(self, path: str, body: object) -> Iterator[bytes]:
        """Send a request with "stream": true, and get the raw lines of the answer as they come."""
        connection, response = self._send("POST", path, body)
        try:
            yield from response
        finally:
            response.close()
            connection.close()

    def post(self, path: str, body: object) -> dict:
        """Send any request of llama.cpp's HTTP API and return its JSON.

        Raises:
            ValueError: the server refuses the request; its own words. RuntimeError: it has stopped.
        """
        connection, response = self._send("POST", path, body)
        try:
            return json.loads(response.read())
        finally:
            connection.close()

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text in which special tokens are written out."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return self.post("/tokenize", body)["tokens"]

    def rendered(self, chat: Chat) -> tuple[str, list[int]]:
        """The chat as the file's own template writes it, up to where the answer begins, and its tokens."""
        text = self.post("/apply-template", {"messages": _messages(chat)})["prompt"]
        body = {"content": text, "add_special": True, "parse_special": True}
        return text, self.post("/tokenize", body)["tokens"]

    def complete(
        self, tokens: Sequence[int], *, adapter: str | None = None, max_tokens: int = 32
    ) -> "Completion":
        """Continue these tokens greedily."""
        body = {"prompt": list(tokens), "n_predict": max_tokens, "temperature": 0.0, "n_probs": 1}
        body |= {"return_tokens": True, "cache_prompt": False, "lora": self._scales(adapter)}
        said = self.post("/completion", body)
        new, told, logps = said["tokens"], iter(said["completion_probabilities"]), []
        ahead = next(told, None)
        for token in new:
            whole = ahead is not None and ahead["id"] == token
            logps.append(ahead["logprob"] if whole else None)
            ahead = next(told, None) if whole else ahead
        return Completion(new, logps, said["stop_type"] == "eos")

    def _body(self, chat: Chat, adapter: str | None, max_tokens: int, temperature: float) -> dict:
        body = {"messages": _messages(chat), "max_tokens": max_tokens, "temperature": temperature}
        return {**body, "lora": self._scales(adapter)}

    def _scales(self, adapter: str | None) -> list[dict]:
        """One scale for every adapter: those that a request leaves out keep their global one."""
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none; serve(path, {name: adapter.gguf}) brings one"
            raise ValueError(f'the server has no adapter "{adapter}"; there are {known}')
        return [{"id": i, "scale": float(name == adapter)} for i, name in enumerate(self.adapters)]

    def _send(self, method: str, path: str, body: object) -> tuple[HTTPConnection, HTTPResponse]:
        address = urlsplit(self.url)
        connection = HTTPConnection(address.hostname, address.port)  # no proxy stands before this machine
        try:
            connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            raise RuntimeError(f"the server at {self.url} does not answer ({error!r}); {_STOPPED}") from error
        if response.status != 200:
            said = response.read().decode("utf-8", "replace")
            connection.close()
            raise ValueError(f"{path}: the server refuses the request ({response.status}): {said}")
        return connection, response


_STOPPED = "it runs only inside its `with serve(…)` block"


class Stream:
    """An answer that is being written: iterate for its pieces; then `answer` has the whole of it."""

    def __init__(self, connection: HTTPConnection, response: HTTPResponse):
        self._connection, self._response, self.answer = connection, response, None

    def __iter__(self) -> Iterator[str]:
        pieces, why, timings = [], None, None
        try:
            for line in self._response:
                if not line.startswith(b"data: {"):
                    continue
                said = json.loads(line[6:])
                if "error" in said:
                    raise ValueError(f"the server stopped the answer: {said['error']}")
                for choice in said["choices"]:
                    why = choice["finish_reason"] or why
                    if piece := choice["delta"].get("content"):
                        pieces.append(piece)
                        yield piece
                timings = said.get("timings", timings)
        except (OSError, HTTPException) as error:
            raise RuntimeError(f"the stream broke off ({error!r}); {_STOPPED}") from error
        finally:
            self.close()
        if timings is None:
            raise RuntimeError(f"the stream broke off; {_STOPPED}")
        self.answer = _answer("".join(pieces), why, timings)

    def close(self) -> None:
        """Stop listening; the server stops writing."""
        self._response.close()
        self._connection.close()


def _messages(chat: Chat) -> list[dict]:
    return [{"role": "user", "content": chat}] if isinstance(chat, str) else [dict(turn) for turn in chat]


def _answer(text: str, why: str, timings: dict) -> Answer:
    numbers = (timings["predicted_n"], timings["prompt_n"], timings["cache_n"])
    return Answer(
        text, why == "stop", *numbers, timings["prompt_per_second"], timings["predicted_per_second"]
    )


@contextmanager
def serve(
    path: str | os.PathLike,
    adapters: Mapping[str, str | os.PathLike] | None = None,
    *,
    context: int = 4096,
    threads: int | None = None,
) -> Iterator[Server]:
    """Run llama.cpp's server on a GGUF file while the block lasts, on a free port of this machine alone.

    It is a child process, so that a crash of llama.cpp is not one of yours. It ends with the block, after an
    exception or in the middle of a stream too, and with the process that started it.

    Args:
        adapters: GGUF LoRA files by the name that a request asks for them with.
        context: tokens of prompt and answer together; more takes more memory.
        threads: default one fewer than the cores: with all of them taken by others, too, llama.cpp's threads
            wait for one another, and a busy machine writes 2 tokens per second instead of 50.

    Raises:
        FileNotFoundError, ValueError: a file is missing, not GGUF, cut off, or not what its place needs.
        ImportError: xllamacpp, which brings llama.cpp, is not installed.
        RuntimeError: llama.cpp does not start; its last words.
    """
    model, adapters = require_kind(path, "a model"), dict(adapters or {})
    for name, file in adapters.items():
        base, own = (
            model.get("general.architecture"),
            require_kind(file, "an adapter")["general.architecture"],
        )
        if own != base:
            raise ValueError(f'{file}: the adapter "{name}" is for a {own} model, and {path} is a {base}')
    if find_spec("xllamacpp") is None:
        raise ImportError(
            "xllamacpp, which brings llama.cpp's server, is not installed: pip install 'spark-ft[labs]'. It "
            "has wheels for Linux and macOS on x86-64 and ARM, and for Windows on x86-64; elsewhere build "
            f"llama.cpp and run its own `llama-server -m {path}`"
        )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    settings = {"model": os.fspath(path), "adapters": [os.fspath(file) for file in adapters.values()]}
    settings |= {"context": context, "threads": threads or max(1, cores - 1)}
    with tempfile.TemporaryFile() as log:  # has no name, so that nothing can be left behind
        child = subprocess.Popen(
            [sys.executable, "-m", "spark_ft.export.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the parent, which then ends this block
        )
        try:
            yield Server(_address(child, settings, log, path), tuple(adapters), child.pid)
        finally:
            _end(child)


def _address(child: subprocess.Popen, settings: dict, log, path: str | os.PathLike) -> str:
    try:
        child.stdin.write(json.dumps(settings).encode() + b"\n")
        child.stdin.flush()
        for line in child.stdout:  # it ends when the child does
            if line.startswith(b'{"url"'):
                return json.loads(line)["url"]
    except BrokenPipeError:
        pass
    child.wait()
    log.seek(0)
    words = log.read().decode("utf-8", "replace").strip().splitlines()
    told = [line.split(" E ", 1)[1] for line in words if " E " in line] or ["it says nothing"]
    raise RuntimeError(f"llama.cpp does not start with {path}: " + " ".join(told[0].split()))


def _end(child: subprocess.Popen) -> None:
    with suppress(BrokenPipeError):
        child.stdin.close()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()


def require_kind(path: str | os.PathLike, kind: str) -> dict:
    """A file's fields, if it is "a model" or "an adapter" as asked; llama.cpp's own errors are all alike."""
    fields = read_gguf(path).fields
    found = fields.get("general.type", "model")
    if found != kind.split()[1]:
        mend = "serve(model.gguf, {name: adapter.gguf})"
        raise ValueError(f'{path}: a GGUF file of type "{found}" where {kind} belongs: {mend}')
    return fields
