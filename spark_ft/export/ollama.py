"""Ollama: a Modelfile with the chat template written out, and its current HTTP API."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from spark_ft.export.reader import read_gguf
from spark_ft.export.server import Chat
from spark_ft.files import write_atomically

PARAMETERS = {"temperature": 0, "num_ctx": 4096}  # Ollama's own are 0.8 and, on small machines, 2048 or 4096
_S, _U, _A, _V = "its System Text", "the user's Text", "an Answer", "a Next turn"


@dataclass(frozen=True)
class Template:
    """A chat template as what stands before and after each role's text.

    `default_system` is what the template says where a chat has no system turn; `start` begins an answer.
    """

    before: Mapping[str, str]
    after: Mapping[str, str]
    start: str
    default_system: str | None

    def render(self, messages: list[dict]) -> str:
        """What Ollama makes of a chat with `go`."""
        turns = (self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in messages)
        return "".join(turns) + self.start

    def go(self) -> str:
        """The template in Go's language, for TEMPLATE."""
        cases = [
            f'if eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}'
            for role in ("system", "user", "assistant")
        ]
        return "{{ range .Messages }}{{ " + "{{ else ".join(cases) + "{{ end }}{{ end }}" + self.start


def chat_template(tokenizer) -> Template:
    """Take a tokenizer's chat template apart, by rendering chats with it.

    Raises:
        ValueError: it does more than wrap each turn, so that Ollama's language needs it written by hand.
    """

    def rendered(*turns: tuple[str, str], start: bool = False) -> str:
        chat = [{"role": role, "content": text} for role, text in turns]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=start)
        bos = tokenizer.bos_token
        doubled = bos and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
        return text.removeprefix(bos) if doubled else text  # the runner puts it before the text itself

    system, user, answer, then = ("system", _S), ("user", _U), ("assistant", _A), ("user", _V)
    whole = rendered(system, user, answer, then)
    after = {role: _after(rendered(*chat), text) for role, text, chat in (
        ("user", _U, (system, user)), ("assistant", _A, (system, user, answer)),
    )}  # fmt: skip
    before = {
        "system": whole.partition(_S)[0],
        "user": _after(whole, _A).partition(_V)[0].removeprefix(after["assistant"]),
        "assistant": _after(whole, _U).partition(_A)[0].removeprefix(after["user"]),
    }
    after["system"] = _after(whole, _S).partition(_U)[0].removesuffix(before["user"])
    start = _after(rendered(system, user, start=True), _U).removeprefix(after["user"])
    alone = rendered(user, start=True)
    plain = Template(before, after, start, None)
    default = alone.removeprefix(before["system"]).removesuffix(
        after["system"] + plain.render([_turn(*user)])
    )
    found = Template(before, after, start, None if alone == plain.render([_turn(*user)]) else default)
    chats = [(system, user), (system, user, answer, then)]
    if found.default_system is not None:
        same = found.render([_turn("system", default), _turn(*user)]) == alone
    else:
        same, chats = True, [*chats, (user, answer, then)]
    same = same and all(found.render([_turn(*t) for t in c]) == rendered(*c, start=True) for c in chats)
    pieces = "".join([*before.values(), *after.values(), start, found.default_system or ""])
    if not same or "{{" in pieces or '"""' in pieces:
        raise ValueError(
            "the chat template does more than put something before and after each turn; write TEMPLATE for "
            "Ollama by hand, and compare what it renders with tokenizer.apply_chat_template"
        )
    return found


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _after(text: str, part: str) -> str:
    return text.partition(part)[2]


def _recipe(gguf: Path, tokenizer, system: str | None, parameters: Mapping | None) -> dict:
    """What both a Modelfile and the API say: template, system and parameters."""
    fields = read_gguf(gguf).fields
    if fields.get("general.type", "model") != "model":
        raise ValueError(
            f"{gguf}: an adapter alone, which Ollama no longer takes (ADAPTER is gone); merge it: "
            "export_gguf(base, adapter_folder, path)"
        )
    template = chat_template(tokenizer)
    ends = (fields.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot"))
    stop = [fields["tokenizer.ggml.tokens"][end] for end in ends if end is not None]
    system = template.default_system if system is None else system
    return {
        "template": template.go(),
        **({} if system is None else {"system": system}),
        "parameters": {**PARAMETERS, "stop": stop, **(parameters or {})},
    }


def write_modelfile(
    gguf: str | os.PathLike, tokenizer, *, system: str | None = None, parameters: Mapping | None = None
) -> Path:
    """Write `Modelfile` beside a GGUF file, for `ollama create NAME -f Modelfile` in that folder.

    TEMPLATE and SYSTEM are written out: without them Ollama takes the nearest template that it knows, and
    the default system prompt, with which the model was trained, gets lost.

    Args:
        gguf: a model, merged; an adapter alone is refused, as Ollama refuses it.
        tokenizer: whose chat template it is.
        system: the system prompt of chats that bring none; None is the template's own.
        parameters: as in a Modelfile, over `PARAMETERS`; a list gives one line per entry.

    Raises:
        ValueError: see `chat_template`; or three quotes in the system prompt.
    """
    gguf = Path(gguf)
    recipe = _recipe(gguf, tokenizer, system, parameters)
    if '"""' in recipe.get("system", ""):
        raise ValueError('system has """ in it, which ends a text in a Modelfile; write it in other quotes')
    lines = [f"FROM ./{gguf.name}", f'TEMPLATE """{recipe["template"]}"""']
    if "system" in recipe:
        lines.append(f'SYSTEM """{recipe["system"]}"""')
    for name, value in recipe["parameters"].items():
        for one in value if isinstance(value, list) else [value]:
            lines.append(f"PARAMETER {name} {json.dumps(one, ensure_ascii=False)}")
    path = gguf.parent / "Modelfile"
    text = "\n".join(lines) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return path


def commands(name: str, modelfile: Path) -> str:
    """What to type on a machine with Ollama, where this one has none."""
    return "\n".join([
        f"cd {modelfile.parent}",
        f"ollama create {name} -f {modelfile.name}",
        f'ollama run {name} "your question"',
    ])  # fmt: skip


# ── its API ───────────────────────────────────────────────────────────────────────────────────────────────


class Ollama:
    """A running Ollama, asked over its HTTP API.

    Args:
        url: default OLLAMA_HOST, else the port that Ollama listens on by itself.
    """

    def __init__(self, url: str | None = None):
        url = url or os.environ.get("OLLAMA_HOST") or "127.0.0.1:11434"
        self.url = url if "//" in url else f"http://{url}"

    def version(self) -> str | None:
        """Its version; None where no Ollama answers."""
        try:
            return json.loads(self._ask("GET", "/api/version").read())["version"]
        except (OSError, ValueError, KeyError):
            return None

    def create(
        self,
        name: str,
        gguf: str | os.PathLike,
        tokenizer,
        *,
        system: str | None = None,
        parameters: Mapping | None = None,
    ) -> None:
        """Make a model of a GGUF file, as `ollama create` does; arguments as in `write_modelfile`.

        Raises:
            OSError: no Ollama answers. ValueError: it refuses; its own words.
        """
        gguf = Path(gguf)
        recipe = _recipe(gguf, tokenizer, system, parameters)
        with open(gguf, "rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        if self._ask("HEAD", f"/api/blobs/{digest}").status == 404:
            with open(gguf, "rb") as file:
                self._checked("POST", f"/api/blobs/{digest}", file, gguf.stat().st_size)
        self._checked("POST", "/api/create", {"model": name, "files": {gguf.name: digest}, **recipe})

    def chat(self, name: str, chat: Chat) -> str:
        """One model's answer to a user's turn, or to a list of {role, content}."""
        messages = [_turn("user", chat)] if isinstance(chat, str) else [dict(turn) for turn in chat]
        said = self._checked("POST", "/api/chat", {"model": name, "messages": messages, "stream": False})
        return said[-1]["message"]["content"]

    def _ask(self, method: str, path: str, body: object = None, size: int | None = None) -> HTTPResponse:
        address = urlsplit(self.url)
        connection = HTTPConnection(address.hostname, address.port or 11434)
        if size is None and body is not None:
            body = json.dumps(body)
        headers = {} if size is None else {"Content-Length": str(size)}
        connection.request(method, path, body, headers)
        return connection.getresponse()

    def _checked(self, method: str, path: str, body: object, size: int | None = None) -> list[dict]:
        """The lines of the answer; an error can be the status, or a line of a stream that began well."""
        response = self._ask(method, path, body, size)
        text = response.read().decode("utf-8", "replace")
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        for line in lines:
            if "error" in line:
                raise ValueError(f"Ollama refuses {path}: {line['error']}")
        if response.status >= 400:
            raise ValueError(f"Ollama refuses {path} ({response.status}): {text}")
        return lines
