"""Adapters on a language model in 4 bits, by a recipe: what is quantised, what trains, what is saved, what is refused."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from seecal.models import loading
from seecal.models.quantised import four_bit_config, four_bit_layers, size_of
from seecal.recipes import run as train
from seecal.recipes.trainable import LoraSettings, prepare
from seecal.trainer.cal_trainer import CALTrainer
from tests.support.four_bit import decoded, in_four_bits
from tests.support.recipe_files import recipe_file
from tests.support.tiny import tiny_llava

pytest.importorskip("bitsandbytes")
FOUR = {"quantization_config": {"load_in_4bit": True}}
STAGE = {"lora": {"r": 2}, "model_init_kwargs": FOUR, "learning_rate": 1e-2, "max_steps": 2, "save_steps": 1}


def run(tiny, base, *more, **changes):
    file = recipe_file(base / "r.yaml", tiny, base / "run", **{**STAGE, **changes})
    assert train.run(["--config", file, *more]) == 0
    return base / "run"


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """(the run's folder, dtype of each parameter that trained, the layers in 4 bits, before and after)."""
    seen, own = {}, CALTrainer._inner_training_loop

    def loop(self, *args, **kwargs):
        seen["dtypes"] = {name: one.dtype for name, one in self.model.named_parameters() if one.requires_grad}
        seen["before"] = {name: one.detach().clone() for name, one in self.model.named_parameters()}
        result = own(self, *args, **kwargs)
        seen["after"] = {name: one.detach().clone() for name, one in self.model.named_parameters()}
        seen["layers"] = list(four_bit_layers(self.model))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CALTrainer, "_inner_training_loop", loop)
        return run(tiny, tmp_path_factory.mktemp("qlora")), seen


def test_the_language_model_is_in_four_bits_and_nothing_else(trained):
    layers = trained[1]["layers"]
    assert len(layers) == 2 * 6  # of two layers all but down_proj, which is 96 wide here
    assert all("language_model.layers" in name for name in layers)


def test_what_trains_changes_in_float32_and_the_rest_stays_to_the_bit(trained):
    _, seen = trained
    assert set(seen["dtypes"].values()) == {torch.float32}
    assert {name.split(".")[3] for name in seen["dtypes"]} == {"multi_modal_projector", "language_model"}
    for name, before in seen["before"].items():
        assert torch.equal(before, seen["after"][name]) != (name in seen["dtypes"]), name


def test_final_is_the_adapter_on_the_values_of_the_four_bits(tiny, trained):
    """With plain transformers and PEFT, the values decoded by the test; and not on the weights from before."""
    run, _ = trained
    four = four_bit_config(str(tiny / "model"), FOUR["quantization_config"], bf16=False)
    options = {"quantization_config": BitsAndBytesConfig(**four), "device_map": {"": "cpu"}, "dtype": torch.float32}
    layers = four_bit_layers(AutoModelForImageTextToText.from_pretrained(tiny / "model", **options))
    base = AutoModelForImageTextToText.from_pretrained(tiny / "model")
    whole = PeftModel.from_pretrained(
        AutoModelForImageTextToText.from_pretrained(tiny / "model"), run / "final/adapter"
    )
    with torch.no_grad():
        for name, layer in layers.items():
            base.get_submodule(name).weight.copy_(decoded(layer.weight))
    merged = PeftModel.from_pretrained(base, run / "final/adapter").merge_and_unload()
    final = AutoModelForImageTextToText.from_pretrained(run / "final")
    assert not hasattr(final.config, "quantization_config")
    for name, one in final.state_dict().items():
        torch.testing.assert_close(one, merged.state_dict()[name], atol=1e-6, rtol=0, msg=name)
    far = [
        name
        for name, one in whole.merge_and_unload().state_dict().items()
        if (one - final.state_dict()[name]).abs().max() > 1e-2
    ]
    assert len(far) == len(layers)


def test_a_run_that_is_resumed_ends_with_the_same_weights(tiny, trained, capsys):
    run, _ = trained
    kept = run.parent / "kept"
    shutil.move(run / "final", kept)
    shutil.rmtree(run / "stage-1" / "checkpoint-2")
    assert train.run(["--config", str(run.parent / "r.yaml"), "--resume"]) == 0
    assert "continues at checkpoint-1" in capsys.readouterr().out
    first, second = (load_file(folder / "model.safetensors") for folder in (kept, run / "final"))
    assert all(torch.equal(one, second[name]) for name, one in first.items())


def test_only_stages_with_adapters_are_in_four_bits(tiny, tmp_path, capsys):
    """The stage before trains the projector on the model as it is; the next starts from what it leaves."""
    stages = [{"train": "projector"}, {"train": ["projector", "lora"]}]
    ended = run(tiny, tmp_path, stages=stages, max_steps=1)
    said = capsys.readouterr().out
    assert said.count("no lora trains here, so the model is loaded without quantization_config") == 1
    before, first, last = (
        load_file(folder / "model.safetensors") for folder in (tiny / "model", ended / "stage-1/model", ended / "final")
    )
    moved = [name for name in before if not torch.equal(before[name], first[name])]
    assert moved
    assert all("multi_modal_projector" in name for name in moved)
    (layer,) = (
        name for name in first if "language_model" in name and name.endswith("layers.0.self_attn.q_proj.weight")
    )
    assert not torch.equal(first[layer], last[layer])


REFUSED = [
    ({"load_in_8bit": True}, r"adapters are trained on 4 bits\. Set \{load_in_4bit: true\}"),
    ("4bit", r"adapters are trained on 4 bits"),
    (
        {"load_in_4bit": True, "bnb_4bit_quanttype": "nf4"},
        r"bnb_4bit_quanttype: no such argument .* mean bnb_4bit_quant_type\?",
    ),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_be_is_refused_by_name(tiny, tmp_path, given, message):
    with pytest.raises(ValueError, match=message):
        run(tiny, tmp_path, model_init_kwargs={"quantization_config": given})


def test_without_adapters_it_is_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"weights in 4 bits do not train, adapters on them do\. Set lora"):
        run(tiny, tmp_path, lora=None, train="projector")


def test_without_the_library_its_name_is_told(tiny, monkeypatch):
    import transformers.quantizers.quantizer_bnb_4bit as theirs

    monkeypatch.setattr(theirs, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ValueError, match=r"Run pip install 'seecal\[qlora\]'"):
        loading.load_vlm(str(tiny / "model"), quantization_config=BitsAndBytesConfig(load_in_4bit=True))


# ---- a model that lies on the disk in 4 bits ----


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """All of it but the head is in 4 bits."""
    folder = tmp_path_factory.mktemp("saved")
    model = in_four_bits(tiny_llava(intermediate_size=128), folder / "whole", llm_int8_skip_modules=["lm_head"])
    model.save_pretrained(folder / "four")
    return folder / "four"


@pytest.mark.parametrize("group", ["projector", "language_model", "vision_tower"])
def test_a_group_in_four_bits_does_not_train_whole(saved, group):
    for train_too in ((), ("lora",)) if group == "projector" else ((),):
        model, _ = loading.load_vlm(str(saved), processor=False)
        with pytest.raises(
            ValueError, match=rf"train: {group}: its \S+\.weight is quantised, and such weights do not train"
        ):
            prepare(model, [group, *train_too])


def test_adapters_go_on_a_tower_in_four_bits(saved):
    """Which of its tensors no feature depends on is found without asking codes for a gradient."""
    model, _ = loading.load_vlm(str(saved), processor=False)
    prepared = prepare(model, ["lora"], LoraSettings(target=["language_model", "vision_tower"]))
    assert any("vision_tower" in name for name in prepared.groups)
    layer = next(iter(four_bit_layers(model).values()))
    assert size_of(layer.weight) == layer.in_features * layer.out_features


def test_a_model_in_four_bits_is_not_quantised_again(saved):
    with pytest.raises(ValueError, match=r"quantised already, by its own config\.json"):
        four_bit_config(str(saved), {"load_in_4bit": True}, bf16=False)
