"""The paper's figures, as they stand beside a task of lmms-eval."""

import pytest

from seecal.evaluation.paper import paper_rows, paper_tables
from seecal.evaluation.paper_tasks import figures_for


def test_a_task_has_a_figure_of_each_system():
    found = figures_for("docvqa_val")
    assert [(one.system, one.baseline, one.cal) for one in found] == [
        ("LLaVA-NeXT-7B", 75.1, 77.3),
        ("LLaVA-NeXT-13B", 78.4, 80.1),
    ]
    assert all(one.figure == "anls" and one.times == 100 and one.unknown for one in found)
    assert figures_for("my_task") == []


@pytest.mark.parametrize("benchmark", paper_tables()["benchmarks"])
def test_every_benchmark_of_the_paper_has_its_task(benchmark):
    tasks = paper_tables()["benchmarks"][benchmark]["lmms_eval"]["tasks"]
    assert tasks
    for task in tasks:
        found = [(one.system, f"{one.baseline:g}", f"{one.cal:g}") for one in figures_for(task)]
        assert found == paper_rows(benchmark)
