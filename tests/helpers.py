"""What several test files share; import with `from helpers import tiny_llama`. Anyone may append."""

import contextlib
import io
import re

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spark_ft.lab.checks import CheckFailed
from spark_ft.scoring import use_packed_attention

TINY_LLAMA = {
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


def tiny_llama(seed=0, packed=True, **changes):
    """A small llama in eval mode: the same weights for the same seed; grouped-query attention, 2 layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **changes})).eval()
    if packed:
        use_packed_attention(model)
    return model


# What each kind of model needs beside TINY_MODEL; a kind that is not listed needs nothing.
SMALL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
TINY_KINDS = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625, "sliding_window": 8},
    "gemma2": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_oss": {
        **SMALL_EXPERTS,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": {**SMALL_EXPERTS, "logits_scaling": 6.0},
    "hyperclovax": {"logits_scaling": 0.125},
    "mistral": {"sliding_window": 8},
    "mixtral": SMALL_EXPERTS,
    "nanochat": {"final_logit_softcapping": 15.0},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": 128},
    "phimoe": SMALL_EXPERTS,
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
}
TINY_MODEL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(kind, seed=0, dtype=torch.float32, **changes):
    """A small random causal model of a transformers kind ("gemma2", "mixtral" …) in eval mode."""
    config = AutoConfig.for_model(kind, **{**TINY_MODEL, **TINY_KINDS.get(kind, {}), **changes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(0, 0.15)
    return model


def token_batch(seed=1, rows=3, length=20, vocab=96):
    """A padded batch of random tokens: rows get shorter, and the labels of prompts and padding are −100."""
    ids = torch.randint(3, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row in range(rows):
        end = length - 4 * row
        ids[row, end:] = mask[row, end:] = 0
        labels[row, end:] = labels[row, : 5 + row] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def printed_by(check, answer):
    """What a lab's check prints about an answer; a tuple is several answers."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), torch.enable_grad():  # an answer may turn gradients off for good
        check(*(answer if isinstance(answer, tuple) else (answer,)))
    return said.getvalue()


def accepts(check, *answers, times=1):
    """Require that a lab's check passes each right answer every time."""
    for answer in answers * times:
        assert "✓" in printed_by(check, answer)


def refuses(check, rows, times=1):
    """Require that a lab's check fails each wrong answer with its message, and list every row where it does not.

    rows: (a pattern of the message, the wrong answer, or a tuple where the check takes several).
    """
    missed = []
    for pattern, answer in rows * times:
        try:
            said = f"it passes: {printed_by(check, answer)}"
        except CheckFailed as failure:
            said = str(failure)
            if re.search(pattern, said, re.S):
                continue
        except Exception as error:
            said = repr(error)
        missed.append(f"expected “{pattern}”, but: {said}")
    assert not missed, "\n".join(missed)
