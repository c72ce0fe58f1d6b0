"""Runs are made once, in pieces, by several workers, and a stop loses the ones that were going alone."""

import dataclasses
import queue
import signal
import subprocess
import sys
import threading
import time
import types

import psutil
import pytest
from experiments.designs import design
from experiments.items import unpacked
from experiments.nano.plan import plan_of
from experiments.rows import Rows
from experiments.runner import Minutes, Scale, missing, planned, pool

import experiments
from experiments import nano, runner, trials
from tests.support.evidence_rows import facts_of, row_of
from tests.support.paths import ROOT
from tests.support.processes import environment, limit

NAME, TINY = "clamp", Scale("gpu", 2)


class Worker(threading.Thread):
    """A thread in the place of a process."""

    def __init__(self, target, args):
        super().__init__(target=target, args=args, daemon=True)

    def terminate(self):
        pass

    def join(self, timeout=None):
        pass


@pytest.fixture
def made(monkeypatch):
    """Runs that are only counted; what makes them can be changed."""
    done = []

    def trial(run, folder, scale, steps):
        if (failure := made.fails(run)) is not None:
            raise failure
        done.append(run)
        return row_of(run, scale=scale, steps=steps) | {"steps": steps}

    made = types.SimpleNamespace(done=done, fails=lambda run: None)
    fake = types.SimpleNamespace(Queue=queue.Queue, Process=Worker)
    monkeypatch.setattr(runner.multiprocessing, "get_context", lambda kind: fake)
    monkeypatch.setattr(runner.signal, "signal", lambda *given: None)
    monkeypatch.setattr(runner, "_silenced", lambda: None)
    monkeypatch.setattr(trials, "trial", trial)
    return made


def piece(folder, **settings):
    said = []
    code = runner.run(NAME, folder, folder / "cache", say=said.append, **{"scale": TINY, "minutes": 600.0} | settings)
    return code, said


def test_every_run_is_made_once_and_a_second_call_makes_none(tmp_path, made):
    code, said = piece(tmp_path)
    runs = design(NAME).runs
    assert code == 0
    assert {run.key() for run in made.done} == {run.key() for run in runs}
    assert len(made.done) == len(runs) == len(Rows(NAME, tmp_path).all)
    assert f"{len(runs)} of {len(runs)}: llava-shapes, seed" in said[-1]
    code, said = piece(tmp_path)
    assert code == 0
    assert len(made.done) == len(runs)
    assert said == [f"{NAME}: {len(runs)} of {len(runs)} runs have their row; 0 now, which take 0 minutes"]
    assert not list(tmp_path.glob(".*.lock"))


def test_a_piece_ends_in_time_and_the_next_goes_on(tmp_path, made):
    """The plan says 0.6 minutes a run: in half a minute a worker makes its first one and begins no other."""
    code, said = piece(tmp_path, minutes=0.5, workers=1)
    assert code == 0
    assert len(made.done) == 1
    assert said[-1] == "The time is over: 29 runs are missing. The same command goes on."
    piece(tmp_path)
    assert len(made.done) == len(design(NAME).runs)
    assert len(pool(tmp_path)) == len(made.done)


def test_a_run_that_fails_is_told_and_has_no_row(tmp_path, made):
    made.fails = lambda run: ValueError("no such thing") if run.name == "uniform" and run.seed == 3 else None
    code, said = piece(tmp_path)
    assert code == 1
    assert len(Rows(NAME, tmp_path).all) == len(design(NAME).runs) - 1
    assert [line for line in said if "no such thing" in line and "uniform" in line and "seed 3" in line]
    made.fails = lambda run: SystemExit(3) if run.seed == 3 else None
    assert piece(tmp_path)[0] == 1
    made.fails = lambda run: None
    assert piece(tmp_path)[0] == 0


def test_ctrl_c_keeps_the_rows(tmp_path, made):
    def say(line):
        if line.startswith("4 of"):
            raise KeyboardInterrupt

    assert runner.run(NAME, tmp_path, tmp_path, scale=TINY, minutes=600.0, workers=1, say=say) == 130
    assert len(Rows(NAME, tmp_path).all) == 4
    assert piece(tmp_path)[0] == 0
    assert len(Rows(NAME, tmp_path).all) == len(design(NAME).runs)


def test_two_at_once_are_refused(tmp_path, made):
    def say(line):
        with pytest.raises(ValueError, match=f"another process makes runs of {NAME}"):
            runner.run(NAME, tmp_path, tmp_path)

    runner.run(NAME, tmp_path, tmp_path, scale=TINY, first=1, say=say)


def test_workers_have_one_thread(tmp_path, made, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    seen = []
    monkeypatch.setattr(
        Worker, "start", lambda self: (seen.append(runner.os.environ["OMP_NUM_THREADS"]), super(Worker, self).start())
    )
    piece(tmp_path, first=1)
    assert seen == ["1"]
    assert runner.os.environ["OMP_NUM_THREADS"] == "7"


WORKING = """
import multiprocessing, time, types
from experiments import runner

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    jobs, found = context.Queue(), context.Queue()
    worker = context.Process(target=runner.work, args=(jobs, found, "cache", runner.Scale(), 0))
    worker.start()
    jobs.put([(types.SimpleNamespace(name="no run", cell={}, seed=0), 1)])
    assert found.get()[0] == "failed"
    print(worker.pid, flush=True)  # it waits for the next job now
    time.sleep(600)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path, name):
    script = tmp_path / "working.py"
    script.write_text(WORKING, encoding="utf8")
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment(), cwd=ROOT) as parent:
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(getattr(signal, name))
        parent.wait()
        try:
            worker.wait(timeout=limit())
        finally:
            if worker.is_running():
                worker.kill()


def test_what_another_experiment_has_made_is_not_made_again(tmp_path):
    rows = Rows("types_and_tasks", tmp_path)
    for run in design("types_and_tasks").runs:
        rows.add(row_of(run))
    left = missing(design("noise"), pool(tmp_path), Scale())
    assert sum(map(len, left)) == 28
    assert len(missing(design("noise"), {}, Scale())) == 8, "a group for each alignment"
    assert [group[0].seed for group in left] == sorted(group[0].seed for group in left)
    assert sum(map(len, missing(design("noise"), pool(tmp_path), Scale("gpu")))) == 48


@pytest.mark.parametrize(("name", "value"), [("tuning", 1), ("joint_rate", 0.5), ("text_only", 0.0)])
def test_rows_of_another_plan_are_refused(tmp_path, name, value):
    """Their keys are the same: a changed plan would put two experiments into one table."""
    run = design("window").runs[0]
    plan = dataclasses.asdict(plan_of(nano.Cell(**run.cell)))
    Rows("window", tmp_path).add(row_of(run) | {"plan": plan})
    assert list(pool(tmp_path)) == [run.key()]
    Rows("noise", tmp_path).add(row_of(run) | {"plan": plan | {name: value}})
    with pytest.raises(
        ValueError, match=f"noise.jsonl: the row {run.key()} was trained with {name}={value}, .*plan.py"
    ):
        pool(tmp_path)


def test_the_plan_multiplies_runs_by_measured_minutes(tmp_path):
    before = planned(tmp_path)
    assert "noise: " in before
    assert before.count("    cut: ") == sum(len(design(name).cut) for name in runner.names())
    run = design("window").runs[0]
    plan = design("window")
    assert Minutes({}).of_run(run, plan) == plan.minutes["run"]
    rows = {name: row_of(run) for name in "abc"}
    rows["b"]["seconds"] = {"training": 180.0, "all": 999.0}
    rows["c"]["seconds"] = {"training": 36_000.0, "all": 0}  # the lid was shut during this one
    found = Minutes(rows)
    assert found.of_run(run, plan) == pytest.approx(3)
    assert found.of_alignment(run, plan) == pytest.approx(300 / 60)
    slow = {
        name: row_of(run, facts=facts_of(seconds={"tower": 9_000.0})) for name in "def"
    }  # one alignment, three runs
    others = {str(seed): row_of(dataclasses.replace(run, seed=seed)) for seed in (1, 2)}
    assert Minutes(slow | others).of_alignment(run, plan) == pytest.approx(300 / 60)
    assert Minutes(rows, Scale("gpu")).of_run(run, plan) == plan.minutes["run"]
    Rows("window", tmp_path).add(rows["a"] | {"seconds": {"training": 36_000.0, "all": 0}})
    assert "does not fit into 8" in planned(tmp_path)


def test_the_committed_set_fits_into_eight_hours_of_two_cores():
    assert ": fits into 8." in planned(), planned().splitlines()[-1]


def test_time_is_left_for_nothing_that_ends_late(tmp_path, made):
    """A worker looks at the clock before each run."""
    todo, found = queue.Queue(), queue.Queue()
    runs = design(NAME).runs[:3]
    todo.put([(run, 1.0) for run in runs])
    todo.put(None)
    runner.work(todo, found, str(tmp_path), TINY, time.time() + 30)
    kinds = [found.get_nowait()[0] for _ in range(found.qsize())]
    assert kinds == ["row", "done"]


def test_a_run_of_the_model_with_real_weights_has_the_same_row(tmp_path, monkeypatch):
    asked = []

    def run(seed, noise, options, folder, *, steps=None, learning_rate=1e-4):
        asked.append((seed, noise, options, folder, steps, learning_rate))
        arrays = {name: [0.0, 1.0, 0.5] for name in ("exact", "nll_visual", "nll_filler")}
        return {
            "arrays": arrays,
            "facts": {"commonest": 0.2},
            "shares": {},
            "seconds": {"alignment": 2.0, "training": 1.0},
        }

    monkeypatch.setitem(sys.modules, "experiments.real_weights", types.SimpleNamespace(run=run))
    monkeypatch.setattr(experiments, "real_weights", sys.modules["experiments.real_weights"], raising=False)
    one = design("real_weights").runs[-1]
    row = trials.trial(one, tmp_path, "cpu", 2)
    assert asked == [(one.seed, 0.2, {}, tmp_path / "demo", 2, 1e-4)]
    assert unpacked(row["test"]["exact"]).tolist() == [0, 1, 0.5]
    assert (row["key"], row["arm"], row["cell"]) == (one.key("cpu", 2), "cal", {"model": "demo"})
    assert "arrays" not in row
