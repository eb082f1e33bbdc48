"""A packed row computes what a padded batch does: hidden states and gradients, wherever the padding stood."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spark_ft.scoring import pack, packed_attention

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
    row = pack(ids, mask)
    assert row.ids.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert row.positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert (row.prefix, row.lengths) == (0, [2, 1, 3])
    assert row.places[mask.bool()].tolist() == [0, 1, 2, 3, 4, 5]


def test_pack_by_hand_with_the_padding_in_front():
    ids = torch.tensor([[0, 7, 8], [4, 5, 6]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    row = pack(ids, mask, share_prefix=True)  # nothing is shared where padding stands in front
    assert row.ids.tolist() == [[7, 8, 4, 5, 6]]
    assert row.positions.tolist() == [[0, 1, 0, 1, 2]]
    assert (row.prefix, row.lengths) == (0, [2, 3])


def test_a_shared_prefix_by_hand():
    ids = torch.tensor([[7, 8, 1, 2, 0], [7, 8, 1, 0, 0], [7, 8, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    row = pack(ids, mask, share_prefix=True)
    assert row.ids.tolist() == [[7, 8, 1, 2, 1, 5, 6, 7]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 2, 2, 3, 4]]
    assert (row.prefix, row.lengths) == (2, [2, 1, 3])
    assert [row.places[i][mask[i].bool()].tolist() for i in range(3)] == [
        [0, 1, 2, 3],
        [0, 1, 4],
        [0, 1, 5, 6, 7],
    ]


def test_equal_sequences_keep_a_token_of_their_own_and_one_alone_shares_nothing():
    twins = torch.tensor([[7, 8, 9], [7, 8, 9]])
    assert pack(twins, torch.ones_like(twins), share_prefix=True)[2:4] == (2, [1, 1])
    assert pack(twins[:1], torch.ones(1, 3, dtype=torch.long), share_prefix=True)[2:4] == (0, [3])


@settings(max_examples=40, deadline=None)
@given(
    lengths=LENGTHS,
    prefix=st.integers(0, 4),
    kv_heads=st.sampled_from([1, 2, 4]),
    scale=st.sampled_from([None, 0.3]),
)
def test_attention_is_the_softmax_formula_in_each_sequence(lengths, prefix, kv_heads, scale):
    total, heads, dim = prefix + sum(lengths), 4, 8
    g = torch.Generator().manual_seed(total)
    q, k, v = (
        torch.randn(1, n, total, dim, generator=g, dtype=torch.float64) for n in (heads, kv_heads, kv_heads)
    )
    ours = packed_attention(q, k, v, lengths, prefix, scale)
    # the formula over the whole row, with a mask in place of the split; −1 owns the prefix, which all may see
    owner = torch.cat(
        [torch.full((prefix,), -1), torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))]
    )
    allowed = ((owner[:, None] == owner) | (owner == -1)) & torch.ones(total, total).tril().bool()
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    expected = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1) @ v
    assert torch.allclose(ours, expected, atol=1e-12)


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def packed_and_padded(model, lengths, side, prefix=0):
    """Hidden states of the real tokens, and the gradients of all weights, in both ways."""
    ids, mask = padded(lengths, side)
    ids[:, :prefix] = ids[0, :prefix]
    results = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            row = pack(ids, mask, share_prefix=True)
            places = {"position_ids": row.positions, "lengths": row.lengths, "prefix": row.prefix}
            hidden = model.base_model(row.ids, **places, use_cache=False).last_hidden_state[0]
            hidden = hidden[row.places[mask.bool()]]
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


@settings(max_examples=12, deadline=None)
@given(lengths=st.lists(st.integers(5, 12), min_size=2, max_size=4), prefix=st.integers(1, 5))
def test_a_prefix_computed_once_gives_the_same_states_and_gradients(tiny_llama, lengths, prefix):
    model = tiny_llama()
    (hidden, grads), (true_hidden, true_grads) = packed_and_padded(model, lengths, "right", prefix)
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
        row = pack(ids, mask)
        places = {"position_ids": row.positions, "lengths": row.lengths}
        before = model.base_model(row.ids, **places).last_hidden_state[0]
        row.ids[0, 2] = 3 + (row.ids[0, 2] + 1) % 90  # another third token of the first sequence
        after = model.base_model(row.ids, **places).last_hidden_state[0]
    same = (before == after).all(-1).tolist()
    assert same == [True] * 2 + [False] * 3 + [True] * 7


def test_without_lengths_the_model_computes_what_transformers_does(tiny_llama):
    ids, mask = padded([4, 9])
    ours, theirs = tiny_llama(), tiny_llama(packed=False)
    with torch.no_grad():
        a, b = (model(input_ids=ids, attention_mask=mask).logits for model in (ours, theirs))
        assert torch.equal(a, b)
        mine, hf = (
            m.generate(input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
            for m in (ours, theirs)
        )
    assert torch.equal(mine, hf)


def test_the_packed_models_loss_is_transformers_own(tiny_llama):
    from spark_ft.scoring import completion_logps

    model = tiny_llama(packed=True)
    ids, mask = padded([6, 11, 2])
    labels = torch.where(mask.bool(), ids, -100)
    labels[1, :4] = -100
    logps, rows = completion_logps(model, {"input_ids": ids, "attention_mask": mask, "labels": labels})
    assert rows.bincount().tolist() == [5, 7, 1]  # the first token of a row is never predicted
    theirs = tiny_llama(packed=False)(input_ids=ids, attention_mask=mask, labels=labels).loss
    assert abs(-logps.mean() - theirs) < 1e-5 * theirs
    padded_logps, _ = completion_logps(
        tiny_llama(packed=False), {"input_ids": ids, "attention_mask": mask, "labels": labels}
    )
    assert torch.allclose(logps, padded_logps, atol=1e-5)


def test_a_shared_beginning_changes_no_loss_and_dropout_turns_sharing_off(tiny_llama):
    from spark_ft.adapters import AdapterConfig, add_adapters
    from spark_ft.scoring import completion_logps

    ids, mask = padded([6, 11, 4])
    ids[:, :3] = ids[0, :3]
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    seen = []
    for dropout in (0.0, 0.1):
        model = add_adapters(tiny_llama(), AdapterConfig(rank=2, dropout=dropout)).train()
        model.base_model.register_forward_pre_hook(lambda _, __, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
        logps, _ = completion_logps(model, batch)
        logps.sum().backward()
        plain, _ = completion_logps(tiny_llama(packed=False), batch)
        assert dropout or torch.allclose(
            logps, plain, atol=1e-5
        )  # B is zero, so the adapted model is the plain one
    assert seen == [21 - 2 * 3, 21]


def test_sequence_logps_of_a_side_are_those_of_its_rows_alone(embedded, tiny_llama):
    from spark_ft.data.batches import collate_preferences, collate_sft, with_prompt
    from spark_ft.scoring import sequence_logps

    tokenizer = embedded[1]
    model = tiny_llama(vocab_size=len(tokenizer))
    rows = [
        {"prompt": "Soup of the day?", "chosen": "Leek.", "rejected": "No."},
        {"prompt": "And a very long question about fish?", "chosen": "Cod, cod and cod.", "rejected": "A"},
    ]
    batch = collate_preferences(rows, tokenizer)
    for side in ("chosen", "rejected"):
        logps, counts = sequence_logps(model, with_prompt(batch, side))
        for i, row in enumerate(rows):
            alone = collate_sft([{"prompt": row["prompt"], "completion": row[side]}], tokenizer)
            expected, count = sequence_logps(model, alone)
            torch.testing.assert_close(logps[i], expected[0])
            assert counts[i] == count[0]
