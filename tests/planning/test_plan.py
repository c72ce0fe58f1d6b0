"""What a plan says of tiny models, against bytes, operations, steps and tokens counted in real training."""

import json
from collections import Counter

import pytest
import torch

from seecal.families.table import image_ids
from seecal.planning import workload
from seecal.planning.activations import activations_of
from seecal.planning.flops import flops_of
from seecal.planning.memory import Precision, held
from seecal.planning.plan import plan
from seecal.planning.stage_model import stage_model
from seecal.planning.workload import Workload, row_of
from seecal.recipes import run as train
from seecal.recipes.check_data import check_data
from seecal.recipes.recipe import read
from seecal.recipes.run import load_data
from tests.support.counted_step import ROWS
from tests.support.recipe_files import recipe_file
from tests.support.zoo import batch_of
from tests.support.zoo_models import ZOO

PARTS = ["projector", "language_model"]
WITHIN = 0.15


def planned(tiny, base, *, checkpointed, train=PARTS, **changes):
    """The only stage's plan on one process, of one step on all 64 records, without mixed precision."""
    settings = {"gradient_checkpointing": checkpointed, "train": train, "per_device_train_batch_size": 64}
    file = recipe_file(base / "r.yaml", tiny, base / "run", **{**settings, "max_steps": 1, **changes})
    return plan(file, gpus=1).stages[0]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """(prepared stage model, workload) of the zoo's Qwen 3, for each of both ways of keeping activations."""
    base = tmp_path_factory.mktemp("qwen")
    model = ZOO["qwen3_vl"].model()
    model.config.save_pretrained(base)
    batch = batch_of("qwen3_vl", ROWS)
    ids = torch.tensor(sorted(image_ids(model.config)))
    each = [{name: value[index : index + 1] for name, value in batch.items()} for index in range(len(ROWS))]
    rows = tuple(row_of(one, ids) for one in each)
    images = {name: batch[name] for name in ("pixel_values", "image_grid_thw")}
    found = {}
    for checkpointed in (False, True):
        file = recipe_file(
            base / "r.yaml",
            base,
            base / "run",
            model="nowhere/qwen",
            architecture=str(base),
            train=[*PARTS, "vision_tower"],
            gradient_checkpointing=checkpointed,
            per_device_train_batch_size=len(ROWS),
        )
        recipe = read(file)
        stage = stage_model(recipe, recipe.stages[0], str(base))
        stage.prepare(recipe.stages[0], images)
        found[checkpointed] = stage, Workload(len(rows), rows, images, rows, ())
    return found


# ---- Bytes ----


@pytest.mark.parametrize("job", ["llava", "llava, checkpointed", "llava, projector"])
def test_bytes_of_a_tiny_llava_are_those_of_its_tensors(tiny, counted, tmp_path, job):
    real, what = counted[job], ["projector"] if "projector" in job else PARTS
    one = planned(tiny, tmp_path, checkpointed=job != "llava", train=what).engines["single"]
    assert one.held.weights == real["weights"]
    assert one.held.gradients == real["gradients"]
    assert one.held.optimizer == pytest.approx(real["optimizer"], rel=0.01)  # AdamW also counts its steps
    assert one.activations.total == pytest.approx(real["peak"], rel=WITHIN)
    assert one.held.communication == 0


@pytest.mark.parametrize("job", ["qwen", "qwen, checkpointed"])
def test_bytes_of_a_tiny_qwen_are_those_of_its_tensors(counted, qwen, job):
    real, (stage, work) = counted[job], qwen[job != "qwen"]
    precision = Precision(4, bf16=False)
    bytes_held = held("single", stage.counts, 1, precision)
    assert (bytes_held.weights, bytes_held.gradients) == (real["weights"], real["gradients"])
    assert bytes_held.optimizer == pytest.approx(real["optimizer"], rel=0.01)
    assert activations_of("single", stage, work, precision).total == pytest.approx(real["peak"], rel=WITHIN)


def test_checkpointing_is_worth_in_a_plan_what_it_is_worth_in_training(tiny, counted, tmp_path):
    plain, again = (planned(tiny, tmp_path, checkpointed=on).engines["single"].activations for on in (False, True))
    saved = counted["llava"]["kept"] - counted["llava, checkpointed"]["kept"]
    assert plain.decoder - again.decoder == pytest.approx(saved, rel=WITHIN)


# ---- Operations ----


@pytest.mark.parametrize("job", ["llava", "llava, checkpointed", "llava, projector"])
def test_operations_of_a_tiny_llava_are_those_that_torch_counts(tiny, counted, tmp_path, job):
    real, what = counted[job], ["projector"] if "projector" in job else PARTS
    flops = planned(tiny, tmp_path, checkpointed=job != "llava", train=what).flops
    assert flops.total == pytest.approx(real["forward"] + real["backward"], rel=WITHIN)
    # The head's gradients are computed in the forward
    assert flops.backward + flops.recomputed == pytest.approx(real["backward"], rel=WITHIN)


@pytest.mark.parametrize("job", ["qwen", "qwen, checkpointed"])
def test_operations_of_a_tiny_qwen_are_those_that_torch_counts(counted, qwen, job):
    real, (stage, work) = counted[job], qwen[job != "qwen"]
    flops = flops_of(stage, work, work.records)
    assert flops.total == pytest.approx(real["forward"] + real["backward"], rel=WITHIN)


def test_what_cal_costs_is_what_the_pass_without_the_image_costs(tiny, counted, tmp_path):
    with_it = planned(tiny, tmp_path, checkpointed=False).flops
    without = planned(tiny, tmp_path, checkpointed=False, weighting="uniform").flops
    assert without.contrast == without.cal_share == 0
    assert with_it.total - with_it.contrast == without.total
    every = planned(tiny, tmp_path, checkpointed=False, contrast_every=4).flops
    assert every.contrast == pytest.approx(with_it.contrast / 4)
    masked = planned(tiny, tmp_path, checkpointed=False, contrast="mask").flops
    assert masked.contrast > with_it.contrast


# ---- Steps and tokens ----


def test_steps_and_tokens_are_those_of_a_run(tiny, counted, tmp_path):
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", num_train_epochs=1, gradient_accumulation_steps=3)
    said = plan(file, gpus=1).stages[0]
    assert train.run(["--config", file]) == 0
    state = json.loads((tmp_path / "run" / "stage-1" / "trainer_state.json").read_text("utf8"))
    assert said.steps == state["global_step"] == 6  # 16 batches, three a step
    assert said.records == 64
    assert said.image_tokens + said.text_tokens == counted["llava"]["main_tokens"]
    assert said.label_tokens == counted["llava"]["label_tokens"]


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """Path of each data set → its plan of one epoch."""
    base, paths = tmp_path_factory.mktemp("alone"), [str(tiny / name) for name in ("data.json", "eval.json")]
    found = {}
    for path in paths:
        file = recipe_file(base / "r.yaml", tiny, base / "run", data=path, num_train_epochs=1)
        found[path] = plan(file, gpus=1).stages[0]
    return found


@pytest.mark.parametrize(("first", "second", "seed"), [(1, 9, 42), (9, 1, 42), (1, 1, 7)])
def test_a_mixture_has_the_records_that_are_drawn(tiny, alone, tmp_path, first, second, seed):
    """Small sets with large weights are repeated; tokens are those of the sets, as often as each is drawn."""
    sets = [{"path": str(tiny / name), "weight": one} for name, one in (("data.json", first), ("eval.json", second))]
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", data=sets, num_train_epochs=1, seed=seed)
    said = plan(file, gpus=1).stages[0]
    data = load_data(read(file).stages[0].data, streaming=False, on_bad="error", seed=seed)
    counts = Counter(data["source"])
    assert said.records == len(data) == sum(counts.values())
    assert said.steps == -(-len(data) // 4)
    for name in ("image_tokens", "text_tokens", "label_tokens"):
        expected = sum(counts[path] * getattr(one, name) / one.records for path, one in alone.items())
        assert getattr(said, name) == pytest.approx(expected)
    assert f"{len(data):,} records drawn by weight from 76, lengths of all" in said.notes


def test_sets_of_different_sizes_stand_for_their_own_records(tiny, tmp_path, monkeypatch):
    """Where not all are looked at: one of each set in turn is."""
    monkeypatch.setattr(workload, "SAMPLE", 4)
    row = next(row for row in json.loads((tiny / "data.json").read_text()) if "image" in row)
    sets, answers = [], ("red", "red red red red red red red red")
    for name, count, answer in zip("ab", (40, 10), answers, strict=True):
        turns = [row["conversations"][0], {"from": "gpt", "value": answer}]
        (tmp_path / name).with_suffix(".json").write_text(json.dumps([{**row, "conversations": turns}] * count))
        sets.append({"path": str(tmp_path / f"{name}.json"), "image_root": str(tiny)})

    def labels(data):
        file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", data=data, num_train_epochs=1)
        return plan(file, gpus=1).stages[0].label_tokens

    assert labels(sets) == pytest.approx(labels(sets[0]) + labels(sets[1]))


def test_a_mixture_that_is_not_there_has_its_weights_too(tiny, tmp_path):
    names = ("blip_laion_cc_sbu_558k.json", "llava_v1_5_mix665k.json")
    sets = [{"path": f"away/{name}", "weight": weight} for name, weight in zip(names, (3, 1), strict=True)]
    said = plan(recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", data=sets, num_train_epochs=1), gpus=1)
    assert said.stages[0].records == pytest.approx(4 * 665_298, rel=0.01)
    sets[0]["weight"] = 1000
    said = plan(recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", data=sets, num_train_epochs=1), gpus=1)
    assert said.stages[0].records == pytest.approx(1001 * 665_298, rel=1e-6), "by expectation"


def test_what_cannot_be_used_and_what_is_left_out_is_not_planned(tiny, tmp_path):
    rows = json.loads((tiny / "data.json").read_text())
    for number in (3, 7, 9, 20):
        rows[number]["conversations"] = "none"
    (tiny / "some.json").write_text(json.dumps(rows))
    one = {"data": str(tiny / "some.json"), "num_train_epochs": 1, "on_bad": "skip", "max_bad_records": None}
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **one)
    said = plan(file, gpus=1).stages[0]
    data = load_data(read(file).stages[0].data, streaming=False, on_bad="skip", seed=42)
    assert (said.records, said.steps) == (len(data), 15) == (60, 15)
    assert "4 of the first 64 cannot be used" in said.notes
    check_data(file, out=tmp_path / "bad.jsonl", workers=1)
    file = recipe_file(
        tmp_path / "r.yaml",
        tiny,
        tmp_path / "run",
        **{**one, "on_bad": "error"},
        skip_records=str(tmp_path / "bad.jsonl"),
    )
    assert plan(file, gpus=1).stages[0].records == 60


def test_batches_that_are_not_full_may_be_left_out(tiny, tmp_path):
    settings = {"per_device_train_batch_size": 5, "dataloader_drop_last": True, "num_train_epochs": 2}
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **settings)
    alone, three = (plan(file, gpus=gpus).stages[0] for gpus in (1, 3))
    assert (alone.steps, alone.records) == (2 * 12, 2 * 60)
    assert (three.steps, three.records) == (2 * 4, 2 * 60)
    filled = plan(
        recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **{**settings, "dataloader_drop_last": False}), gpus=1
    )
    assert (filled.stages[0].steps, filled.stages[0].records) == (2 * 13, 2 * 64)


def test_ranks_and_epochs_round_up_as_a_trainer_does(tiny, tmp_path):
    def steps(gpus, **changes):
        return plan(recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **changes), gpus=gpus).stages[0]

    assert steps(3, num_train_epochs=1).steps == 6  # 16 batches of 4 on three ranks
    assert steps(1, num_train_epochs=0.5).steps == 8
    assert steps(2, num_train_epochs=2).batch == 8
    assert (steps(4, max_steps=7).steps, steps(4, max_steps=7).records) == (7, 7 * 16)
