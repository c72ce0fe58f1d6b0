"""seecal train on a tiny model: what trains, what is saved, stopping and resuming, errors in one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from seecal.data.collators.vision import VisionCollator
from seecal.models.feature_cache import VisionFeatureCache
from seecal.models.loading import merge
from seecal.recipes import run as train
from seecal.recipes.stage_runner import StageRunner
from tests.support.processes import environment, limit
from tests.support.recipe_files import recipe_file
from tests.support.tiny import tiny_records

ENVIRONMENT = environment(PYTHONUNBUFFERED="1")


def batch_of(folder):
    batch = VisionCollator(AutoProcessor.from_pretrained(folder))(tiny_records(6, seed=3))
    return {name: one for name, one in batch.items() if name != "labels"}


def logits_of(model, folder):
    with torch.no_grad():
        return model.eval()(**batch_of(folder)).logits


# ---- what trains and what is saved ----

KINDS = {
    "projector": {"train": "projector", "learning_rate": 5e-3},
    "full": {"train": ["projector", "language_model", "vision_tower"], "learning_rates": {"vision_tower": 1e-4}},
    "lora": {"lora": {"r": 4, "dropout": 0.1}},
}
TRAINED = {
    "projector": ("model.multi_modal_projector.",),
    "full": ("model.multi_modal_projector.", "model.language_model.", "lm_head.", "model.vision_tower."),
    "lora": ("model.multi_modal_projector.", "model.language_model.layers."),
}


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    """kind → (the run's folder, the logits of the model in memory at its end)."""
    found = {}
    finish = StageRunner.finish

    def noting(self, trainer, metrics):
        found[self.folder.path.name] = (self.folder.path, logits_of(trainer.model, tiny / "model"))
        finish(self, trainer, metrics)

    StageRunner.finish = noting
    try:
        for kind, changes in KINDS.items():
            base = tmp_path_factory.mktemp("run")
            settings = {"learning_rate": 2e-3, "max_steps": 6, "save_steps": 3, **changes}
            file = recipe_file(base / "recipe.yaml", tiny, base / kind, eval_data=str(tiny / "eval.json"), **settings)
            assert train.run(["--config", file]) == 0
    finally:
        StageRunner.finish = finish
    return found


def untouched_in_tower(name):
    """LLaVA reads the layer before the tower's last: that one, and the norm after it, have no gradient."""
    return name.startswith(("model.vision_tower.encoder.layers.1.", "model.vision_tower.post_layernorm."))


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_changes_and_nothing_else(kind, trained, tiny):
    folder, _ = trained[kind]
    before = AutoModelForImageTextToText.from_pretrained(tiny / "model").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(folder / "final").state_dict()
    assert before.keys() == after.keys()
    for name, one in before.items():
        expected = name.startswith(TRAINED[kind]) and not untouched_in_tower(name)
        if kind == "lora" and name.startswith("model.language_model"):
            expected = name.endswith("proj.weight")  # adapters go on linear layers
        if name == "model.language_model.embed_tokens.weight":
            continue  # rows of tokens that do not occur have gradient 0, but weight decay 0 too: equal or not
        assert torch.equal(one, after[name]) != expected, name


@pytest.mark.parametrize("kind", KINDS)
def test_the_final_folder_has_everything(kind, trained):
    folder, _ = trained[kind]
    final = folder / "final"
    metrics = json.loads((final / "metrics.json").read_text())["stages"][0]
    assert metrics["steps"] == 6
    assert metrics["eval"]["eval_loss"] > 0
    resolved = yaml.safe_load((final / "recipe.yaml").read_text())
    assert resolved["stages"][0]["train"] == KINDS[kind].get("train", ["projector", "lora"]) or kind == "projector"
    assert AutoProcessor.from_pretrained(final).chat_template
    assert not list(folder.glob("final/**/*.bin")), "nothing pickled"


def test_reloaded_in_a_fresh_offline_process_with_equal_logits(trained, tiny, tmp_path):
    torch.save(batch_of(tiny / "model"), tmp_path / "batch.pt")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForImageTextToText, AutoProcessor\n"
        "batch = torch.load('batch.pt')\nfound = {}\n"
        "for folder in sys.argv[1:]:\n"
        "    AutoProcessor.from_pretrained(folder)\n"
        "    model = AutoModelForImageTextToText.from_pretrained(folder)\n"
        "    with torch.no_grad():\n        found[folder] = model(**batch).logits\n"
        "assert 'seecal' not in sys.modules\ntorch.save(found, 'logits.pt')\n"
    )
    folders = [str(folder / "final") for folder, _ in trained.values()]
    command = [sys.executable, "-c", code, *folders]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment(TRANSFORMERS_OFFLINE="1"), timeout=limit(2))
    found = torch.load(tmp_path / "logits.pt")
    for kind, (folder, logits) in trained.items():
        tolerance = 2e-4 if kind == "lora" else 0  # W + BA, rounded once more
        torch.testing.assert_close(found[str(folder / "final")], logits, rtol=0, atol=tolerance)


def test_merged_is_the_adapter(trained, tiny):
    folder, logits = trained["lora"]
    adapter = folder / "final" / "adapter"
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= set(os.listdir(adapter))
    targets = json.loads((adapter / "adapter_config.json").read_text())
    assert targets["modules_to_save"] == ["model.multi_modal_projector"]
    assert not any("vision" in one or "lm_head" in one for one in targets["target_modules"])
    adapted = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(tiny / "model"), adapter)
    assert torch.equal(logits_of(adapted, tiny / "model"), logits)
    merged = AutoModelForImageTextToText.from_pretrained(folder / "final")
    torch.testing.assert_close(logits_of(merged, tiny / "model"), logits, rtol=0, atol=2e-4)


def test_an_adapter_without_a_tensor_is_refused(trained, tiny, tmp_path):
    adapter = trained["lora"][0] / "final" / "adapter"
    for file in adapter.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[next(name for name in tensors if "projector" in name)]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"does not hold all that was trained: .*projector"):
        merge(str(tiny / "model"), tmp_path)


def losses_of(run):
    state = json.loads((run / "stage-1" / "trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def test_kept_features_give_the_same_run_and_the_word_table_can_stay(tiny, tmp_path):
    """Two epochs with and without the cache: the same losses and weights; embeddings are frozen in both."""
    settings = {"learning_rate": 2e-3, "num_train_epochs": 2, "freeze": "embeddings", "logging_steps": 1}
    for name, cached in (("plain", False), ("cached", True)):
        file = recipe_file(tmp_path / f"{name}.yaml", tiny, tmp_path / name, cache_vision_features=cached, **settings)
        assert train.run(["--config", file]) == 0
    plain, cached = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("plain", "cached"))
    for name, weights in plain.items():
        torch.testing.assert_close(cached[name], weights, rtol=1e-4, atol=1e-5)
    assert losses_of(tmp_path / "cached") == pytest.approx(losses_of(tmp_path / "plain"), rel=1e-4)
    assert losses_of(tmp_path / "cached")[-1] < losses_of(tmp_path / "cached")[0]
    start = load_file(tiny / "model" / "model.safetensors")
    changed = {name for name in start if not torch.equal(start[name], cached[name])}
    assert any(".layers." in name for name in changed)
    assert any("lm_head" in name for name in changed), "not tied to the embeddings here"
    assert not any("embed_tokens" in name or "vision" in name for name in changed)


def test_the_tower_runs_once_an_image(tiny, tmp_path, monkeypatch):
    runs = []
    original = VisionFeatureCache._compute

    def counting(self, run, pixels, keys, args, kwargs):
        found = original(self, run, pixels, keys, args, kwargs)
        runs.append((len(keys), len(found)))
        return found

    monkeypatch.setattr(VisionFeatureCache, "_compute", counting)
    settings = {"num_train_epochs": 3, "cache_vision_features": True, "train": "projector"}
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **settings)
    assert train.run(["--config", file]) == 0
    images, computed = (sum(column) for column in zip(*runs[2:], strict=True))  # the first two are of the dummy image
    rows = json.loads((tiny / "data.json").read_text())
    drawn = [Image.open(tiny / row["image"]).convert("RGB").tobytes() for row in rows if "image" in row]
    assert images == 3 * len(drawn)
    assert computed == len(set(drawn)) > 1


# ---- progress ----


def test_a_run_into_a_file_says_its_steps_and_evaluation(tiny, tmp_path, capsys):
    settings = {"max_steps": 3, "logging_steps": 1, "eval_data": str(tiny / "eval.json"), "train": "projector"}
    assert train.run(["--config", recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **settings)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "stage 1 of 1: 3 steps" in lines
    assert any(
        re.fullmatch(r"stage 1 of 1: step 3 of 3 in \d+:\d\d, loss \d+\.\d\d  Δ [+-]\d+\.\d\d", line) for line in lines
    )
    assert any(line.startswith("evaluate stage 1 of 1: batch 2 of 2 in") for line in lines)
    assert sum(line.startswith("{'loss'") for line in lines) == 3
    assert "it/s" not in said.err


# ---- stopping and resuming ----


def stopped(file, stage, logs, *more):
    """Run, send SIGTERM after ``logs`` log lines of the stage, return what it wrote."""
    command = [sys.executable, "-m", "seecal", "train", "--config", file, *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    lines, seen = [], -1
    for line in process.stdout:
        lines.append(line)
        if line.startswith(f"stage {stage} of 2"):
            seen = 0
        elif seen >= 0 and line.startswith("{'loss'"):
            seen += 1
            if seen == logs:
                process.send_signal(signal.SIGTERM)
    assert process.wait(limit()) == 143, process.stderr.read()
    return "".join(lines)


def test_killed_twice_and_resumed_is_the_uninterrupted_run(tiny, tmp_path, capsys):
    stages = [
        {"name": "first", "train": ["projector", "language_model"], "max_steps": 120, "learning_rate": 1e-3},
        {
            "name": "second",
            "lora": {"r": 4, "dropout": 0.1},
            "max_steps": 100,
            "gradient_accumulation_steps": 2,
            "train_sampling_strategy": "group_by_length",
        },
    ]
    both = {"stages": stages, "logging_steps": 5, "save_steps": 1000, "learning_rate": 2e-3}
    whole = recipe_file(tmp_path / "whole.yaml", tiny, tmp_path / "whole", **both)
    assert train.run(["--config", whole]) == 0

    file = recipe_file(tmp_path / "killed.yaml", tiny, tmp_path / "killed", **both)
    said = stopped(file, 1, 3)
    assert "Stopped at stage 1 of 2 (first), step" in said
    assert "the same command with --resume" in said
    with pytest.raises(ValueError, match=r"holds an unfinished run\. Continue it with --resume"):
        train.run(["--config", file])
    with pytest.raises(ValueError, match=r"another recipe: stages.1.learning_rate was 0.001, is 0.5"):
        train.run(["--config", file, "--resume", "--stages.1.learning_rate", "0.5"])
    said = stopped(file, 2, 2, "--resume")
    assert "stage 1 of 2 (first): continues at checkpoint-" in said
    assert not (tmp_path / "killed" / "final").exists()
    capsys.readouterr()
    assert train.run(["--config", file, "--resume"]) == 0
    said = capsys.readouterr().out
    assert "stage 1 of 2" not in said, "a finished stage is not repeated"
    assert "stage 2 of 2 (second): continues at checkpoint-" in said
    assert train.run(["--config", file, "--resume"]) == 0

    # Killed between the last step and the saving: the last checkpoint is all that is there.
    shutil.rmtree(tmp_path / "killed" / "final")
    assert train.run(["--config", file, "--resume"]) == 0

    for part in ("stage-1/model", "final", "final/adapter"):
        name = "adapter_model.safetensors" if part == "final/adapter" else "model.safetensors"
        one, other = (load_file(tmp_path / run / part / name) for run in ("whole", "killed"))
        assert one.keys() == other.keys()
        worst = max((one[key] - other[key]).abs().max().item() for key in one)
        assert worst <= 1e-6, part
    steps = [json.loads((tmp_path / run / "final" / "metrics.json").read_text()) for run in ("whole", "killed")]
    assert [[stage["steps"] for stage in one["stages"]] for one in steps] == [[120, 100]] * 2
