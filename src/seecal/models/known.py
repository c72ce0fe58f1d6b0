"""Configs of published models by name, without a download: what a plan and a dry run need to know of a model.

One file a model under ``known/``: the hub ids that it stands for, where its sizes are from, and the config itself.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("known")


@dataclass(frozen=True)
class KnownModel:
    """A published model's config.

    Attributes:
        name: such as ``llava-1.5-7b``.
        ids: the hub ids that have this config.
        source: where its sizes are from.
        parameters: what is published of its size, in numbers; None: nothing that could be compared.
        parameters_source: where that is from.
        config: as in its config.json.
        image_processor: class and settings of its image processor, where images have more than one size in it.
    """

    name: str
    ids: tuple[str, ...]
    source: str
    parameters: int | None
    parameters_source: str | None
    config: Mapping[str, Any]
    image_processor: Mapping[str, Any] | None = None


@functools.cache
def known_models() -> dict[str, KnownModel]:
    """Name → model, of all that come with seecal."""
    found = {}
    for file in sorted(FOLDER.glob("*.json")):
        entry = json.loads(file.read_text("utf8"))
        found[file.stem] = KnownModel(file.stem, tuple(entry.pop("ids")), **entry)
    return found


def known_config(name: str) -> Any:
    """The transformers config of a model, without a download.

    Args:
        name: one of :func:`known_models`, a hub id that one of them stands for, or a folder with a config.json.

    Returns:
        A new ``PreTrainedConfig`` at every call.

    Raises:
        ValueError: none of these; the message lists the names.
    """
    from transformers import AutoConfig

    folder = Path(name)
    if (folder / "config.json").is_file():
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder / 'config.json'}: cannot be read: {str(error).splitlines()[0]}") from None
    model = known_model(name)
    if model is None:
        raise ValueError(
            f"{name}: no folder with a config.json, and no model whose sizes come with seecal. Give a model's folder, or "
            f"one of {', '.join(known_models())}"
        )
    entries = _copy(model.config)
    if entries["model_type"] == "mgm":
        importlib.import_module("seecal.models.mgm")  # which registers it
    return AutoConfig.for_model(entries.pop("model_type"), **entries)


def known_model(name: str) -> KnownModel | None:
    """The entry of a name or a hub id; None: not known."""
    known = known_models()
    by_id = {hub_id.lower(): one for one in known.values() for hub_id in one.ids}
    return known.get(name) or by_id.get(name.lower())


def known_image_processor(name: str) -> Any:
    """The image processor of a known model whose images have several sizes; None: they have one, which its config tells."""
    import transformers

    model = known_model(name)
    if model is None or model.image_processor is None:
        return None
    return getattr(transformers, model.image_processor["class"])(**_copy(model.image_processor["settings"]))


def _copy(entries: Any) -> Any:
    """transformers keeps and changes what it is given."""
    return json.loads(json.dumps(entries))
