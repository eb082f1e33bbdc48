"""Experts in NF4: what they compute, keep and become; and models in NF4 that have no numbers."""

import pytest
import torch
from helpers import tiny_model, token_batch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM

from spark_ft import AdapterConfig, add_adapters
from spark_ft.experts import NF4Experts, nf4_names, put_nf4, quantize_model
from spark_ft.methods.nf4 import NF4Tensor

IDS = torch.tensor([[5, 6, 7]])


def step(model, checkpointing):
    """Loss and gradients of one step, LoRA on the attention."""
    torch.manual_seed(0)
    add_adapters(model.requires_grad_(False), AdapterConfig(rank=2, targets=("q_proj", "v_proj"))).train()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = model(**token_batch()).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "olmoe"])
def test_a_step_through_4_bit_experts_is_that_of_their_dequantized_weights_to_the_bit(kind):
    how = "eager" if kind in ("mixtral", "olmoe") else "grouped_mm"
    checkpointing = kind in ("gpt_oss", "olmoe")
    dense, model = (tiny_model(kind, _experts_implementation=how) for _ in range(2))
    for name in nf4_names(model):
        put_nf4(model, name)
        if "experts" in name:
            dense.get_parameter(name).data = model.get_submodule(name).dequantize()
        else:
            put_nf4(dense, name)
    assert {m.config._experts_implementation for m in model.modules() if isinstance(m, NF4Experts)} == {how}
    assert not [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]
    for ours, theirs in zip(step(model, checkpointing), step(dense, checkpointing), strict=True):
        assert torch.equal(ours, theirs)


def test_nothing_of_the_experts_dense_weights_is_kept_and_the_rest_is_left_to_checkpointing():
    model = quantize_model(tiny_model("qwen3_moe", _experts_implementation="grouped_mm"))
    model.get_input_embeddings().weight.requires_grad_()
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        model(IDS).logits.sum().backward()
    products = {(6, 64), (6, 32)}  # of the rows that go through the experts
    assert {tuple(t.shape) for t in seen} >= products
    experts = {m.numel() for m in model.modules() if isinstance(m, NF4Tensor) and len(m.shape) == 3}
    assert not experts & {t.untyped_storage().nbytes() // 4 for t in seen}


def test_experts_in_4_bits_move_are_cast_and_become_dense_again():
    model = quantize_model(tiny_model("gpt_oss"))
    expected = model(IDS).logits
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(IDS).logits.float(), expected, atol=0.1)
    assert model.generate(IDS, max_new_tokens=2, do_sample=False).shape == (1, 5)
    for experts in [m for m in model.modules() if isinstance(m, NF4Experts)]:
        experts.dequantize_(torch.float32)
        assert not isinstance(experts, NF4Experts)
        assert experts.gate_up_proj.shape == (4, 64, 192)
        assert isinstance(experts.gate_up_proj, torch.nn.Parameter)
    assert torch.equal(model(IDS).logits, expected)
    model = quantize_model(tiny_model("gpt_oss")).to(torch.bfloat16)
    assert torch.allclose(model(IDS).logits.float(), expected, atol=0.1)


def test_a_model_without_numbers_gets_nf4_weights_of_the_right_sizes_and_a_tied_weight_is_left_out():
    def sizes(model):
        return {name: (t.shape, t.dtype) for name, t in quantize_model(model).state_dict().items()}

    real = sizes(tiny_model("qwen3_moe"))
    config = tiny_model("qwen3_moe").config
    for pretend in (torch.device("meta"), FakeTensorMode()):
        with pretend:
            assert sizes(AutoModelForCausalLM.from_config(config, dtype=torch.float32)) == real
    model = tiny_model("llama")
    one, two = (f"model.layers.{layer}.mlp.up_proj.weight" for layer in (0, 1))
    assert {one, two} <= set(nf4_names(model))
    model.all_tied_weights_keys[two] = one
    assert not {one, two} & set(nf4_names(model))
