"""A plain CALTrainer on a model in 4 bits: loaded by TRL from its name, or by the caller."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForImageTextToText

from seecal import CALConfig, CALTrainer
from seecal.models.quantised import four_bit_layers
from tests.support.four_bit import four_bits
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

pytest.importorskip("bitsandbytes")
BESIDE = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
PROJECTOR = LoraConfig(r=2, target_modules=r".*language_model.*q_proj", modules_to_save=["multi_modal_projector"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava(intermediate_size=128).save_pretrained(folder)
    tiny_llava_processor().save_pretrained(folder)
    return folder


def loaded(folder, **changed):
    options = {"quantization_config": four_bits(**changed), "device_map": {"": "cpu"}, "dtype": torch.float32}
    return AutoModelForImageTextToText.from_pretrained(folder, **options)


def trainer(folder, out, by_name, lora=PROJECTOR, beside=BESIDE, **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
    }
    options = {"llm_int8_skip_modules": beside}
    if by_name:
        settings["model_init_kwargs"] = {"dtype": "float32", "device_map": {"": "cpu"}}
    return CALTrainer(
        str(folder) if by_name else loaded(folder, **options),
        CALConfig(str(out), **{**settings, **changes}),
        train_dataset=tiny_dataset(8),
        eval_dataset=tiny_dataset(2),
        processing_class=tiny_llava_processor(),
        peft_config=lora,
        quantization_config=four_bits(**options) if by_name else None,
    )


def logits(model, batch):
    with torch.no_grad():
        return model.eval()(**batch).logits


@pytest.mark.parametrize("by_name", [True, False], ids=["by its name", "loaded"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_train_and_load_on_the_same_four_bits(folder, tmp_path, by_name, checkpointing):
    """An evaluation in the middle leaves the weights in 4 bits as they are, and the adapters with gradients."""
    this = trainer(folder, tmp_path, by_name, gradient_checkpointing=checkpointing, eval_strategy="steps", eval_steps=1)
    assert four_bit_layers(this.model)
    assert {one.dtype for one in this.model.parameters() if one.requires_grad} == {torch.float32}
    assert this.model.is_loaded_in_4bit
    start = {name: one.detach().clone() for name, one in this.model.named_parameters()}
    this.train()
    for name, one in this.model.named_parameters():
        assert torch.equal(one, start[name]) != one.requires_grad, name
    this.save_model()
    batch = this.data_collator(list(tiny_dataset(2)))
    again = PeftModel.from_pretrained(loaded(folder, llm_int8_skip_modules=BESIDE), tmp_path)
    for layer in four_bit_layers(again).values():
        layer.support_avx512bf16_for_cpu = False  # as under CAL: no other kernel for inference
    torch.testing.assert_close(logits(again, batch), logits(this.model, batch), atol=1e-5, rtol=0)
    base = again.get_base_model()
    with again.disable_adapter():
        assert (logits(base, batch) - logits(this.model, batch)).abs().max() > 0.5


@pytest.mark.parametrize("by_name", [True, False], ids=["by its name", "loaded"])
def test_a_copy_of_what_is_in_four_bits_cannot_train(folder, tmp_path, by_name):
    expected = r"modules_to_save=\['multi_modal_projector'\]: .*_modules=\['lm_head', 'multi_modal_projector'\]"
    with pytest.raises(ValueError, match=expected):
        trainer(folder, tmp_path, by_name, beside=BESIDE[:2])


def test_without_adapters_transformers_refuses_it(folder, tmp_path):
    with pytest.raises(ValueError, match="purely quantized models"):
        trainer(folder, tmp_path, False, lora=None)
