"""CITATION.cff and the workflow: they are read by machines, so their few facts are compared with the code's."""

import tomllib

import yaml

import seecal
from tests.support.paths import ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
README = (ROOT / "README.md").read_text("utf8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))["project"]


def test_the_citation_says_what_the_package_says():
    assert CITATION["version"] == seecal.__version__
    assert PROJECT["dynamic"] == ["version"], "it stands in seecal.__version__"
    assert CITATION["license"] == PROJECT["license"]
    assert CITATION["authors"] == PROJECT["authors"] == [{"name": "The seecal authors"}]
    assert not {"url", "repository", "repository-code", "doi"} & CITATION.keys()


def test_the_paper_is_the_one_of_the_readme():
    paper = CITATION["preferred-citation"]
    assert f"title     = {{{paper['title']}}}" in README
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    assert f"author    = {{{names}}}" in README
    assert f"year      = {{{paper['year']}}}" in README
    assert paper["identifiers"][0]["value"].removeprefix("arXiv:") in README


def test_the_workflow_runs_what_anybody_can_run():
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text("utf8"))["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (python,) = (step["with"]["python-version"] for step in job["steps"] if "setup-python" in step.get("uses", ""))
    assert PROJECT["requires-python"] == f">={python}"
