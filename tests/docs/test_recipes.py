"""docs/recipes.md: its recipes and commands run, every key is on it; the paper's recipes run on a tiny start model."""

import json
import re
import shlex

import pytest
import torch
import yaml
from safetensors.torch import load_file
from scripts.options_table import with_section
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)
from typer.testing import CliRunner

from seecal import build_start
from seecal.cli.main import app
from seecal.recipes import run as train
from seecal.recipes.help import config_fields
from seecal.recipes.recipe import KEYS
from tests.support.paths import ROOT
from tests.support.run_example import run_example
from tests.support.tiny import tiny_tokenizer

PAGE = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
(BASE,) = re.findall(r"```yaml base\n(.*?)```", PAGE, re.S)
SNIPPETS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.S) for line in block.splitlines()]
RECIPE_COMMANDS = [line for line in COMMANDS if line.startswith("seecal train ")]


def test_the_options_are_those_of_the_code():
    assert with_section(PAGE) == PAGE, "docs/recipes.md is out of date: python -m scripts.options_table"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the page's first command has been run."""
    folder = tmp_path_factory.mktemp("page")
    first, *rest = COMMANDS
    assert rest == RECIPE_COMMANDS
    assert first == "python examples/tiny_folder.py out/tiny"
    run_example("tiny_folder.py", folder / "out" / "tiny")
    (line,) = re.findall(r"# (seecal score .*)", PAGE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        CliRunner().invoke(app, shlex.split(line)[1:], catch_exceptions=False)
    return folder


@pytest.fixture
def there(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_a_snippet_trains(number, there, tmp_path):
    recipe = {**yaml.safe_load(BASE), **yaml.safe_load(SNIPPETS[number]), "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert train.run(["--config", str(tmp_path / "recipe.yaml"), "--disable_tqdm", "--report_to", "none"]) == 0
    assert (tmp_path / "run" / "final" / "recipe.yaml").exists()


@pytest.mark.parametrize("line", RECIPE_COMMANDS)
def test_a_command_runs(line, there):
    given = [*shlex.split(line)[1:], "--disable_tqdm", "--report_to", "none"]
    assert CliRunner().invoke(app, given, catch_exceptions=False).exit_code == 0


def test_every_key_is_on_the_page():
    written = "\n".join([BASE, *SNIPPETS])
    for name in (*KEYS, *(name for name, _, _ in config_fields())):
        assert re.search(rf"^[ -]*{name}:", written, re.M), name


def test_the_lora_example(tmp_path, capsys):
    run_example("lora.py", "tiny", tmp_path / "out")
    assert re.search(r"lora +14,848 parameters", capsys.readouterr().out)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out" / "merged")


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A tiny language model with its tokenizer, and a tiny CLIP tower, as the hub has them."""
    folder = tmp_path_factory.mktemp("parts")
    tokenizer = tiny_tokenizer()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, bos_token="<s>", eos_token="<|end|>"
    ).save_pretrained(folder / "text")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(folder / "text")
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder / "vision")
    return folder


def newline(folder):
    (tensor,) = (one for name, one in load_file(folder / "model.safetensors").items() if name.endswith("image_newline"))
    return tensor


@pytest.mark.parametrize(("family", "recipe"), [("llava", "llava-1.5-7b"), ("llava_next", "llava-next-7b")])
def test_the_papers_recipe_from_its_start_model(family, recipe, parts, there, tmp_path, capsys):
    build_start(family, str(parts / "text"), str(parts / "vision"), tmp_path / "start")
    small = "--max_steps 1 --warmup_steps 0 --per_device_train_batch_size 2 --dataloader_num_workers 0"
    here = f"--model {tmp_path / 'start'} --output_dir {tmp_path / 'run'} --data out/tiny/data.json"
    run = f"--config {recipe} {here} {small} --use_cpu --bf16 false --disable_tqdm"
    assert train.run(shlex.split(run)) == 0
    said = capsys.readouterr().out
    assert "stage 1 of 2 (align), projector:" in said
    assert ("vision_tower" in said.split("stage 2 of 2")[1].split("frozen")[0]) == (family == "llava_next")
    template = (tmp_path / "run" / "final" / "chat_template.jinja").read_text()
    assert "ASSISTANT" in template, "the model's own template, not that of stage 1"
    aligned, tuned = tmp_path / "run" / "stage-1" / "model", tmp_path / "run" / "final"
    settings = [json.loads((one / "processor_config.json").read_text()) for one in (aligned, tuned)]
    padded = [one["image_processor"]["do_pad"] for one in settings]
    assert padded == ([False, True] if family == "llava" else [True, True]), "square, then pad; NeXT has tiles"
    if family == "llava_next":
        start, after_1, after_2 = (newline(one) for one in (tmp_path / "start", aligned, tuned))
        assert torch.equal(start, after_1), "frozen while the projector alone trains"
        assert not torch.equal(after_1, after_2)
