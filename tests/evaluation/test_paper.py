"""The paper's figures, as they stand beside a result."""

from seecal.evaluation.paper import figures_for, paper_figures


def test_a_task_has_a_figure_of_each_model():
    found = figures_for("docvqa_val")
    assert [(one.model, one.baseline, one.cal) for one in found] == [
        ("LLaVA-NeXT-7B", 75.1, 77.3),
        ("LLaVA-NeXT-13B", 78.4, 80.1),
    ]
    assert all(one.metric == "anls" and one.times == 100 and one.unknown for one in found)
    assert figures_for("my_task") == []


def test_every_benchmark_of_both_models_is_there():
    found = paper_figures()
    assert {one.model for one in found} == {"LLaVA-NeXT-7B", "LLaVA-NeXT-13B"}
    assert len({(one.model, one.benchmark) for one in found}) == 22
    assert sum(one.cal > one.baseline for one in found if one.task != "coco2017_cap_val") == 21  # SQA of the 13B is not
