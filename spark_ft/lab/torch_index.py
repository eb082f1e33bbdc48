"""Print the package index that has the smallest right PyTorch, or nothing where pip's own will do.

Set-up runs this file before there is a .venv, so it needs Python alone.
"""

import os
import shutil
import sys
import threading
import urllib.request

CPU = "https://download.pytorch.org/whl/cpu"
DRIVER = "/proc/driver/nvidia/version"  # a file of NVIDIA's driver; WSL2 has nvidia-smi instead
PATIENCE = 3.0  # seconds


def takes_cuda_for_nothing() -> bool:
    """Whether pip would bring gigabytes of CUDA to a machine without a GPU: on Linux, without a driver."""
    return sys.platform == "linux" and not os.path.exists(DRIVER) and shutil.which("nvidia-smi") is None


def answers(index: str) -> bool:
    """Whether an index has a page on torch and sends it within seconds; looking up its name counts too."""
    found = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{index}/torch/", timeout=PATIENCE) as response:
                found.append(response.status == 200)
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found == [True]


def smallest() -> str:
    """The index to add to pip's, or ""."""
    return CPU if takes_cuda_for_nothing() and answers(CPU) else ""


if __name__ == "__main__":
    print(smallest(), flush=True)
    os._exit(0)  # without waiting for a thread that still looks up a name
