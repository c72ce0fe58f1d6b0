"""A checkpoint is whole or not there: damage to any file, a full disk, an end in the middle of a save."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from trl import SFTTrainer

from seecal import CALTrainer
from seecal.trainer.checkpoints import checkpoints_in, damage, newest_checkpoint
from seecal.trainer.manifests import write_manifest
from tests.support.processes import environment, limit
from tests.support.sgd import sgd_config
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor

Usage = namedtuple("Usage", ["total", "used", "free"])


def trainer(folder, adapter=None, **changes):
    evaluation = changes.pop("eval_dataset", None)
    settings = {"max_steps": 6, "save_steps": 2, "save_strategy": "steps", "logging_steps": 1, "optim": "adamw_torch"}
    args = sgd_config(folder, 2, 1, **(settings | changes))
    model = tiny_llava()
    if adapter is not None:
        torch.manual_seed(0)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, modules_to_save=["multi_modal_projector"])
        model = get_peft_model(model, lora, adapter_name=adapter[0])
        for name in adapter[1:]:
            model.add_adapter(name, lora)
        model.set_adapter(adapter[-1])
    return CALTrainer(
        model, args, train_dataset=tiny_dataset(12), eval_dataset=evaluation, processing_class=tiny_llava_processor()
    )


BEST = {
    "learning_rate": 1e-3,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # the loss falls, so that the first one is the best
    "save_total_limit": 2,
}


def evaluated(folder, steps, **changes):
    """A run of so many steps that keeps its first checkpoint as the best."""
    this = trainer(folder, eval_dataset=tiny_dataset(4, 1), max_steps=8, **BEST, **changes)
    this.args.max_steps = steps
    return this


def losses(this):
    return [entry["loss"] for entry in this.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder of a run of six steps, its losses)."""
    folder = tmp_path_factory.mktemp("whole")
    this = trainer(folder)
    this.train()
    return folder, losses(this)


def files_of(checkpoint):
    return sorted(path.relative_to(checkpoint).as_posix() for path in checkpoint.rglob("*") if path.is_file())


def test_what_has_its_name_is_whole(whole):
    folder, _ = whole
    assert [one.name for one in checkpoints_in(folder)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    for one in checkpoints_in(folder):
        assert damage(one) is None
        told = json.loads((one / "manifest.json").read_text("utf8"))
        assert sorted(told["files"]) == [name for name in files_of(one) if name != "manifest.json"]
        assert told["step"] == int(one.name.split("-")[1])
    assert not list(folder.glob(".saving*"))


def flipped(file, older):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "cut": lambda file, older: file.write_bytes(file.read_bytes()[:-1]),
    "one bit": flipped,
    "gone": lambda file, older: file.unlink(),
    "empty": lambda file, older: file.write_bytes(b""),
    "an older one's": lambda file, older: shutil.copy(older, file),
}


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_to_any_file_is_named_and_passed_over(whole, tmp_path, how):
    folder, _ = whole
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.copytree(folder / name, tmp_path / name)
    older, newer = tmp_path / "checkpoint-4", tmp_path / "checkpoint-6"
    tried = 0
    for name in files_of(newer):
        before = (newer / name).read_bytes()
        DAMAGES[how](newer / name, older / name)
        if (newer / name).exists() and (newer / name).read_bytes() == before:
            continue  # the same in both, such as the tokenizer
        said = []
        assert newest_checkpoint(tmp_path, said.append) == older, (name, how)
        assert len(said) == 1
        of_all = name == "manifest.json" and how == "an older one's"  # it speaks of the others
        assert "checkpoint-6 is passed over" in said[0]
        assert of_all or name in said[0]
        (newer / name).write_bytes(before)
        tried += 1
    assert newest_checkpoint(tmp_path) == newer
    assert tried >= (5 if how == "an older one's" else 12)


def test_the_newest_is_told_by_its_number(whole, tmp_path):
    assert newest_checkpoint(tmp_path) is None
    for name in ("9", "20", "100", "best"):
        shutil.copytree(whole[0] / "checkpoint-6", tmp_path / f"checkpoint-{name}")
    (tmp_path / "checkpoint-100" / "manifest.json").unlink()  # it is written last
    said = []
    assert newest_checkpoint(tmp_path, said.append).name == "checkpoint-20"
    assert said == [f"{tmp_path}/checkpoint-100 is passed over: manifest.json, which is written last, is not there"]


NEEDED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", NEEDED)
def test_what_was_written_without_all_that_a_resume_needs(whole, tmp_path, name):
    """save_only_model, say: Trainer goes on without a word, on another path."""
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / name).unlink()
    write_manifest(tmp_path / "checkpoint-6", {"step": 6})
    assert damage(tmp_path / "checkpoint-6") == f"it has no {name.replace('state.pth', 'state*.pth')}"


def test_a_shard_that_is_gone(tmp_path):
    for number in (1, 2):
        save_file({str(number): torch.ones(2)}, tmp_path / f"model-0000{number}-of-00002.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    for name in NEEDED[1:]:
        (tmp_path / name).write_bytes(b"")
    write_manifest(tmp_path, {})
    assert damage(tmp_path) is None
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert damage(tmp_path) == "model-00002-of-00002.safetensors is not there"


READ = [
    *("optimizer.bin", "scaler.pt", "adapter_model.safetensors", "mine/adapter_config.json", "adapter_model.bin"),
    *(
        "model-00001-of-00002.safetensors",
        "pytorch_model_fsdp_0/.metadata",
        "optimizer_0/__0_0.distcp",
        "RNG_STATE_1.pth",
    ),
    *("global_step6/mp_rank_00_model_states.pt", "latest"),
]


@pytest.mark.parametrize("name", READ)
def test_a_file_more_that_loading_reads_is_told(whole, tmp_path, name):
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "checkpoint-6" / name).write_bytes(b"another")
    assert damage(tmp_path / "checkpoint-6") == f"{name} was not written with it"


@pytest.mark.parametrize("name", ["notes.json", "ema.pt", "plots/step.png"])
def test_a_file_more_that_nothing_reads_is_only_said(tmp_path, caplog, name):
    """A callback adds it when a checkpoint is saved: it is gone on from, and the best of them is loaded."""

    class Adds(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            file = tmp_path / f"checkpoint-{state.global_step}" / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"more")

    for resume in (None, True):
        this = evaluated(tmp_path, 6 if resume else 4, load_best_model_at_end=True)
        this.add_callback(Adds())
        this.train(resume_from_checkpoint=resume)
    assert this.state.global_step == 6
    assert f"{tmp_path}/checkpoint-4: {name} was added later; nothing reads it" in caplog.text
    assert f"{tmp_path}/checkpoint-2: {name} was added later; nothing reads it" in caplog.text


def test_resume_takes_the_newest_whole_one(whole, tmp_path, caplog):
    folder, expected = whole
    for one in checkpoints_in(folder):
        shutil.copytree(one, tmp_path / one.name)
    flipped(tmp_path / "checkpoint-6" / "optimizer.pt", None)
    (tmp_path / "checkpoint-4" / "model.safetensors").unlink()
    this = trainer(tmp_path)
    this.train(resume_from_checkpoint=True)
    assert losses(this) == expected
    assert "checkpoint-6 is passed over: optimizer.pt has other bytes than were written" in caplog.text
    assert "checkpoint-4 is passed over: model.safetensors is not there" in caplog.text
    assert damage(tmp_path / "checkpoint-6") is None, "and the damaged one was written anew"


def test_a_damaged_one_is_not_gone_on_from(whole, tmp_path, caplog):
    shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    flipped(tmp_path / "checkpoint-4" / "scheduler.pt", None)
    this = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint-4 is damaged: scheduler.pt has other bytes"):
        this.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    with pytest.raises(ValueError, match=r"no whole checkpoint to resume from; found: checkpoint-4 .scheduler.pt"):
        this.train(resume_from_checkpoint=True)
    # One that another trainer wrote cannot be checked, and is taken where it is named
    shutil.rmtree(tmp_path / "checkpoint-4")
    shutil.copytree(whole[0] / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()
    this.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert "checkpoint-4 has no manifest.json: whether it is whole cannot be told" in caplog.text
    assert losses(this) == whole[1]


def test_no_room_is_told_before_anything_is_written(tmp_path, monkeypatch):
    this = trainer(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: Usage(2**40, 2**40, 0 if this.state.global_step > 2 else 2**40)
    )
    with pytest.raises(
        OSError, match=r"no room for the next checkpoint: about 0\.\d+ GiB .*0\.00 GiB are free"
    ) as told:
        this.train()
    assert told.value.errno == errno.ENOSPC
    assert f"The last checkpoint, {tmp_path / 'checkpoint-2'}, is whole" in str(told.value)
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    assert not list(tmp_path.glob(".saving*"))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("file write failed")])
def test_a_disk_that_fills_while_saving(tmp_path, monkeypatch, error):
    this = trainer(tmp_path)
    save = torch.save

    def fails(value, file, **options):
        if this.state.global_step > 2 and str(file).endswith("scheduler.pt"):
            raise error
        save(value, file, **options)

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match=r"no room for the next checkpoint: .* are needed .*checkpoint-2, is whole"):
        this.train()
    assert [one.name for one in checkpoints_in(tmp_path)] == ["checkpoint-2"]
    assert not list(tmp_path.glob(".saving*"))
    monkeypatch.setattr(torch, "save", save)
    again = trainer(tmp_path)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


@pytest.fixture
def small_disk(tmp_path):
    """A folder that is a disk of 80 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def done(*command):
        child = subprocess.run(command, capture_output=True, env=environment(), timeout=limit(), check=False)
        return child.returncode == 0

    if not shutil.which("mount") or not done("mount", "-t", "tmpfs", "-o", "size=80m", "tmpfs", str(folder)):
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    assert done("umount", "--lazy", str(folder)), "the error that was caught may hold a file open"


@pytest.mark.parametrize("when", ["_save_checkpoint", "_save_optimizer_and_scheduler", "_about"])
def test_a_disk_that_is_really_full(small_disk, monkeypatch, when):
    """Before the save, after the weights, and when all but the manifest is written."""
    this, filler = trainer(small_disk / "run"), small_disk / "filler"
    plain = getattr(CALTrainer, when)

    def filled(self, *args):
        found = plain(self, *args) if when == "_about" else None
        if self.state.global_step == 4:
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        return plain(self, *args) if found is None else found

    monkeypatch.setattr(CALTrainer, when, filled)
    with pytest.raises(OSError, match=r"0\.\d+ GiB are needed and 0\.00 GiB are free, 0\.\d+ GiB too few.*2, is whole"):
        this.train()
    monkeypatch.undo()
    assert newest_checkpoint(small_disk / "run").name == "checkpoint-2"
    assert not list((small_disk / "run").glob(".saving*"))
    filler.unlink()
    again = trainer(small_disk / "run")
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_what_a_kill_left_is_removed_and_older_ones_stay_until_then(tmp_path):
    left = tmp_path / ".saving-3" / "checkpoint-3"  # of a step that is not saved again
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    seen = []

    class Seen(CALTrainer):
        def _save_optimizer_and_scheduler(self, output_dir):
            seen.append([one.name for one in checkpoints_in(tmp_path)])
            super()._save_optimizer_and_scheduler(output_dir)

    this = trainer(tmp_path, save_total_limit=1)
    this.__class__ = Seen
    this.train()
    assert seen == [[], ["checkpoint-2"], ["checkpoint-4"]], "the old one goes after the new one"
    assert [one.name for one in checkpoints_in(tmp_path)] == ["checkpoint-6"]
    assert not list(tmp_path.glob(".saving*"))


def test_the_best_one_is_found_where_it_lies(tmp_path):
    changes = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    this = trainer(tmp_path, eval_dataset=tiny_dataset(4, 1), metric_for_best_model="loss", **changes)
    this.train()
    best = this.state.best_model_checkpoint
    assert best in [str(one) for one in checkpoints_in(tmp_path)]
    state = json.loads((checkpoints_in(tmp_path)[-1] / "trainer_state.json").read_text("utf8"))
    assert ".saving" not in json.dumps(state)
    assert damage(checkpoints_in(tmp_path)[-1]) is None


@pytest.mark.parametrize("how", ["as it was", "renamed", "copied", "spelled otherwise", "spelled with dots"])
def test_the_best_one_stays_the_best_where_a_run_was_moved(tmp_path, monkeypatch, how):
    """Trainer takes one at another path for lost, and deletes one that is spelled otherwise."""
    monkeypatch.chdir(tmp_path)
    begun = "run" if how.startswith("spelled") else tmp_path / "run"
    evaluated(begun, 4).train()
    folder = {"as it was": begun, "spelled otherwise": tmp_path / "run", "spelled with dots": "./x/../run"}.get(how)
    if folder is None:
        folder = tmp_path / "moved"
        shutil.copytree(begun, folder) if how == "copied" else begun.rename(folder)
    (tmp_path / "x").mkdir()
    this = evaluated(folder, 8, load_best_model_at_end=True)
    this.train(resume_from_checkpoint=True)
    assert sorted(one.name for one in checkpoints_in(tmp_path / folder)) == ["checkpoint-2", "checkpoint-8"]
    assert os.path.samefile(this.state.best_model_checkpoint, tmp_path / folder / "checkpoint-2")
    best = load_file(tmp_path / folder / "checkpoint-2" / "model.safetensors")
    assert torch.equal(this.model.lm_head.weight, best[next(name for name in best if "lm_head" in name)])


def test_a_best_one_that_is_gone_is_said(tmp_path, caplog):
    """The last weights in the place of the best ones, without a word, is what nobody asked for."""
    evaluated(tmp_path, 4).train()
    shutil.rmtree(tmp_path / "checkpoint-2")
    this = evaluated(tmp_path, 8, load_best_model_at_end=True)
    this.train(resume_from_checkpoint=True)
    assert "checkpoint-2, the best checkpoint so far, is gone: the best of those from here on" in caplog.text
    assert this.state.best_model_checkpoint == str(tmp_path / "checkpoint-6")


@pytest.mark.parametrize("names", [["default"], ["mine"], ["default", "mine"]], ids=" and ".join)
def test_adapters_of_any_name_go_on_and_the_best_is_loaded(tmp_path, names):
    """PEFT writes those that are not called "default" into folders; the last of the names is the one that trains."""
    whole = trainer(tmp_path / "whole", names, max_steps=4)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "run" / "checkpoint-2")
    this = trainer(tmp_path / "run", names, max_steps=4)
    this.train(resume_from_checkpoint=True)
    assert losses(this) == losses(whole)
    assert trainable(this).keys() == trainable(whole).keys()
    best = evaluated(tmp_path / "best", 4, adapter=names, load_best_model_at_end=True)
    kept = {}
    best.add_callback(Keeps(kept))
    best.train()
    assert best.state.best_model_checkpoint == str(tmp_path / "best" / "checkpoint-2")
    assert all(torch.equal(value, kept[2][name]) for name, value in trainable(best).items())
    assert not all(torch.equal(value, kept[4][name]) for name, value in trainable(best).items())


def trainable(this):
    return {name: value for name, value in this.model.named_parameters() if value.requires_grad}


class Keeps(TrainerCallback):
    """The trained weights at each save."""

    def __init__(self, kept):
        self._kept = kept

    def on_save(self, args, state, control, model, **kwargs):
        named = model.named_parameters()
        self._kept[state.global_step] = {name: value.detach().clone() for name, value in named if value.requires_grad}


def test_what_is_uploaded_has_its_name(tmp_path, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        SFTTrainer,
        "_push_from_checkpoint",
        lambda self, folder: pushed.append((folder, damage(tmp_path / "checkpoint-6"))),
    )
    this = trainer(tmp_path, save_steps=6)
    this.args.push_to_hub = True
    monkeypatch.setattr(this, "init_hf_repo", lambda token=None: None, raising=False)
    this.train()
    assert pushed == [(str(tmp_path / "checkpoint-6"), None)]
