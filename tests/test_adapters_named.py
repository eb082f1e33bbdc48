"""Several adapters by name on one model: any mix of them, switched exactly to the bit, and never confused."""

import copy

import pytest
import torch
from helpers import complains, tiny_llama

from spark_ft import (
    AdapterConfig,
    adapters_disabled,
    add_adapters,
    load_adapters,
    merge_adapters,
    save_adapters,
    use_adapter,
)
from spark_ft.adapters import adapted_layers
from spark_ft.experts import quantize_model

IDS = torch.tensor([[5, 17, 40, 8, 61, 3], [9, 9, 2, 70, 71, 1]])
MIX = {
    "kitchen": AdapterConfig(rank=4),
    "grams": AdapterConfig("dora", rank=2, alpha=6, targets=("q_proj", "down_proj")),
    "polite": AdapterConfig(rank=3, targets=("v_proj", "lm_head"), rslora=True),
}


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for seed, (name, config) in enumerate(MIX.items()):
        model = add_adapters(tiny_llama(), config)
        torch.manual_seed(seed)
        for layer in adapted_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1)
            if config.method == "dora":
                layer.magnitude.data.mul_(0.5 + torch.rand(layer.magnitude.shape))
                layer.forget_norm()
        made[name] = save_adapters(model, tmp_path_factory.mktemp(name))
    return made


@pytest.fixture
def three(folders):
    model = tiny_llama()
    for name, folder in folders.items():
        load_adapters(model, folder, name)
    return model


@pytest.mark.parametrize("base", [tiny_llama, lambda: quantize_model(tiny_llama())])
def test_each_of_three_adapters_and_none_computes_as_if_it_were_alone_bit_for_bit(base, folders):
    alone = {name: logits(load_adapters(base(), folder)) for name, folder in folders.items()}
    alone[None] = logits(base())
    model = base()
    for name, folder in folders.items():
        assert load_adapters(model, folder, name=name) is model
        assert torch.equal(logits(model), alone[name])  # the one that was loaded is in use
    order = torch.randint(4, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    for name in [[None, *folders][i] for i in order]:
        assert use_adapter(model, name) is model
        assert torch.equal(logits(model), alone[name])
        if name:
            assert model.adapter_config.rank == MIX[name].rank
            with adapters_disabled(model):
                assert torch.equal(logits(model), alone[None])
    values = list(alone.values())
    assert not any(torch.equal(values[i], values[j]) for i in range(4) for j in range(i))


def test_the_one_in_use_can_be_trained_and_saved_and_the_others_stay(three, folders, tmp_path):
    others = {name: logits(use_adapter(three, name)) for name in ("grams", "polite", None)}
    use_adapter(three, "kitchen").train()
    torch.nn.functional.cross_entropy(three(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    trained = [p for p in three.parameters() if p.grad is not None]
    assert len(trained) == 2 * len(adapted_layers(three))
    torch.optim.SGD(trained, 0.5).step()
    after = logits(three.eval())
    assert not torch.equal(after, logits(load_adapters(tiny_llama(), folders["kitchen"])))
    save_adapters(three, tmp_path)
    for name, before in others.items():
        assert torch.equal(logits(use_adapter(three, name)), before)
        assert not any(module.training for module in three.modules())  # eval() reached what is put on later
    assert torch.equal(logits(use_adapter(three, "kitchen")), after)
    load_adapters(three, tmp_path, "grams")  # the name gets the new adapter
    assert torch.equal(logits(three), after)
    assert torch.equal(logits(use_adapter(copy.deepcopy(three), "polite")), others["polite"])


def test_what_is_refused_leaves_the_model_with_the_adapter_that_was_in_use(three, folders, tmp_path):
    use_adapter(three, "grams")
    before = logits(three)
    with pytest.raises(FileNotFoundError, match="an adapter folder holds"):
        load_adapters(three, tmp_path, "missing")
    complains(
        (use_adapter, (three, "kichen"), 'no adapter is called "kichen"; there are kitchen, grams, polite'),
        (load_adapters, (three, folders["kitchen"]), "have names (kitchen, grams, polite)", "a name too"),
        (merge_adapters, (three,), "a merge would change the base under each"),
        (add_adapters, (use_adapter(copy.deepcopy(three), None), MIX["kitchen"]), "keeps adapters by name"),
        (use_adapter, (tiny_llama(), "kitchen"), "there are none; load_adapters(model, folder, name)"),
    )
    assert torch.equal(logits(three), before)
    nameless = load_adapters(tiny_llama(), folders["kitchen"])
    complains(
        (use_adapter, (nameless, None), "an adapter without a name"),
        (load_adapters, (nameless, folders["grams"], "grams"), "an adapter without a name"),
    )
    assert torch.equal(logits(nameless), logits(load_adapters(tiny_llama(), folders["kitchen"])))
    for layer in adapted_layers(three).values():
        layer.merge()
    complains((use_adapter, (three, None), "the adapter is merged; unmerge() it first"))


def test_a_single_named_adapter_merges_and_leaves_a_plain_model(folders):
    model = load_adapters(tiny_llama(), folders["grams"], "grams")
    expected = logits(model)
    assert torch.allclose(logits(merge_adapters(model)), expected, atol=1e-4)
    use_adapter(model, None)
    complains((use_adapter, (model, "grams"), "no adapter is called"))
    add_adapters(model, MIX["kitchen"])
