"""Settings of every test: no hub, no telemetry, the laptop profile, and two known messages silenced."""

import os
from itertools import count
from zlib import crc32

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("SPARK_FT_PROFILE", "laptop")


def pytest_configure(config):
    settings.register_profile("here", deadline=None)  # a machine that is busy is no failure
    settings.load_profile("here")
    # pytest resets warning filters for each test, so its own setting has to hold this one;
    # importing spark_ft.lab filters bitsandbytes' log message.
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing:FutureWarning")
    import spark_ft.lab  # noqa: F401


def pytest_collection_modifyitems(items):
    """Labs first in either half of the tests: both workers begin with them, and neither ends on one."""
    labs = [item for item in items if item.get_closest_marker("notebooks")]
    others = [item for item in items if not item.get_closest_marker("notebooks")]
    half = len(others) // 2
    items[:] = labs[::2] + others[:half] + labs[1::2] + others[half:]


@pytest.fixture(autouse=True)
def checks_draw_the_same_inputs_in_every_run(request, monkeypatch):
    """A check draws fresh inputs at every call; here it draws the same sequence in every run of a test."""
    if request.module.__name__.startswith("test_checks_"):
        import torch

        seeds = count(crc32(request.node.nodeid.encode()))
        monkeypatch.setattr(torch, "seed", lambda: torch.manual_seed(next(seeds)).initial_seed())


@pytest.fixture(scope="session")
def tokenizer():
    """The embedded model's, loaded once for all tests; leave it as you found it."""
    from spark_ft.models import load_tokenizer

    return load_tokenizer()


@pytest.fixture(scope="session")
def embedded(tokenizer):
    """(model, tokenizer): the embedded model, loaded once for all tests; leave it as you found it."""
    from spark_ft.models import load_model

    return load_model()[0], tokenizer


@pytest.fixture(scope="session")
def tiny_llama():
    """A factory of small llamas, `helpers.tiny_llama`."""
    from helpers import tiny_llama

    return tiny_llama
