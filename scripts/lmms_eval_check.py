"""lmms-eval really runs, offline: one task, four ways to its accuracy, which must be one number (two minutes on two cores).

    .venv-lmms/bin/python -m scripts.lmms_eval_check [FOLDER]

1. ``seecal.evaluation.run_tasks`` in this process, batch size 4.
2. lmms-eval's own command line, ``--model seecal``, batch size 4.
3. ``seecal eval --tasks``, batch size 4, two processes that share the documents.
4. ``seecal.evaluate`` on the same records, without lmms-eval.

The model is a LLaVA of 0.1 M parameters that this script trains for a few seconds with CAL to name the colour of a square;
the questions have an image, two, or none, so that it is right about some of them. The answers must be the same, too.
Run it from the root of the repository; docs/evaluation.md has the command that installs lmms-eval.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, Sequence, Value

ROOT = Path(__file__).parents[1]
TASK_FILES = [ROOT / "tests" / "support" / name for name in ("seecal_colours.yaml", "lmms_task.py")]
TASK, BATCH_SIZE, DOCUMENTS = "seecal_colours", 4, 23
MAX_NEW_TOKENS = 12  # as seecal_colours.yaml says
QUESTION = "What colour is it?"


def micro_checkpoint(folder: Path, steps: int = 30) -> Path:
    """A tiny LLaVA that has learnt some colours, with its processor."""
    import torch

    from seecal import VisionCollator, enable_cal
    from seecal.recipes.tiny import tiny_llava, tiny_llava_processor

    processor = tiny_llava_processor()
    model = enable_cal(tiny_llava(scale=2.0)).train()
    collate = VisionCollator(processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    documents = documents_of(16 * steps, seed=1)
    for step in range(steps):
        model(**collate([record_of(one) for one in documents[16 * step :][:16]])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def documents_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Questions with an image, with two (the answer is the first one's colour), or none, where one can only guess.

    Each has id, question, answer, images.
    """
    from seecal.recipes.tiny import _COLOURS, tiny_image

    choose = random.Random(seed)
    found = []
    for number in range(count):
        colours = [choose.choice(sorted(_COLOURS)) for _ in range((1, 1, 2, 1, 0)[number % 5])]
        answer = f"It is {colours[0] if colours else choose.choice(sorted(_COLOURS))}."
        images = [tiny_image(colour) for colour in colours]
        words = QUESTION + " b" * choose.randrange(6)
        found.append({"id": f"q{number}", "question": words, "answer": answer, "images": images})
    return found


def record_of(document: dict[str, Any]) -> dict[str, Any]:
    """A document as a record that seecal trains on, and evaluates without lmms-eval."""
    messages = [
        {"role": "user", "content": document["question"]},
        {"role": "assistant", "content": document["answer"]},
    ]
    return {"id": document["id"], "messages": messages, "images": document["images"]}


def local_task(folder: Path, documents: list[dict[str, Any]]) -> Path:
    """The task of the tests with its data beside it: images as bytes in a Parquet file."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in TASK_FILES:
        shutil.copy(path, folder)
    text = Value("string")
    features = Features({"id": text, "question": text, "answer": text, "images": Sequence(Image())})
    rows = [{**one, "images": [{"bytes": _png(image), "path": None} for image in one["images"]]} for one in documents]
    Dataset.from_list(rows, features=features).to_parquet(str(folder / "colours.parquet"))
    return folder


def _png(image: Any) -> bytes:
    held = io.BytesIO()
    image.save(held, "png")
    return held.getvalue()


def by_python(model: Path, tasks: Path, out: Path) -> tuple[float, list[str]]:
    """(accuracy, answers) of seecal.evaluation.run_tasks."""
    from seecal.evaluation import run_tasks

    results = run_tasks(str(model), TASK, include_path=tasks, batch_size=BATCH_SIZE, out=out)
    assert results is not None
    return results.scores[TASK]["exact"], [row["filtered_resps"] for row in results.samples[TASK]]


def by_command_line(model: Path, tasks: Path, out: Path) -> tuple[float, list[str]]:
    """(accuracy, answers) of lmms-eval's own command line, from the files that it writes."""
    command = [sys.executable, "-m", "lmms_eval", "--model", "seecal", "--model_args", f"pretrained={model}"]
    command += ["--tasks", TASK, "--include_path", str(tasks), "--batch_size", str(BATCH_SIZE)]
    command += ["--output_path", str(out), "--log_samples", "--verbosity", "DEBUG"]
    done = subprocess.run(command, capture_output=True, text=True, env=offline(), cwd=out.parent)
    found = sorted(out.rglob("*_results.json"))
    if done.returncode or not found:  # it ends with 0 after an error, too
        raise SystemExit(f"lmms-eval failed ({done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    told = json.loads(found[-1].read_text("utf8"))
    samples = found[-1].with_name(found[-1].name.replace("_results.json", f"_samples_{TASK}.jsonl"))
    rows = [json.loads(line) for line in samples.read_text("utf8").splitlines()]
    rows.sort(key=lambda row: row["doc_id"])
    return told["results"][TASK]["exact,none"], [_bare(row["filtered_resps"]) for row in rows]


def by_two_processes(model: Path, tasks: Path, out: Path) -> tuple[float, list[str]]:
    """(accuracy, answers) of seecal eval --tasks in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "seecal"]
    command += ["eval", str(model), "--tasks", TASK, "--include-path", str(tasks), "--batch-size", str(BATCH_SIZE)]
    done = subprocess.run([*command, "--out", str(out)], capture_output=True, text=True, env=offline())
    if done.returncode:
        raise SystemExit(f"seecal eval failed ({done.returncode}):\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    told = json.loads((out / "results.json").read_text("utf8"))
    rows = [json.loads(line) for line in (out / f"samples_{TASK}.jsonl").read_text("utf8").splitlines()]
    return told["scores"][TASK]["exact"], [row["filtered_resps"] for row in rows]


def _bare(answer: Any) -> str:
    return _bare(answer[0]) if isinstance(answer, list) else answer


def without_harness(model: Path, documents: list[dict[str, Any]], out: Path) -> tuple[float, list[str]]:
    """(accuracy, answers) of seecal.evaluate."""
    import seecal

    records = [record_of(one) for one in documents]
    options: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS, "batch_size": BATCH_SIZE, "out": out}
    found = seecal.evaluate(str(model), records, "exact", **options)
    return found.value / 100, [sample["prediction"] for sample in found.samples]


def offline() -> dict[str, str]:
    """The environment of a run that must not look for a network."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def main(folder: Path) -> None:
    os.environ.update(offline())
    from importlib.metadata import version

    from seecal import verbosity

    verbosity.quiet()
    documents = documents_of(DOCUMENTS)
    model, tasks = micro_checkpoint(folder / "model"), local_task(folder / "task", documents)
    print(f"lmms-eval {version('lmms-eval')}, transformers {version('transformers')}, torch {version('torch')}")
    ways = {
        "seecal.evaluation.run_tasks": by_python(model, tasks, folder / "python"),
        "lmms-eval --model seecal": by_command_line(model, tasks, folder / "command"),
        "seecal eval, two processes": by_two_processes(model, tasks, folder / "processes"),
        "seecal.evaluate": without_harness(model, documents, folder / "local"),
    }
    for way, (accuracy, answers) in ways.items():
        print(
            f"{way:<28} batch size {BATCH_SIZE}  {len(answers)} documents  exact {accuracy:.4f}  first: {answers[0]!r}"
        )
    assert len({round(accuracy, 12) for accuracy, _ in ways.values()}) == 1, "more than one accuracy"
    assert len({tuple(answers) for _, answers in ways.values()}) == 1, "different answers"
    assert 0 < ways["seecal.evaluate"][0] < 1, "nothing, or everything, is right: that would not show a difference"
    print("one accuracy, and the same answers")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]).absolute())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
