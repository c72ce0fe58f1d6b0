"""One place of the grid of experiments."""

from __future__ import annotations

from dataclasses import dataclass, fields

MODELS = ("llava", "llava_next", "qwen2_vl", "paligemma")
TASKS = ("shapes", "reading", "charts", "scenes")
SIZES = ("s", "m")
SIDES = (64, 96)
ANSWERS = ("sentence", "short")
_CHOICES = {"model": MODELS, "task": TASKS, "size": SIZES, "side": SIDES, "answers": ANSWERS}


@dataclass(frozen=True)
class Cell:
    """A kind of model on a task.

    Args:
        model: the classes of transformers that it is made of.
        task: what it is asked.
        size: its width and depth.
        side: of an image, in pixels.
        answers: whole sentences with stock phrases around, or the words of the image alone.

    Raises:
        ValueError: a value that is not one of those above.
    """

    model: str = "llava"
    task: str = "shapes"
    size: str = "s"
    side: int = 64
    answers: str = "sentence"

    def __post_init__(self) -> None:
        for field in fields(self):
            value, known = getattr(self, field.name), _CHOICES[field.name]
            if value not in known:
                raise ValueError(
                    f"{field.name}={value!r}: there is no such cell. Set one of {', '.join(map(str, known))}"
                )

    def __str__(self) -> str:
        return "-".join(str(getattr(self, field.name)) for field in fields(self))
