"""README.md of an exported model: what it was trained on and how, read from its run's folder."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from ..models.trusted_files import json_object
from .yaml_text import read_yaml


def model_card(name: str, run: Path | None, config: Any, parameters: int, moved: float | None) -> str:
    """The text of a model card.

    Args:
        name: of the model.
        run: the folder that holds recipe.yaml, and metrics.json or stages with theirs; None: nothing is known.
        config: the model's.
        parameters: how many numbers its weights have.
        moved: of a merged adapter: by how much its logits moved, as a share of the largest.

    Raises:
        ValueError: a recipe.yaml or metrics.json that is damaged.
    """
    from jinja2 import Environment, StrictUndefined

    recipe = {} if run is None else _recipe(run / "recipe.yaml")
    stages = recipe.get("stages") or ([recipe] if recipe else [])
    found = _metrics(run, len(stages)) if run is not None else []
    settings = Environment(undefined=StrictUndefined, autoescape=False, keep_trailing_newline=True, trim_blocks=True)
    template = settings.from_string(Path(__file__).with_name("model_card.md.j2").read_text("utf8"))
    base = recipe.get("model")
    return template.render(
        metadata=_metadata(base),
        name=name,
        model_type=config.model_type,
        parameters=parameters,
        base=base,
        stages=[_stage({**recipe, **stage}, number, found) for number, stage in enumerate(stages, 1)],
        metrics=[row for number, one in enumerate(found, 1) for row in _rows(one, number)],
        recipe=(run / "recipe.yaml").read_text("utf8") if run is not None and recipe else "",
        versions={package: version(package) for package in ("seecal", "transformers", "torch")},
        moved=moved,
    )


def _metadata(base: Any) -> str:
    """The YAML that model hubs read."""
    known = {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["seecal", "cal"]}
    looks_like_id = isinstance(base, str) and base.count("/") == 1 and not Path(base).exists()
    return yaml.safe_dump({**known, **({"base_model": base} if looks_like_id else {})}, sort_keys=False)


def _recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: no recipe; the run's folder is damaged. Copy it again.")
    return found


def _metrics(run: Path, stages: int) -> list[dict[str, Any]]:
    """Those of each stage, in order: of a final folder, or of the run's stages."""
    if (run / "metrics.json").is_file():
        return list(json_object(run / "metrics.json").get("stages", []))
    files = [run / f"stage-{number}" / "metrics.json" for number in range(1, stages + 1)]
    return [json_object(file) if file.is_file() else {} for file in files]


def _stage(stage: dict[str, Any], number: int, metrics: list[dict[str, Any]]) -> dict[str, Any]:
    data = stage.get("data")
    sets = data if isinstance(data, list) else [data]
    paths = [str(one.get("path") if isinstance(one, dict) else one) for one in sets]
    settings = {key: stage[key] for key in ("alpha", "beta", "window", "normalize", "contrast") if key in stage}
    shown = ", ".join(f"{key} {value}" for key, value in settings.items())
    train = stage.get("train", [])
    return {
        "name": _cell(stage.get("name", f"stage {number}")),
        "data": _cell(", ".join(paths)),
        "train": _cell(", ".join(train) if isinstance(train, list) else train),
        "weighting": _cell(f"{stage.get('weighting', 'cal')}{f' ({shown})' if shown else ''}"),
        "steps": metrics[number - 1].get("steps", "") if number <= len(metrics) else "",
    }


def _rows(metrics: dict[str, Any], number: int) -> list[tuple[str, str, str]]:
    name = _cell(metrics.get("stage", f"stage {number}"))
    found = []
    for kind in ("train", "eval"):
        for key, value in (metrics.get(kind) or {}).items():
            if isinstance(value, (int, float)) and not key.endswith(("_runtime", "_per_second", "epoch", "step")):
                called = key if key.startswith(f"{kind}_") else f"{kind}_{key}"
                found.append((name, called, f"{value:.6g}"))
    return found


def _cell(text: Any) -> str:
    return " ".join(str(text).replace("|", "\\|").split())
