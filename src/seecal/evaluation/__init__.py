"""How good a model is: on records of one's own, and on the benchmarks of lmms-eval."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "lmms_eval": ["TaskResults", "run_tasks"],
    },
)
