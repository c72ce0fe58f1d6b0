"""seecal train on the micro VLM's real weights, whose head is tied to its embeddings: LoRA, full and projector-only."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from seecal.data.collators.vision import VisionCollator
from seecal.models import micro
from seecal.recipes import run as train
from seecal.recipes.stage_runner import StageRunner
from tests.support.paths import ROOT
from tests.support.processes import environment, limit
from tests.support.tiny import tiny_records

pytestmark = pytest.mark.real
KINDS = {
    "projector": (["--train", "projector"], ("model.multi_modal_projector.",)),
    "full": (["--train", "projector", "language_model"], ("model.multi_modal_projector.", "model.language_model.")),
    "lora": (["--lora.r", "4"], ("model.multi_modal_projector.", "model.language_model.layers.")),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("micro")
    for part in micro.build():
        part.save_pretrained(folder / "model")
    rows = []
    for record in tiny_records(4):
        image = {"image": f"{record['id']}.png"} if record["images"] else {}
        for one in record["images"]:
            one.save(folder / image["image"])
        rows.append({"id": record["id"], "messages": record["messages"], **image})
    (folder / "data.json").write_text(json.dumps(rows))
    return folder


def logits_of(model, folder):
    processor = AutoProcessor.from_pretrained(folder)
    batch = VisionCollator(processor)(tiny_records(2, seed=5))
    with torch.no_grad():
        return model.eval()(**{name: one for name, one in batch.items() if name != "labels"}).logits


IN_ANOTHER_PROCESS = """
import sys, seecal, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
from tests.recipes.test_run_micro import logits_of
torch.save(logits_of(AutoModelForImageTextToText.from_pretrained(sys.argv[1]), sys.argv[1]), sys.argv[2])
"""


@pytest.mark.parametrize("kind", ["projector", pytest.param("full", marks=pytest.mark.slow), "lora"])
def test_what_trains_changes_and_reloads(kind, place, tmp_path, monkeypatch):
    """Trained tensors changed, all others are bit-equal; a fresh offline process gets the logits of the end of training."""
    arguments, trained = KINDS[kind]
    at_the_end = []
    finish = StageRunner.finish
    noting = lambda self, trainer, metrics: (  # noqa: E731
        at_the_end.append(logits_of(trainer.model, place / "model")),
        finish(self, trainer, metrics),
    )
    monkeypatch.setattr(StageRunner, "finish", noting)
    here = ["--model", place / "model", "--data", place / "data.json", "--output_dir", tmp_path / "run"]
    settings = (
        "--use_cpu --bf16 false --max_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 2 --disable_tqdm"
    )
    assert (
        train.run([*map(str, here), *settings.split(), "--save_strategy", "no", "--weight_decay", "0", *arguments]) == 0
    )
    before = AutoModelForImageTextToText.from_pretrained(place / "model").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "final").state_dict()
    code = [sys.executable, "-c", IN_ANOTHER_PROCESS, tmp_path / "run" / "final", tmp_path / "logits.pt"]
    offline = environment(TRANSFORMERS_OFFLINE="1")
    subprocess.run(list(map(str, code)), check=True, cwd=ROOT, env=offline, timeout=limit(2))
    reloaded = torch.load(tmp_path / "logits.pt", weights_only=True)
    # LoRA's final model is the merged one: W + BA, rounded once more, through 30 layers
    tolerance = 2e-3 * float(at_the_end[0].abs().max()) if kind == "lora" else 0
    torch.testing.assert_close(reloaded, at_the_end[0], rtol=0, atol=tolerance)
    assert before.keys() == after.keys()
    for name, one in before.items():
        inside = name.startswith(trained)
        if name == "lm_head.weight":  # the embeddings under another name
            inside = kind == "full"
        if kind == "lora" and name.startswith("model.language_model"):
            inside = name.endswith("proj.weight")
        assert torch.equal(one, after[name]) != inside, name
