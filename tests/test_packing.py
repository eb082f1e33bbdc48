"""A packed row computes what a padded batch does: hidden states and gradients, wherever the padding stood."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ft.methods.packing import pack, packed_attention

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)


def padded(lengths, side="right", seed=0):
    """Random token ids with padding; the pad tokens are random too, so that anything that reads them shows."""
    g = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 97, (len(lengths), width), generator=g)
    place = torch.arange(width).expand_as(ids)
    n = torch.tensor(lengths)[:, None]
    return ids, ((place < n) if side == "right" else (place >= width - n)).long()


def test_pack_by_hand():
    ids = torch.tensor([[7, 8, 0], [9, 0, 0], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    packed, positions, lengths = pack(ids, mask)
    assert packed.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert lengths == [2, 1, 3]


def test_pack_by_hand_with_the_padding_in_front():
    ids = torch.tensor([[0, 7, 8], [4, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    packed, positions, lengths = pack(ids, mask)
    assert packed.tolist() == [[7, 8, 4, 5, 6]]
    assert positions.tolist() == [[0, 1, 0, 1, 2]]
    assert lengths == [2, 3]


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, kv_heads=st.sampled_from([1, 2, 4]), scale=st.sampled_from([None, 0.3]))
def test_attention_is_the_softmax_formula_in_each_sequence(lengths, kv_heads, scale):
    total, heads, dim = sum(lengths), 4, 8
    g = torch.Generator().manual_seed(total)
    q, k, v = (torch.randn(1, n, total, dim, generator=g, dtype=torch.float64) for n in (heads, kv_heads, kv_heads))
    ours = packed_attention(q, k, v, lengths, scale)
    # the formula over the whole row, with a mask in place of the split
    owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = (owner[:, None] == owner) & torch.ones(total, total).tril().bool()
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    expected = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1) @ v
    assert torch.allclose(ours, expected, atol=1e-12)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def packed_and_padded(model, lengths, side):
    """Hidden states of the real tokens, and the gradients of all weights, in both ways."""
    ids, mask = padded(lengths, side)
    results = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            row, positions, sizes = pack(ids, mask)
            hidden = model.base_model(row, position_ids=positions, lengths=sizes, use_cache=False).last_hidden_state[0]
        else:
            # a padded model needs positions too where the padding stands in front
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            out = model.base_model(ids, attention_mask=mask, position_ids=positions, use_cache=False)
            hidden = out.last_hidden_state[mask.bool()]
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.base_model.parameters() if p.grad is not None])
        results.append((hidden.detach(), grads))
    return results


@settings(max_examples=12, deadline=None)
@given(lengths=LENGTHS, side=st.sampled_from(["right", "left"]), kv_heads=st.sampled_from([1, 2, 4]))
def test_a_packed_model_computes_what_a_padded_one_does(tiny_llama, lengths, side, kv_heads):
    model = tiny_llama(num_key_value_heads=kv_heads)
    (hidden, grads), (true_hidden, true_grads) = packed_and_padded(model, lengths, side)
    assert relative(hidden, true_hidden) < 1e-5
    assert relative(grads, true_grads) < 1e-5


def test_sequences_of_one_token_each(tiny_llama):
    (hidden, grads), (true_hidden, true_grads) = packed_and_padded(tiny_llama(), [1, 1, 1], "right")
    assert relative(hidden, true_hidden) < 1e-5
    assert relative(grads, true_grads) < 1e-5


def test_a_sequence_does_not_see_its_neighbours(tiny_llama):
    model = tiny_llama()
    ids, mask = padded([5, 7])
    with torch.no_grad():
        row, positions, lengths = pack(ids, mask)
        before = model.base_model(row, position_ids=positions, lengths=lengths).last_hidden_state[0]
        row[0, 2] = 3 + (row[0, 2] + 1) % 90  # another third token of the first sequence
        after = model.base_model(row, position_ids=positions, lengths=lengths).last_hidden_state[0]
    same = (before == after).all(-1).tolist()
    assert same == [True] * 2 + [False] * 3 + [True] * 7


def test_without_lengths_the_model_computes_what_transformers_does(tiny_llama):
    ids, mask = padded([4, 9])
    ours, theirs = tiny_llama(), tiny_llama(packed=False)
    with torch.no_grad():
        a, b = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, theirs))
        assert torch.equal(a, b)
        mine, hf = (m.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False) for m in (ours, theirs))
    assert torch.equal(mine, hf)


def test_the_packed_models_loss_is_transformers_own(tiny_llama):
    from spark_ft.data import completion_logps

    model = tiny_llama(packed=True)
    ids, mask = padded([6, 11, 2])
    labels = torch.where(mask.bool(), ids, -100)
    labels[1, :4] = -100
    logps, rows = completion_logps(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert rows.bincount().tolist() == [5, 7, 1]  # the first token of a row is never predicted
    theirs = tiny_llama(packed=False)(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert abs(-logps.mean() - theirs) < 1e-5 * theirs
    padded_logps, _ = completion_logps(tiny_llama(packed=False), {"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert torch.allclose(logps, padded_logps, atol=1e-5)
