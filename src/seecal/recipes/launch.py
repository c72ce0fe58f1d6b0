"""The files that ``accelerate launch --config_file`` takes, found by name wherever seecal is installed."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "accelerate"


def accelerate_configs() -> dict[str, str]:
    """name -> what the file is for (its first line), of the configurations that come with seecal."""
    files = sorted(FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text("utf8").splitlines()[0].removeprefix("# ") for file in files}


def accelerate_config(name: str) -> Path:
    """The path of an accelerate configuration of ours: single, ddp, fsdp2, zero2 or zero3. ValueError for another name."""
    known = accelerate_configs()
    if name not in known:
        raise ValueError(
            f"there is no accelerate configuration {name!r}; there are {', '.join(known)}. A file of your own goes to "
            "accelerate launch --config_file as it is"
        )
    return FOLDER / f"{name}.yaml"
