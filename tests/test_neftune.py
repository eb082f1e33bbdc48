"""NEFTune's noise is transformers' own, bit for bit; it comes in training alone, and goes away again."""

import math
from contextlib import nullcontext

import pytest
import torch
from helpers import tiny_llama, token_batch
from torch import nn

from spark_ft.adapters import AdapterConfig, adapters_disabled, add_adapters
from spark_ft.methods.neftune import draws_noise, neftune, neftune_noise
from spark_ft.scoring import sequence_logps, sft_loss
from spark_ft.training import TrainConfig, train

LENGTHS = (12, 8)  # of the batch's two texts
BATCH = token_batch(rows=2, length=12)
PADDED = {"input_ids": BATCH["input_ids"], "attention_mask": BATCH["attention_mask"]}


def embeddings(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def drawn(function, seed=3):
    torch.manual_seed(seed)
    return function()


def noise_of(model, run, ids):
    """What reaches the first decoder layer beside the clean embeddings."""
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    hook.remove()
    with torch.no_grad():
        return seen[-1] - model.get_input_embeddings()(ids)


def assert_fills(noise, length, width, alpha=5.0):
    bound = alpha / math.sqrt(length * width)
    assert 0.9 * bound < noise.abs().max() <= bound * 1.00001


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_noise_is_transformers_own_bit_for_bit(dtype):
    from transformers.integrations.neftune import neftune_post_forward_hook

    layer = nn.Identity()
    for shape in ((1, 1, 1), (2, 7, 16), (3, 40, 576)):
        e = embeddings(*shape, dtype=dtype)
        for alpha in (1, 5.0, 12.5):
            layer.neftune_noise_alpha = alpha
            torch.manual_seed(3)
            theirs = neftune_post_forward_hook(layer, None, e)
            torch.manual_seed(3)
            assert torch.equal(neftune_noise(e, alpha), theirs), (shape, alpha)


def test_true_lengths_scale_each_text_by_its_own_also_packed_and_leave_padding_clean():
    e = embeddings(3, 30, 64)
    noise = neftune_noise(e, 5.0, lengths=[30, 10, 1]) - e
    for row, length in zip(noise, (30, 10, 1), strict=True):
        assert_fills(row[:length], length, 64)
        assert torch.count_nonzero(row[length:]) == 0
    assert torch.equal(neftune_noise(e, 5.0, torch.tensor([4, 0, 2]))[1], e[1])
    before = torch.get_rng_state()
    assert neftune_noise(e, 0) is neftune_noise(e, 0.0, [30, 10, 1]) is e
    assert torch.equal(torch.get_rng_state(), before), "alpha 0 draws nothing"
    for lengths in ([3], [3, 4, 31], [[3, 3, 3]]):
        with pytest.raises(ValueError, match="do not fit 3 texts of at most 30 tokens"):
            neftune_noise(e, 5.0, lengths)
    model, batch = tiny_llama().train(), {name: t.clone() for name, t in BATCH.items()}
    batch["input_ids"][:, :4] = batch["input_ids"][0, :4]
    row = batch["input_ids"][batch["attention_mask"].bool()][None]  # both texts, their common beginning twice
    with neftune(model, 5.0):
        noise = noise_of(model, lambda: sft_loss(model, batch), row)[0]
    for part, length in zip(noise.split(LENGTHS), LENGTHS, strict=True):
        assert_fills(part, length, 32)
    assert not torch.equal(noise[:4], noise[12:16])


def test_a_model_in_training_gets_the_noise_that_transformers_hook_gives():
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    model = tiny_llama(packed=False).train()
    weight = model.get_input_embeddings().weight
    before = weight.detach().clone()
    hook = activate_neftune(model, 5.0)
    theirs = drawn(lambda: model(**PADDED).logits)
    deactivate_neftune(model, hook)
    with neftune(model, 5.0):
        ours = drawn(lambda: model(**PADDED).logits)
        ours.square().mean().backward()
    assert torch.equal(weight, before)
    assert weight.grad.norm() > 0
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, model(**PADDED).logits)


def test_it_is_off_in_eval_without_gradients_with_a_disabled_adapter_outside_and_after_an_error(monkeypatch):
    model = add_adapters(tiny_llama(packed=False), AdapterConfig(rank=2)).train()
    plain, state = model(**PADDED).logits, torch.get_rng_state()

    def is_plain():
        return torch.equal(model(**PADDED).logits, plain) and torch.equal(torch.get_rng_state(), state)

    with neftune(model, 5.0):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "modules", lambda *_: pytest.fail("it walks all modules"))
            assert draws_noise(model)
        with torch.no_grad():
            assert is_plain()
        with adapters_disabled(model):
            assert not draws_noise(model)
            assert is_plain()
        model.eval()
        assert is_plain()
        model.train()
        assert not is_plain()
    torch.set_rng_state(state)
    assert is_plain()
    model = tiny_llama(packed=False).train()
    plain = model(**PADDED).logits
    with pytest.raises(RuntimeError, match="on purpose"), neftune(model, 5.0):
        raise RuntimeError("on purpose")
    assert torch.equal(model(**PADDED).logits, plain)
    assert not draws_noise(model)
    with neftune(model, 5.0):  # and it can be put on again
        with pytest.raises(ValueError, match="on already"), neftune(model, 5.0):
            pass
        assert draws_noise(model)
    with pytest.raises(ValueError, match="alpha=-1"), neftune(model, -1):
        pass


@pytest.mark.parametrize("side", ["right", "left"])
def test_true_lengths_come_from_the_attention_mask(side):
    model, ids = tiny_llama(packed=False).train(), BATCH["input_ids"]
    mask = BATCH["attention_mask"] if side == "right" else BATCH["attention_mask"].flip(1)
    with neftune(model, 5.0, true_lengths=True):
        noise = noise_of(model, lambda: model(input_ids=ids, attention_mask=mask), ids)
    assert torch.count_nonzero(noise[mask == 0]) == 0
    for row, real, length in zip(noise, mask.bool(), LENGTHS, strict=True):
        assert_fills(row[real], length, 32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_no_other_noise(reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = add_adapters(tiny_llama(packed=False), AdapterConfig(rank=2))
        nn.init.normal_(model.model.layers[0].self_attn.q_proj.lora_B)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        with neftune(model, 5.0):
            drawn(lambda model=model: sft_loss(model, BATCH)[0]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients)


def test_a_run_with_alpha_zero_is_bitwise_the_baseline_and_a_reference_is_never_noisy():
    losses, references = [], []
    for block in (nullcontext, lambda model: neftune(model, 0), lambda model: neftune(model, 5.0)):
        torch.manual_seed(0)
        model = add_adapters(tiny_llama(), AdapterConfig(rank=2, dropout=0.1)).train()
        config = TrainConfig(steps=3, learning_rate=1e-2, progress=False)
        with block(model):
            with torch.no_grad(), adapters_disabled(model):
                references.append(sequence_logps(model, BATCH)[0].tolist())
            losses.append(train(model, lambda _: BATCH, sft_loss, config).losses)
    assert losses[0] == losses[1] != losses[2]
    assert references[0] == references[1] == references[2]
