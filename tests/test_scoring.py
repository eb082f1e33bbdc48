"""The loss is the model's own, for every kind of model; a packed row computes what a padded batch does."""

import copy
import math

import pytest
import torch
from helpers import pair_batch, tiny_llama, tiny_model, token_batch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, LlamaForCausalLM

from spark_ft import AdapterConfig, adapters_disabled, add_adapters, collate_preferences, neftune, with_prompt
from spark_ft import scoring as sc
from spark_ft.scoring import completion_logps, head_path, pack, sequence_logps, sft_loss

LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=5)
OWN_HEAD = {  # what these kinds do to the logits after the head: scale, cap, or both
    "cohere", "cohere2", "falcon_h1", "gemma2", "gemma4", "gemma4_text", "granite", "granitemoe",
    "hyperclovax", "nanochat", "recurrent_gemma", "xlstm",
}  # fmt: skip
PLAIN_HEAD = {
    "bloom", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "gptj", "jamba", "llama", "llama4_text", "mamba",
    "mixtral", "olmo2", "opt", "phi3", "qwen3_moe", "stablelm",
}  # fmt: skip


def loud(kind, **changes):
    """A tiny model whose logits are so large that a soft cap acts on them."""
    model = tiny_model(kind, **changes)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() > 1 else 1)
    return model


def check_own(model, batch, tolerance=1e-4, **inputs):
    """The loss and all gradients are those of the model's own forward."""
    found = []
    for total, count in (sft_loss(model, batch), (model(**batch, **inputs, use_cache=False).loss, 1)):
        model.zero_grad()
        (total / count).backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append(((total / count).item(), grads))
    (ours, our_grads), (theirs, their_grads) = found
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert (our_grads - their_grads).norm() < tolerance * their_grads.norm()


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations put out while it is on."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(x.shape) for x in tree_leaves(out) if isinstance(x, torch.Tensor)}
        return out


@pytest.mark.parametrize("kind", sorted(OWN_HEAD | PLAIN_HEAD))
def test_loss_and_gradient_are_the_models_own(kind):
    model = loud(kind)
    check_own(model, token_batch())
    assert head_path(model) == ("own" if kind in OWN_HEAD else "head")


@pytest.mark.parametrize("kind", ["qwen2", "gemma2"])
def test_a_frozen_head_and_an_adapted_one_give_the_models_own_gradient(kind):
    model = loud(kind).requires_grad_(False)
    model.model.layers[0].mlp.down_proj.requires_grad_(True)
    check_own(model, token_batch())
    add_adapters(model, AdapterConfig(rank=2, targets=("lm_head",)))
    torch.nn.init.normal_(model.lm_head.lora_B)
    check_own(model, token_batch())


def test_a_soft_cap_that_small_logits_hide_is_found():
    model = tiny_model("gemma2", final_logit_softcapping=50.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)
        assert model(**token_batch()).logits.abs().max() < 0.01
    assert head_path(model) == "own"


def test_the_head_is_compared_once_and_again_when_it_or_a_number_of_the_config_changed():
    model, passes = tiny_model("gemma2"), []
    model.base_model.register_forward_pre_hook(lambda *_: passes.append(1))
    first = head_path(model)
    compared = len(passes)
    assert first == head_path(model) == head_path(copy.deepcopy(model)) == "own"
    assert len(passes) == compared
    for cap, path in ((None, "head"), (2.0, "own")):
        model.config.final_logit_softcapping = cap
        check_own(model, token_batch())
        assert head_path(model) == path
    add_adapters(model, AdapterConfig(rank=2, targets=("lm_head",)))
    passes.clear()
    assert head_path(model) == "own"
    assert len(passes) == compared


def test_the_comparison_disturbs_nothing():
    model = add_adapters(tiny_model("gemma2"), AdapterConfig(rank=2, dropout=0.5)).train()
    model.model.layers[1].eval()  # a user's choice

    def state():
        modules = [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
        grads = [p.grad for p in model.parameters()]
        return modules, grads, torch.is_grad_enabled(), torch.get_rng_state().tolist()

    with neftune(model, 5.0):
        before = state()
        head_path(model)
        assert state() == before


def test_a_model_without_numbers_keeps_the_answer_of_its_original():
    model, batch = tiny_model("gemma2"), token_batch()
    inputs, *integers = sc.prepare(model, batch)
    mode = FakeTensorMode()
    fakes = {id(x): mode.from_tensor(x) for x in [*model.parameters(), *model.buffers()]}
    with pytest.raises(RuntimeError, match="ask head_path of the real model"):
        head_path(copy.deepcopy(model, dict(fakes)))
    head_path(model)
    copied = copy.deepcopy(model, fakes)
    inputs = {name: mode.from_tensor(x) for name, x in inputs.items()}
    prepared = type(sc.prepare(model, batch))(inputs, *map(mode.from_tensor, integers))
    with mode:
        shapes = [x.shape for x in (*completion_logps(copied, prepared), *sequence_logps(copied, prepared))]
    assert shapes == [x.shape for x in (*completion_logps(model, batch), *sequence_logps(model, batch))]
    assert sft_loss(model, sc.prepare(model, batch)) == sft_loss(model, batch)


class Remembering(LlamaForCausalLM):
    """Its logits depend on more than the hidden states."""

    def forward(self, input_ids, **kwargs):
        out = super().forward(input_ids, **kwargs)
        out.logits = out.logits + input_ids[..., None]
        return out


def test_a_model_whose_logits_cannot_be_reproduced_is_refused_with_the_mend():
    config = tiny_llama(packed=False).config
    with pytest.raises(ValueError, match=r"logits of Remembering do not follow .* give `train` its own loss"):
        sft_loss(Remembering(config), token_batch())
    tiny = tiny_llama(vocab_size=3, pad_token_id=None)  # fewer than the tokens compared, and not numbers
    torch.nn.init.constant_(tiny.model.norm.weight, torch.nan)
    assert head_path(tiny) == "head"
    for other in (AutoModel.from_config(config), torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match=f"{type(other).__name__} is no causal language model"):
            sft_loss(other, token_batch())


def test_sequence_logps_are_those_of_each_row_alone_and_nothing_without_a_completion(embedded):
    model = tiny_llama(vocab_size=len(embedded[1]))
    first = {"prompt": "Soup of the day?", "chosen": "Leek.", "rejected": "No."}
    second = {"prompt": "And a long question about fish?", "chosen": "Cod, cod and cod.", "rejected": "A"}
    for side in ("chosen", "rejected"):
        groups = ([first, second], [first], [second])
        whole, *alone = (with_prompt(collate_preferences(rows, embedded[1]), side) for rows in groups)
        logps, counts = sequence_logps(model, whole)
        for i, batch in enumerate(alone):
            tokens, _ = completion_logps(model, batch)
            assert counts[i] == len(tokens)
            torch.testing.assert_close(logps[i], tokens.sum())
    batch = token_batch()
    batch["labels"][1] = -100
    for model in (tiny_llama(), tiny_model("gemma2")):
        logps, counts = sequence_logps(model, batch)
        assert logps[1] == counts[1] == 0 < counts[0]
        nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
        assert sft_loss(model, nothing) == (0, 0)


def padded(lengths, side="right", prefix=0, seed=0):
    """Random ids with a common beginning; the padding's ids are random too, so that reading them shows."""
    g = torch.Generator().manual_seed(seed)
    width = max(lengths)
    ids = torch.randint(3, 96, (len(lengths), width), generator=g)
    ids[:, :prefix] = ids[0, :prefix].clone()
    place = torch.arange(width).expand_as(ids)
    n = torch.tensor(lengths)[:, None]
    return ids, ((place < n) if side == "right" else (place >= width - n)).long()


def learned(ids, mask, first=2):
    """A batch that learns the tokens from the `first` of each sequence on."""
    labels = torch.where(mask.bool() & (mask.cumsum(1) > first), ids, -100)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_pack_and_a_shared_prefix_by_hand():
    ids = torch.tensor([[7, 8, 0], [9, 0, 0], [4, 5, 6]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    row = pack(ids, mask)
    assert row.ids.tolist() == [[7, 8, 9, 4, 5, 6]]
    assert row.positions.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert (row.prefix, row.lengths) == (0, [2, 1, 3])
    assert row.places[mask.bool()].tolist() == [0, 1, 2, 3, 4, 5]
    # with the padding in front nothing is shared
    row = pack(torch.tensor([[0, 7, 8], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]]), share_prefix=True)
    assert (row.ids.tolist(), row.positions.tolist()) == ([[7, 8, 4, 5, 6]], [[0, 1, 0, 1, 2]])
    assert (row.prefix, row.lengths) == (0, [2, 3])
    ids = torch.tensor([[7, 8, 1, 2, 0], [7, 8, 1, 0, 0], [7, 8, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    row = pack(ids, mask, share_prefix=True)
    assert row.ids.tolist() == [[7, 8, 1, 2, 1, 5, 6, 7]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 2, 2, 3, 4]]
    assert (row.prefix, row.lengths, row.groups) == (2, [2, 1, 3], [(0, 2), (0, 1), (0, 3)])
    places = [row.places[i][mask[i].bool()].tolist() for i in range(3)]
    assert places == [[0, 1, 2, 3], [0, 1, 4], [0, 1, 5, 6, 7]]
    # equal sequences keep a token of their own each, and one alone shares nothing
    twins = torch.tensor([[7, 8, 9], [7, 8, 9]])
    assert pack(twins, torch.ones_like(twins), share_prefix=True)[2:4] == (2, [(0, 1), (0, 1)])
    assert pack(twins[:1], torch.ones_like(twins[:1]), share_prefix=True)[2:4] == (0, [(0, 3)])


@given(LENGTHS, st.integers(0, 4), st.sampled_from([1, 2, 4]), st.sampled_from([None, 0.3]))
def test_attention_is_the_softmax_formula_in_each_sequence(lengths, prefix, kv_heads, scale):
    total, heads, dim = prefix + sum(lengths), 4, 8
    g = torch.Generator().manual_seed(total)
    sizes = [(1, n, total, dim) for n in (heads, kv_heads, kv_heads)]
    q, k, v = (torch.randn(size, generator=g, dtype=torch.float64) for size in sizes)
    masks = sc.Packed(torch.empty(1, total), None, prefix, [(0, n) for n in lengths], None).masks()
    ours = sc.packed_attention(q, k, v, lengths, prefix, masks, scale)
    # the formula over the whole row, with a mask in place of the split; −1 owns the prefix, which all may see
    owner = torch.tensor([-1] * prefix + [i for i, n in enumerate(lengths) for _ in range(n)])
    allowed = ((owner[:, None] == owner) | (owner == -1)) & torch.ones(total, total).tril().bool()
    k, v = (x.repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (dim**-0.5 if scale is None else scale)
    expected = torch.softmax(scores.masked_fill(~allowed, -torch.inf), -1) @ v
    assert torch.allclose(ours, expected, atol=1e-12)


def positions(batch):
    """By sequence; transformers counts from the padding's start unless it is told."""
    return (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)


@settings(max_examples=15)
@given(LENGTHS, st.integers(0, 5), st.sampled_from(["right", "left"]), st.sampled_from([1, 2, 4]))
@example([2, 2, 2], 0, "right", 2)
def test_a_packed_model_computes_what_transformers_does(lengths, prefix, side, kv_heads):
    batch = learned(*padded([n + 1 for n in lengths], side, prefix), first=1)
    check_own(tiny_llama(num_key_value_heads=kv_heads), batch, 1e-5, position_ids=positions(batch))


@pytest.mark.parametrize("kind", sc.PACKED_KINDS)
def test_a_kind_that_takes_packed_rows_gives_its_own_loss_and_gradient(kind):
    model = tiny_model(kind, sliding_window=None, num_hidden_layers=4)
    assert sc.takes_packed_rows(model.config)
    sc.use_packed_attention(model)
    model.requires_grad_(False).model.layers.requires_grad_(True)
    for side, prefix in (("right", 0), ("right", 3), ("left", 0)):
        batch = learned(*padded([6, 11, 4], side, prefix))
        assert sc.packed_row(model, batch).prefix == prefix
        check_own(model, batch, 1e-5, position_ids=positions(batch))


def test_what_has_windows_randomness_or_no_lengths_is_not_packed_but_computed_as_before():
    windowed = tiny_model("mistral")
    for model in (windowed, tiny_llama(attention_dropout=0.1), tiny_model("gemma2")):
        assert not sc.takes_packed_rows(model.config)
    ids, mask = padded([4, 9])
    packed, plain = tiny_llama(), tiny_llama(packed=False)
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=ids, attention_mask=mask).logits for model in (packed, plain)))
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False}
    assert torch.equal(*(model.generate(input_ids=ids, **settings) for model in (packed, plain)))


def test_no_step_makes_a_mask_of_all_tokens_by_all_or_the_logits_of_all():
    batch = learned(*padded([30, 41, 25], prefix=4))
    model = add_adapters(tiny_llama(), AdapterConfig(rank=2)).train()
    head_path(model)
    tokens = sc.packed_row(model, batch).ids.numel()
    with Shapes() as shapes:
        sft_loss(model, batch)[0].backward()
    assert (1, 4, tokens, 8) in shapes.seen  # it sees the queries, so it would see a mask
    assert not [shape for shape in shapes.seen if shape[-2:] == (tokens, tokens)]
    model, batch = tiny_model("gemma2", vocab_size=101), token_batch(rows=16, length=80)
    model.requires_grad_(False).model.layers[0].mlp.down_proj.requires_grad_(True)
    head_path(model)
    with Shapes() as shapes:
        total, count = sft_loss(model, batch)
        total.backward()
    largest = max(math.prod(shape[:-1]) for shape in shapes.seen if shape[-1:] == (101,))
    assert largest <= 128 < count


def test_nothing_is_shared_where_something_random_acts():
    batch = learned(*padded([6, 11, 4], prefix=3))

    def prefix(model):
        return sc.packed_row(model, batch).prefix

    model = add_adapters(tiny_llama(), AdapterConfig(rank=2, dropout=0.1))
    assert (prefix(model.train()), prefix(model.eval())) == (0, 3)
    model = add_adapters(tiny_llama(), AdapterConfig(rank=2)).train()
    assert prefix(model) == 3
    with neftune(model, 5.0):
        assert prefix(model) == 0
        with adapters_disabled(model):
            assert prefix(model) == 3
    model.model.norm = torch.nn.Sequential(model.model.norm, torch.nn.Dropout(0.1)).train()
    assert prefix(model) == 0


# --- pairs: a prompt is computed once for both answers ----------------------------------------------------
def test_a_row_of_pairs_by_hand():
    ids = torch.tensor([[7, 8, 1, 2, 0], [7, 8, 3, 0, 0], [7, 5, 6, 4, 4], [7, 5, 6, 4, 9]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    row = pack(ids, mask, share_prefix=True, together=2)
    # 7 belongs to all; 8 to the first pair, 5 6 4 to the second; then each sequence's own
    assert row.ids.tolist() == [[7, 8, 1, 2, 3, 5, 6, 4, 4, 9]]
    assert row.positions.tolist() == [[0, 1, 2, 3, 2, 1, 2, 3, 4, 4]]
    assert (row.prefix, row.groups, row.lengths) == (1, [(1, 2, 1), (3, 1, 1)], [4, 5])
    places = [row.places[i][mask[i].bool()].tolist() for i in range(4)]
    assert places == [[0, 1, 2, 3], [0, 1, 4], [0, 5, 6, 7, 8], [0, 5, 6, 7, 9]]
    first, second = (mask.int().tolist() for mask in row.masks())
    assert first == [[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    assert second[3:] == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]
    alone = pack(ids[:2], mask[:2], share_prefix=True, together=2)  # all that one pair shares is the prefix
    assert (alone.ids.tolist(), alone.prefix, alone.groups) == ([[7, 8, 1, 2, 3]], 2, [(0, 2, 1)])


PAIR_MODELS = {}


def pair_model(kind, attention):
    """A model with adapters; "packed" computes a row of pairs."""
    if (kind, attention) not in PAIR_MODELS:
        model = tiny_model(kind).double()  # transformers still turns positions and norms in fp32
        if attention == "packed":
            sc.use_packed_attention(model)
        else:
            model.set_attn_implementation(attention)
        torch.manual_seed(0)
        add_adapters(model, AdapterConfig(rank=2))
        for name, weight in model.named_parameters():
            if name.endswith("lora_B"):
                torch.nn.init.normal_(weight, std=0.2)
        PAIR_MODELS[kind, attention] = model
    return PAIR_MODELS[kind, attention]


ANSWER = st.integers(1, 12)
ANSWERS = st.lists(st.tuples(st.integers(1, 14), ANSWER, ANSWER), min_size=1, max_size=4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@settings(max_examples=6)
@given(ANSWERS, st.integers(0, 4), st.integers(0, 99))
@example([(3, 1, 1)], 0, 0)
@example([(2, 1, 9), (11, 9, 1), (1, 4, 4)], 1, 0)
def test_a_row_of_pairs_gives_the_log_probabilities_and_gradient_of_plain_rows(
    kind, attention, lengths, shared, seed
):
    prompts, chosen, rejected = zip(*lengths, strict=True)
    batch = pair_batch(prompts, chosen, rejected, min(shared, *prompts), seed)
    found = []
    for model in (pair_model(kind, "packed"), pair_model(kind, attention)):
        model.zero_grad()
        logps, counts, nll = sc.answer_logps(model, batch, ("chosen", "rejected"), prompts=True)
        assert counts.tolist() == [list(chosen), list(rejected)]
        (logps * logps.new_tensor([[1.0], [-0.7]]) + 0.3 * nll).sum().backward()
        grads = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
        found.append([logps.detach().flatten(), nll.detach(), torch.cat(grads)])
    # eager's softmax is in fp32 whatever comes in, and these random models magnify its rounding
    for ours, theirs, most in zip(*found, (1e-5, 1e-5, 1e-4 if attention == "eager" else 1e-5), strict=True):
        assert (ours - theirs).norm() <= most * theirs.norm()


def test_prompts_are_scored_apart_from_answers():
    model, batch = tiny_llama(), pair_batch()
    logps, _, prompts = sc.answer_logps(model, batch, ("chosen", "rejected"), prompts=True)
    rows = with_prompt(batch, "chosen")
    rows["labels"] = torch.where(rows["attention_mask"] > 0, rows["input_ids"], -100)
    whole, counts = sequence_logps(model, rows)
    torch.testing.assert_close(prompts + logps[0], whole)
    assert counts.tolist() == [5, 12, 12]
    torch.testing.assert_close(sc.pair_logps(model, batch)[0], logps)


def test_rejected_does_not_see_chosen():
    model, batch = pair_model("llama", "packed"), pair_batch()
    other = {**batch, "chosen_ids": batch["chosen_ids"].roll(1, 1)}
    (chosen, rejected), (moved, still) = (sc.pair_logps(model, x)[0] for x in (batch, other))
    assert torch.equal(rejected, still)
    assert not torch.allclose(chosen[1:], moved[1:], atol=1e-3)


def test_a_pairs_prompt_is_not_shared_where_dropout_acts():
    model = add_adapters(tiny_llama(), AdapterConfig(rank=2, dropout=0.1)).train()
    rows = with_prompt(pair_batch(), "chosen", "rejected")
    assert sc.packed_row(model, rows, together=2).groups == [(0, n) for n in rows["attention_mask"].sum(1)]
    # the first pair's answers begin with the same token: that one is shared too, and no other is left
    assert sc.packed_row(model.eval(), rows, together=2).groups == [(3, 0, 4), (6, 4, 3), (3, 7, 1)]
