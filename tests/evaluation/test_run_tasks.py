"""lmms-eval itself, where it is installed (docs/evaluation.md): python -m pytest tests/evaluation in its environment."""

import json
import re
from types import SimpleNamespace

import pytest
from datasets import Dataset, Features, Value
from datasets import Image as HubImage
from PIL import Image, ImageFile

pytest.importorskip("lmms_eval")

from lmms_eval.api.task import ConfigurableTask
from scripts import lmms_eval_check as check  # the local task and its data
from tenacity import wait_none

from seecal.evaluation import run_tasks
from seecal.evaluation.lmms_eval import manifest
from seecal.evaluation.lmms_model import SeecalModel
from seecal.recipes.tiny import tiny_image, tiny_llava, tiny_llava_processor

UTILS = """
from PIL import Image, ImageFile

def visuals(doc):
    return [Image.open(doc["image"]).convert("RGB")]

def question(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]

def scored(doc, results):
    return {"exact": float(results[0] == doc["answer"])}

def refused(doc, results):
    raise KeyError("question_type")

def guessed(doc, results):
    import random
    return {"exact": random.random()}

drawn = []

def in_turn(doc, results):
    import time
    time.sleep(0.05 * doc["question"].endswith("?"))  # the first: in a thread of its own it would come last
    drawn.append(1)
    return {"exact": len(drawn)}
"""


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """lmms-eval tries five times, with two seconds between."""
    for retried in (ConfigurableTask.download, ConfigurableTask.process_results):
        monkeypatch.setattr(retried.retry, "wait", wait_none())


@pytest.fixture(scope="module")
def model():
    return {"model": tiny_llava().eval(), "processor": tiny_llava_processor()}


@pytest.fixture
def task(tmp_path):
    """Writes a task over four rows and gives its folder."""
    for colour in ("red", "blue"):
        tiny_image(colour).save(tmp_path / f"{colour}.png")
    (tmp_path / "utils.py").write_text(UTILS)

    def write(name="own", rows=None, **changes):
        image = str(tmp_path / "red.png")
        rows = (
            [{"image": image, "question": "What?" + " b" * at, "answer": "red"} for at in range(4)]
            if rows is None
            else rows
        )
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": f"{{data_files: {{test: {name}.jsonl}}}}",
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_visual": "!function utils.visuals",
            "doc_to_text": "!function utils.question",
            "doc_to_target": "answer",
            "generation_kwargs": "{max_new_tokens: 6, temperature: 0}",
            "process_results": "!function utils.scored",
            "metric_list": "[{metric: exact, aggregation: mean, higher_is_better: true}]",
        }
        (tmp_path / f"{name}.yaml").write_text("".join(f"{key}: {value}\n" for key, value in (lines | changes).items()))
        return tmp_path

    return write


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    documents = check.documents_of(10)
    return check.local_task(tmp_path_factory.mktemp("local") / "task", documents), documents


def test_the_same_answers_as_without_lmms_eval_in_batches_of_four(model, local, tmp_path):
    from seecal.models.generate import answers

    folder, documents = local
    found = run_tasks(**model, tasks=[check.TASK], include_path=folder, batch_size=4, out=tmp_path)
    expected = answers(*model.values(), map(check.record_of, documents), max_new_tokens=12, batch_size=1)
    expected = [answer.split("\n")[0].strip() for answer in expected]
    assert [row["filtered_resps"] for row in found.samples[check.TASK]] == expected
    assert len(set(expected)) > 3
    right = [answer == one["answer"] for answer, one in zip(expected, documents, strict=True)]
    assert found.scores[check.TASK]["exact"] == sum(right) / len(right)
    assert found.counts == {check.TASK: 10}
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["scores"] == found.scores
    assert told["about"]["batch_size"] == 4
    lines = (tmp_path / f"samples_{check.TASK}.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == found.samples[check.TASK]
    assert not list(tmp_path.glob("*.part"))


def test_a_model_is_used_again_after_a_run(model, task):
    asked = SeecalModel(model["model"], processor=model["processor"])
    asked.clean()
    assert asked.model is model["model"]
    first = run_tasks(**model, tasks="own", include_path=task())
    assert run_tasks(**model, tasks="own", include_path=task()).samples == first.samples


def test_ocrbench_counts_from_the_start_in_every_run(model, task, tmp_path):
    rows = [
        {"image": str(tmp_path / "red.png"), "question": "What?", "answer": [""], "dataset": "x", "question_type": kind}
        for kind in ("Regular Text Recognition", "Doc-oriented VQA", "Doc-oriented VQA")
    ]  # "" is in every answer
    module = "!function lmms_eval.tasks.ocrbench.utils.ocrbench_"
    folder = task(
        "ocr",
        rows,
        process_results=f"{module}process_results",
        metric_list=f"[{{metric: ocrbench_accuracy, aggregation: {module}aggregate_accuracy, higher_is_better: true}}]",
    )
    for _ in range(2):
        assert run_tasks(**model, tasks="ocr", include_path=folder).scores["ocr"]["ocrbench_accuracy"] == 0.003


def test_a_guess_is_drawn_alike_in_every_run(model, task):
    folder = task("guess", process_results="!function utils.guessed")
    found = [run_tasks(**model, tasks="guess", include_path=folder, seed=seed).scores for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]


def test_answers_are_scored_in_the_order_of_their_documents(model, task):
    folder = task(process_results="!function utils.in_turn")
    for _ in range(2):
        found = run_tasks(**model, tasks="own", include_path=folder)
        assert [row["exact"] for row in found.samples["own"]] == [1, 2, 3, 4]


def test_limit_and_length_of_an_answer(model, task):
    found = run_tasks(**model, tasks="own", include_path=task(), limit=2, max_new_tokens=1)
    assert found.counts == {"own": 2}
    short = [row["filtered_resps"] for row in found.samples["own"]]
    whole = [row["filtered_resps"] for row in run_tasks(**model, tasks="own", include_path=task()).samples["own"]]
    assert len(short) == 2
    assert all(one != other and other.startswith(one) for one, other in zip(short, whole, strict=False))


def test_the_papers_figures_stand_beside_a_task_of_its_name(model, task):
    found = run_tasks(**model, tasks="docvqa_val", include_path=task("docvqa_val"))
    assert [one.cal for one in found.paper["docvqa_val"]] == [77.3, 80.1]
    assert found.to_json()["paper"]["docvqa_val"][0]["baseline"] == 75.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process_results": "!function utils.refused"}, "task own: it failed to score .*KeyError: 'question_type'"),
        ({"output_type": "multiple_choice"}, "task own: it is of type multiple_choice"),
        ({"output_type": "loglikelihood"}, "task own: it is of type loglikelihood"),
        ({"output_type": "generate_until_multi_round"}, "task own: it is of type generate_until_multi_round"),
        ({"doc_to_target": "!function utils.refused"}, "task own"),
        ({"dataset_kwargs": "{data_files: {test: missing.jsonl}}"}, "task own: .*missing.jsonl"),
        ({"dataset_path": "lmms-lab/DocVQA", "dataset_kwargs": "{}"}, "task own: .*[Hh]ub.*docs/evaluation.md"),
        ({"generation_kwargs": "{max_new_tokens: 0}"}, "task own: max_new_tokens=0"),
        ({"doc_to_text": "!function utils.refused"}, "task own|own, doc_id"),
    ],
)
def test_a_task_that_fails_is_an_error_that_names_it(model, task, changes, message, tmp_path):
    folder = task(**changes)
    with pytest.raises((ValueError, NotImplementedError), match=message):
        run_tasks(**model, tasks="own", include_path=folder, out=tmp_path / "out")
    assert not (tmp_path / "out" / "results.json").exists()


def test_a_model_that_fails_is_no_empty_answer(model, task, monkeypatch):
    def fail(**batch):
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(model["model"], "generate", fail)
    with pytest.raises(ValueError, match=r"own, doc_id 3.*CUDA error"):
        run_tasks(**model, tasks="own", include_path=task())


def test_an_image_that_is_gone_is_no_empty_answer(model, task, tmp_path):
    folder = task()
    (tmp_path / "red.png").unlink()
    with pytest.raises(ValueError, match=r"own, doc_id \d: the task failed to put its question: FileNotFoundError"):
        run_tasks(**model, tasks="own", include_path=folder)


def test_an_image_that_is_cut_off_is_no_grey_one(model, task, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as importing lmms-eval leaves it
    folder = task()
    Image.effect_noise((64, 64), 50).save(tmp_path / "red.png")
    whole = (tmp_path / "red.png").read_bytes()
    (tmp_path / "red.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"own, doc_id \d: the task failed to put its question: OSError.*truncated"):
        run_tasks(**model, tasks="own", include_path=folder)
    assert ImageFile.LOAD_TRUNCATED_IMAGES


def test_nor_is_it_under_lmms_evals_own_command_line(model, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    asked = SeecalModel(model["model"], processor=model["processor"])
    seen = []
    monkeypatch.setattr(asked, "_ask", lambda *given: [str(seen.append(ImageFile.LOAD_TRUNCATED_IMAGES))])
    asked.task_dict = {"own": {"test": ["What?"]}}
    content = [{"type": "text", "text": "What?"}]
    asked.generate_until(
        [SimpleNamespace(args=("What?", lambda _: [{"role": "user", "content": content}], {}, 0, "own", "test"))]
    )
    assert seen == [False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": "owm"}, "task owm: lmms-eval has none of this name. Did you mean own"),
        ({"tasks": ""}, "no name of a task"),
        ({"tasks": "own", "limit": 0}, "limit=0"),
        ({"tasks": "own", "batch_size": "auto"}, "batch_size='auto'"),
        ({"tasks": "own", "include_path": "not/there"}, "include_path=not/there: no such folder"),
        ({"tasks": "own", "processor": None}, "processor=None"),
    ],
)
def test_what_cannot_be_run_is_told(model, task, options, message, monkeypatch):
    from seecal.evaluation import lmms_tasks

    folder = task()
    built_in = lmms_tasks.Tasks
    monkeypatch.setattr(  # without 20 s of indexing
        lmms_tasks, "Tasks", lambda *args, **given: built_in(*args, **{**given, "include_defaults": False})
    )
    with pytest.raises(ValueError, match=message):
        run_tasks(**{**model, "include_path": folder, **options})


def test_a_pattern_names_several_tasks(model, task):
    task("own_a")
    found = run_tasks(**model, tasks="own_*", include_path=task("own_b"))
    assert set(found.scores) == {"own_a", "own_b"}


def test_mmt_bench_marks_the_images_place_itself(model, task, tmp_path):
    Image.new("RGB", (32, 32)).save(tmp_path / "red.png")
    folder = task(rows=[{"image": str(tmp_path / "red.png"), "question": "Question: <image>\nWhat?", "answer": "A"}])
    assert run_tasks(**model, tasks="own", include_path=folder).counts == {"own": 1}


def test_the_example_of_the_docs_scores_as_lmms_eval_does(model, tmp_path):
    (text,) = re.findall(
        r"```yml\n(task: docvqa_val.*?)```", (check.ROOT / "docs" / "evaluation.md").read_text("utf8"), re.S
    )
    (tmp_path / "docvqa_val.yaml").write_text(text, "utf8")
    features = Features({"image": HubImage(), "question": Value("string"), "answers": [Value("string")]})
    image = check._png(tiny_image("red"))
    rows = [
        {"image": {"bytes": image, "path": None}, "question": "What?", "answers": [answer]} for answer in ("a", "b")
    ]
    Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "docvqa_val.parquet"))
    found = run_tasks(**model, tasks="docvqa_val", include_path=tmp_path)
    assert found.scores["docvqa_val"].keys() == {"anls"}
    assert found.samples["docvqa_val"][0]["prompt"].endswith("using a single word or phrase.")
    assert found.paper["docvqa_val"][0].cal == 77.3


def test_the_entry_point_leads_to_the_model():
    from lmms_eval.models import get_model

    assert manifest().model_id == "seecal"
    assert get_model("seecal") is SeecalModel


def test_a_run_whose_scoring_failed_goes_on_from_its_answers(model, task, tmp_path, monkeypatch):
    folder, out = task(process_results="!function utils.refused"), tmp_path / "out"
    for part in model.values():
        part.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="failed to score"):
        run_tasks(str(tmp_path / "model"), "own", include_path=folder, out=out)
    assert len((out / "answers-0.jsonl").read_text().splitlines()) == 1 + 4
    whole = run_tasks(**model, tasks="own", include_path=task())
    with monkeypatch.context() as patched:
        patched.setattr(type(model["model"]), "generate", None)  # nothing is left to ask
        found = run_tasks(str(tmp_path / "model"), "own", include_path=folder, out=out)
    assert found.samples == whole.samples
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "samples_own.jsonl"]


def test_a_task_with_captions_needs_java_before_anything_is_asked(model, task, monkeypatch):
    captions = "!function lmms_eval.tasks.textcaps.utils.textcaps_process_result"
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="task own: its captions are scored by a program in Java"):
        run_tasks(**model, tasks="own", include_path=task(process_results=captions))
