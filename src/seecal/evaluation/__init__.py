"""Answers measured: ``seecal eval``, its metrics, and what tells two models apart."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "metrics.table": ["METRICS", "Metric"],
        "result": ["Comparison", "Evaluation"],
    },
)
