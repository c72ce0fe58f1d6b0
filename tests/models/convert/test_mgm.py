"""seecal.convert of Mini-Gemini: its original's files to transformers, the same logits, and back."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import seecal
from tests.models.mgm.test_original_keys import GEMMA, ORIGINAL, TOWERS, made_up
from tests.support import mgm_reference, original_llava, processors

KINDS = {"mgm": ORIGINAL, "mgm_gemma": GEMMA}


def clip(folder):
    """The folder of a CLIP without weights, which tells its sizes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **TOWERS["vision_config"]}))
    return str(folder)


def checkpoint(folder, kind, grid=1):
    """(state, config) of the original, written into ``folder`` as its code does: .bin shards with an index."""
    made = processors.tokenizer(pad="<pad>" if kind == "mgm_gemma" else None, bos="<s>", eos="</s>", begins=True)
    made.save_pretrained(folder)
    draw, tied = torch.Generator().manual_seed(1), kind == "mgm_gemma"
    state = {name: 0.3 * one for name, one in made_up(tied=tied).items()}
    for name in ("model.embed_tokens.weight", *(() if tied else ("lm_head.weight",))):
        state[name] = torch.randn(len(made), state[name].shape[1], generator=draw)
    size = {"image_grid": grid, "image_global": grid > 1, "image_size_aux": 64 * grid}
    config = {**KINDS[kind], "vocab_size": len(made), "torch_dtype": "float32", "pad_token_id": 0, **size}
    (folder / "config.json").write_text(json.dumps(config))
    original_llava.write(folder, state, "bin shards")
    return state, config


@pytest.fixture(scope="module", params=[("mgm", 1), ("mgm", 2), ("mgm_gemma", 1)], ids=["Llama", "HD", "Gemma"])
def made(request, tmp_path_factory):
    """(original's state and config, the folder with original/ and hf/, what convert told)."""
    kind, grid = request.param
    folder = tmp_path_factory.mktemp(kind)
    (folder / "original").mkdir()
    state, config = checkpoint(folder / "original", kind, grid)
    told = seecal.convert(folder / "original", folder / "hf", vision_tower=clip(folder / "clip"))
    return state, config, folder, told


def weights(folder):
    found = {}
    for path in folder.glob("*.bin"):
        found |= torch.load(path, weights_only=True)
    return found


def test_logits_are_the_originals(made):
    state, config, folder, told = made
    model = AutoModelForImageTextToText.from_pretrained(folder / "hf", dtype=torch.float64).eval()
    processor = AutoProcessor.from_pretrained(folder / "hf")
    image = Image.effect_noise((50, 41), 90).convert("RGB")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}]
    batch = processor(text=processor.apply_chat_template(chat), images=image, return_tensors="pt")
    batch = {name: one.double() if one.is_floating_point() else one for name, one in batch.items()}
    with torch.no_grad():
        found = model(**batch).logits[0]
    ids = batch["input_ids"][0]
    seen = ids == model.config.image_token_id
    short = ids[~seen | (torch.cumsum(seen, 0) == 1)]
    pictures, (large,) = batch["pixel_values"], batch["pixel_values_aux"]
    text = model.config.text_config
    text.vocab_size, text.pad_token_id = config["vocab_size"], None
    expected = mgm_reference.logits(
        {name: one.double() for name, one in state.items()},
        text,
        short,
        [(pictures if config["image_grid"] == 1 else pictures[0], large)],
        heads=2,
        image_id=model.config.image_token_id,
        grid=config["image_grid"],
    )
    torch.testing.assert_close(found[:, : config["vocab_size"]], expected, atol=1e-6, rtol=1e-6)
    assert told.model == "mgm"


def test_back_bit_for_bit(made, tmp_path):
    state, config, folder, _ = made
    told = seecal.convert(folder / "hf", tmp_path / "back", to="original", max_shard_size="100KB")
    back = weights(tmp_path / "back")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    after = json.loads((tmp_path / "back" / "config.json").read_text())
    assert after.pop("optimize_vision_tower_aux") is True
    assert {name: after[name] for name in config} == config
    index = json.loads((tmp_path / "back" / "pytorch_model.bin.index.json").read_text())["weight_map"]
    assert index.keys() == state.keys()
    assert told.model == config["model_type"]
    pad = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()).get("pad_token")
    assert pad == ("<pad>" if config["model_type"] == "mgm_gemma" else None)


def test_one_shard_has_an_index_too(made, tmp_path):
    """Its loader opens nothing else."""
    seecal.convert(made[2] / "hf", tmp_path / "back", to="original")
    found = {one.name for one in (tmp_path / "back").glob("*.bin*")}
    assert found == {"pytorch_model.bin", "pytorch_model.bin.index.json"}


def test_stage_1_with_its_towers(made, tmp_path):
    """``mm_projector.bin`` has projector, mining and both towers; the language model comes from its own folder."""
    state, config, folder, _ = made
    text = {
        name: one for name, one in state.items() if not any(part in name for part in ("mm_proj", "vlm_uni", "vision"))
    }
    language = tmp_path / "text"
    language.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (language / name).write_bytes((folder / "original" / name).read_bytes())
    kind = {"mgm": "llama", "mgm_gemma": "gemma"}[config["model_type"]]
    (language / "config.json").write_text(json.dumps({**config, "model_type": kind}))
    save_file(text, language / "model.safetensors")
    torch.save({n: t for n, t in state.items() if n not in text}, tmp_path / "mm_projector.bin")
    seecal.convert(
        tmp_path / "mm_projector.bin",
        tmp_path / "hf",
        language_model=str(language),
        images="pad",
        vision_tower=str(folder / "clip"),
    )
    one, other = (load_file(place / "hf" / "model.safetensors") for place in (tmp_path, folder))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_projector_alone(made, tmp_path):
    state, _, folder, _ = made
    seecal.convert(folder / "hf", tmp_path / "out", to="projector")
    found = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    assert found.keys() == {name for name in state if "mm_projector" in name or "vlm_uni" in name}
    assert all(torch.equal(found[name], state[name]) for name in found)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("to", ["original", "projector"])
def test_what_the_config_does_not_hold_of_gemmas_factor_goes_into_the_projector(scale, to, made, tmp_path):
    """The original has the factor √width of its language model in its code, Llama's factor 1."""
    state, config, folder, _ = made
    shutil.copytree(folder / "hf", tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(
        json.dumps({**json.loads((folder / "hf" / "config.json").read_text()), "image_feature_scale": scale})
    )
    seecal.convert(tmp_path / "hf", tmp_path / "back", to=to)
    back = weights(tmp_path / "back")
    own = config["hidden_size"] ** 0.5 if config["model_type"] == "mgm_gemma" else 1.0
    last = ("model.mm_projector.2.weight", "model.mm_projector.2.bias")
    for name, one in back.items():
        wanted = (state[name].double() * scale / own).float() if name in last else state[name]
        torch.testing.assert_close(one, wanted, rtol=2e-7 if name in last else 0, atol=0)
    assert back.keys() >= set(last)


def test_towers_from_their_own_folders(made, tmp_path):
    """CLIP's as it is published, ConvNeXt's in OpenCLIP's file."""
    state, _, folder, _ = made
    source = tmp_path / "original"
    source.mkdir()
    for one in (folder / "original").iterdir():
        if ".bin" not in one.name:
            (source / one.name).write_bytes(one.read_bytes())
    torch.save({name: one for name, one in state.items() if "vision_tower" not in name}, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"the tower model_zoo/OpenAI/clip.* is not in it.*--vision-tower"):
        seecal.convert(source, tmp_path / "hf", aux_tower=str(folder / "clip"))
    with pytest.raises(ValueError, match=r"the tower model_zoo/OpenAI/openclip.* is not in it.*--aux-tower"):
        seecal.convert(source, tmp_path / "hf", vision_tower=str(folder / "clip"))
    given = {"vision_tower": clip(tmp_path / "clip"), "aux_tower": str(tmp_path / "aux")}
    (tmp_path / "aux").mkdir()
    tower = "model.vision_tower.vision_tower."
    own = {name.removeprefix(tower): one for name, one in state.items() if name.startswith(tower)}
    save_file({**own, "logit_scale": torch.ones(1)}, tmp_path / "clip" / "model.safetensors")
    aux = "model.vision_tower_aux.vision_"
    trunk = {f"visual.trunk.{n.removeprefix(aux)}": t for n, t in state.items() if n.startswith(aux)}
    torch.save({**trunk, "text.positional_embedding": torch.ones(2)}, tmp_path / "aux" / "open_clip_pytorch_model.bin")
    seecal.convert(source, tmp_path / "hf", **given)
    one, other = (load_file(place / "hf" / "model.safetensors") for place in (tmp_path, folder))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "said"),
    [("model.vlm_uni_new.weight", "model.vlm_uni_new.weight"), (None, "lacks 1 of the model's tensors")],
)
def test_an_unknown_and_a_missing_tensor_are_named(name, said, made, tmp_path):
    state, _, folder, _ = made
    source = tmp_path / "original"
    source.mkdir()
    for one in (folder / "original").iterdir():
        if ".bin" not in one.name:
            (source / one.name).write_bytes(one.read_bytes())
    changed = {**state, name: torch.ones(2)} if name else {n: t for n, t in state.items() if n != "model.norm.weight"}
    torch.save(changed, source / "pytorch_model.bin")
    with pytest.raises(ValueError, match=said):
        seecal.convert(source, tmp_path / "hf", vision_tower=str(folder / "clip"))
