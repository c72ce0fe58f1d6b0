"""kill -9 at random moments, also inside a save: a run that goes on is the one that nothing stopped, to the last bit.

The long form, and its figures: pytest -m slow -s tests/trainer/test_kills.py
"""

import json
import random
import subprocess
import sys

import pytest
import yaml

from seecal.recipes.tiny import tiny_folder
from tests.support.paths import ROOT
from tests.support.processes import environment, limit
from tests.support.recipe_files import QUICK

STAGES = [
    {"name": "first", "train": ["projector", "language_model"], "max_steps": 6, "learning_rate": 1e-3},
    {"name": "second", "lora": {"r": 4, "dropout": 0.1}, "max_steps": 6, "gradient_accumulation_steps": 2},
]


def data_in(folder):
    """Two sources of 9 and 7 records, in one of them a damaged image and a record without messages; a recipe of both."""
    tiny_folder(folder)
    rows = json.loads((folder / "data.json").read_text())[:16]
    (folder / "damaged.png").write_bytes((folder / rows[1]["image"]).read_bytes()[:-40])
    rows[1]["image"] = "damaged.png"
    rows[3] = {"id": rows[3]["id"], "conversations": "none"}
    for name, part in (("a", rows[:9]), ("b", rows[9:])):
        (folder / f"{name}.json").write_text(json.dumps(part))
    sources = [{"path": str(folder / f"{name}.json"), "weight": weight} for name, weight in (("a", 2), ("b", 1))]
    more = {"on_bad": "skip", "max_bad_records": None, "save_steps": 2, "save_total_limit": 2, "logging_steps": 3}
    recipe = {**QUICK, **more, "per_device_train_batch_size": 2, "model": str(folder / "model"), "data": sources}
    (folder / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "stages": STAGES}))


def steps_of(folder):
    """(rank, stage, step) → what stands in the journal of it; AssertionError where a step was not the same again."""
    found = {}
    for path in folder.glob("journal-*.jsonl"):
        for text in path.read_text().split("\n")[:-1]:
            line = json.loads(text)
            key = path.name, line.pop("stage"), line.pop("step")
            assert found.setdefault(key, line) == line, (folder.name, key)
    return found


def check(folder, found):
    """All runs of a case are the whole one. Returns what there is to say of them."""
    whole, steps = json.loads((folder / "whole" / "result.json").read_text()), steps_of(folder / "whole")
    assert len(steps) >= 10
    assert whole["quarantine"]
    for number, run in enumerate(found["runs"]):
        assert not any(run["again"]), run["said"]
        assert steps_of(folder / str(number)) == steps, (number, run["kills"])
        assert json.loads((folder / str(number) / "result.json").read_text()) == whole, (number, run["kills"])
    kills = [one for run in found["runs"] for one in run["kills"] if -9 in one["codes"]]
    inside = sum(one["inside a save"] is not None for one in kills)
    return f"{len(kills)} kills, {inside} of them inside a save, in {len(found['runs'])} runs of {len(steps)} steps"


CASES = ("workers-2", "workers-0", "ranks-2", "stream-0", "stream-2", "recipe")
LONG = [pytest.param([f"{case}:20"], marks=pytest.mark.slow, id=f"{case}, 20 kills") for case in CASES]


@pytest.mark.parametrize("asked", [pytest.param(["workers-2:1", "ranks-2:1", "stream-0:1"], id="3 kills"), *LONG])
def test_killed_and_gone_on_with_is_the_run_that_nothing_stopped(tmp_path, asked):
    data_in(tmp_path / "data")
    seed = random.randrange(10**6)
    command = [sys.executable, "-m", "tests.support.kill_worker", str(tmp_path), str(seed), *asked]
    minutes = 2 + sum(int(one.split(":")[1]) for one in asked) / 3
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment(CUDA_VISIBLE_DEVICES=""),
        timeout=limit(minutes), check=False,
    )  # fmt: skip
    assert done.returncode == 0, (seed, done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    for case, runs in found.items():
        print(f"{case}: seed {seed}, {check(tmp_path / case, runs)}")
