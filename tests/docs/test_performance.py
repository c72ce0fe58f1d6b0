"""docs/performance.md: its tables say what the CSVs, the floors and a run at tiny size say."""

import re
from pathlib import Path

from scripts import performance_table
from scripts.performance_table import PAGE, RESULTS, count_table, tables, with_table, written

TEXT = PAGE.read_text("utf8")
STALE = "docs/performance.md is out of date: python -m scripts.performance_table"


def test_the_tables_are_those_of_the_figures():
    for name, rows in tables(RESULTS).items():
        assert written(TEXT, name) == rows, f"{STALE} ({name})"


def test_the_counts_are_those_of_a_run():
    page, found = written(TEXT, "counts"), count_table()
    assert [row[:3] for row in page] == [row[:3] for row in found], STALE
    for there, here in zip(page[1:], found[1:], strict=True):
        assert abs(float(there[3]) - float(here[3])) < 0.05 * float(here[3]), STALE


def test_writing_a_table_again_changes_nothing():
    for name in ("floors", "times", "counts"):
        assert with_table(TEXT, name, written(TEXT, name)) == TEXT


def test_the_loss_is_flat_in_rows_times_words():
    """What the committed figures of the loss say; their times are noise."""
    found = {}
    for row in performance_table.read(RESULTS / "loss-cpu.csv"):
        if row["peak_mib"]:
            place = row["variant"], int(row["rows"]), int(row["vocabulary"])
            found[place] = float(row["peak_mib"]) - float(row["grads_mib"])
    assert found["naive", 8192, 65536] > 3.9 * found["naive", 2048, 65536] > 15 * found["naive", 2048, 16384]
    assert found["ours", 8192, 65536] < 1.02 * found["ours", 2048, 65536]
    assert found["ours-128", 8192, 16384] < 1.02 * found["ours-128", 512, 16384]


def test_figures_fill_the_cells_that_waited(tmp_path):
    """Made-up figures of one shape: its column is filled, the others go on waiting."""
    head = "shape,variant,p50_ms,of_hf,held_mib,peak_mib,note,device,torch,transformers"
    lines = [
        "llava-1.5-7b,hf,1000,1.0,14336,13312,,Some GPU,2,5",
        "llava-1.5-7b,cal,960,0.96,14336,13312,,Some GPU,2,5",
        "llava-1.5-7b,liger,,,,,liger_kernel is not installed,Some GPU,2,5",
    ]
    (tmp_path / "step-llava-1.5-7b.csv").write_text("\n".join([head, *lines]), "utf8")
    times = {row[0]: row[1:] for row in performance_table.time_table(tmp_path)}
    assert times["transformers, plain"][:2] == ["1000 ms", "waits for a GPU"]
    assert times["**ours CAL**"][0] == "0.960×"
    assert times["Liger, plain"][0] == "liger_kernel is not installed"
    memory = {row[0]: row[1:] for row in performance_table.memory_table(tmp_path)}
    assert memory["**ours CAL**"][:2] == ["27.0", "waits for a GPU"]
    assert performance_table.device_table(tmp_path)[1] == ["Some GPU", "2", "5", "step-llava-1.5-7b"]


HEAD = "shape,variant,rounds,p50_ms,of_hf_p20,of_hf_p50,of_hf_p80,peak_mib,note,device,torch"


def put(folder, name, *lines):
    (folder / f"{name}.csv").write_text("\n".join([HEAD, *lines]), "utf8")


def test_figures_of_a_cpu_fill_the_row_of_their_shape(tmp_path):
    """Made-up figures: ratios with their spread and floor, met and missed, a CPU a row, and none that a GPU gave."""
    hf, some = "135m,hf,3,12000,1,1,1,900,,cpu (Some),2", "cpu (Some),2"
    put(
        tmp_path, "step-135m-cpu", hf, f"135m,cal,3,11000,0.89,0.91,0.93,700,,{some}", f"135m,trl,,,,,,,not here,{some}"
    )
    put(tmp_path, "step-135m-cpu-2", hf.replace("Some", "Other"), "135m,cal,3,11000,1.1,1.2,1.3,700,,cpu (Other),2")
    put(tmp_path, "step-60m-152k-cpu", "60m-152k,hf,3,12000,1,1,1,900,,Some GPU,2")
    header, one, other, following, last = performance_table.cpu_table(tmp_path)
    cells = dict(zip(header, one, strict=True))
    floor = cells["**ours CAL**"].split("; floor ")[1]
    assert cells["transformers, plain"] == "12.0 s"
    assert cells["**ours CAL**"].startswith("0.910× (0.890 to 0.930); floor ")
    assert cells["TRL SFT, plain"].startswith("not here; floor ")
    assert cells["limit of ours CAL"] == f"{1.02 * float(floor.rstrip('×')) + 0.03:.3f}×: met"
    assert cells["taken on"] == "cpu (Some), 3 rounds, torch 2"
    assert dict(zip(header, other, strict=True))["limit of ours CAL"].endswith("×: missed")
    assert [one[0], other[0], following[0], last[0]] == ["135m", "135m", "135m-next", "60m-152k"]
    for row in (following, last):
        assert row[1] == row[-1] == "not measured yet"
    memory = performance_table.cpu_memory_table(tmp_path)
    assert memory[1] == ["135m", "900", "not measured yet", "not measured yet", "not measured yet", "700"]
    assert [row[0] for row in memory[1:]] == ["135m", "135m-next", "60m-152k"], "two CPUs that agree are one row"
    put(tmp_path, "step-135m-cpu-3", hf.replace("900", "901"))
    assert [row[:2] for row in performance_table.cpu_memory_table(tmp_path)[1:3]] == [["135m", "900"], ["135m", "901"]]


def test_figures_of_whole_trainings_fill_theirs(tmp_path):
    names = [f"{name}_{spot}" for name in ("samples_per_s", "of_sft") for spot in ("p20", "p50", "p80")]
    names += ["wait_share_p50", "peak_mib_p50", "workers_mib_p50"]
    row = "cal,9,10,11,0.8,0.9,1.1,0.123,1500,600"
    (tmp_path / "trainer-cpu.csv").write_text("\n".join([",".join(["variant", *names]), row]), "utf8")
    found = {row[0]: row[1:] for row in performance_table.trainer_table(tmp_path)}
    assert found["**CALTrainer**"] == ["10.0 (9.0 to 11.0)", "0.900× (0.800 to 1.100)", "12.3 %", "1,500", "600"]
    assert set(found["SFTTrainer"]) == {"not measured yet"}


def test_what_the_text_says_of_the_batches_on_a_cpu():
    for shape in performance_table.CPU_SHAPES.values():
        work = performance_table.work_of(performance_table.draw(shape)[0])
        padding = 1 - sum(work.rows) / sum(work.padded)
        assert f"\n{100 * padding:.0f} % of it padding" in TEXT
        assert f"with {shape.text[0]} to {shape.text[1]} tokens of text" in TEXT


def test_the_floors_in_the_text_are_those_of_the_table():
    """The published way's, beside the prototype's measurements, and the slack of 3b-152k."""
    floors = {row[0]: row[1:] for row in written(TEXT, "floors")}
    said = re.search(r"where the count says ([\d.]+×), ([\d.]+×), ([\d.]+×) and ([\d.]+×)", TEXT)
    assert list(said.groups()) == floors["CAL as published / hf"]
    slack = 0.92 - float(floors["**ours CAL** / hf"][2].rstrip("×"))
    assert f"lies {slack * 100:.1f} points above its floor" in TEXT


def test_the_readme_says_the_same_floors():
    floors = {row[0]: row[1:] for row in written(TEXT, "floors")}
    readme = (PAGE.parents[1] / "README.md").read_text("utf8")
    said = re.search(r"plain step ([\d.]+×) at LLaVA-1.5-7B, ([\d.]+×) at LLaVA-NeXT-7B", readme)
    assert [f"**{one}**" for one in said.groups()] == floors["**ours CAL / ours plain**"][:2]


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (Path(PAGE).parent / target).exists(), target
