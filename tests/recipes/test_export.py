"""seecal.export: a run as a folder to publish, under published names, with its model card."""

import json
import re
import shutil

import pytest
import torch
import transformers as hf
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import seecal
from seecal.cli.main import app
from seecal.recipes import run as train
from tests.support import processors
from tests.support.recipe_files import recipe_file

STAGES = [
    {"name": "align", "train": "projector", "weighting": "uniform", "max_steps": 1},
    {
        "name": "tune",
        "train": ["projector", "lora"],
        "lora": {"r": 2},
        "max_steps": 2,
        "alpha": 0.5,
        "logging_steps": 1,
    },
]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """The folder of a run of two stages, the second with an adapter."""
    folder = tmp_path_factory.mktemp("run")
    recipe = recipe_file(folder / "recipe.yaml", tiny, folder / "run", stages=STAGES, eval_data=str(tiny / "eval.json"))
    assert train.run(["--config", recipe]) == 0
    return folder / "run"


def tensors(folder):
    return {name: one for path in folder.glob("*.safetensors") for name, one in load_file(path).items()}


def test_tensors_have_the_published_names(run, tmp_path):
    saved = seecal.export(run, tmp_path / "out", max_shard_size="100KB")
    held = tensors(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == held.keys()
    assert len(set(index.values())) > 2
    starts = (
        "language_model.model.",
        "language_model.lm_head.",
        "multi_modal_projector.",
        "vision_tower.vision_model.",
    )
    assert {name for name in held if not name.startswith(starts)} == set()
    assert all(any(name.startswith(start) for name in held) for start in starts)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    trained = AutoModelForImageTextToText.from_pretrained(run / "final")
    assert all(torch.equal(one, trained.get_parameter(name)) for name, one in model.named_parameters())
    assert saved.tensors == len(held)
    assert saved.parameters == sum(one.numel() for one in model.parameters())


def test_the_processors_files_are_those_of_transformers(run, tmp_path):
    seecal.export(run, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(run / "final")
    processor.save_pretrained(tmp_path / "own")
    processor.image_processor.save_pretrained(tmp_path / "images")
    for own in (*(tmp_path / "own").iterdir(), tmp_path / "images" / "preprocessor_config.json"):
        assert (tmp_path / "out" / own.name).read_bytes() == own.read_bytes()
    others = {one.name for one in (tmp_path / "out").iterdir()} - {one.name for one in (tmp_path / "own").iterdir()}
    assert others == {
        *("config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json", "README.md")
    }


def test_the_card_tells_data_recipe_weighting_metrics_and_versions(run, tmp_path):
    seecal.export(run, tmp_path / "out", name="me/model")
    card = (tmp_path / "out" / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata == {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["seecal", "cal"]}
    assert re.search(r"\| align \| \S+data\.json \| projector \| uniform \| 1 \|", card)
    assert re.search(r"\| tune \| \S+data\.json \| projector, lora \| cal \(alpha 0\.5\) \| 2 \|", card)
    loss = json.loads((run / "final" / "metrics.json").read_text())["stages"][1]["eval"]["eval_loss"]
    assert f"| tune | eval_loss | {loss:.6g} |" in card
    assert "| tune | train_loss |" in card
    assert (run / "final" / "recipe.yaml").read_text() in card
    assert f"seecal {seecal.__version__}" in card
    assert 'from_pretrained("me/model")' in card
    assert "\n\n\n" not in card


def test_an_adapters_folder_is_merged(run, tmp_path):
    saved = seecal.export(run / "final" / "adapter", tmp_path / "out", base=str(run / "stage-1" / "model"))
    whole, merged = tensors(run / "final"), tensors(tmp_path / "out")
    assert 0 < saved.moved < 1e-4
    assert len(whole) == len(merged)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "An adapter was merged" in card
    assert "| tune |" in card, "the run's recipe lies beside it"


def test_a_model_without_a_run_says_so(run, tmp_path):
    shutil.copytree(run / "final", tmp_path / "model")
    for name in ("recipe.yaml", "metrics.json"):
        (tmp_path / "model" / name).unlink()
    seecal.export(tmp_path / "model", tmp_path / "out", dtype="bfloat16")
    assert "holds no recipe" in (tmp_path / "out" / "README.md").read_text()
    assert {one.dtype for one in tensors(tmp_path / "out").values()} == {torch.bfloat16}


def test_damaged_files_of_the_run_are_named(run, tmp_path):
    shutil.copytree(run / "final", tmp_path / "model")
    (tmp_path / "model" / "metrics.json").write_text("{")
    with pytest.raises(ValueError, match=r"metrics\.json: not valid JSON"):
        seecal.export(tmp_path / "model", tmp_path / "out")
    (tmp_path / "model" / "recipe.yaml").write_text("- 1")
    with pytest.raises(ValueError, match=r"recipe\.yaml: no recipe"):
        seecal.export(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(run, tmp_path):
    call = ["export", str(run), str(tmp_path / "out")]
    done = CliRunner().invoke(app, call, catch_exceptions=False)
    assert "loaded again, the logits are equal" in done.output
    with pytest.raises(ValueError, match="it holds files already"):
        CliRunner().invoke(app, call, catch_exceptions=False)


def test_a_family_of_our_own(tmp_path):
    """Mini-Gemini keeps the names of its own saving."""
    folder = tmp_path / "parts"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = processors.tokenizer(pad=None, bos="<s>", eos="</s>", begins=True)
    made.save_pretrained(folder / "text")
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(made), **sizes)).save_pretrained(folder / "text")
    hf.CLIPVisionModel(hf.CLIPVisionConfig(image_size=32, patch_size=8, **sizes)).save_pretrained(folder / "clip")
    aux = hf.ConvNextConfig(hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1])
    hf.ConvNextModel(aux).save_pretrained(folder / "aux")
    parts = [str(folder / name) for name in ("text", "clip")]
    start = seecal.build_start("mgm_hd", *parts, tmp_path / "start", aux_tower=str(folder / "aux"))
    seecal.export(start, tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(start).keys()
