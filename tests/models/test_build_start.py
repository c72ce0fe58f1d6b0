"""seecal.build_start: a model of any tower and any language model, ready to train."""

import json
import shutil

import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import seecal
from seecal.cli.main import app
from seecal.models import build_start
from tests.support import processors
from tests.support.planted import left_no, planted_torch

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHAT = [
    {"role": "user", "content": [{"type": "text", "text": "What?\n"}, {"type": "image"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders by name: two language models and two towers, tiny, as the hub has them."""
    folder = tmp_path_factory.mktemp("parts")
    made = processors.tokenizer(pad=None, bos="<s>", eos="<|end|>")
    texts = {
        "llama": hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(made), **SIZES)),
        "qwen": hf.Qwen2ForCausalLM(
            hf.Qwen2Config(vocab_size=len(made) + 70, num_key_value_heads=1, tie_word_embeddings=True, **SIZES)
        ),
    }
    for name, model in texts.items():
        model.to(torch.bfloat16).save_pretrained(folder / name)
        made.chat_template = CHATML if name == "qwen" else None
        made.save_pretrained(folder / name)
    vision = {"image_size": 32, "patch_size": 8, **SIZES}
    hf.CLIPVisionModel(hf.CLIPVisionConfig(**vision)).save_pretrained(folder / "clip")
    siglip = hf.SiglipConfig(vision_config=vision, text_config={"vocab_size": 40, **SIZES})
    hf.SiglipModel(siglip).save_pretrained(folder / "siglip")
    return folder


def tokens_of(folder, size=(50, 20)):
    """(loaded model, the processor's batch for CHAT about an image of ``size``)."""
    model = hf.AutoModelForImageTextToText.from_pretrained(folder)
    processor = hf.AutoProcessor.from_pretrained(folder)
    text = processor.apply_chat_template(CHAT)
    return model, processor, processor(text=text, images=Image.new("RGB", size), return_tensors="pt")


@pytest.mark.parametrize("text", ["llama", "qwen"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_it_is_a_model_to_train(family, text, vision, parts, tmp_path):
    out = seecal.build_start(family, str(parts / text), str(parts / vision), tmp_path / "start")
    model, processor, batch = tokens_of(out)
    before = hf.AutoModelForCausalLM.from_pretrained(parts / text)
    rows = before.get_input_embeddings().weight
    assert model.dtype == torch.bfloat16
    batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
    assert model(**batch).logits.isfinite().all(), "features and image tokens are as many"
    grown = model.get_input_embeddings().weight
    assert torch.equal(grown[: len(rows)], rows)
    assert len(grown) >= len(processor.tokenizer)
    assert len(grown) % 64 == 0 or len(grown) == len(rows)
    tower = hf.AutoModel.from_pretrained(parts / vision)
    tower = getattr(tower, "vision_model", tower).to(torch.bfloat16)
    theirs = dict(tower.named_parameters())
    ours = dict(model.model.vision_tower.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert processor.image_processor.image_mean[0] == (0.5 if vision == "siglip" else pytest.approx(0.4814, abs=1e-4))


def test_the_published_numbers(parts, tmp_path):
    """Multiples of 64 rows, an image and a padding token behind the language model's own, the mean in the new rows."""
    out = seecal.build_start(
        "llava_next", str(parts / "llama"), str(parts / "clip"), tmp_path / "start", dtype="float32"
    )
    model, processor, _ = tokens_of(out)
    tokenizer, before = (
        processor.tokenizer,
        hf.AutoModelForCausalLM.from_pretrained(parts / "llama", dtype=torch.float32),
    )
    own = len(hf.AutoTokenizer.from_pretrained(parts / "llama"))
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [own, own + 1]
    assert (model.config.image_token_id, model.config.pad_token_id) == (own, own + 1)
    for grown, old in (
        (model.get_input_embeddings().weight, before.get_input_embeddings().weight),
        (model.lm_head.weight, before.lm_head.weight),
    ):
        assert len(grown) == -(-(own + 2) // 64) * 64
        torch.testing.assert_close(grown[len(old) :], old.mean(0).expand(len(grown) - len(old), -1))
    assert model.config.image_grid_pinpoints == [[64, 32], [32, 64], [64, 64], [32, 96], [96, 32]]
    assert processor.image_processor.image_grid_pinpoints == model.config.image_grid_pinpoints
    newline = model.model.image_newline
    assert newline.std().item() == pytest.approx(1 / 32**0.5, rel=0.4)
    assert (processor.image_processor.size["shortest_edge"], model.dtype) == (32, torch.float32)
    again = seecal.build_start(
        "llava_next", str(parts / "llama"), str(parts / "clip"), tmp_path / "again", dtype="float32"
    )
    other = hf.AutoModelForImageTextToText.from_pretrained(again)
    assert all(torch.equal(one, other.get_parameter(name)) for name, one in model.named_parameters())


def language_model(name, folder, **changes):
    """The folder of a language model of another family, drawn wide enough that its logits tell."""
    made = processors.tokenizer(pad=None, bos="<s>", eos="<|end|>")
    kind = getattr(hf, f"{name}ForCausalLM")
    config = kind.config_class(vocab_size=len(made), **{**SIZES, **changes})
    model = kind(config)
    with torch.no_grad():
        for one in model.parameters():
            one.normal_(std=0.3)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
    return str(folder)


GEMMA = {"head_dim": 16, "num_key_value_heads": 1}


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("Phi", {}, "a phi, whose lm_head has a bias"),
        ("Granite", {"logits_scaling": 8.0}, r"a granite, .* its config has logits_scaling=8\.0, which would be lost"),
        ("Cohere", {}, r"its config has logit_scale=0\.0625, which would be lost"),
        ("Gemma2", GEMMA, r"its config has final_logit_softcapping=30\.0, which would be lost"),
    ],
)
@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_what_a_language_model_does_to_its_logits_is_not_lost(family, name, changes, said, parts, tmp_path):
    text = language_model(name, tmp_path / "text", **changes)
    with pytest.raises(ValueError, match=said):
        seecal.build_start(family, text, str(parts / "clip"), tmp_path / "start")
    assert not (tmp_path / "start").exists()


def test_a_class_that_does_more_than_its_parts_is_refused(parts, tmp_path, monkeypatch):
    """Nothing in its config says it."""
    own = hf.LlamaForCausalLM.forward

    def louder(self, *args, **options):
        found = own(self, *args, **options)
        found.logits = 1.5 * found.logits
        return found

    monkeypatch.setattr(hf.LlamaForCausalLM, "forward", louder)
    with pytest.raises(ValueError, match=r"by 3\.\de-01 of the largest: its class does more"):
        seecal.build_start("llava", str(parts / "llama"), str(parts / "clip"), tmp_path / "start")


@pytest.mark.parametrize("part", ["load_text", "load_tower"])
def test_a_part_with_a_tensor_that_its_class_has_not_is_refused(part, parts, tmp_path, monkeypatch):
    own = getattr(build_start, part)

    def with_one_more(*args):
        found = own(*args)
        found.base_model.odd = torch.nn.Parameter(torch.ones(2))
        return found

    monkeypatch.setattr(build_start, part, with_one_more)
    with pytest.raises(ValueError, match=r"\.odd is in one of the parts and not in a llava"):
        seecal.build_start("llava", str(parts / "llama"), str(parts / "clip"), tmp_path / "start")


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("Gemma", GEMMA),
        ("Gemma3", {**GEMMA, "query_pre_attn_scalar": 16}),
        ("Granite", {"logits_scaling": 1.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.5}),
        ("Llama", {"logit_scale": 0.5}),
    ],
)
def test_what_is_inside_of_a_language_model_stays(name, changes, parts, tmp_path):
    """Factors of embeddings and layers; and a field that its class does not read changes nothing."""
    text = language_model(name, tmp_path / "text", **changes)
    out = seecal.build_start("llava", text, str(parts / "clip"), tmp_path / "start")
    tokens = torch.arange(5, 17)[None]
    before = hf.AutoModelForCausalLM.from_pretrained(text).eval()(input_ids=tokens).logits
    after = hf.AutoModelForImageTextToText.from_pretrained(out).eval()(input_ids=tokens).logits
    torch.testing.assert_close(after[..., : before.shape[-1]], before, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("images", "whole"), [("pad", True), ("square", False)])
def test_how_images_become_squares(images, whole, parts, tmp_path):
    out = seecal.build_start("llava", str(parts / "llama"), str(parts / "clip"), tmp_path / "start", images=images)
    processor = hf.AutoProcessor.from_pretrained(out)
    red = Image.new("RGB", (64, 32))
    red.paste((255, 0, 0), (0, 0, 16, 32))  # at the left edge, which the middle has not
    pixels = processor.image_processor(red, return_tensors="pt")["pixel_values"]
    assert (pixels[0, 0].max() > 1.5) == whole


def test_a_language_models_own_template_gets_the_images(parts, tmp_path):
    out = seecal.build_start("llava", str(parts / "qwen"), str(parts / "clip"), tmp_path / "start")
    processor = hf.AutoProcessor.from_pretrained(out)
    text = processor.apply_chat_template(CHAT)
    assert text == "<|im_start|>user\nWhat?\n<image>\n<|end|>\n<|im_start|>assistant\nRed.<|end|>\n"
    assert processor.apply_chat_template([{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|end|>\n"


def test_its_labels_are_the_answers(parts, tmp_path):
    for text, template in (("qwen", None), ("llama", None), ("qwen", "vicuna_v1")):
        out = seecal.build_start(
            "llava", str(parts / text), str(parts / "clip"), tmp_path / f"{text} {template}", template=template
        )
        processor = hf.AutoProcessor.from_pretrained(out)
        batch = seecal.VisionCollator(processor)([{"messages": CHAT, "images": [Image.new("RGB", (9, 9))]}])
        learnt = batch["labels"][0][batch["labels"][0] >= 0]
        assert processor.tokenizer.decode(learnt).strip().startswith("Red.")
        assert processor.tokenizer.decode(learnt).strip().endswith("<|end|>")


@pytest.mark.parametrize("family", ["mgm", "mgm_hd"])
@pytest.mark.parametrize("files", ["transformers", "OpenCLIP"])
def test_mini_gemini(family, files, parts, tmp_path):
    sizes = {"hidden_sizes": [4, 6, 8, 10], "depths": [1, 1, 2, 1]}
    aux = hf.ConvNextModel(hf.ConvNextConfig(**sizes))
    if files == "transformers":
        aux.save_pretrained(tmp_path / "aux")
    else:
        (tmp_path / "aux").mkdir()
        held = {
            f"visual.trunk.{as_timm(name)}": one for name, one in aux.state_dict().items() if name[:9] != "layernorm"
        }
        torch.save({**held, "text.token": torch.ones(2)}, tmp_path / "aux" / "open_clip_pytorch_model.bin")
    out = seecal.build_start(
        family, str(parts / "llama"), str(parts / "clip"), tmp_path / "start", aux_tower=str(tmp_path / "aux")
    )
    model, _, batch = tokens_of(out)
    pictures = 5 if family == "mgm_hd" else 1
    assert (batch["input_ids"] == model.config.image_token_id).sum() == pictures * 16
    model.float()
    assert model(**batch).logits.isfinite().all()
    ours = dict(model.model.vision_tower_aux.named_parameters())
    for name, one in aux.named_parameters():
        if not name.startswith("layernorm"):
            assert torch.equal(ours[name], one.to(torch.bfloat16).float()), name
    linear = model.model.mining.query[1].weight
    assert linear.std().item() == pytest.approx(1 / (3 * 32) ** 0.5, rel=0.2), "as torch initialises it"


def as_timm(name):
    """A tensor of transformers' ConvNextModel as timm calls it."""
    for ours, theirs in (
        ("embeddings.patch_embeddings", "stem.0"),
        ("embeddings.layernorm", "stem.1"),
        ("encoder.", ""),
        ("downsampling_layer", "downsample"),
        (".layers.", ".blocks."),
        ("dwconv", "conv_dw"),
        ("layernorm", "norm"),
        ("pwconv1", "mlp.fc1"),
        ("pwconv2", "mlp.fc2"),
        ("layer_scale_parameter", "gamma"),
    ):
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"family": "blip"}, "family: blip: known are llava, llava_next, mgm, mgm_hd"),
        ({"images": "wide"}, "images: wide: known are pad and square"),
        ({"template": "alpaca"}, "template: alpaca: no such file, and none of gemma, vicuna_v1, own"),
        ({"template": "own"}, "the language model has no chat template"),
        ({"family": "mgm"}, "aux_tower: None: Mini-Gemini"),
        ({"aux_tower": "x"}, "aux_tower: x: Mini-Gemini"),
        ({"vision_tower": "llama"}, "llama, whose image_size is None"),
        ({"language_model": "clip"}, "clip: "),
        ({"language_model": "nowhere"}, "nowhere: its tokenizer cannot be loaded"),
        ({"out": "qwen"}, "it holds files already"),
    ],
)
def test_what_cannot_be_built_is_told(changes, said, parts, tmp_path):
    given = {"family": "llava", "language_model": "llama", "vision_tower": "clip", "out": tmp_path / "start", **changes}
    for name in ("language_model", "vision_tower", "out"):
        given[name] = str(parts / given[name])
    family, language_model, vision_tower, out = (
        given.pop(n) for n in ("family", "language_model", "vision_tower", "out")
    )
    before = sorted(parts.rglob("*"))
    with pytest.raises(ValueError, match=said):
        seecal.build_start(family, language_model, vision_tower, out, **given)
    assert sorted(parts.rglob("*")) == before


def test_the_towers_own_colours(parts, tmp_path):
    shutil.copytree(parts / "clip", tmp_path / "clip")
    colours = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(colours))
    out = seecal.build_start("llava", str(parts / "llama"), str(tmp_path / "clip"), tmp_path / "start")
    images = hf.AutoProcessor.from_pretrained(out).image_processor
    assert (list(images.image_mean), list(images.image_std)) == tuple(colours.values())


def spoiled(parts, name, folder):
    """A copy of a part, and the tensors in its file."""
    shutil.copytree(parts / name, folder)
    return folder, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_a_part_that_lacks_a_tensor_is_refused(name, parts, tmp_path):
    folder, held = spoiled(parts, name, tmp_path / "part")
    lost = next(one for one in held if "layers.1" in one)
    del held[lost]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    given = [str(folder if one == name else parts / one) for one in ("llama", "clip")]
    with pytest.raises(ValueError, match="lacks 1 of the model's tensors"):
        seecal.build_start("llava", *given, tmp_path / "start")


def test_parts_that_are_pytorchs_files(parts, tmp_path):
    """Read, with nothing in them run: Vicuna and CLIP have come as nothing else."""
    folder, held = spoiled(parts, "llama", tmp_path / "part")
    (folder / "model.safetensors").unlink()
    torch.save(held, folder / "pytorch_model.bin")
    out = seecal.build_start("llava", str(folder), str(parts / "clip"), tmp_path / "start")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(load_file(out / "model.safetensors")[f"language_model.{name}"], held[name])
    planted_torch(folder / "pytorch_model.bin", tmp_path / "mark")
    with pytest.raises(ValueError, match="part: cannot be loaded"):
        seecal.build_start("llava", str(folder), str(parts / "clip"), tmp_path / "other")
    left_no(tmp_path / "mark")


def test_the_command(parts, tmp_path):
    call = ["build-start", "llava", str(parts / "llama"), str(parts / "clip"), str(tmp_path / "start")]
    done = CliRunner().invoke(app, call, catch_exceptions=False)
    assert done.output.strip().endswith("start: a llava to train, its projector untrained")
    again = CliRunner().invoke(app, [*call, "--overwrite", "--template", "vicuna_v1"], catch_exceptions=False)
    assert again.exit_code == 0
    assert not list(tmp_path.glob("*.part"))
