"""`make labs`: progress, table, exit status; and the headline it reads."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from jupyter_core.paths import jupyter_path

from spark_ft.files import ROOT
from spark_ft.lab import HEADLINE_TYPE, headline
from spark_ft.lab.build import sources
from spark_ft.lab.run import Result, main, table
from spark_ft.version import __version__

GOOD = '# %%\nfrom spark_ft.lab import headline\n\n# %%\nheadline({"exact match %": 92.5, "base %": 0})\n'
FAILS = "# %% [markdown]\n# # Text\n\n# %%\ndef f(x):\n    return x / 0\n\nf(1)\n"
SILENT, DIES = "# %%\n1 + 1\n", "# %%\nimport os\nos._exit(9)\n"


def labs(folder, **sources):
    (folder / "src").mkdir()
    for number, (name, text) in enumerate(sources.items(), 1):
        (folder / "src" / f"lab-9.1.{number}-{name}.py").write_text(text)
    return ["--labs", str(folder)]


def test_passing_lab_shows_its_headline_and_writes_nothing(tmp_path, capsys):
    arguments = labs(tmp_path, good=GOOD)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "[1/1] lab-9.1.1-good: pass" in out
    assert "exact match % 92.5; base % 0" in out
    assert "1 of 1 labs passed" in out
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["lab-9.1.1-good.py"]


def test_failing_labs_exit_1_with_a_readable_traceback_and_an_unknown_one_with_2(tmp_path, capsys):
    assert main(labs(tmp_path, fails=FAILS, silent=SILENT, dies=DIES)) == 1
    out = capsys.readouterr().out
    assert "cell 2 of 2: ZeroDivisionError: division by zero" in out
    assert "----> 2     return x / 0" in out
    assert "\x1b[" not in out, "no colour codes in a log"
    assert "does not end with headline" in out
    assert "the kernel died" in out, "which is a failure, not a hang"
    assert "0 of 3 labs passed" in out
    for arguments in (["3.1.99"], ["--labs", "/nonexistent"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert "no lab" in capsys.readouterr().err


def test_table_has_a_line_per_lab_within_its_width():
    broken = Result("lab-long-name", 2, "", "cell 3: it broke\nmore")
    text = table([Result("lab-a", 61.4, "x 1; " * 60, ""), broken], 100)
    lines = text.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[2].split()[:3] == ["lab-a", "61", "pass"]
    assert lines[3].split()[:3] == ["lab-long-name", "2", "FAIL"]
    assert "more" not in text
    assert lines[-1] == "1 of 2 labs passed in 63 s"


def test_headline_takes_scalars_of_any_library_and_refuses_what_a_table_cannot_hold():
    numbers = headline({"tensor": torch.tensor(1.5), "numpy": np.float64(2.0), "flag": True, "text": "so"})
    assert numbers == {"tensor": 1.5, "numpy": 2.0, "flag": True, "text": "so"}
    assert numbers._repr_mimebundle_()[HEADLINE_TYPE] == numbers
    assert repr(numbers) == "tensor 1.5; numpy 2; flag True; text so"
    for wrong in ({"a": None}, {"a": [1, 2]}, {"a": torch.zeros(2)}):
        with pytest.raises(TypeError, match="a headline holds numbers, booleans and strings, not"):
            headline(wrong)
    with pytest.raises(ValueError, match="ends with at least one number"):
        headline({})


def test_only_the_two_known_messages_are_silenced():
    code = """if True:
        import logging, warnings
        import spark_ft.lab
        logging.basicConfig()
        logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
        logger.warning("Failed to load CPU gemm_4bit_forward from somewhere")
        logger.warning("another of its warnings")
        warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning)
        warnings.warn("`is_gradient_checkpointing` is wrong", UserWarning)
        warnings.warn("another is deprecated", FutureWarning)
    """
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "gemm_4bit" not in said
    assert "`is_gradient_checkpointing` is deprecated" not in said
    assert all(text in said for text in ("another of its", "is wrong", "another is deprecated"))


def test_command_line_names_its_commands():
    run = [sys.executable, "-m", "spark_ft.cli"]
    shown = subprocess.run([*run, "--help"], capture_output=True, text=True, check=True).stdout
    assert "labs" in shown
    assert subprocess.run([*run, "nothing"], capture_output=True).returncode == 2
    version = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    assert version == __version__


def test_make_lab_opens_a_page_with_every_labs_own_title_and_minutes():
    makefile = (ROOT / "Makefile").read_text()
    folder = ROOT / re.search(r"^lab: export JUPYTER_CONFIG_PATH := \$\(CURDIR\)/([^$]+)", makefile, re.M)[1]
    viewers = json.loads((folder / "labconfig" / "default_setting_overrides.json").read_text())
    assert (
        viewers["@jupyterlab/docmanager-extension:plugin"]["defaultViewers"]["markdown"] == "Markdown Preview"
    )
    welcome = ROOT / re.search(r"default_url=/lab/tree/(\S+)", makefile)[1]
    rows = re.findall(
        r"^\| \[(3\.1\.\d+ .*?)\]\((.*?)\.ipynb\) \| .+ \| (\d+) \|$", welcome.read_text(), re.M
    )
    for source in sources():
        text = source.read_text()
        title, minutes = re.search(r"^# # (.+)$", text, re.M)[1], re.search(r"about (\d+) minutes", text)[1]
        assert (title, source.stem, minutes) in rows, f"welcome.md has another title or time for {title}"
    assert len(rows) == len(sources())


def test_make_lab_opens_without_news_and_without_the_instructors_menus(monkeypatch):
    from jupyterlab_server.config import get_federated_extensions, get_static_page_config

    makefile = (ROOT / "Makefile").read_text()
    folder = re.search(r"^lab: export JUPYTER_CONFIG_PATH := \$\(CURDIR\)/([^$]+)", makefile, re.M)[1]
    monkeypatch.setenv("JUPYTER_CONFIG_PATH", str(ROOT / folder))
    disabled = get_static_page_config(level="all")["disabledExtensions"]
    assert {name for name, off in disabled.items() if off} >= {
        "@jupyterlab/apputils-extension:announcements",
        "@jupyter/nbgrader",
    }
    assert "@jupyter/nbgrader" in get_federated_extensions(jupyter_path("labextensions")), (
        "its name is another"
    )
