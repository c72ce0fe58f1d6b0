"""seecal train on the micro VLM's real weights, whose head is tied to its embeddings: LoRA, full and projector-only."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText

from seecal import train
from seecal.models import micro
from tests.tiny import tiny_records

pytestmark = [pytest.mark.real, pytest.mark.xdist_group("micro")]
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


@pytest.mark.parametrize("kind", KINDS)
def test_what_trains_changes_and_nothing_else(kind, place, tmp_path):
    arguments, trained = KINDS[kind]
    here = ["--model", place / "model", "--data", place / "data.json", "--output_dir", tmp_path / "run"]
    settings = (
        "--use_cpu --bf16 false --max_steps 2 --learning_rate 1e-3 --per_device_train_batch_size 2 --disable_tqdm"
    )
    assert (
        train.run([*map(str, here), *settings.split(), "--save_strategy", "no", "--weight_decay", "0", *arguments]) == 0
    )
    before = AutoModelForImageTextToText.from_pretrained(place / "model").state_dict()
    after = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "final").state_dict()
    assert before.keys() == after.keys()
    for name, one in before.items():
        inside = name.startswith(trained)
        if name == "lm_head.weight":  # the embeddings under another name
            inside = kind == "full"
        if kind == "lora" and name.startswith("model.language_model"):
            inside = name.endswith("proj.weight")
        assert torch.equal(one, after[name]) != inside, name
