"""A stage as it is run: what it starts from, in which precision, and which of the recipe's settings reach it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from seecal import load_records
from seecal.recipes import run as train
from seecal.recipes.folder import RunFolder
from seecal.recipes.recipe import arguments, read
from seecal.recipes.stage_runner import Speech, StageRunner, with_lengths
from seecal.trainer import answer_metrics
from seecal.trainer.callbacks import GradientCheck
from seecal.verbosity import Progress
from tests.support.recipe_files import recipe_file

PROJECTOR = "multi_modal_projector."


def runner_of(file, stage=1):
    recipe = read(file)
    folder = RunFolder(recipe)
    chosen = recipe.stages[stage - 1]
    config = chosen.config(folder.of_stage(chosen))
    return StageRunner(folder, chosen, config, Speech(lambda text: None, Progress(bars=False, shown=False)))


def split(folder):
    """(the projector's tensors, the others) of a model on the disk."""
    tensors = load_file(folder / "model.safetensors")
    projector = {name: one for name, one in tensors.items() if PROJECTOR in name}
    return projector, {name: one for name, one in tensors.items() if PROJECTOR not in name}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def two_stages(tiny, tmp_path_factory):
    """The projector first, then everything but it: so the end shows what the second stage started from."""
    base = tmp_path_factory.mktemp("two")
    template = (tiny / "model" / "chat_template.jinja").read_text().replace("<|start|>", "<|start|>of ")
    stages = [
        {"train": "projector", "chat_template": template},
        {"train": "language_model", "check_gradients": False},
    ]
    settings = {"stages": stages, "max_steps": 2, "learning_rate": 1e-2, "save_strategy": "no"}
    assert train.run(["--config", recipe_file(base / "r.yaml", tiny, base / "run", **settings)]) == 0
    return base / "run", template


def test_a_finished_run_is_not_written_over(two_stages):
    run, _ = two_stages
    file = str(run.parent / "r.yaml")
    before = (run / "final" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(ValueError, match=r"holds a finished run\. Give another folder"):
        train.run(["--config", file])
    with pytest.raises(ValueError, match=r"another recipe: stages\.1\.learning_rate was 0\.01, is 0\.5"):
        RunFolder(read(file, arguments(["--stages.1.learning_rate", "0.5"]))).check(resume=True)
    assert train.run(["--config", file, "--resume"]) == 0
    assert (run / "final" / "model.safetensors").stat().st_mtime_ns == before


def test_stage_2_starts_with_stage_1s_weights(two_stages, tiny):
    run, _ = two_stages
    (start, others), (first, _), (final, trained) = map(
        split, (tiny / "model", run / "stage-1" / "model", run / "final")
    )
    assert not same(first, start)
    assert same(final, first), "the second stage did not train the projector, but it had the first one's"
    assert not same(trained, others)


def test_killed_after_its_last_step_a_run_goes_on_with_what_comes_then(tiny, tmp_path):
    """No step more, and the figures of those that there were."""
    settings = {"train": "projector", "max_steps": 2, "save_steps": 2, "logging_steps": 1, "learning_rate": 1e-2}
    file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **settings)
    assert train.run(["--config", file]) == 0
    final = tmp_path / "run" / "final"
    weights, metrics = load_file(final / "model.safetensors"), json.loads((final / "metrics.json").read_text())
    shutil.rmtree(final)
    assert train.run(["--config", file, "--resume"]) == 0
    again = json.loads((final / "metrics.json").read_text())
    assert again == metrics
    assert again["stages"][0]["steps"] == 2
    assert same(weights, load_file(final / "model.safetensors"))


def test_the_template_of_one_stage_is_not_the_models(two_stages, tiny):
    run, template = two_stages
    own = AutoProcessor.from_pretrained(tiny / "model").chat_template
    assert own != template
    for folder in (run / "stage-1" / "model", run / "final"):
        assert AutoProcessor.from_pretrained(folder).chat_template == own


def test_a_stages_own_template_makes_its_batches(tiny, tmp_path, monkeypatch):
    seen = []
    make = StageRunner.make_trainer
    monkeypatch.setattr(StageRunner, "make_trainer", lambda *given: seen.append(given[2].chat_template) or make(*given))
    template = (tiny / "model" / "chat_template.jinja").read_text().replace("<|start|>", "<|start|>of ")
    stages = [{"chat_template": template}, {}]
    settings = {"stages": stages, "max_steps": 1, "train": "projector", "save_strategy": "no"}
    assert train.run(["--config", recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **settings)]) == 0
    assert seen == [template, AutoProcessor.from_pretrained(tiny / "model").chat_template]


@pytest.mark.parametrize("kind", ["plain", "text", "adapters", "answers"])
def test_the_last_evaluation_reads_the_stages_own_template(kind, tiny, tmp_path, monkeypatch):
    """The model's own template gives other label tokens and prompts; it is what is saved all the same."""
    own = (tiny / "model" / "chat_template.jinja").read_text()
    template = "plain" if kind == "plain" else own.replace("<|start|>", "<|start|>of ")
    prompts = []
    ask = answer_metrics.prompt_of
    monkeypatch.setattr(answer_metrics, "prompt_of", lambda *given: prompts.append(ask(*given).text) or ask(*given))
    settings = {"max_steps": 1, "train": "projector", "eval_data": str(tiny / "eval.json"), "eval_strategy": "steps"}
    settings |= {"eval_steps": 1, "chat_template": template}
    settings |= {"train": ["projector", "lora"]} if kind == "adapters" else {}
    if kind == "answers":
        settings |= {"eval_metric": "exact", "eval_metric_records": 1, "eval_max_new_tokens": 1}
    assert train.run(["--config", recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **settings)]) == 0
    state = json.loads((tmp_path / "run" / "stage-1" / "trainer_state.json").read_text())
    (logged,) = [entry for entry in state["log_history"] if "eval_loss" in entry and entry["step"] == 1][:1]
    measured = json.loads((tmp_path / "run" / "final" / "metrics.json").read_text())["stages"][0]["eval"]
    names = ("eval_loss", "eval_num_tokens", "eval_mean_token_accuracy")
    assert {name: measured[name] for name in names} == {name: logged[name] for name in names}
    assert len(set(prompts)) == (kind == "answers"), "the same question at every evaluation"
    assert AutoProcessor.from_pretrained(tmp_path / "run" / "final").chat_template == own


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_weights_train_in_float32_unless_the_recipe_says_otherwise(saved, tiny, tmp_path):
    """In bfloat16, which most checkpoints are saved in, AdamW's updates at 2e-5 round to nothing."""
    model = AutoModelForImageTextToText.from_pretrained(tiny / "model").to(saved)
    model.save_pretrained(tmp_path / "model")
    AutoProcessor.from_pretrained(tiny / "model").save_pretrained(tmp_path / "model")
    for asked, expected in (({}, torch.float32), ({"model_init_kwargs": {"dtype": "bfloat16"}}, torch.bfloat16)):
        file = recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **{"model": str(tmp_path / "model"), **asked})
        loaded, _ = runner_of(file).load()
        assert {one.dtype for one in loaded.parameters()} == {expected}


def test_the_recipes_lora_settings_reach_the_adapter(tiny, tmp_path):
    lora = {"r": 3, "alpha": 7, "dropout": 0.25}
    runner = runner_of(recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", lora=lora))
    adapted = runner.prepare(runner.load()[0]).model
    config = adapted.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7, 0.25)
    layer = next(
        one for name, one in adapted.named_modules() if name.endswith("language_model.layers.0.self_attn.q_proj")
    )
    assert layer.scaling == {"default": 7 / 3}
    assert layer.lora_dropout["default"].p == 0.25


@pytest.mark.parametrize(
    ("asked", "checks"), [({}, 1), ({"check_gradients": True}, 1), ({"check_gradients": False}, 0)]
)
def test_gradients_are_checked_unless_the_recipe_says_no(asked, checks, tiny, tmp_path):
    runner = runner_of(recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", train="projector", **asked))
    model, processor = runner.load()
    trainer = runner.make_trainer(runner.prepare(model), processor, load_records(tiny / "data.json"), None)
    assert sum(isinstance(one, GradientCheck) for one in trainer.callback_handler.callbacks) == checks


# ---- batches by length ----


def two_epochs(trainer):
    """The order of the rows in each, as a fresh process draws it."""
    orders = []
    for epoch in (0, 1):
        sampler = trainer._get_train_sampler(trainer.train_dataset)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    return orders


def test_batches_by_length_follow_the_seed_and_the_epoch_and_nothing_else(tiny, tmp_path):
    def orders(**settings):
        settings = {"train": "projector", "train_sampling_strategy": "group_by_length", **settings}
        runner = runner_of(recipe_file(tmp_path / "r.yaml", tiny, tmp_path / "run", **settings))
        model, processor = runner.load()
        trainer = runner.make_trainer(runner.prepare(model), processor, load_records(tiny / "data.json"), None)
        torch.seed()  # what was drawn before does not matter
        return two_epochs(trainer)

    first, second = orders(seed=1)
    rows = len(json.loads((tiny / "data.json").read_text()))
    assert sorted(first) == sorted(second) == list(range(rows))
    assert first != second, "every epoch has batches of its own"
    assert orders(seed=1) == [first, second]
    assert orders(seed=2) != [first, second]
    assert orders(seed=2, data_seed=1) == [first, second]


def test_rows_with_images_are_the_longer_ones(tiny):
    """So that batches by length are also those with and those without images."""

    class Config:
        length_column_name, train_sampling_strategy = "length", "group_by_length"

    records = load_records(tiny / "data.json")
    data = with_lengths(records, Config)
    lengths = {bool(row["images"]): [] for row in data}
    for row in data:
        lengths[bool(row["images"])].append(row["length"])
    assert min(lengths[True]) > max(lengths[False])
    Config.train_sampling_strategy = "random"
    assert "length" not in with_lengths(records, Config).column_names


def test_the_metrics_of_both_stages_are_at_the_end(two_stages):
    run, _ = two_stages
    stages = json.loads((run / "final" / "metrics.json").read_text())["stages"]
    assert [stage["stage"] for stage in stages] == ["stage 1", "stage 2"]
    assert [stage["steps"] for stage in stages] == [2, 2]
