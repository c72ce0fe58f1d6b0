"""docs/trl.md names every field of SFTConfig and every argument of SFTTrainer, and what it says is refused is refused."""

import dataclasses
import inspect
import re
from types import SimpleNamespace

import pytest
from trl import SFTConfig, SFTTrainer

from seecal import CALConfig
from seecal.trainer.arguments import refuse_other_losses
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "trl.md").read_text("utf8")
VERDICTS = {"same", "better", "different", "refused"}


def table(title):
    """{name: (verdict, note)} of the table with that title; each name once."""
    lines = PAGE.split(f"| {title} | | |\n")[1].split("\n\n")[0].splitlines()[1:]
    found = {}
    for line in lines:
        names, verdict, note = (cell.strip() for cell in line.strip().removeprefix("|").removesuffix("|").split("|"))
        for name in re.findall(r"`(\w+)`", names):
            assert name not in found, f"{name} stands twice"
            found[name] = verdict, note
    return found


FIELDS, ARGUMENTS = table("SFTConfig"), table("SFTTrainer")


def test_every_field_and_argument_stands_in_the_table():
    """A new TRL that adds one makes this fail: decide what becomes of it, and write it down."""
    assert set(FIELDS) == {field.name for field in dataclasses.fields(SFTConfig)}
    assert set(ARGUMENTS) == set(inspect.signature(SFTTrainer.__init__).parameters) - {"self"}
    assert {verdict for verdict, _ in [*FIELDS.values(), *ARGUMENTS.values()]} == VERDICTS
    unexplained = [
        name for name, (verdict, note) in {**FIELDS, **ARGUMENTS}.items() if verdict != "same" and len(note) < 20
    ]
    assert unexplained == []


# A value that is refused, for each field that the page says is
VALUES = {
    "use_liger_kernel": True,
    "label_smoothing_factor": 0.1,
    "loss_type": "dft",
    "logging_nan_inf_filter": True,
    "parallelism_config": SimpleNamespace(tp_size=1, cp_size=2, sp_size=1),
    "packing": True,
    "eval_packing": True,
}


def test_there_is_a_value_for_each_that_is_refused():
    assert set(VALUES) == {name for name, (verdict, _) in FIELDS.items() if verdict == "refused"}


@pytest.mark.parametrize("name", VALUES)
def test_what_the_page_calls_refused_is_refused(tmp_path, name):
    settings = {"use_cpu": True, "bf16": False, "report_to": "none"}
    if name == "parallelism_config":  # asked of the accelerator, which takes several ranks
        refuse, arguments = refuse_other_losses, {"compute_loss_func": None, "parallelism": VALUES[name]}
    else:
        refuse, arguments = CALConfig, {"output_dir": str(tmp_path), **settings, name: VALUES[name]}
    with pytest.raises(ValueError, match=rf"^{name}(=| with)"):
        refuse(**arguments)


def test_what_is_called_the_same_keeps_its_default():
    """Fields with another default are called different or refused."""
    ours = {field.name: field for field in dataclasses.fields(CALConfig)}
    other = {
        field.name
        for field in dataclasses.fields(SFTConfig)
        if (ours[field.name].default, ours[field.name].default_factory) != (field.default, field.default_factory)
    }
    assert other == {"padding_free", "logging_nan_inf_filter"}
    assert {FIELDS[name][0] for name in other} <= {"different", "refused"}


def test_the_readme_leads_here():
    readme = (ROOT / "README.md").read_text("utf8")
    swap = readme.split("With TRL, change two names:")[1].split("With any other loop")[0]
    assert "(docs/trl.md)" in swap
    assert "docs/trl.md" in (ROOT / "examples" / "trl_swap.py").read_text("utf8")
