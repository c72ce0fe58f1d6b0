"""What a source may be: files of every kind, the layouts of transformers, a projector, a LoRA; and what is refused."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaConfig, LlamaForCausalLM

import seecal
from seecal.models.hub_layout import hub_name
from tests.support import original_llava as original
from tests.support.planted import left_no, planted_torch

FILES = ["safetensors", "bin", "safetensors shards", "bin shards", "safetensors loose", "bin loose"]


def weights(folder):
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """(folder with a converted LLaVA-NeXT in hf/, its original's state, the CLIP's folder)."""
    folder = tmp_path_factory.mktemp("files")
    state, _ = original.checkpoint(folder / "original", "llava_next")
    clip = str(original.clip_folder(folder / "clip", original.state_dict("llava", 3, seed=5)))
    seecal.convert(folder / "original", folder / "hf", vision_tower=clip)
    return folder, state, clip


@pytest.mark.parametrize("files", FILES[1:])
def test_every_kind_of_file_is_read(files, place, tmp_path):
    folder, _, clip = place
    original.checkpoint(tmp_path / "original", "llava_next", files=files)
    seecal.convert(tmp_path / "original", tmp_path / "hf", vision_tower=clip, max_shard_size="20KB")
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    assert same(weights(tmp_path / "hf"), weights(folder / "hf"))


def in_memory(name):
    """A hub name as transformers 5 has it in memory."""
    name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "model.language_model.")
    name = name.replace("vision_tower.vision_model.", "vision_tower.")
    return name if name.startswith(("lm_head.", "model.")) else f"model.{name}"


def of_4_52(name):
    name = name.replace("language_model.lm_head.", "lm_head.").replace("language_model.model.", "model.language_model.")
    return name if name.startswith(("lm_head.", "model.")) else f"model.{name}"


LAYOUTS = {
    "saved by 5": lambda name: name.replace("vision_tower.vision_model.", "vision_tower."),
    "hub": lambda name: name,
    "in memory": in_memory,
    "4.52": of_4_52,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_transformers_goes_back(layout, place, tmp_path):
    folder, state, _ = place
    shutil.copytree(folder / "hf", tmp_path / "hf")
    hub = weights(folder / "hf")
    named = {LAYOUTS[layout](name): tensor for name, tensor in hub.items()}
    assert len(named) == len(hub)
    assert {hub_name(name) for name in named} == hub.keys()
    save_file(named, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    _, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"], "no layout that transformers reads"
    seecal.convert(tmp_path / "hf", tmp_path / "back", to="original")
    assert same(weights(tmp_path / "back"), state)


def test_what_a_training_saves_goes_back_with_what_it_trained(place, tmp_path):
    folder, state, _ = place
    model = AutoModelForImageTextToText.from_pretrained(folder / "hf")
    with torch.no_grad():
        for one in model.parameters():
            one.add_(0.5)
    shutil.copytree(folder / "hf", tmp_path / "trained")
    model.save_pretrained(tmp_path / "trained")
    seecal.convert(tmp_path / "trained", tmp_path / "back", to="original")
    back = weights(tmp_path / "back")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name] + 0.5) for name in state), "the tower's too"


# ---- towers, projector, LoRA ----


def test_an_absent_tower_comes_from_clips_folder(place, tmp_path):
    folder, _, clip = place
    original.checkpoint(tmp_path / "original", "llava", without=["model.vision_tower"])
    told = seecal.convert(tmp_path / "original", tmp_path / "hf", vision_tower=clip)
    held, tower = weights(tmp_path / "hf"), weights(folder / "clip")
    assert any("from" in note and "vision tower" in note for note in told.notes)
    names = [name for name in tower if name.startswith("vision_model.")]
    assert all(torch.equal(held[f"vision_tower.{name}"], tower[name]) for name in names)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")


def test_an_absent_tower_without_a_folder_is_an_error(tmp_path):
    original.checkpoint(tmp_path / "original", "llava", without=["model.vision_tower"])
    with pytest.raises(ValueError, match=r"vision tower is authors/clip.*--vision-tower"):
        seecal.convert(tmp_path / "original", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    known = json.loads((tmp_path / "original" / "config.json").read_text())
    known["mm_vision_tower"] = "openai/clip-vit-large-patch14-336"
    (tmp_path / "original" / "config.json").write_text(json.dumps(known))
    with pytest.raises(ValueError, match=r"no vision tower in it.*--vision-tower"):
        seecal.convert(tmp_path / "original", tmp_path / "hf")


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A language model as it was before it saw images."""
    folder = tmp_path_factory.mktemp("text")
    made = original.tokenizer()
    made.save_pretrained(folder)
    known = original.config("llava", len(made))
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = LlamaConfig(**{name: known[name] for name in fields}, rms_norm_eps=1e-5)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llava", "llava_next"])
@pytest.mark.parametrize("prefix", ["model.", "base_model.model.model.", ""])
def test_a_projector_of_stage_1(kind, prefix, place, language_model, tmp_path):
    _, state, clip = place
    projector = {name: one for name, one in state.items() if "mm_projector" in name}
    torch.save({prefix + n.removeprefix("model."): t for n, t in projector.items()}, tmp_path / "mm_projector.bin")
    parts = {"language_model": str(language_model), "vision_tower": clip}
    images = "anyres" if kind == "llava_next" else "pad"
    told = seecal.convert(tmp_path / "mm_projector.bin", tmp_path / "hf", images=images, **parts)
    assert told.model == kind
    held, text = weights(tmp_path / "hf"), weights(language_model)
    layer = "layers.1.mlp.up_proj.weight"
    assert torch.equal(held[f"language_model.model.{layer}"], text[f"model.{layer}"])
    assert torch.equal(held["multi_modal_projector.linear_2.bias"], state["model.mm_projector.2.bias"])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf")
    assert model.config.vision_feature_layer == -2
    seecal.convert(tmp_path / "hf", tmp_path / "again", to="projector")
    assert same(torch.load(tmp_path / "again" / "mm_projector.bin", weights_only=True), projector)
    with pytest.raises(ValueError, match=r"a projector alone.*--language-model"):
        seecal.convert(tmp_path / "mm_projector.bin", tmp_path / "other", vision_tower=clip)


def test_a_lora_of_the_original(place, language_model, tmp_path):
    _, state, clip = place
    source = tmp_path / "lora"
    source.mkdir()
    text = weights(language_model)
    name = "model.layers.1.self_attn.q_proj"
    a, b = torch.randn(2, original.WIDTH), torch.randn(original.WIDTH, 2)
    stem = f"base_model.model.{name}"
    torch.save({f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b}, source / "adapter_model.bin")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (source / "adapter_config.json").write_text(json.dumps(adapter))
    (source / "config.json").write_text(json.dumps(original.config("llava", len(original.tokenizer()))))
    rest = {f"base_model.model.{name}": one for name, one in state.items() if "mm_projector" in name}
    torch.save(rest, source / "non_lora_trainables.bin")
    parts = {"language_model": str(language_model), "vision_tower": clip}
    seecal.convert(source, tmp_path / "hf", **parts)
    held = weights(tmp_path / "hf")
    torch.testing.assert_close(held[f"language_model.{name}.weight"], text[f"{name}.weight"] + 2 * b @ a)
    other = name.replace("q_proj", "k_proj")
    assert torch.equal(held[f"language_model.{other}.weight"], text[f"{other}.weight"])
    assert torch.equal(held["multi_modal_projector.linear_1.bias"], state["model.mm_projector.0.bias"])
    for start, plain in ((True, True), ("gaussian", True), ("pissa", False), ("olora", False), ("new_one", False)):
        (source / "adapter_config.json").write_text(json.dumps({**adapter, "init_lora_weights": start}))
        with contextlib.nullcontext() if plain else pytest.raises(ValueError, match=f"init_lora_weights is '{start}'"):
            seecal.convert(source, tmp_path / "again", overwrite=True, **parts)
    (source / "adapter_config.json").write_text(json.dumps({**adapter, "layer_replication": [[0, 2]]}))
    with pytest.raises(ValueError, match="no plain LoRA adapter"):
        seecal.convert(source, tmp_path / "other", **parts)
    with pytest.raises(ValueError, match=r"LLaVA's LoRA.*--language-model"):
        seecal.convert(source, tmp_path / "other", vision_tower=clip)
    (source / "non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=r"an adapter without non_lora_trainables\.bin"):
        seecal.convert(source, tmp_path / "other", **parts)


# ---- what is refused, by name ----


def spoiled(folder, **changes):
    """A checkpoint with tensors added, or taken away where they are None."""
    state, _ = original.checkpoint(folder, "llava")
    for name, one in changes.items():
        if one is None:
            del state[name]
        else:
            state[name] = one
    save_file(state, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"model.vision_resampler.query": torch.ones(2)},
            r"it holds model\.vision_resampler\.query, which is no tensor",
        ),
        ({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}, r"it holds language_model\.model\.layers\.7\.mlp"),
        ({"model.mm_projector.4.weight": torch.ones(2)}, r"it holds model\.mm_projector\.4\.weight"),
        ({"model.norm.weight": None}, r"lacks 1 of the model's tensors, language_model\.model\.norm\.weight"),
        ({"model.embed_tokens.weight": None}, r"lacks model\.embed_tokens\.weight"),
        ({"lm_head.weight": None}, r"lacks 1 of the model's tensors, language_model\.lm_head\.weight"),
        (
            {"model.mm_projector.0.bias": torch.ones(3)},
            r"linear_1\.bias has the shape \(3,\), its config\.json says \(32,\)",
        ),
    ],
    ids=["unknown", "a layer too many", "a third layer", "missing", "no words", "no head", "shape"],
)
def test_a_tensor_that_does_not_belong_is_named(changes, said, place, tmp_path):
    with pytest.raises(ValueError, match=said):
        seecal.convert(spoiled(tmp_path / "original", **changes), tmp_path / "hf", vision_tower=place[2])
    assert sorted(one.name for one in tmp_path.iterdir()) == ["original"], "nothing half written is left"


def test_buffers_of_old_versions_are_left_out_and_told(place, tmp_path):
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    old[original.TOWER + "embeddings.position_ids"] = torch.arange(17)[None]
    told = seecal.convert(spoiled(tmp_path / "original", **old), tmp_path / "hf", vision_tower=place[2])
    assert any(note.startswith("2 computed buffers") for note in told.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mm_projector_type": "linear"}, "mm_projector_type: linear"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end: True"),
        ({"mm_vision_select_feature": "cls"}, "mm_vision_select_feature: cls"),
        ({"model_type": "llava_mpt"}, "model_type: llava_mpt"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type: flat"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio: highres"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_what_transformers_cannot_compute_is_refused(changes, said, place, tmp_path):
    original.checkpoint(tmp_path / "original", "llava", **changes)
    with pytest.raises(ValueError, match=said):
        seecal.convert(tmp_path / "original", tmp_path / "hf", vision_tower=place[2])


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "mm_projector.bin"])
def test_a_pickle_with_code_is_not_run(name, place, language_model, tmp_path):
    original.checkpoint(tmp_path / "original", "llava")
    (tmp_path / "original" / "model.safetensors").unlink()
    planted_torch(tmp_path / "original" / name, tmp_path / "mark")
    text = str(language_model) if name.startswith("mm") else None
    with pytest.raises(ValueError, match="more than tensors"):
        seecal.convert(tmp_path / "original", tmp_path / "hf", vision_tower=place[2], language_model=text)
    left_no(tmp_path / "mark")


def test_damaged_and_doubled_files_are_named(place, tmp_path):
    folder = tmp_path / "original"
    original.checkpoint(folder, "llava", files="safetensors shards")
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"00002.*cut off or damaged"):
        seecal.convert(folder, tmp_path / "hf", vision_tower=place[2])
    index = folder / "model.safetensors.index.json"
    named = json.loads(index.read_text())
    lost = {"weight_map": {**named["weight_map"], "model.other": second.name}}
    second.write_bytes(whole)
    index.write_text(json.dumps(lost))
    with pytest.raises(
        ValueError, match=r"it names model\.other, which model-00002-of-00002\.safetensors does not hold"
    ):
        seecal.convert(folder, tmp_path / "hf", vision_tower=place[2])
    second.unlink()
    with pytest.raises(ValueError, match=r"it names model-00002-of-00002\.safetensors, which is not in the folder"):
        seecal.convert(folder, tmp_path / "hf", vision_tower=place[2])
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", second)
    with pytest.raises(ValueError, match="which another file of the folder holds too"):
        seecal.convert(folder, tmp_path / "hf", vision_tower=place[2])


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("original", {"to": "original"}, "a llava_llama model; to the original layout go"),
        ("hf", {}, "no original LLaVA or CAL checkpoint"),
        ("hf", {"to": "ggml"}, "known are transformers, original, projector"),
        ("nowhere", {}, "no such folder"),
        ("hf", {"to": "original", "images": "pad"}, "images: pad: a llava_next model has anyres"),
        ("original", {"images": "wide"}, "known are square, pad, anyres"),
        ("original", {"aux_tower": "x"}, "is no Mini-Gemini"),
        ("original", {"language_model": "x"}, "a whole checkpoint"),
    ],
)
def test_what_is_asked_wrongly_is_told(source, options, said, place, tmp_path):
    with pytest.raises(ValueError, match=said):
        seecal.convert(place[0] / source, tmp_path / "out", **options)
