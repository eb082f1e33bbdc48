"""NEFTune's noise is transformers' own, bit for bit; it comes in training alone, and always goes away again."""

import math

import pytest
import torch
from torch import nn

from spark_ft import (
    AdapterConfig,
    TrainConfig,
    adapters_disabled,
    add_adapters,
    collate_sft,
    sequence_logps,
    sft_loss,
    train,
)
from spark_ft.data.records import read_records
from spark_ft.files import ROOT
from spark_ft.methods.neftune import draws_noise, neftune, neftune_noise
from spark_ft.scoring import packed_row


def embeddings(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def drawn(function, seed=3):
    torch.manual_seed(seed)
    return function()


@pytest.fixture
def batch():
    """Two texts of 9 and 6 tokens, padded on the right, of which the last tokens are learned."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3])
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def inner(model):
    """What the decoder is given: the embeddings with their noise."""
    seen = []
    return model.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True
    ), seen


# ── the noise ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 16), (3, 40, 576)])
@pytest.mark.parametrize("alpha", [1, 5.0, 12.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padded_noise_is_transformers_own_bit_for_bit(shape, alpha, dtype):
    from transformers.integrations.neftune import neftune_post_forward_hook

    layer, e = nn.Identity(), embeddings(*shape, dtype=dtype)
    layer.neftune_noise_alpha = alpha
    assert torch.equal(
        drawn(lambda: neftune_noise(e, alpha)), drawn(lambda: neftune_post_forward_hook(layer, None, e))
    )


@pytest.mark.parametrize("shape", [(4, 12, 64), (2, 200, 64), (1, 50, 576)])
def test_its_norm_is_alpha_over_root_three_whatever_length_and_width(shape):
    e, alpha = torch.zeros(shape), 5.0
    norms = torch.stack([neftune_noise(e, alpha).flatten(1).norm(dim=1) for _ in range(30)])
    assert norms.mean().item() == pytest.approx(alpha / math.sqrt(3), rel=0.02)
    assert neftune_noise(e, alpha).abs().max() <= alpha / math.sqrt(shape[1] * shape[2])


def test_true_lengths_scale_each_text_by_its_own_and_leave_padding_clean():
    e, alpha = embeddings(3, 30, 64), 5.0
    out = neftune_noise(e, alpha, lengths=[30, 10, 1])
    noise = out - e
    assert torch.count_nonzero(noise[1, 10:]) == torch.count_nonzero(noise[2, 1:]) == 0
    for row, length in zip(noise, (30, 10, 1), strict=True):
        bound = alpha / math.sqrt(length * 64)
        assert 0.9 * bound < row[:length].abs().max() <= bound * 1.000001
    assert torch.equal(drawn(lambda: neftune_noise(e, 5.0, torch.tensor([4, 0, 2])))[1], e[1])


@pytest.mark.parametrize("lengths", [[3], [3, 4, 31], [[3, 3, 3]]])
def test_lengths_that_do_not_fit_are_refused(lengths):
    with pytest.raises(ValueError, match="do not fit 3 texts of at most 30 tokens"):
        neftune_noise(embeddings(3, 30, 8), 5.0, lengths)


def test_alpha_zero_is_the_embeddings_themselves_and_draws_nothing():
    e = embeddings(2, 5, 8)
    before = torch.get_rng_state()
    assert neftune_noise(e, 0) is e
    assert neftune_noise(e, 0.0, [5, 2]) is e
    assert torch.equal(torch.get_rng_state(), before)


# ── the context manager ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_in_training_gets_the_noise_that_transformers_hook_gives(tiny_llama, batch):
    from transformers.integrations.neftune import activate_neftune, deactivate_neftune

    model = tiny_llama(packed=False).train()
    arguments = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    hook = activate_neftune(model, 5.0)
    theirs = drawn(lambda: model(**arguments).logits)
    deactivate_neftune(model, hook)
    with neftune(model, 5.0):
        ours = drawn(lambda: model(**arguments).logits)
    plain = model(**arguments).logits
    assert torch.equal(ours, theirs)
    assert not torch.equal(ours, plain)


def test_it_is_off_in_eval_without_gradients_and_with_a_disabled_adapter(tiny_llama, batch):
    model = add_adapters(tiny_llama(packed=False), AdapterConfig(rank=2)).train()
    plain = model(batch["input_ids"]).logits
    state = torch.get_rng_state()
    with neftune(model, 5.0):
        assert draws_noise(model)
        with torch.no_grad():
            assert torch.equal(model(batch["input_ids"]).logits, plain)
        with adapters_disabled(model):
            assert torch.equal(model(batch["input_ids"]).logits, plain)
        model.eval()
        assert torch.equal(model(batch["input_ids"]).logits, plain)
        assert torch.equal(torch.get_rng_state(), state)
        model.train()
        assert not torch.equal(model(batch["input_ids"]).logits, plain)
    assert torch.equal(model(batch["input_ids"]).logits, plain)


def test_the_hooks_go_away_after_an_exception_too(tiny_llama, batch):
    model = tiny_llama(packed=False).train()
    plain = model(batch["input_ids"]).logits
    with pytest.raises(RuntimeError, match="on purpose"), neftune(model, 5.0):
        raise RuntimeError("on purpose")
    assert torch.equal(model(batch["input_ids"]).logits, plain)
    assert not draws_noise(model)
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.model._forward_pre_hooks
    with neftune(model, 5.0):  # and it can be put on again
        assert draws_noise(model)


def test_twice_on_one_model_is_refused_and_the_first_stays(tiny_llama):
    model = tiny_llama().train()
    with neftune(model, 5.0):
        with pytest.raises(ValueError, match="on already"), neftune(model, 5.0):
            pass
        assert draws_noise(model)
    with pytest.raises(ValueError, match="alpha=-1"), neftune(model, -1):
        pass


def test_the_embedding_weight_is_never_touched_and_gets_the_clean_gradient(tiny_llama, batch):
    model = tiny_llama(packed=False).train()
    before = model.get_input_embeddings().weight.detach().clone()
    with neftune(model, 50.0):
        model(batch["input_ids"]).logits.square().mean().backward()
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert model.get_input_embeddings().weight.grad.norm() > 0


@pytest.mark.parametrize("side", ["right", "left"])
def test_true_lengths_come_from_the_attention_mask(tiny_llama, batch, side):
    model = tiny_llama(packed=False).train()
    mask = batch["attention_mask"] if side == "right" else batch["attention_mask"].flip(1)
    clean = model.get_input_embeddings()(batch["input_ids"])
    hook, seen = inner(model)
    with neftune(model, 5.0, true_lengths=True):
        model(input_ids=batch["input_ids"], attention_mask=mask)
    hook.remove()
    noise = seen[0] - clean
    assert torch.count_nonzero(noise[mask == 0]) == 0
    for row, real in zip(noise, mask.bool(), strict=True):
        bound = 5.0 / math.sqrt(int(real.sum()) * 32)
        assert 0.9 * bound < row[real].abs().max() <= bound * 1.00001


def test_packed_sequences_get_noise_by_their_own_lengths_and_share_no_prefix(tiny_llama, batch):
    model = tiny_llama().train()
    batch["input_ids"][:, :4] = batch["input_ids"][0, :4]
    assert packed_row(model, batch).prefix == 4
    hook, seen = inner(model)
    with neftune(model, 5.0):
        row = packed_row(model, batch)
        assert row.prefix == 0
        sft_loss(model, batch)
        with torch.no_grad():
            assert packed_row(model, batch).prefix == 4
    hook.remove()
    noise = (seen[-1] - model.get_input_embeddings()(row.ids))[0]
    for part, length in zip(noise.split([9, 6]), (9, 6), strict=True):
        bound = 5.0 / math.sqrt(length * 32)
        assert 0.9 * bound < part.abs().max() <= bound * 1.00001
    assert not torch.equal(noise[:4], noise[9:13])


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_replays_no_other_noise(tiny_llama, batch, reentrant):
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
            drawn(lambda model=model: sft_loss(model, batch)[0]).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


def test_a_run_with_alpha_zero_is_bitwise_the_baseline(tiny_llama, batch):
    losses = {}
    for alpha in (None, 0, 5.0):
        torch.manual_seed(0)
        model = add_adapters(tiny_llama(), AdapterConfig(rank=2, dropout=0.1))
        config = TrainConfig(steps=3, learning_rate=1e-2, progress=False)
        if alpha is None:
            losses[alpha] = train(model, lambda _: batch, sft_loss, config).losses
        else:
            with neftune(model, alpha):
                losses[alpha] = train(model, lambda _: batch, sft_loss, config).losses
    assert losses[0] == losses[None]
    assert losses[5.0] != losses[None]


def test_reference_log_probabilities_of_the_embedded_model_are_bitwise_the_same(embedded):
    from spark_ft import load_model

    model, tokenizer = load_model()
    rows = read_records(ROOT / "data/kitchen_tickets/test.jsonl", "sft")[:3]
    batch = collate_sft(rows, tokenizer)
    add_adapters(model, AdapterConfig(rank=4)).train()

    def reference():
        with torch.no_grad(), adapters_disabled(model):
            return sequence_logps(model, batch)[0]

    off = reference()
    with neftune(model, 5.0):
        assert torch.equal(reference(), off)
        noisy = sequence_logps(model, batch)[0]
    assert not torch.equal(noisy.detach(), off)
