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


@documented
@dataclass(frozen=True)
class AnswerOptions:
    """Answers that CALTrainer has the model write at each evaluation, and measures.

    Raises:
        ValueError: a metric that is not known or that one answer is too few for, or a number out of its range.
    """

    eval_metric: str | None = option(
        None,
        "At each evaluation the model answers some records of the evaluation data, and this is logged of its answers: "
        "exact, anls, relaxed, ocr, cider, iou, choice, choice_mmt or choice_scienceqa, as seecal eval measures it "
        "(eval_exact and so on). null: none.",
    )
    eval_metric_records: int = option(64, "How many records, the first of each evaluation set.")
    eval_max_new_tokens: int = option(64, "Longest answer, in tokens.")

    def __post_init__(self) -> None:
        for name, unit in (("eval_metric_records", "records"), ("eval_max_new_tokens", "tokens")):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: expected a whole number of {unit}, 1 or more")
        if self.eval_metric is None:
            return
        from ..evaluation.metrics.table import METRICS

        fit = [name for name, metric in METRICS.items() if metric.least == 1]
        if self.eval_metric not in fit:
            why = (
                "compares the answers of several people, and a record has one"
                if self.eval_metric in METRICS
                else ("is not known")
            )
            raise ValueError(f"eval_metric={self.eval_metric!r} {why}: expected one of {', '.join(fit)}")


@documented
@dataclass(frozen=True)
class HangOptions:
    """How long a rank may go without progress.

    Raises:
        ValueError: a time that is none.
    """

    hang_timeout: float = option(
        1200.0,
        "Seconds without progress (a micro-batch, a batch of an evaluation, a save) after which every rank writes its "
        "stacks to stderr and to hang-rank-R.txt in output_dir, and ends with exit code 75. 0: never. Keep it below "
        "ddp_timeout, after which torch ends the ranks that wait, without stacks.",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.hang_timeout < float("inf"):
            raise ValueError(f"hang_timeout={self.hang_timeout}: expected seconds, 0 for never")
