"""docs/plan.md: the plan that it shows is the one that is computed, and it names every known model."""

from scripts import plan_page as page

from seecal.models.known import known_models

TEXT = page.PAGE.read_text("utf8")


def test_the_plan_on_the_page_is_the_plan(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where neither the model nor the data lie
    assert page.with_plan(TEXT) == TEXT, "python -m scripts.plan_page"


def test_every_known_model_is_named():
    assert all(f"`{name}`" in TEXT for name in known_models())
