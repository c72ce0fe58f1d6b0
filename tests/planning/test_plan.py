"""What a plan says of tiny models, against bytes, operations, steps and tokens counted in real training."""

import json

import pytest
import torch

from seecal.families.table import image_ids
from seecal.planning.activations import activations_of
from seecal.planning.flops import flops_of
from seecal.planning.memory import Precision, held
from seecal.planning.plan import plan
from seecal.planning.stage_model import stage_model
from seecal.planning.workload import Workload, row_of
from seecal.recipes import run as train
from seecal.recipes.recipe import read
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


def test_ranks_and_epochs_round_up_as_a_trainer_does(tiny, tmp_path):
    def steps(gpus, **changes):
        return plan(recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **changes), gpus=gpus).stages[0]

    assert steps(3, num_train_epochs=1).steps == 6  # 16 batches of 4 on three ranks
    assert steps(1, num_train_epochs=0.5).steps == 8
    assert steps(2, num_train_epochs=2).batch == 8
    assert (steps(4, max_steps=7).steps, steps(4, max_steps=7).records) == (7, 7 * 16)
