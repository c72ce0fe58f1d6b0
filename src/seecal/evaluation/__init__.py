"""Answers measured: ``seecal eval``, its metrics, what tells two models apart, and the benchmarks of lmms-eval."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "lmms_eval": ["TaskResults", "run_tasks"],
        "metrics.table": ["METRICS", "Metric"],
        "result": ["Comparison", "Evaluation"],
    },
)
