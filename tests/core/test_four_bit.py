"""CAL on a model in 4 bits: its loss, gradients and Δ are those of the float weights that the 4 bits stand for."""

import pytest
import torch
from peft import LoraConfig, PeftModel

import seecal
from seecal.core.decoder import keep_four_bits_as_they_are
from seecal.families.table import decoder_of
from seecal.models.quantised import beside_the_decoder, dequantised
from tests.support import zoo
from tests.support.builders import MIXED, batch_of, build
from tests.support.four_bit import decoded, in_four_bits
from tests.support.reference import assert_same_gradients, by_the_equations, gradients

bnb = pytest.importorskip("bitsandbytes")
# What is no multiple of 64 wide here stays as it is
BESIDE = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]
KINDS = ["llava", "qwen2_5_vl", "smolvlm", "gemma3"]


def layers_of(model):
    return [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]


def with_adapters(model, seed=0):
    """Adapters that change something: at PEFT's usual start they are zero."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|down_proj)", init_lora_weights=False)
    return PeftModel(model, lora)


@pytest.fixture
def packs_for_inference(monkeypatch):
    """As on CPUs with AVX-512 in bfloat16: there bitsandbytes writes weights anew in their first forward for inference."""
    own = bnb.nn.Linear4bit.__init__

    def made(self, *args, **kwargs):
        own(self, *args, **kwargs)
        self.support_avx512bf16_for_cpu = True

    monkeypatch.setattr(bnb.nn.Linear4bit, "__init__", made)


@pytest.fixture
def llava4(tmp_path, packs_for_inference):
    model, tokens, pixels = build("llava", intermediate_size=128)  # what bitsandbytes can pack at all
    return in_four_bits(model, tmp_path, llm_int8_skip_modules=BESIDE), batch_of(MIXED, tokens, pixels)


@pytest.mark.parametrize("double", [False, True], ids=["one scale a block", "scales quantised too"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_equations(tmp_path, packs_for_inference, double, checkpointing):
    """In float64, on the weights that 4 bits stand for; two steps, so that the first one's contrast is behind."""
    model, tokens, pixels = build("llava", intermediate_size=128)
    batch = batch_of(MIXED, tokens, pixels)
    settings = {"bnb_4bit_use_double_quant": double, "llm_int8_skip_modules": BESIDE}
    plain, model = dequantised(in_four_bits(model, tmp_path, **settings)), in_four_bits(model, tmp_path, **settings)
    if not double:
        for layer, other in zip(layers_of(model), linears_like(model, plain), strict=True):
            assert torch.equal(decoded(layer.weight), other.weight)
    oracle = with_adapters(plain).double()
    expected, _ = by_the_equations(oracle, {**batch, "pixel_values": batch["pixel_values"].double()})
    expected.backward()
    tested = seecal.enable_cal(with_adapters(model)).train()
    if checkpointing:
        tested.enable_input_require_grads()
        tested.gradient_checkpointing_enable({"use_reentrant": False})
    for _ in range(2):
        tested.zero_grad()
        loss = tested(**batch).loss
        loss.backward()
        assert float(loss) == pytest.approx(float(expected), rel=2e-5)
        got = {name: one for name, one in gradients(tested).items() if "lora_" in name}
        assert len(got) == 2 * 2 * 3
        assert_same_gradients(got, {name: gradients(oracle)[name].float() for name in got}, 1e-4)


def linears_like(model, plain):
    names = [name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    return [plain.get_submodule(name) for name in names]


@pytest.mark.parametrize("name", KINDS)
def test_dropping_the_image_is_masking_it(tmp_path, packs_for_inference, name):
    """Packed, padded and hidden in the mask, against the model's own forward with the image hidden."""
    model = in_four_bits(zoo.model_of(name, "sdpa"), tmp_path, llm_int8_skip_modules=[*beside(name), "down_proj"])
    keep_four_bits_as_they_are(model)
    batch = zoo.batch_of(name, zoo.rows_for(name))
    own = zoo.truth(name, model, batch)
    assert float(own.delta.abs().max()) > 0.5
    assert layers_of(decoder_of(model))
    for options in zoo.ROUTES.values():
        got = seecal.visual_delta(model, batch, contrast=options.contrast, options=options)
        torch.testing.assert_close(got.delta, own.delta, atol=own.tolerance, rtol=0)


def beside(name):
    return beside_the_decoder(zoo.model_of(name, "sdpa"))


def weights_of(model):
    return [layer.weight.data.clone() for layer in layers_of(model)]


def evaluated(model, batch):
    model.eval()
    with torch.no_grad():
        model(**batch)
    model.train()


USES = {
    "a training forward": lambda model, batch: model.train()(**batch),
    "visual_delta": lambda model, batch: seecal.visual_delta(seecal.disable_cal(model), batch),
    "an evaluation": evaluated,
}


@pytest.mark.parametrize("use", USES)
def test_no_forward_writes_the_weights_anew(llava4, use):
    """bitsandbytes does, on some CPUs: then scales are rounded, and the next backward passes no gradient."""
    model, batch = llava4
    seecal.enable_cal(with_adapters(model))
    before = weights_of(model)
    USES[use](model, batch)
    assert all(torch.equal(one, other) for one, other in zip(before, weights_of(model), strict=True))
    assert keep_four_bits_as_they_are(model)


def test_a_model_that_was_written_anew_before_is_refused(llava4):
    model, batch = llava4
    evaluated(model, batch)
    with pytest.raises(ValueError, match=r"rewritten this model's 4-bit weights for inference .* Load the model again"):
        seecal.enable_cal(model)


@pytest.mark.parametrize("storage", [torch.uint8, torch.float32])
def test_a_head_in_four_bits_is_refused(tmp_path, storage):
    """Codes may be stored in a float type: then only their state tells them from weights."""
    model = in_four_bits(
        build("llava")[0], tmp_path, llm_int8_skip_modules=[*BESIDE[1:], "down_proj"], bnb_4bit_quant_storage=storage
    )
    with pytest.raises(ValueError, match=r"Add lm_head to quantization_config's llm_int8_skip_modules"):
        seecal.enable_cal(model)


@pytest.mark.parametrize(("width", "left"), [(96, "down_proj"), (128, "vision_tower")])
def test_layers_that_bitsandbytes_may_decode_wrongly_are_refused(tmp_path, width, left):
    """Those whose rows are no whole number of blocks: here its values are further from the weights than 4 bits can be."""
    model, tokens, pixels = build("llava", intermediate_size=width)
    skipped = [*BESIDE, "down_proj"]
    if left == "vision_tower":
        skipped.remove("model.vision_tower")
    else:
        skipped.remove("down_proj")
    four = in_four_bits(model, tmp_path, llm_int8_skip_modules=skipped)
    with pytest.raises(
        ValueError, match=r"no multiple of 64: bitsandbytes may decode such weights wrongly on the CPU. Add \w+"
    ):
        seecal.enable_cal(four)
    with pytest.raises(ValueError, match="no multiple of 64"):
        seecal.visual_delta(four, batch_of(MIXED, tokens, pixels))
    if "AVX512" in torch.backends.cpu.get_cpu_capability():
        layer = next(one for one in layers_of(four) if one.in_features % 64)
        theirs = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert not torch.equal(theirs, decoded(layer.weight)), "bitsandbytes has mended it: take the refusal out"
