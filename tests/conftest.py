"""Settings of every test: no hub, no telemetry, the laptop profile; and the two known messages silenced, no others."""

import os
from itertools import count
from zlib import crc32

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("SPARK_FT_PROFILE", "laptop")


def pytest_configure(config):
    # pytest resets warning filters for each test, so its own setting has to hold this one;
    # importing spark_ft.lab filters bitsandbytes' log message.
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing:FutureWarning")
    import spark_ft.lab  # noqa: F401


@pytest.fixture(autouse=True)
def checks_draw_the_same_inputs_in_every_run(request, monkeypatch):
    """A check draws other inputs each time; in the tests of the checks, other ones each time, but the same in every run."""
    if request.module.__name__.startswith("test_checks_"):
        import torch

        seeds = count(crc32(request.node.nodeid.encode()))
        monkeypatch.setattr(torch, "seed", lambda: torch.manual_seed(next(seeds)).initial_seed())


@pytest.fixture(scope="session")
def embedded():
    """(model, tokenizer): the embedded model, loaded once for all tests; leave it as you found it."""
    from spark_ft.models import load_model

    return load_model()


@pytest.fixture(scope="session")
def tiny_llama():
    """A factory of small llamas in eval mode: the same weights for the same seed; grouped-query attention, 2 layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from spark_ft.scoring import use_packed_attention

    def make(seed=0, packed=True, **changes):
        shape = {
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "initializer_range": 0.2,  # wide enough that a wrong mask or position shows in the outputs
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = LlamaForCausalLM(LlamaConfig(**{**shape, **changes})).eval()
        if packed:
            use_packed_attention(model)
        return model

    return make
