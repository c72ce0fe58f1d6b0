"""seecal trains vision-language models on the tokens that see the image.

The public names below are loaded when they are first used, so that ``import seecal`` and ``seecal --help`` stay instant:
neither torch nor transformers nor trl is imported here.
"""

import importlib
from typing import TYPE_CHECKING, Any

import wrapt

__version__ = "0.1.0.dev0"

# public name -> module that defines it
_PUBLIC = {
    "CALOptions": "options",
    "VisualDelta": "options",
    "WEIGHTINGS": "weighting",
    "token_weights": "weighting",
    "weighted_linear_cross_entropy": "linear_ce",
    "enable_cal": "forward",
    "disable_cal": "forward",
    "visual_delta": "forward",
    "CALConfig": "config",
    "CALTrainer": "trainer",
}

__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:
    from .config import CALConfig as CALConfig
    from .forward import disable_cal as disable_cal
    from .forward import enable_cal as enable_cal
    from .forward import visual_delta as visual_delta
    from .linear_ce import weighted_linear_cross_entropy as weighted_linear_cross_entropy
    from .options import CALOptions as CALOptions
    from .options import VisualDelta as VisualDelta
    from .trainer import CALTrainer as CALTrainer
    from .weighting import WEIGHTINGS as WEIGHTINGS
    from .weighting import token_weights as token_weights


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'seecal' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"seecal.{_PUBLIC[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _register_micro(_: object) -> None:
    importlib.import_module("seecal.models.micro").register()


# The demo's vision tower is a class of ours. AutoModel must know it whenever seecal and transformers are both imported,
# in either order, and importing transformers here would make `seecal --help` slow: so wait until someone else does.
wrapt.register_post_import_hook(_register_micro, "transformers.models.auto.modeling_auto")
