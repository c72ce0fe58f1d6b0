"""Benchmarks of lmms-eval on a model of ours: ``seecal eval --tasks``, and ``--model seecal`` of its own command line.

lmms-eval is imported when a run begins, never with this module. Its faults that a result would suffer from are met here: a
failure ends the run, counters that its tasks keep are put back, answers are scored in one order, and files are whole.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .kept_answers import KeptAnswers, state_of
from .module_state import damaged_images_refused
from .paper_tasks import PaperFigure, figures_for
from .predictions import write_json

INSTALL = "python3 -m venv .venv-lmms && .venv-lmms/bin/pip install 'seecal[lmms]'"
RESULTS = "results.json"


@dataclass
class TaskResults:
    """What :func:`run_tasks` found.

    Attributes:
        scores: task -> figure -> value, as lmms-eval names and scales them; a group's own figures too.
        counts: task -> how many documents were asked.
        samples: task -> one dict a document: doc_id, target, filtered_resps (the answer), and the figures of it.
        about: model, batch size, versions, seeds, time.
        file: the results on the disk; None if no ``out`` was given.
    """

    scores: dict[str, dict[str, float]]
    counts: dict[str, int]
    samples: dict[str, list[dict[str, Any]]] = field(repr=False)
    about: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None

    @property
    def paper(self) -> dict[str, list[PaperFigure]]:
        """task -> the paper's figures for it."""
        return {task: found for task in self.scores if (found := figures_for(task))}

    def to_json(self) -> dict[str, Any]:
        """Everything but the samples."""
        beside = {task: [vars(one) for one in found] for task, found in self.paper.items()}
        return {"scores": self.scores, "counts": self.counts, "paper": beside, "about": self.about}


def manifest() -> Any:
    """What the entry point ``lmms_eval.models`` gives lmms-eval: where ``--model seecal`` is."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="seecal", chat_class_path=f"{__package__}.lmms_model.SeecalModel")


def run_tasks(
    model: Any,
    tasks: str | Sequence[str],
    *,
    processor: Any = None,
    include_path: str | Path | None = None,
    batch_size: int = 4,
    limit: int | None = None,
    out: str | Path | None = None,
    max_new_tokens: int | None = None,
    dtype: Any = "auto",
    seed: int = 0,
) -> TaskResults | None:
    """Run tasks of lmms-eval (0.7.3) on a model; their scores, every answer, and the paper's figures.

    Args:
        model: a folder, a hub id, or a model on its device.
        tasks: names, as a list or with commas: docvqa_val, chartqa, a group, or a pattern with ``*``.
        processor: of a model that is given.
        include_path: a folder with tasks of your own (YAML). Where it has all of ``tasks``, lmms-eval's thousands of own
            files are not read.
        batch_size: questions in one call of ``generate``.
        limit: only the first documents of each task, to try it: scores of a part are not those of the benchmark.
        out: folder for ``results.json`` and a ``samples_TASK.jsonl`` for each task; what is there is replaced. A run that
            was stopped goes on from its answers so far, if ``model`` is a folder that has not changed, or a hub id.
        max_new_tokens: instead of what the tasks set, in tokens.
        dtype: to load a model in that is not there yet.
        seed: of random, NumPy and torch, for tasks that guess where an answer holds no choice.

    Returns:
        The results; None on all ranks of a distributed run but the first. The ranks share the documents.

    Raises:
        ImportError: lmms-eval is not installed.
        ValueError: a task that is not known, has no data here, asks for more than answers, or fails.
    """
    names = [name for one in ([tasks] if isinstance(tasks, str) else tasks) for name in one.split(",") if name.strip()]
    names = [name.strip() for name in names]
    if not names:
        raise ValueError(f"tasks={tasks!r}: no name of a task. Give some, such as docvqa_val,chartqa.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit={limit!r}: expected a whole number of documents, 1 or more")
    settings = {"batch_size": batch_size, "limit": limit, "max_new_tokens": max_new_tokens, "seed": seed}
    with damaged_images_refused():
        _check_installed()
        return _run(model, processor, names, include_path, out, dtype, settings)


def _run(
    model: Any,
    processor: Any,
    names: Sequence[str],
    include_path: str | Path | None,
    out: str | Path | None,
    dtype: Any,
    settings: Mapping[str, Any],
) -> TaskResults | None:
    """:func:`run_tasks` after its arguments were looked at; ``settings`` go into the results, too."""
    from lmms_eval.evaluator import simple_evaluate

    from .lmms_model import SeecalModel

    seed, max_new_tokens = settings["seed"], settings["max_new_tokens"]
    manager = _task_manager(names, include_path, seed)
    names = manager.known(names)
    asked = SeecalModel(model, processor=processor, batch_size=settings["batch_size"], dtype=dtype)
    with _folder(out) as folder, manager.kept_modules():
        kept = None
        if out is not None and isinstance(model, str | os.PathLike):
            asked.kept = kept = _kept_answers(folder, os.fspath(model), dtype)
        found = simple_evaluate(
            asked,
            tasks=names,
            batch_size=settings["batch_size"],
            limit=settings["limit"],
            bootstrap_iters=0,
            log_samples=True,
            gen_kwargs=None if max_new_tokens is None else f"max_new_tokens={max_new_tokens}",
            task_manager=manager,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            cli_args=_arguments(folder),
            process_docs_parallel=1,  # threads would draw a task's random choices in another order each time
        )
    results = None
    if found is not None:
        results = _results(found, os.fspath(model) if isinstance(model, str | os.PathLike) else asked.tokenizer_name)
        results.about |= settings
        results.file = None if out is None else _write(results, Path(out))
    if kept is not None:
        kept.forget()
    return results


def _kept_answers(folder: Path, model: str, dtype: Any) -> KeptAnswers:
    """The answers of this rank so far, if this model gave them."""
    about = {"model": str(Path(model).absolute()) if Path(model).is_dir() else model, "files": state_of(model)}
    about |= {"dtype": str(dtype), "versions": [version("transformers"), version("torch")]}
    return KeptAnswers(folder / f"answers-{os.environ.get('RANK', 0)}.jsonl", about)


def _check_installed() -> None:
    try:
        import lmms_eval  # noqa: F401
    except ImportError:
        raise ImportError(f"--tasks needs lmms-eval, which is not installed here: {INSTALL}") from None


def _task_manager(names: Sequence[str], include_path: str | Path | None, seed: int) -> Any:
    """lmms-eval's list of tasks, with ours first; the built-in ones only where they are needed (20 s)."""
    from .lmms_tasks import Tasks

    if include_path is None:
        return Tasks(seed)
    folder = Path(include_path).absolute()
    if not folder.is_dir():
        raise ValueError(f"include_path={include_path}: no such folder. Give the one with the tasks' YAML files.")
    own = Tasks(seed, include_path=str(folder), include_defaults=False)
    return own if all(own.match_tasks([name]) for name in names) else Tasks(seed, include_path=str(folder))


@contextlib.contextmanager
def _folder(out: str | Path | None) -> Iterator[Path]:
    """Where tasks may write files of their own (OCRBench does, into the working folder if nothing tells it otherwise)."""
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
        yield Path(out)
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _arguments(folder: Path) -> Namespace:
    """What tasks and evaluator read of the command line of lmms-eval."""
    return Namespace(output_path=str(folder), process_with_media=False, reasoning_tags=None, log_samples=True)


def _results(found: Mapping[str, Any], model: str) -> TaskResults:
    scores = {}
    for task, figures in {**found["results"], **found.get("groups", {})}.items():
        numbers = {name.removesuffix(",none"): value for name, value in figures.items() if _is_figure(name, value)}
        scores[task] = {name: float(value) for name, value in numbers.items()}
    counts = {task: number["effective"] for task, number in found["n-samples"].items()}
    about = {
        "model": model,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "lmms_eval": version("lmms-eval"),
        "transformers": version("transformers"),
        "task_versions": dict(found["versions"]),
    }
    return TaskResults(scores, counts, {task: _plain(rows) for task, rows in found["samples"].items()}, about)


def _is_figure(name: str, value: Any) -> bool:
    return name != "alias" and "_stderr" not in name and isinstance(value, int | float) and not isinstance(value, bool)


def _plain(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A task's samples as JSON holds them, in the order of its documents; answers without the lists around them."""
    left_out = {"doc", "arguments", "doc_hash", "token_counts", "resps", "input_media"}
    plain = []
    for row in sorted(rows, key=lambda row: row["doc_id"]):
        kept = {name: value for name, value in row.items() if name not in left_out}
        answer = kept["filtered_resps"]
        while isinstance(answer, list) and len(answer) == 1:
            answer = answer[0]
        plain.append({**kept, "filtered_resps": answer, "prompt": row["arguments"][0]})
    return json.loads(json.dumps(plain, default=str))


def _write(results: TaskResults, out: Path) -> Path:
    """The results last, so that where they are, the samples are too."""
    for task, rows in results.samples.items():
        part = out / f".samples_{task}.jsonl.part"
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf8")
        part.replace(out / f"samples_{task}.jsonl")
    write_json(out / RESULTS, results.to_json())
    return out / RESULTS
