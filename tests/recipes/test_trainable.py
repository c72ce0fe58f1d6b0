"""Groups of modules by attribute, LoRA's targets, learning rates a group, and the check of the first gradients."""

import copy

import pytest
import torch
from torch import nn

from seecal import CALConfig
from seecal.families.module_groups import GROUPS, group_of, module_groups
from seecal.recipes.stage_trainer import StageTrainer
from seecal.recipes.trainable import LoraSettings, prepare, split_by_learning_rate, trainable_tree
from seecal.trainer.callbacks import GradientCheck
from tests.support.builders import FAMILIES, Row, batch_of, build
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor
from tests.support.zoo_models import ZOO


def trainable(model):
    return {name for name, one in model.named_parameters() if one.requires_grad}


def test_groups_are_attributes_of_the_model():
    expected = {
        "projector": ("model.multi_modal_projector",),
        "language_model": ("model.language_model", "lm_head"),
        "vision_tower": ("model.vision_tower",),
        "lm_head": ("lm_head",),
    }
    assert module_groups(build("llava")[0]) == expected
    expected["image_newline"] = ("model.image_newline",)
    expected["language_model"] += ("model.image_newline",)
    assert module_groups(build("llava_next")[0]) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_llavas_has_a_group(family):
    model, *_ = build(family)
    prepared = prepare(model, ["projector", "language_model", "vision_tower"])
    assert set(prepared.groups) == trainable(model)
    assert set(prepared.groups) | set(prepared.unused) == {name for name, _ in model.named_parameters()}
    assert prepared.unused, "the end of the tower is not read"
    assert all("vision_tower" in name for name in prepared.unused)


@pytest.mark.parametrize("family", FAMILIES)
def test_unused_tensors_are_those_without_a_gradient(family):
    """LLaVA reads the tower's last layer but one, OneVision the last."""
    model, tokens, pixels = build(family)
    unused = set(prepare(model, ["vision_tower"]).unused)
    model.requires_grad_(True)
    model(**batch_of([Row([2, "image", -4])], tokens, pixels)).loss.backward()
    without = {name for name, one in model.named_parameters() if one.grad is None}
    assert without == unused


@pytest.mark.parametrize("name", ZOO)
def test_every_family_has_its_groups_and_takes_lora(name):
    model = ZOO[name].model()
    groups = module_groups(model)
    newline = {"image_newline"} & set(groups)
    assert bool(newline) == any(one.endswith("image_newline") for one, _ in model.named_parameters())
    assert set(groups) == set(GROUPS) - {"lora", "image_newline"} | newline
    assert all(group_of(one, groups, groups) for one, _ in model.named_parameters())
    prepared = prepare(model, ["projector", "lora"])
    assert set(prepared.groups) == trainable(prepared.model)
    assert set(prepared.groups.values()) == {"projector", "lora"}
    decoder = groups["language_model"][0]
    assert all(f".{decoder}." in one for one, group in prepared.groups.items() if group == "lora")


def test_what_is_in_another_group_stays_out():
    """Qwen keeps its projector inside the tower: training `visual` leaves `visual.merger` alone."""
    groups = {"projector": ("model.visual.merger",), "vision_tower": ("model.visual",), "language_model": ("model.lm",)}
    assert group_of("model.visual.merger.mlp.weight", groups, ["vision_tower"]) is None
    assert group_of("model.visual.merger.mlp.weight", groups, ["vision_tower", "projector"]) == "projector"
    assert group_of("model.visual.merger_norm.weight", groups, ["vision_tower"]) == "vision_tower"
    assert group_of("model.other.weight", groups, ["vision_tower"]) is None


@pytest.mark.parametrize("tied", [False, True])
def test_the_word_table_stays_frozen_and_so_does_a_head_that_is_tied_to_it(tied):
    model, *_ = build("llava", tied=tied)
    train = ["projector", "language_model"]
    everything = set(prepare(model, train).groups)
    trained = set(prepare(model, train, freeze=["embeddings"]).groups)
    assert everything - trained == {"model.language_model.embed_tokens.weight"}
    assert trained == trainable(model)
    assert model.get_output_embeddings().weight.requires_grad is not tied


def test_the_lm_head_alone_or_at_its_own_rate():
    model, *_ = build("llava")
    assert set(prepare(model, ["lm_head"]).groups.values()) == {"lm_head"}
    assert trainable(model) == {"lm_head.weight"}
    both = prepare(model, ["language_model", "lm_head"]).groups
    assert both["lm_head.weight"] == "lm_head"
    assert both["model.language_model.norm.weight"] == "language_model"
    assert prepare(model, ["language_model"]).groups["lm_head.weight"] == "language_model"


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_the_newline_goes_with_the_language_model_or_alone(family):
    """As in the paper's code, where it is a parameter of the language model: frozen while the projector alone trains."""
    model, name = build(family)[0], "model.image_newline"
    assert name not in prepare(model, ["projector"]).groups
    assert prepare(model, ["projector", "language_model"]).groups[name] == "language_model"
    assert prepare(model, ["projector", "image_newline", "language_model"]).groups[name] == "image_newline"
    assert prepare(model, ["image_newline"]).groups == {name: "image_newline"}
    with pytest.raises(ValueError, match="has no image_newline that seecal knows"):
        prepare(build("llava")[0], ["image_newline"])


def test_lora_stays_in_the_language_model_unless_asked():
    prepared = prepare(build("llava")[0], ["projector", "lora"], LoraSettings(r=2))
    assert set(prepared.groups) == trainable(prepared.model)
    assert set(prepared.groups.values()) == {"projector", "lora"}
    adapters = {name for name, group in prepared.groups.items() if group == "lora"}
    assert len(adapters) == 3 * 7 * 2  # layers x linear layers x (A, B)
    assert all(".language_model.layers." in name for name in adapters)
    asked = prepare(build("llava")[0], ["lora"], LoraSettings(r=2, target=["language_model", "vision_tower"]))
    tower = {name for name in asked.groups if "vision_tower" in name}
    assert len(tower) == 6 * 2  # the one layer that is read
    assert set(asked.groups.values()) == {"lora"}


def test_a_single_parameter_beside_lora_is_said_to_stay_frozen(caplog):
    prepare(build("llava_next")[0], ["projector", "lora"])
    assert "image_newline" not in caplog.text, "nobody asked for it"
    prepared = prepare(build("llava_next")[0], ["projector", "image_newline", "lora"])
    assert "image_newline" in caplog.text
    assert not any("image_newline" in name for name in prepared.groups)


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (["connector"], {}, "no group is called 'connector'"),
        ([], {}, "train is empty"),
        (["lora", "language_model"], {}, "lora and language_model"),
        (["lm_head"], {"tied": True}, "tied to the input embeddings"),
    ],
)
def test_what_is_refused(train, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(build("llava", **options)[0], train)


def test_a_group_that_the_model_has_not_lists_its_modules():
    model, *_ = build("llava")
    model.model.bridge = model.model.multi_modal_projector
    del model.model.multi_modal_projector
    with pytest.raises(ValueError, match=r"has no projector .* top modules are bridge, language_model"):
        prepare(model, ["projector"])


def test_adapters_on_adapters_are_refused():
    adapted = prepare(build("llava")[0], ["lora"]).model
    with pytest.raises(ValueError, match="already carries adapters"):
        prepare(adapted.get_base_model(), ["lora"])


@pytest.mark.parametrize("changes", [{"r": 0}, {"dropout": 1.0}, {"target": "lm_head"}])
def test_lora_settings_out_of_range(changes):
    with pytest.raises(ValueError, match=r"lora\.(r|dropout|target)="):
        LoraSettings(**changes)


def test_the_tree_names_groups_parameters_and_rates():
    prepared = prepare(build("llava")[0], ["projector", "vision_tower"])
    tree = trainable_tree(prepared, 1e-3, {"vision_tower": 2e-6}).splitlines()
    assert tree[0].split() == ["projector", "6,272", "parameters", "in", "4", "tensors", "learning", "rate", "0.001"]
    assert tree[1].endswith("learning rate 2e-06")
    assert tree[2].split()[0] == "frozen"
    assert "no image feature depends on them" in tree[3]


def test_rates_split_the_optimizers_groups():
    model, *_ = build("llava")
    groups = prepare(model, ["projector", "language_model", "vision_tower"]).groups
    named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(
        [
            {"params": [one for _, one in named if one.ndim > 1], "weight_decay": 0.1},
            {"params": [one for _, one in named if one.ndim == 1], "weight_decay": 0.0},
        ],
        lr=1e-3,
    )
    split_by_learning_rate(optimizer, model, groups, {"vision_tower": 2e-6})
    rate = {id(p): (one["lr"], one["weight_decay"]) for one in optimizer.param_groups for p in one["params"]}
    for name, one in named:
        expected = 2e-6 if name.startswith("model.vision_tower") else 1e-3
        assert rate[id(one)] == (expected, 0.1 if one.ndim > 1 else 0.0), name
    assert optimizer.param_groups[0]["lr"] == 1e-3, "the one that Trainer logs"
    with pytest.raises(ValueError, match="lora does not train here"):
        split_by_learning_rate(optimizer, model, groups, {"lora": 1e-4})
    wrapped = nn.ModuleDict({"module": model})  # as DDP names parameters
    again = torch.optim.SGD([one for _, one in named], lr=1e-3)
    split_by_learning_rate(again, wrapped, groups, {"vision_tower": 2e-6})
    assert sorted(one["lr"] for one in again.param_groups) == [2e-6, 1e-3]


# ---- in training ----


def trainer(folder, prepared, rates=(), **changes):
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
    }
    return StageTrainer(
        prepared.model,
        CALConfig(str(folder), **{**settings, **changes}),
        train_dataset=tiny_dataset(16),
        processing_class=tiny_llava_processor(),
        callbacks=[GradientCheck()],
        groups=prepared.groups,
        learning_rates=dict(rates),
    )


def test_a_groups_rate_is_the_one_it_trains_at(tmp_path):
    """One SGD step: the weights move by rate x gradient, so a hundredth of the rate moves them a hundredth."""
    moved = []
    for rates in ({}, {"projector": 1e-5}):
        model = tiny_llava()
        before = copy.deepcopy(model.state_dict())
        trainer(tmp_path, prepare(model, ["projector", "language_model"]), rates, max_steps=1).train()
        moved.append({name: one - before[name] for name, one in model.state_dict().items()})
    name = "model.multi_modal_projector.linear_1.weight"
    torch.testing.assert_close(moved[1][name] * 100, moved[0][name], rtol=0.05, atol=1e-5)
    assert torch.equal(moved[0]["lm_head.weight"], moved[1]["lm_head.weight"])


def test_a_tensor_without_a_gradient_is_named_before_the_first_step(tmp_path):
    prepared = prepare(tiny_llava(), ["projector", "language_model"])
    for name in prepare(tiny_llava(), ["vision_tower"]).unused[:2]:
        prepared.model.get_parameter(name).requires_grad_(True)
    before = prepared.model.lm_head.weight.clone()
    with pytest.raises(
        ValueError, match=r"step 1: 2 trainable tensors got no gradient: model.vision_tower.*check_grad"
    ):
        trainer(tmp_path, prepared).train()
    assert torch.equal(prepared.model.lm_head.weight, before)


def test_a_step_without_images_is_not_judged(tmp_path, caplog):
    this = trainer(tmp_path, prepare(tiny_llava(), ["projector", "language_model"]), per_device_train_batch_size=1)
    rows = [index for index in range(16) if index % 5 == 4]  # text only
    this.train_dataset = this.train_dataset.select(rows)
    this.train()
    assert "no step had an image" in caplog.text
