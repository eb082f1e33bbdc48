"""Set-up adds PyTorch's CPU index only where it saves something and answers at once."""

import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from spark_ft.files import ROOT
from spark_ft.lab import torch_index


@pytest.fixture
def index():
    """An index at /cpu, nothing at /none, and one at /slow that never answers."""
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path.startswith("/slow"):
                release.wait(20)
            self.send_response(200 if self.path == "/cpu/torch/" else 404)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    release.set()
    server.shutdown()
    server.server_close()


def test_an_index_that_does_not_answer_is_not_waited_for(index, monkeypatch):
    monkeypatch.setattr(torch_index, "PATIENCE", 0.5)
    assert torch_index.answers(f"{index}/cpu")
    assert not torch_index.answers(f"{index}/none")
    assert not torch_index.answers("http://127.0.0.1:9")
    assert not torch_index.answers("no address")
    started = time.monotonic()
    assert not torch_index.answers(f"{index}/slow")
    assert time.monotonic() - started < 15  # the server holds the line for 20 seconds


def test_it_is_added_on_linux_without_a_driver_alone(index, monkeypatch, tmp_path):
    monkeypatch.setattr(torch_index, "CPU", f"{index}/cpu")
    for platform, driver, smi, expected in (
        ("linux", False, None, f"{index}/cpu"),
        ("linux", True, None, ""),
        ("linux", False, "/usr/lib/wsl/lib/nvidia-smi", ""),
        ("darwin", False, None, ""),
    ):
        monkeypatch.setattr(torch_index.sys, "platform", platform)
        monkeypatch.setattr(torch_index.shutil, "which", lambda name, smi=smi: smi)
        monkeypatch.setattr(torch_index, "DRIVER", str(tmp_path if driver else tmp_path / "none"))
        assert torch_index.smallest() == expected
    monkeypatch.setattr(torch_index, "CPU", f"{index}/none")
    monkeypatch.setattr(torch_index.sys, "platform", "linux")
    assert torch_index.smallest() == ""


def test_it_runs_without_the_package_and_prints_one_line():
    file = ROOT / "spark_ft" / "lab" / "torch_index.py"
    said = subprocess.run(
        [sys.executable, "-S", str(file)], capture_output=True, text=True, check=True, timeout=30
    )
    assert said.stdout in ("\n", f"{torch_index.CPU}\n")
