"""The pages keep their word: code blocks run and print what they say, commands exist, numbers are right."""

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
from dataclasses import fields
from functools import cache
from importlib.util import find_spec

import nbformat
import pytest
import torch

import spark_ft
from spark_ft.cli import COMMANDS
from spark_ft.cli import main as cli
from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.memory import trace
from spark_ft.memory.plan import plan_training
from spark_ft.memory.shapes import known_config
from spark_ft.models import PROFILES

PAGES = ("README.md", "ELI5.md", "QUICK_REFERENCE.md", "CHANGELOG.md")
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.M | re.S)


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def flat(name: str) -> str:
    """A page's text with every line break and run of spaces as one space: wrapping a line changes nothing."""
    return " ".join(read(name).split())


def blocks(name: str, language: str) -> list[tuple[int, str, str]]:
    """(line of the first code line, the fence's other words, code) of a page's blocks in that language."""
    page, found = read(name), []
    for match in FENCE.finditer(page):
        kind, _, rest = match[1].partition(" ")
        found += [(page.count("\n", 0, match.start()) + 2, rest.strip(), match[2])] * (kind == language)
    return found


def run_block(code: str, line: int, namespace: dict) -> tuple[list[str], list[str]]:
    """The lines a block prints, and those that its `# → ` comments promise; tracebacks name page lines."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile("\n" * (line - 1) + code, "QUICK_REFERENCE.md", "exec"), namespace)
    return said.getvalue().splitlines(), re.findall(r"^# → (.*)$", code, re.M)


def test_every_block_of_the_quick_reference_runs_and_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    ran = blocks("QUICK_REFERENCE.md", "python")
    assert len(ran) >= 10
    for line, _, code in ran:
        printed, promised = run_block(code, line, namespace)
        assert printed == promised, f"QUICK_REFERENCE.md: the block at line {line} prints something else"
    assert run_block("print(1)\n# → 2\n", 1, {}) == (["1"], ["2"])


def test_example_rows_of_the_quick_reference_are_valid(tmp_path):
    rows = blocks("QUICK_REFERENCE.md", "jsonl")
    assert [kind for _, kind, _ in rows] == ["sft", "preference", "feedback", "chat"]
    for _, kind, text in rows:
        (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
        assert read_records(tmp_path / "rows.jsonl", kind)


def make(*arguments: str) -> str:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True).stdout


@cache
def make_targets() -> set[str]:
    """Every target that make itself counts as phony here, from its own database."""
    return set(re.search(r"^\.PHONY: (.*)$", make("-pq"), re.M)[1].split())


def commands(name: str) -> list[list[str]]:
    """The commands in a page's bash blocks and inline code, without comments."""
    inline = re.findall(r"(?<!`)`((?:make|\.venv/bin/\S+|spark-ft) [^`\n]*)`(?!`)", FENCE.sub("", read(name)))
    lines = "".join(code for _, _, code in blocks(name, "bash")).splitlines() + inline
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_commands_on_the_pages_exist():
    found = [(name, words) for name in PAGES for words in commands(name)]
    assert ("QUICK_REFERENCE.md", ["make", "labs", "ARGS=3.1.4"]) in found
    assert ("README.md", ["make", "lab", "PYTHON=python3.12"]) in found
    for name, words in found:
        program = words[0].rpartition("/")[2]
        if program == "make":
            target = next(word for word in words[1:] if "=" not in word)
            assert target in make_targets(), f"{name}: the Makefile has no target {target}"
        elif program == "spark-ft":
            assert words[1] in COMMANDS, f"{name}: spark-ft has no command {words[1]}"


def test_make_and_spark_ft_know_their_commands(capsys):
    """Each as a dry run or its help: what is only declared would pass the pages' test."""
    for target in sorted(make_targets()):
        done = make("-n", target)
        assert "rm -rf .venv" in done if target == "clean" else ".venv/bin/python" in done
        for module in re.findall(r"-m (spark_ft[\w.]*)", done):
            assert find_spec(module), f"make {target} runs {module}, which is not there"
    for command in COMMANDS:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli([command, "--help"])
        assert f"usage: spark-ft {command}" in capsys.readouterr().out


def test_the_readme_tree_is_the_package():
    tree = read("README.md").partition("\nspark_ft/\n")[2].partition("\n```")[0]
    files = [path for path in (ROOT / "spark_ft").iterdir() if path.name[0] != "_"]
    here = {path.name + "/" * path.is_dir() for path in files} - {"lazy.py", "version.py"}
    assert sorted(re.findall(r"(?:^  |  +)([a-z_]+(?:\.py|/))(?: |$)", tree, re.M)) == sorted(here)
    for folder, names in re.findall(r"^  (\w+)/ +([a-z_\d ]+):", tree, re.M):
        inside = {path.stem for path in (ROOT / "spark_ft" / folder).iterdir() if path.name[0] != "_"}
        assert set(names.split()) == inside, folder


def test_make_clean_removes_what_the_readme_says():
    removed = re.search(r"^rm -rf (.*)$", make("-n", "clean"), re.M)[1].split()
    sentence = re.search(r"`make clean` removes.*?\n\n", read("README.md"), re.S)[0]
    assert {".venv", ".cache", "spark_ft.egg-info"} <= set(removed)
    for name in removed:
        words = "test and lint" if name in (".pytest_cache", ".ruff_cache", ".hypothesis") else f"`{name}`"
        assert words in sentence, f"make clean removes {name}, and README.md does not say so"


def test_readme_example_runs(capsys):
    for line, _, code in blocks("README.md", "python"):
        exec(compile("\n" * (line - 1) + code, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


def test_the_tickets_at_the_top_of_the_readme_are_those_of_the_solved_lab():
    shown = re.search(r"^order    (.+)\nbefore   (.+) …\nafter    (.+)\n```", read("README.md"), re.M)
    notebook = nbformat.read(ROOT / "labs" / "solutions" / "lab-3.1.4-8b-lora-finetuning.ipynb", 4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    tables = [output.data["text/plain"] for output in outputs if "text/html" in output.get("data", ())]
    row = next(" ".join(line.split()) for text in tables for line in text.split("\n") if shown[1] in line)
    assert all(" ".join(shown[i].split()) in row.replace("⏎ ", "") for i in (2, 3))


def test_readme_profiles_are_the_table_in_models():
    short = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
    for p in PROFILES.values():
        row = next(line for line in read("README.md").splitlines() if line.startswith(f"| `{p.name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[2:] == [p.model or "embedded, 135M", short[str(p.dtype)], f"{p.steps} × {p.batch_size}"]


def test_settings_named_in_the_code_are_in_the_readme():
    code = "".join(path.read_text("utf-8") for path in (ROOT / "spark_ft").rglob("*.py"))
    used = set(re.findall(r"\bSPARK_FT_[A-Z]+\b", code))
    made = set(re.findall(r"\$\((TORCH_INDEX|PYTHON|ARGS)\)", read("Makefile")))
    assert {"SPARK_FT_MODEL", "SPARK_FT_PROFILE"} <= used
    assert used | made <= set(re.findall(r"^\| `(\w+)` \|", read("README.md"), re.M))


def test_changelog_begins_with_this_version_and_the_license_is_the_one_that_is_named():
    assert re.findall(r"^## (\S+)", read("CHANGELOG.md"), re.M)[0] == spark_ft.__version__
    assert " ".join(read("LICENSE").split()).startswith("Apache License Version 2.0, January 2004")
    assert 'license = "Apache-2.0"' in read("pyproject.toml")


def test_workflow_runs_make_targets_that_exist():
    import yaml

    jobs = yaml.safe_load(read(".github/workflows/labs.yml"))["jobs"]
    ran = [entry["command"] for entry in jobs["run"]["strategy"]["matrix"]["include"]]
    targets = {target for command in ran for target in re.findall(r"\bmake ([\w-]+)", command)}
    assert {"labs", "test"} <= targets <= make_targets()


def qlora_table(page: str) -> list[str]:
    table = page.partition("GB, at 2,048 tokens")[2].partition("\n\n")[0]
    return re.findall(r"^\| .* \| (\d+\.\d) \|$", table, re.M)


def test_counted_numbers_of_the_eli5_page_are_right():
    """Counted again from shapes, by other means than QUICK_REFERENCE.md does; cited ones cannot be."""
    hidden, mlp, kv, layers, vocab = 8192, 28672, 1024, 80, 128256  # Llama-3.3-70B
    attention, feed_forward = 2 * hidden * (hidden + kv), 3 * hidden * mlp
    linear = layers * (attention + feed_forward)
    other = 2 * vocab * hidden
    adapter = layers * 16 * (2 * (hidden + hidden) + 2 * (hidden + kv) + 3 * (hidden + mlp))
    nf4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8
    checkpoints = layers * 2048 * hidden * 2
    page = flat("ELI5.md")
    for counted in (
        f"{1000 * 1000 * 4 / 1e6:.0f} MB in fp32",
        f"{2 * 16 * 1000 * 4 / 1000:.0f} KB: {2 * 16 / 1000:.1%}",
        f"{2 * 16 / 8192:.2%} of an 8192 × 8192 table",
        f"{adapter / linear:.2%} of those layers",
        f"({adapter / 1e6:.0f} million numbers beside {linear / 1e9:.2f} billion)",
        f"{(linear + other) / 1e9:.2f} billion weights in the plain way",
        f"{16 * (linear + other) / 1e9:,.0f} GB",
        f"{8 * nf4:.3f} bits where it took 16: {2 / nf4:.1f} times smaller",
        f"from {2 * (linear + other) / 1e9:.1f} GB to {(nf4 * linear + 2 * other) / 1e9:.1f} GB",
        f"{2 * (linear + other) / (nf4 * linear + 2 * other):.1f} times smaller",
        f"| linear layers, {linear / 1e9:.2f} billion weights in NF4 | {nf4 * linear / 1e9:.1f} |",
        f"| embeddings and head, bf16 | {2 * other / 1e9:.1f} |",
        f"{adapter / 1e6:.0f} million × 6 bytes (their gradients, {2 * adapter / 1e9:.1f},",
        f"| one activation kept per layer (checkpoints) | {checkpoints / 1e9:.1f} |",
        "ln 2 = 0.6931",
        f"{8.19 * 2:.1f} GB in bf16 for 8.19 billion weights",
    ):
        assert counted in page, f"ELI5.md should say: {counted}"
    assert f"{sum(map(float, qlora_table(read('ELI5.md')))):.0f}" == "45"


def whole_logits(model, batch):
    return model(**batch, use_cache=False).loss, 1


@pytest.mark.slow
def test_the_qlora_table_of_the_eli5_page_is_the_plan():
    """Term by term at the worst moment; the peaks for other settings too."""
    shape, lengths = known_config("Llama-3.3-70B"), (512, 2048)
    short, plan = (plan_training(shape, "qlora", length=n, adapter_dtype=torch.bfloat16) for n in lengths)
    terms = [
        (trace.LINEAR,),
        (trace.EMBEDDINGS,),
        (trace.ADAPTERS, trace.MOMENTS),
        (trace.CHECKPOINTS,),
        (trace.RECOMPUTED, trace.DEQUANTIZED),
        (trace.CONTEXT,),
        (trace.PASSING, trace.LOGITS),
    ]
    page = flat("ELI5.md")
    sums = [sum(plan.terms[name] for name in names) / 1e9 for names in terms]
    assert qlora_table(read("ELI5.md")) == [f"{gigabytes:.1f}" for gigabytes in sums]
    first, second = (f"{plan.peak / 1e9:.0f} GB" for plan in (short, plan))
    assert f"about {first} at its worst moment for rows of 512 tokens, and about {second} for rows of" in page
    full = [plan_training(shape, "qlora", length=length).peak for length in lengths]
    more = " to ".join(f"{(b - a.peak) / 1e9:.1f}" for a, b in zip((short, plan), full, strict=True))
    assert f"In fp32 the notes take {more} GB more" in page
    usual = {"dtype": torch.float32, "loss": whole_logits}
    peaks = [plan_training(shape, "qlora", length=length, **usual).peak / 1e9 for length in lengths]
    assert "preparation does, it is {:.0f} and {:.0f} GB".format(*peaks) in page


def test_names_in_the_eli5_glossary_exist():
    table = read("ELI5.md").partition("From ELI5 to Technical\n")[2].partition("\n## ")[0]
    names = re.findall(r"`(\w+)[^`]*`", table)
    assert {"LoRALinear", "load_model", "merge_adapters"} <= set(names)
    assert not [name for name in names if not hasattr(spark_ft, name)]


PARTS = ["The Jargon-Free Version", "The Analogy", "A Visual", "Common Misconception"]
PARTS += ["Where the Picture Ends", "When You're Ready for Details"]
SECTIONS = ["Fine-Tuning", "LoRA", "QLoRA", "DoRA", "NEFTune", "Data", "DPO", "SimPO, ORPO, KTO", "KTO"]
SECTIONS += ["Export"]
MYTH = re.compile(r"\n❌ \*\*People often think\*\*: .+\n✅ \*\*But actually\*\*: .+\n\n###")


def test_every_section_of_the_eli5_page_has_its_parts_and_at_most_180_words_outside_folds():
    sections = re.split(r"^## 🧒 ", read("ELI5.md").partition("\n## 🔗 ")[0], flags=re.M)[1:]
    names = [section.partition(":")[0] for section in sections]
    assert names == SECTIONS
    for name, section in zip(names, sections, strict=True):
        parts = [part for part in re.findall(r"^### (.*)$", section, re.M) if part != "Quick Decision Guide"]
        assert parts == PARTS, f"{name} has other parts"
        assert len(MYTH.findall(section)) == 1, f"{name}: ❌ and ✅ in two lines"
        assert len(re.findall(r"^<details>$.*?^</details>$", section, re.M | re.S)) == 1, f"{name}: one fold"
        open_text = re.sub(r"<details>.*?</details>", "", FENCE.sub("", section), flags=re.S)
        open_text = re.sub(r"^[|#].*$|\]\([^)]*\)|<a .*?</a>", "", open_text, flags=re.M)
        words = len(re.findall(r"\w[\w'’-]*", open_text))
        assert words <= 180, f"{name}: {words} words outside its fold"
    guide = next(section for section in sections if section.startswith("SimPO"))
    guide = guide.partition("### Quick Decision Guide\n```\n")[2].partition("```")[0].splitlines()
    assert [re.search(r"→ +(\w+)", line)[1] for line in guide] == ["DPO", "SimPO", "ORPO", "KTO"]


def test_quick_reference_explains_every_field_of_the_adapter_config():
    page = read("QUICK_REFERENCE.md").partition("## Configuration")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \|", page, re.M))
    for field in fields(spark_ft.AdapterConfig):
        if field.name != "method":
            said = rows[field.name].strip()
            assert said == json.dumps(field.default) or ast.literal_eval(said) == field.default
