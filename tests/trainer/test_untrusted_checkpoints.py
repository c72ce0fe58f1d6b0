"""Checkpoints from somebody else: nothing in them runs, nothing outside of them is read, also where their manifest fits.

A manifest is no signature: who can write a checkpoint can write its manifest. It tells damage, not authors.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from seecal.trainer.checkpoints import damage
from seecal.trainer.manifests import _digest_of, check_manifest, write_manifest
from tests.support.planted import left_no, planted_pickle, planted_torch
from tests.support.tiny import tiny_dataset
from tests.trainer.test_checkpoints import losses, trainer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of a run of six steps, its losses)."""
    folder = tmp_path_factory.mktemp("made")
    this = trainer(folder, save_steps=3)
    this.train()
    return folder, losses(this)


@pytest.fixture
def checkpoint(made, tmp_path):
    shutil.copytree(made[0] / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    return tmp_path / "run" / "checkpoint-3"


def resume(checkpoint, **changes):
    this = trainer(checkpoint.parent, **changes)
    this.train(resume_from_checkpoint=str(checkpoint))
    return this


def test_what_is_written_is_read_without_unpickling(made):
    names = set()
    for file in (made[0] / "checkpoint-6").iterdir():
        names.add(file.name)
        if file.suffix in (".pt", ".pth", ".bin", ".pkl"):
            with torch.serialization.safe_globals([]):
                state = torch.load(
                    file, weights_only=file.name != "rng_state.pth"
                )  # NumPy's, which Trainer allows by name
            assert state
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
    assert not names & {"training_args.bin", "pytorch_model.bin"}


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("kind", [planted_pickle, planted_torch])
@pytest.mark.parametrize("whole", [True, False], ids=["with its manifest", "without one"])
def test_a_state_that_would_run_code_is_refused(checkpoint, tmp_path, name, kind, whole):
    kind(checkpoint / name, tmp_path / "mark")
    (checkpoint / "manifest.json").unlink()
    if whole:
        write_manifest(checkpoint, {"step": 3})
        assert damage(checkpoint) is None
    with pytest.raises(ValueError, match=r"checkpoint-3: a file of its optimizer, scheduler or random state holds"):
        resume(checkpoint)
    left_no(tmp_path / "mark")


@pytest.mark.parametrize("name", ["training_args.bin", "pytorch_model.pt", "scaler.pt.old", "global_step3.pkl"])
def test_pickles_that_nothing_reads_stay_unread(made, checkpoint, tmp_path, name):
    planted_pickle(checkpoint / name, tmp_path / "mark")
    write_manifest(checkpoint, {"step": 3})
    assert losses(resume(checkpoint)) == made[1]
    left_no(tmp_path / "mark")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "deep/adapter_model.bin"])
@pytest.mark.parametrize("whole", [True, False], ids=["with its manifest", "without one"])
@pytest.mark.parametrize("kind", [planted_pickle, planted_torch])
def test_weights_that_are_a_pickle_are_refused(checkpoint, tmp_path, name, whole, kind):
    (checkpoint / "deep").mkdir()
    (checkpoint / "model.safetensors").rename(checkpoint / "model.safetensors.index.json")
    kind(checkpoint / name, tmp_path / "mark")
    (checkpoint / "manifest.json").unlink()
    if whole:
        write_manifest(checkpoint, {"step": 3})
    with pytest.raises(ValueError, match=rf"its weights are {name}, a PyTorch file, which holds pickles"):
        resume(checkpoint)
    left_no(tmp_path / "mark")


@pytest.mark.parametrize("sharded", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_shards_are_unpickled_only_where_a_manifest_fits(checkpoint, sharded):
    """torch.distributed.checkpoint unpickles .metadata, DeepSpeed all its files."""
    this = trainer(checkpoint.parent)
    setattr(this, sharded, True)
    assert this._whole(str(checkpoint)) == str(checkpoint)
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(
        ValueError, match=r"has no manifest.json, and reading the shards of FSDP or DeepSpeed unpickles"
    ):
        this.train(resume_from_checkpoint=str(checkpoint))
    (checkpoint / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"checkpoint-3 is damaged: manifest.json cannot be read"):
        this.train(resume_from_checkpoint=str(checkpoint))


# ---- the manifest ----


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "..", ""])
def test_a_manifest_that_names_files_outside(checkpoint, name):
    """Only what is found below the folder is opened."""
    (checkpoint.parent / "outside").write_text("outside")
    write_manifest(checkpoint, {"step": 3})
    told = json.loads((checkpoint / "manifest.json").read_text())
    del told["sha256"]
    told["files"][name] = {"size": 7, "sha256": "0" * 64}
    rewritten(checkpoint, told)
    assert check_manifest(checkpoint) == f"{name} is not there"


def rewritten(checkpoint, told):
    (checkpoint / "manifest.json").write_text(json.dumps({**told, "sha256": _digest_of(told)}))


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "7", '{"files": {}}', '{"sha256": 1, "files": {"a": 1}}', "\0", ""]
)
def test_a_manifest_that_is_none(checkpoint, text):
    (checkpoint / "manifest.json").write_text(text)
    assert check_manifest(checkpoint) == "manifest.json cannot be read"


@pytest.mark.parametrize("kind", ["file", "folder", "broken", "deep"])
def test_links_in_a_checkpoint(checkpoint, tmp_path, kind):
    """A folder behind a link is not looked through, and what FSDP reads there would be read unchecked."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / ".metadata").write_bytes(b"pickle")
    target = {"file": checkpoint / "config.json", "broken": tmp_path / "gone"}.get(kind, tmp_path / "elsewhere")
    (checkpoint / "deep").mkdir()
    link = "deep/link" if kind == "deep" else "link"
    (checkpoint / link).symlink_to(target)
    write_manifest(checkpoint, {"step": 3})
    assert check_manifest(checkpoint) == f"{link} is a link, and what it leads to can change"


# ---- the best one ----


def with_best(checkpoint, folder):
    file = checkpoint / "trainer_state.json"
    state = json.loads(file.read_text())
    state.update(best_model_checkpoint=str(folder), best_metric=-1.0, best_global_step=1)
    file.write_text(json.dumps(state))
    write_manifest(checkpoint, {"step": 3})


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 3, "save_steps": 3}


@pytest.mark.parametrize("name", ["elsewhere/checkpoint-1", "run/../elsewhere/checkpoint-1"])
def test_the_best_checkpoint_is_not_read_elsewhere(checkpoint, tmp_path, name):
    """trainer_state.json came with the checkpoint that was resumed from."""
    shutil.copytree(checkpoint, tmp_path / "elsewhere" / "checkpoint-1")
    with_best(checkpoint, tmp_path / name)
    with pytest.raises(ValueError, match=r"the best checkpoint is .*checkpoint-1, outside of .*run"):
        resume(checkpoint, eval_dataset=tiny_dataset(4), **BEST)


@pytest.mark.parametrize("name", ["..", "elsewhere/..", "elsewhere/notes"])
def test_the_best_checkpoint_is_a_checkpoint(checkpoint, tmp_path, name):
    """A name that leads out of the run, or to a folder that holds something else."""
    for folder in (tmp_path / "elsewhere" / "notes", checkpoint.parent / "notes"):
        shutil.copytree(checkpoint, folder)
    with_best(checkpoint, tmp_path / name)
    with pytest.raises(ValueError, match=r"the best checkpoint is .*, outside of .*run"):
        resume(checkpoint, eval_dataset=tiny_dataset(4), **BEST)


@pytest.mark.parametrize("harm", [None, "pickle", "flipped"])
def test_the_best_checkpoint_of_a_run_that_was_copied(made, checkpoint, tmp_path, harm):
    """Its own copy is read, not the one that the first run still has."""
    best = checkpoint.parent / "checkpoint-1"
    shutil.copytree(checkpoint, best)
    weights = load_file(best / "model.safetensors")
    if harm == "pickle":
        planted_torch(best / "pytorch_model.bin", tmp_path / "mark")
        write_manifest(best, {"step": 1})
    elif harm:
        (best / "model.safetensors").write_bytes((best / "model.safetensors").read_bytes()[:-1] + b"\7")
    shutil.copytree(checkpoint, tmp_path / "first" / "checkpoint-1")
    (tmp_path / "first" / "checkpoint-1" / "model.safetensors").write_bytes(b"of the first run")
    with_best(checkpoint, tmp_path / "first" / "checkpoint-1")
    if harm:
        with pytest.raises(
            ValueError, match=r"checkpoint-1 is damaged: (its weights are pytorch|model.safetensors has)"
        ):
            resume(checkpoint, eval_dataset=tiny_dataset(4), **BEST)
        left_no(tmp_path / "mark")
    else:
        this = resume(checkpoint, eval_dataset=tiny_dataset(4), **BEST)
        name, value = next(iter(this.model.named_parameters()))
        assert any(torch.equal(value, one) for one in weights.values() if one.shape == value.shape), name
