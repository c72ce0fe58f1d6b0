"""Trainings that are killed with SIGKILL and gone on with, for tests/trainer/test_kills.py.

    python -m tests.support.kill_worker FOLDER SEED CASE:KILLS ...

Each run is a fork of this process, so that torch is imported once. First, for each case, one that nothing stops
(FOLDER/CASE/whole); then as many runs (FOLDER/CASE/0 and on) as it takes for so many kills, each killed once or twice and
gone on with to its end. A kill comes at a random moment of the run's time, or inside a save: before a random one of its
calls that bring something to the disk, or in the middle of writing the manifest. Prints what became of them as JSON.
"""

import contextlib
import functools
import hashlib
import io
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import seecal
from seecal.data.sources.quarantine_file import read_quarantine
from seecal.ops.distributed import leave
from seecal.recipes import run as recipes
from seecal.recipes import stage_runner  # noqa: F401  # before the fork
from seecal.trainer import manifests
from seecal.trainer.checkpoints import checkpoints_in
from seecal.trainer.saving import SavingTrainer
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_llava, tiny_llava_processor

STEPS = 10
CASES = {
    "workers-0": {"workers": 0},
    "workers-2": {"workers": 2},
    "ranks-2": {"ranks": 2},
    "stream-0": {"stream": True},
    "stream-2": {"stream": True, "workers": 2},
    "recipe": {"recipe": True},
}
_SECONDS = 300  # after which a run hangs


# ---- One run ----


def train(data, out, resume, workers=0, stream=False, recipe=False, ranks=1):
    """A training with dropout, AdamW, a learning rate that falls, two sources, bad records, logs between checkpoints."""
    out.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        if recipe:
            assert (
                recipes.run(["--config", str(data / "recipe.yaml"), "--output_dir", str(out / "run"), "--resume"]) == 0
            )
            weights = out / "run" / "final" / "model.safetensors"
            digest, folder = hashlib.sha256(weights.read_bytes()).hexdigest(), out / "run"
            states = [json.loads((folder / f"stage-{n}" / "trainer_state.json").read_text()) for n in (1, 2)]
            log = [entry for state in states for entry in state["log_history"]]
        else:
            folder = out
            sources = {
                name: seecal.load_records(data / f"{name}.json", streaming=stream, on_bad="skip") for name in ("a", "b")
            }
            mixed = seecal.mix(sources, [2, 1], seed=3)
            args = sgd_config(
                folder, 2, 4 // (2 * ranks), max_steps=STEPS, optim="adamw_torch", learning_rate=1e-3,
                lr_scheduler_type="linear", train_sampling_strategy="random", on_bad="skip", max_bad_records=None,
                logging_steps=4, save_strategy="steps", save_steps=3, save_total_limit=2,
                dataloader_num_workers=workers,
            )  # fmt: skip
            model, processor = tiny_llava(attention_dropout=0.1), tiny_llava_processor()
            trainer = seecal.CALTrainer(model, args, train_dataset=mixed, processing_class=processor)
            trainer.train(resume_from_checkpoint=resume and bool(checkpoints_in(folder)))
            state = b"".join(value.numpy().tobytes() for value in trainer.model.state_dict().values())
            digest, log = hashlib.sha256(state).hexdigest(), trainer.state.log_history
    timed = ("seconds", "runtime", "per_second", "wait_share", "train_loss", "host_memory")
    log = [{name: value for name, value in entry.items() if not any(one in name for one in timed)} for entry in log]
    met = [{**entry, "rank": None} for entry in read_quarantine(folder / "quarantine.jsonl")]
    result = {"weights": digest, "log": log, "quarantine": sorted(json.dumps(entry) for entry in met)}
    if os.environ.get("RANK", "0") == "0":
        (out / "result.json").write_text(json.dumps(result))


def journal(out):
    """Have each step that is about to be taken written down: a line, which a kill leaves whole or cuts off."""
    before = seecal.CALTrainer._stop_unless_finite

    def told(self, loss, norm):
        before(self, loss, norm)
        line = {
            "stage": Path(self.args.output_dir).name if "stage-" in self.args.output_dir else "",
            "step": self.state.global_step + 1,
            "loss": loss.item(),
            "norm": norm.item(),
            "rate": self._get_learning_rate(),
            "ids": list(self._watch.records),
        }
        with (out / f"journal-{os.environ.get('RANK', '0')}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    seecal.CALTrainer._stop_unless_finite = told


class Saves:
    """Counts what brings a checkpoint to the disk, and ends the process before the call of a given number."""

    def __init__(self, at=None):
        self.at, self.calls, self.inside = at, 0, False
        save = SavingTrainer._save_checkpoint

        def saving(trainer, *args):
            self.inside = True
            try:
                return save(trainer, *args)
            finally:
                self.inside = False

        SavingTrainer._save_checkpoint = saving
        for owner, name in ((os, "fsync"), (torch, "save"), (Path, "replace"), (Path, "write_text")):
            setattr(owner, name, self._counting(getattr(owner, name), name))

    def _counting(self, call, name):
        @functools.wraps(call)
        def counted(*args, **kwargs):
            self.calls += self.inside
            if self.inside and self.calls == self.at:
                if name == "write_text":
                    call(args[0], args[1][: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return counted


def child(data, out, case, resume=True, at=None, rank=0, port=0):
    """The process id of a run that has begun."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        ranks = CASES[case].get("ranks", 1)
        if ranks > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        signal.alarm(_SECONDS)
        (out / "said").parent.mkdir(parents=True, exist_ok=True)
        said = os.open(out / "said", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(said, 2)
        logging.disable(logging.WARNING)
        journal(out)
        saves = Saves(at if rank == 0 else None)
        train(data, out, resume, **CASES[case])
        if rank == 0:
            (out / "calls").write_text(str(saves.calls))
        code = 0
        leave(0)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
    finally:
        os._exit(code)


# ---- Killed runs ----


def begin(data, out, case, at=None):
    port = 0
    if CASES[case].get("ranks", 1) > 1:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
    return [child(data, out, case, at=at, rank=rank, port=port) for rank in range(CASES[case].get("ranks", 1))]


def ends(pids, until=None):
    """The exit codes; all are killed once ``until`` has come or one has failed: the others would wait for it."""
    codes = dict.fromkeys(pids)
    while None in codes.values():
        for pid in [pid for pid, code in codes.items() if code is None]:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        if any(codes.values()) or (until is not None and time.monotonic() >= until):
            for pid in [pid for pid, code in codes.items() if code is None]:
                os.kill(pid, signal.SIGKILL)
                codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.002)
    return list(codes.values())


def reached(out):
    """The steps that stand in the journal."""
    path = out / "journal-0.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def soak(data, folder, case, kills, rng):
    start = time.monotonic()
    codes = ends(begin(data, folder / "whole", case))
    assert not any(codes), (case, codes, (folder / "whole" / "said").read_text()[-3000:])
    whole, calls = time.monotonic() - start, int((folder / "whole" / "calls").read_text())
    runs, done = [], 0
    while done < kills:
        out, killed = folder / str(len(runs)), []
        for _ in range(min(rng.choice((1, 1, 2)), kills - done)):
            at = rng.randint(1, calls) if rng.random() < 0.5 else None
            moment = None if at else rng.uniform(0.1, 1) * whole
            codes = ends(begin(data, out, case, at), None if at else time.monotonic() + moment)
            killed.append({"inside a save": at, "after": moment, "codes": codes, "steps": reached(out)})
        again = ends(begin(data, out, case))
        runs.append({"kills": killed, "again": again, "said": (out / "said").read_text()[-2000:] if any(again) else ""})
        done += sum(-signal.SIGKILL in one["codes"] for one in killed)
        if any(again):
            break
    return {"calls": calls, "runs": runs}


def main():
    folder, seed = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    assert manifests.os is os, "its fsync is the one that is counted"
    found = {}
    for number, asked in enumerate(sys.argv[3:]):
        case, kills = asked.split(":")
        found[case] = soak(folder / "data", folder / case, case, int(kills), random.Random(1000 * seed + number))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
