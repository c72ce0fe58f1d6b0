"""A frozen vision tower runs once a step, forwards; what trains has the gradients that it had."""

import contextlib
import copy

import pytest
import torch
from peft import LoraConfig
from torch import nn

from seecal import CALTrainer, enable_cal
from seecal.families.module_groups import group_of, module_groups
from seecal.trainer import cal_trainer
from seecal.trainer.frozen_tower import forward_only
from tests.support import zoo
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor


def in_tower(model):
    groups = module_groups(model)
    return [name for name, _ in model.named_parameters() if group_of(name, groups, groups) == "vision_tower"]


def step_of(name, around, trained=()):
    """(gradients by name, how often an inner layer of the tower ran) in a step with gradient checkpointing."""
    model = copy.deepcopy(zoo.model_of(name)).train()
    frozen = set(in_tower(model)) - {one for one in in_tower(model) if any(part in one for part in trained)}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter_name not in frozen)
    model.gradient_checkpointing_enable()
    paths = [one.rpartition(".")[0] for one in in_tower(model) if ".layers.0." in one or ".blocks.0." in one]
    inner = next(one for path in paths if isinstance(one := model.get_submodule(path), nn.Linear))
    calls = []
    inner.register_forward_hook(lambda *_: calls.append(1))
    enable_cal(model)
    with around(model):
        model(**zoo.batch_of(name, zoo.rows_for(name))).loss.backward()
    return {key: value.grad for key, value in model.named_parameters() if value.grad is not None}, len(calls)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_vl", "mgm", "idefics3"])
def test_once_forwards_and_the_same_gradients(name):
    before, twice = step_of(name, contextlib.nullcontext)
    after, once = step_of(name, forward_only)
    assert (twice, once) == (2, 1)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert not any(key.startswith(tuple(in_tower(zoo.model_of(name)))) for key in after)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_a_tower_of_which_a_part_trains_is_left_as_it_is(name):
    parts = ("embeddings", "patch_embed")
    before, _ = step_of(name, contextlib.nullcontext, parts)
    after, _ = step_of(name, forward_only, parts)
    assert any(part in key for key in after for part in parts)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("adapters", [None, "all-linear", r".*language_model.*(q_proj|v_proj)"])
def test_in_a_training(tmp_path, monkeypatch, adapters):
    """The same steps with and without; with adapters in the tower, their gradients too."""

    def trained(folder):
        model = tiny_llava()
        tower = model.model.vision_tower.requires_grad_(False)
        calls = []
        tower.encoder.layers[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
        args = sgd_config(tmp_path / folder, 4, 1, gradient_checkpointing=True, max_steps=2)
        lora = LoraConfig(r=2, target_modules=adapters, init_lora_weights=False) if adapters else None
        torch.manual_seed(0)
        data = {"train_dataset": tiny_dataset(8), "processing_class": tiny_llava_processor()}
        trainer = CALTrainer(model, args, peft_config=lora, **data)
        trainer.train()
        return trainer.model.state_dict(), len(calls), trainer

    weights, calls, trainer = trained("ours")
    assert not [hook for one in trainer.model.modules() for hook in one._forward_hooks.values() if "graph" in str(hook)]
    monkeypatch.setattr(cal_trainer, "forward_only", contextlib.nullcontext)
    usual, calls_before, _ = trained("usual")
    assert all(torch.equal(weights[key], value) for key, value in usual.items())
    assert calls_before == 4, "each step once forwards and once more in its backward pass"
    assert calls == (4 if adapters == "all-linear" else 2)
