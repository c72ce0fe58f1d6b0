"""CAL on TRL's SFTTrainer: the only part that needs TRL.

``CALConfig`` and ``CALTrainer`` take the place of ``SFTConfig`` and ``SFTTrainer``.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "cal_config": ["CALConfig"],
        "cal_trainer": ["CALTrainer"],
        "callbacks": ["GradientCheck", "StopOnSignal"],
    },
)
