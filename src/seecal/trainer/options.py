"""What CALTrainer can be told beside CAL and its data. Needs neither torch nor TRL, so that the help can show it."""

from __future__ import annotations

from dataclasses import dataclass

from ..core.options import documented, option


@documented
@dataclass(frozen=True)
class LoggingOptions:
    """What CALTrainer logs beside its figures.

    Raises:
        ValueError: a number of steps that is none.
    """

    logging_tokens_steps: int | None = option(
        None,
        "Every so many steps, and before the first, log the label tokens of one fixed record of the evaluation data, "
        "coloured by Δ, and the histogram of Δ: to tensorboard, trackio or wandb, whichever report_to names. null or 0: "
        "off (docs/logging.md).",
    )

    def __post_init__(self) -> None:
        steps = self.logging_tokens_steps
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
            raise ValueError(
                f"logging_tokens_steps={steps!r}: expected a whole number of steps, such as 50; 0 or None is off"
            )
