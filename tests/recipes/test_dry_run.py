"""``seecal train --dry-run``: a recipe that is right passes, and what is wrong in one is found by its name."""

import json
import shutil

import pytest
import yaml

from seecal.models.known import known_config
from seecal.models.stand_in import stand_in_processor
from seecal.recipes.dry_run import dry_run, run
from seecal.recipes.real_size import RealSize
from seecal.recipes.recipe import read
from seecal.recipes.tiny import tiny_folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def try_out(tiny, tmp_path, monkeypatch):
    """settings → what a dry run finds of a user's own recipe about the tiny model and its data."""
    monkeypatch.chdir(tmp_path)

    def go(**changes):
        settings = {
            "model": str(tiny / "model"),
            "data": str(tiny / "data.json"),
            "output_dir": "out",
            "max_length": 512,
        }
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump({**settings, **changes}))
        found = dry_run(file)
        assert [one.name for one in tmp_path.iterdir()] == ["recipe.yaml"], "a dry run leaves nothing behind"
        return found

    return go


STAGES = [
    {"name": "align", "train": "projector", "weighting": "uniform"},
    {"name": "tune", "train": ["projector", "language_model"], "learning_rates": {"projector": 1e-3}},
]


def test_a_recipe_of_the_users_own(try_out, tiny):
    found = try_out(stages=STAGES, gradient_accumulation_steps=4, eval_data=str(tiny / "eval.json"), bf16=True)
    assert found.problems == []
    assert found.to_provide == []
    first, second = found.stages
    assert (first.moved, sorted(second.moved)) == (["projector"], ["language_model", "projector"])
    assert first.trains == {"projector": 64 * 32 + 64 + 64 * 64 + 64}, "of the real model"
    assert first.delta is None, "uniform weights need no second pass"
    assert second.delta is not None
    assert all(one.label_tokens > 0 and len(one.losses) == 2 for one in found.stages)
    replaced = {what: (real, here) for what, real, here in found.replaced}
    assert replaced[str(tiny / "data.json")] == ("all records", "the first 32")
    assert replaced["stage 1: gradient_accumulation_steps"] == ("4", "2")
    assert replaced["precision"][1] == "float32 on the CPU"
    assert "processor" not in replaced, "the model's own is used"
    text = str(found)
    assert "Stage 2 of 2 (tune)" in text
    assert "Nothing found that training would stop at" in text
    assert isinstance(found.answer, str)


NO_ANSWERS = (
    "{% for m in messages %}{% for p in m.content %}{% if p.type == 'image' %}<image>{% elif m.role == 'user' %}"
    "{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)
NO_IMAGES = "{% for m in messages %}{{ m.role }}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
LORA = {"train": ["projector", "lora"], "lora": {"r": 2}}
# What is wrong, and the words that name it
PLANTED = {
    "a group that the model lacks": (
        {"train": ["projector", "image_newline"]},
        "has no image_newline that seecal knows",
    ),
    "a learning rate of what is frozen": (
        {"train": "projector", "learning_rates": {"vision_tower": 1e-6}},
        "learning_rates: vision_tower does not train here; what trains is projector",
    ),
    "groups that exclude each other": ({"train": ["lora", "language_model"]}, "train: lora and language_model"),
    "a missing data file": ({"data": "gone/data.json"}, "data: gone/data.json: not there"),
    "a template without answers": ({"chat_template": NO_ANSWERS}, "leaves out its message 1 (role 'assistant')"),
    "a template that is no Jinja": (
        {"chat_template": "{% for m in messages %}{{ m.role }"},
        "cannot render its messages",
    ),
    "a template without images": ({"chat_template": NO_IMAGES}, "wrote no placeholder ('<image>') for its 1 images"),
    "an unknown setting of the processor": ({"processor_kwargs": {"max_pixel": 9}}, "has no setting 'max_pixel'"),
    "images of another size than the tower's": (
        {"processor_kwargs": {"size": {"height": 64, "width": 64}, "crop_size": {"height": 64, "width": 64}}},
        "makes pictures of 64 × 64 pixels, and the vision tower sees 32 × 32",
    ),
    "images longer than max_length": (
        {"max_length": 16},
        "is 16 image tokens, which cannot be cut, and leaves 0 for text",
    ),
    "options that contradict each other": ({"pool_scope": "released"}, "pool_scope='released' with contrast='drop'"),
    "an unknown weighting": ({"weighting": "call"}, "weighting='call' is not in seecal.WEIGHTINGS"),
    "features cached where pixels change": (
        {"contrast": "blur", "cache_vision_features": True},
        "cache_vision_features with contrast: blur",
    ),
    "two precisions": ({"bf16": True, "fp16": True}, "bf16 and fp16 are both true"),
    "a DeepSpeed file that is not there": (
        {"deepspeed": "gone/zero2.json"},
        "deepspeed: gone/zero2.json: no such file",
    ),
    "scores that are not there": ({"weights": "gone"}, "weights: gone: no such folder"),
    "4 bits without adapters": (
        {"model_init_kwargs": {"quantization_config": {"load_in_4bit": True}}},
        "weights in 4 bits do not train",
    ),
    "an unknown attention": (
        {"model_init_kwargs": {"attn_implementation": "flash_attn"}, **LORA},
        "attn_implementation: flash_attn: no such attention",
    ),
    "an unknown argument of the model": ({"model_init_kwargs": {"dtypee": "float32"}}, "argument 'dtypee'"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named(name, try_out):
    changes, words = PLANTED[name]
    found = try_out(**changes)
    assert [one for one in found.problems if words in one], found.problems
    assert not found.passed
    assert words in str(found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rat": 1}, "learning_rat: no such key. Did you mean learning_rate?"),
        ({"max_steps": 1.5}, "max_steps: expected a whole number, got 1.5"),
        ({"model": "models/gone/x"}, "model: models/gone/x: no such folder, and nothing is known"),
        ({"model": "models/gone/x", "architecture": "llava-9b"}, "architecture: llava-9b"),
    ],
)
def test_what_cannot_even_be_read_is_an_error(changes, words, try_out):
    with pytest.raises(ValueError, match=words.replace("?", r"\?")):
        try_out(**changes)


GRID = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        (
            {"processor_kwargs": {"image_grid_pinpoints": [[300, 672]]}},
            "[300, 672] is no whole number of tiles: the vision",
        ),
        ({"processor_kwargs": {"image_grid_pinpoints": GRID[:3]}}, "They have to be the same, in the same order"),
        ({"max_length": 2048}, "is 2,928 image tokens, which cannot be cut, and leaves 0 for text"),
        ({"max_length": 2940, "on_long": "drop"}, "leaves 12 for text: such records are left out"),
    ],
    ids=["right", "no multiple", "another list", "too short", "no room for text"],
)
def test_the_real_size_is_looked_at(changes, words, tmp_path):
    """Of a model whose folder is not there."""
    settings = {"model": "models/next", "data": "data.json", "output_dir": "out", "max_length": 4096, **changes}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    config = known_config("llava-next-7b")
    recipe, processor = read(str(tmp_path / "recipe.yaml")), stand_in_processor(config).processor
    problems = RealSize(recipe, config, processor, own=False).problems()
    assert len(problems) == (words is not None)
    assert words is None or words in problems[0]


def test_a_tokenizer_that_stands_in_does_not_make_texts_longer(try_out):
    """LLaVA's 576 image tokens, its system prompt of 35 and a few words."""
    found = try_out(model="models/gone/x", architecture="llava-1.5-7b", on_long="error", max_length=660)
    assert found.problems == ["model: models/gone/x: not there, so training would stop at once. Correct the path"]


def test_adapters_on_both_sides_under_a_contrast_on_pixels(try_out, tiny):
    lora = {"r": 2, "target": ["language_model", "vision_tower"]}
    found = try_out(
        lora=lora, contrast="swap", eval_data=str(tiny / "eval.json"), eval_strategy="steps", eval_steps=100
    )
    assert found.problems == []
    assert sorted(found.stages[0].moved) == ["lora", "projector"]


def test_all_stages_are_looked_at_whatever_is_wrong_with_the_first(try_out):
    stages = [{"train": ["projector", "image_newline"]}, {"max_length": 16}, {"data": "gone.json"}]
    problems = try_out(stages=stages).problems
    for words in ("stage 1: train: Llava", "stage 2: max_length=16", "data: gone.json"):
        assert [one for one in problems if one.startswith(words)], problems
    assert len(problems) == 3, "each once"


def test_a_bad_record_among_the_first(try_out, tiny, tmp_path):
    rows = json.loads((tiny / "data.json").read_text())
    rows[3]["image"] = "images/gone.png"
    (tiny / "bad.json").write_text(json.dumps(rows))
    assert (
        "record 'r3' (entry 3): image 'images/gone.png' is not in" in try_out(data=str(tiny / "bad.json")).problems[0]
    )
    skipped = try_out(data=str(tiny / "bad.json"), on_bad="skip")
    assert skipped.problems == []
    rows[3]["image"] = rows[2]["image"]
    rows[40]["image"] = "images/gone.png"
    (tiny / "late.json").write_text(json.dumps(rows))
    assert try_out(data=str(tiny / "late.json")).problems == [], "no more than the first 32 are read"


def test_a_folder_without_weights_or_with_pickles(try_out, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(tiny / "model", folder)
    (folder / "model.safetensors").unlink()
    assert f"model: {folder}: it lacks model.safetensors. Copy the folder again" in try_out(model=str(folder)).problems
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="a PyTorch file, and those hold pickles"):
        try_out(model=str(folder))


def test_the_processor_of_another_model(try_out, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "model"
    shutil.copytree(tiny / "model", folder)
    config = json.loads((folder / "config.json").read_text())
    config["image_token_index"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    problems = try_out(model=str(folder)).problems
    assert "but LlavaForConditionalGeneration puts image features at id" in problems[0]


def test_shipped_recipes_leave_paths_to_their_user(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = dry_run("tiny", overrides=["--stages.2.data", "my/own.json"])
    assert found.problems == ["data: my/own.json: not there, so training would stop at once. Correct the path"]
    assert found.to_provide == ["model: out/tiny/model", "data: out/tiny/data.json", "data: out/tiny/eval.json"]
    assert [one.moved for one in found.stages] == [["projector"], ["projector", "language_model"]]


def test_the_command(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = [
        "--model",
        str(tiny / "model"),
        "--data",
        str(tiny / "data.json"),
        "--output_dir",
        "out",
        "--train",
        "projector",
    ]
    assert run(given) == 0
    assert "Nothing found" in capsys.readouterr().out
    assert run([*given, "--data", "gone.json"]) == 2
    assert "1 problem in" in capsys.readouterr().out
    for wrong, words in ((["--resume"], "leaves nothing behind"), (["--config", "a", "b"], "--config takes one file")):
        with pytest.raises(ValueError, match=words):
            run([*given, *wrong])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without accelerate launch"):
        run(given)
