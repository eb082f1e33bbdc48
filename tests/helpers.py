"""What several test files share; import with `from helpers import tiny_llama`. Anyone may append."""

import contextlib
import inspect
import io
import re
import sys
import textwrap

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from spark_ft.lab.checks import CheckFailed
from spark_ft.lab.checks.told import MESSAGE
from spark_ft.scoring import use_packed_attention

TINY_LLAMA = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "initializer_range": 0.2,  # wide enough that a wrong mask or position shows in the outputs
}  # fmt: skip


def tiny_llama(seed=0, packed=True, **changes):
    """A small llama in eval mode: the same weights for the same seed; grouped-query attention, 2 layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **changes})).eval()
    if packed:
        use_packed_attention(model)
    return model


TINY_MODEL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

SMALL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
TINY_GEMMA4 = {
    **SLIDING, "global_head_dim": 16, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96,
    "num_kv_shared_layers": 0, "final_logit_softcapping": 30.0,
}  # fmt: skip
TINY_GEMMA = {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}
# What each kind of model needs beside TINY_MODEL; a kind that is not listed needs nothing.
TINY_KINDS = {
    "bloom": {"n_layer": 2, "n_head": 4},
    "cohere": {"logit_scale": 0.0625},
    "cohere2": {"logit_scale": 0.0625, "sliding_window": 8},
    "falcon_h1": {
        "lm_head_multiplier": 0.0195, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16,
        "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8,
    },
    "gemma2": TINY_GEMMA,
    "gemma3_text": TINY_GEMMA,
    "gemma4": {
        "text_config": {**TINY_MODEL, **TINY_GEMMA4}, "audio_config": None,
        "vision_config": {**TINY_MODEL, "num_hidden_layers": 1},
    },
    "gemma4_text": TINY_GEMMA4,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {"rotary_pct": 0.25},
    "gpt_oss": {**SMALL_EXPERTS, **SLIDING},
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8, "n_positions": 128},
    "granite": {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "granitemoe": {**SMALL_EXPERTS, "logits_scaling": 6.0},
    "hyperclovax": {"logits_scaling": 0.125},
    "jamba": {
        "num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 8,
    },
    "llama4_text": {**SMALL_EXPERTS, "num_experts_per_tok": 1, "intermediate_size_mlp": 96},
    "mamba": {"state_size": 8},
    "mistral": {"sliding_window": 8},
    "mixtral": SMALL_EXPERTS,
    "nanochat": {"final_logit_softcapping": 15.0},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 32},
    "phi3": {"rope_scaling": None, "original_max_position_embeddings": 128},
    "phimoe": SMALL_EXPERTS,
    "qwen3": {"head_dim": 32},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "recurrent_gemma": {
        "logits_soft_cap": 3.0, "lru_width": 64, "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
    "xlstm": {
        "output_logit_soft_cap": 3.0, "num_blocks": 2, "num_heads": 4, "embedding_dim": 64,
        "qk_dim_factor": 1.0, "chunkwise_kernel": "chunkwise--native_autograd",
        "sequence_kernel": "native_sequence__native", "step_kernel": "native",
    },
}  # fmt: skip


def tiny_model(kind, seed=0, dtype=torch.float32, **changes):
    """A small random causal model of a transformers kind ("gemma2", "mixtral" …) in eval mode."""
    shape = {**TINY_MODEL, **TINY_KINDS.get(kind, {}), **changes}
    if kind == "falcon":
        del shape["head_dim"]  # which its config computes
    config = AutoConfig.for_model(kind, **shape)
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


def then(answer, *changes):
    """The same answer, its result changed by each function in turn."""

    def changed(*arguments):
        result = answer(*arguments)
        for change in changes:
            result = change(result)
        return result

    return changed


def mutant(right, *pieces):
    """A wrong answer: the right one with pieces of its source replaced; pieces: old, new, old, new, …"""
    source = textwrap.dedent(inspect.getsource(right))
    for old, new in zip(pieces[::2], pieces[1::2], strict=True):
        assert old in source, f"{old!r} is not in the right answer"
        source = source.replace(old, new)
    exec(source, scope := dict(vars(sys.modules[right.__module__])))
    return scope[right.__name__]


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


def refuses(check, *rows, times=1, right=None, answers=lambda wrong: wrong):
    """Require that a lab's check fails each wrong answer with its message, and list all rows where not. The
    message fits on two lines.

    rows: (pattern of the message, wrong answer), or (pattern, old, new, …) for `right` with these pieces of
    its source replaced; `answers` makes of a wrong answer all that the check takes, as a tuple.
    """
    missed = []
    for pattern, *wrong in rows * times:
        wrong = mutant(right, *wrong) if len(wrong) > 1 else wrong[0]
        try:
            said = f"it passes: {printed_by(check, answers(wrong))}"
        except CheckFailed as failure:
            said = str(failure)
            fits = len(said) <= MESSAGE
            if fits and re.search(pattern, said, re.S):
                continue
            said = said if fits else f"{len(said)} characters: {said}"
        except Exception as error:
            said = repr(error)
        missed.append(f"expected “{pattern}”, but: {said}")
    assert not missed, "\n".join(missed)


def complains(*rows):
    """Require that each call raises a ValueError whose text has all of its parts; list all rows where not.

    rows: (function, its arguments as a tuple, part, part, …).
    """
    missed = []
    for function, arguments, *parts in rows:
        try:
            said = f"no error, but {function(*arguments)!r}"[:300]
        except Exception as error:
            said = str(error) if isinstance(error, ValueError) else repr(error)
        missed += [f"expected “{part}”, but: {said}" for part in parts if part not in said]
    assert not missed, "\n".join(missed)


def relative(ours, theirs) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def outcome(layer, x, parameters, seed=11):
    """A layer's output and the gradients of x and the parameters; its loss weighs each output differently."""
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)  # the same dropout mask in every call
    y = layer(x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    return (y.detach(), *torch.autograd.grad(loss, (x, *parameters)))


def peft_layer(layer):
    """PEFT's layer with all that a LoRALinear or DoRALinear has, and its trained parameters."""
    from peft import LoraConfig, get_peft_model

    dora, bias = hasattr(layer, "magnitude"), layer.bias is not None
    base = torch.nn.Linear(layer.in_features, layer.out_features, bias, dtype=layer.weight.dtype)
    base.load_state_dict(layer.base.state_dict())
    options = {"lora_dropout": layer.dropout, "use_rslora": layer.rslora, "use_dora": dora}
    config = LoraConfig(r=layer.rank, lora_alpha=layer.alpha, target_modules=["0"], **options)
    twin = get_peft_model(torch.nn.Sequential(base), config).base_model.model[0].train(layer.training)
    parts = (twin.lora_A, twin.lora_B, twin.lora_magnitude_vector)[: 3 if dora else 2]
    theirs = [part["default"].weight for part in parts]
    with torch.no_grad():
        for their, our in zip(theirs, trained_parameters(layer), strict=True):
            their.copy_(our)
    return twin, theirs


def trained_parameters(layer):
    """A, B and DoRA's magnitude."""
    return [parameter for parameter in layer.parameters() if parameter.requires_grad]


def trained_layer(kind, out=24, inp=16, rank=4, dtype=torch.float32, bias=True, **options):
    """A LoRALinear or DoRALinear whose B and magnitude are not those of the start any more."""
    torch.manual_seed(0)
    layer = kind(torch.nn.Linear(inp, out, bias=bias).to(dtype), rank, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
        if hasattr(layer, "magnitude"):
            layer.magnitude.mul_(0.5 + torch.rand(out))
    return layer


def _random_tokens(lengths, generator, left, vocab):
    """(ids, mask) of rows of these lengths, padded with random ids, so that reading the padding shows."""
    width, n = max(lengths), torch.tensor(lengths)[:, None]
    ids = torch.randint(3, vocab, (len(lengths), width), generator=generator)
    place = torch.arange(width).expand_as(ids)
    return ids, ((place >= width - n) if left else (place < n)).long()


def pair_batch(prompts=(5, 9, 6), chosen=(1, 4, 7), rejected=(5, 3, 1), shared=3, seed=0, vocab=96):
    """Random preference pairs of these lengths, as `collate_preferences` makes them; prompts begin alike."""
    g, batch = torch.Generator().manual_seed(seed), {}
    for name, lengths in (("prompt", prompts), ("chosen", chosen), ("rejected", rejected)):
        batch[f"{name}_ids"], batch[f"{name}_mask"] = _random_tokens(lengths, g, name == "prompt", vocab)
    for row, length in zip(batch["prompt_ids"], prompts, strict=True):
        row[len(row) - length :][:shared] = torch.arange(7, 7 + min(shared, length))
    return {**batch, "row": torch.arange(len(prompts))}


def thumb_batch(prompts=(5, 9, 6, 5), answers=(1, 4, 7, 2), up=(1, 0, 1, 1), **settings):
    """Random thumbs of these lengths, as `collate_feedback` makes them."""
    batch = pair_batch(prompts, answers, answers, **settings)
    for name in ("ids", "mask"):
        batch[f"completion_{name}"] = batch.pop(f"chosen_{name}")
        batch[f"mismatched_{name}"] = batch[f"completion_{name}"].roll(1, 0)
        del batch[f"rejected_{name}"]
    return {**batch, "desirable": torch.tensor(up) > 0}
