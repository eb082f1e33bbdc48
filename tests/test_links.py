"""Relative links lead somewhere, anchors too, and every lab is linked where it should be."""

import json
import re
from pathlib import Path

from spark_ft.files import ROOT

LABS = """lab-3.1.1-lora-theory lab-3.1.2-dora-comparison lab-3.1.3-neftune-magic lab-3.1.4-8b-lora-finetuning
lab-3.1.5-70b-qlora-finetuning lab-3.1.6-dataset-preparation lab-3.1.7-dpo-training lab-3.1.8-simpo-vs-orpo
lab-3.1.9-kto-binary-feedback lab-3.1.10-ollama-integration""".split()  # noqa: SIM905
LEFT_OUT = {".venv", ".cache", ".git", ".pytest_cache", "runs", "node_modules", ".ipynb_checkpoints"}
LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
CODE = re.compile(r"^(```|~~~).*?^\1", re.M | re.S)


def pages() -> list[Path]:
    found = [path for path in ROOT.rglob("*.md") if not LEFT_OUT & set(path.relative_to(ROOT).parts)]
    return sorted(found) + sorted((ROOT / "labs").glob("**/lab-*.ipynb"))


def text_of(page: Path) -> str:
    """A page's markdown; of a notebook, that of its markdown cells."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".ipynb":
        cells = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "markdown"]
        text = "\n\n".join(source if isinstance(source, str) else "".join(source) for source in cells)
    return text


def links(text: str) -> list[str]:
    """A text's link targets, without fenced blocks and inline code, where brackets are not links."""
    return LINK.findall(re.sub(r"`[^`\n]*`", "", CODE.sub("", text)))


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a page's headings: lower case, no punctuation, hyphens, repeats numbered."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", CODE.sub("", text), re.M):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        number, plain = 1, slug
        while slug in found:
            slug, number = f"{plain}-{number}", number + 1
        found.add(slug)
    return found | set(re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text))


def complaint(page: Path, target: str) -> str | None:
    """Why a relative link of a page leads nowhere, or None."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target):
        return None
    path, _, anchor = target.partition("#")
    goal = (page.parent / path).resolve() if path else page
    if goal != ROOT and ROOT not in goal.parents:
        return "leads out of the repository"
    if not goal.exists():
        return "no such file"
    if anchor and goal.suffix == ".md" and anchor not in anchors(text_of(goal)):
        return f"no heading of {goal.name} has that anchor"
    return None


def test_links_lead_somewhere():
    broken = []
    for page in pages():
        text = text_of(page)
        for target in links(text):
            if why := complaint(page, target):
                broken.append(f"{page.relative_to(ROOT)}: {target}: {why}")
    assert not broken, "\n".join(broken)


def test_each_lab_is_there_and_linked():
    eli5, rows = links(text_of(ROOT / "ELI5.md")), text_of(ROOT / "README.md").splitlines()
    for lab in LABS:
        path, number = f"labs/{lab}.ipynb", re.escape(lab.split("-")[1])
        assert (ROOT / path).exists(), f"{path} is missing"
        row = next(line for line in rows if re.match(rf"\| \[?{number} ", line))
        assert links(row) == [path], f"README.md's row of {lab} does not link to it"
        assert path in eli5, f"ELI5.md has no link to {path}"


def test_every_data_set_has_a_card():
    for folder in (ROOT / "data").iterdir():
        if list(folder.glob("*.jsonl")):
            assert (folder / "README.md").exists(), f"data/{folder.name} has no card"


def test_bad_links_are_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    page = tmp_path / "a.md"
    page.write_text(
        "# Top: one\n## Top: one\n[x](b.md) [y](#top-one-1) [z](a.md#gone) `[no](link)` [o](../out.md)\n"
    )
    said = {target: complaint(page, target) for target in links(text_of(page))}
    assert said == {
        "b.md": "no such file",
        "#top-one-1": None,
        "a.md#gone": "no heading of a.md has that anchor",
        "../out.md": "leads out of the repository",
    }
