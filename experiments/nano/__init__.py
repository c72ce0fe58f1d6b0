"""Vision-language models of 1 to 4 M parameters, the tasks that they learn, and what is measured of them.

One training takes minutes of one core. What every arm of an experiment shares, up to and with stage 1, is made once for a
(cell, seed) and kept: :func:`aligned`.
"""

from .align import Aligned, aligned, counts
from .cell import ANSWERS, MODELS, SIDES, SIZES, TASKS, Cell
from .measure import calibrated, fitted, measure
from .plan import PLANS, Plan
from .records import Record, swapped
from .training import trained

__all__ = [
    "ANSWERS",
    "MODELS",
    "PLANS",
    "SIDES",
    "SIZES",
    "TASKS",
    "Aligned",
    "Cell",
    "Plan",
    "Record",
    "aligned",
    "calibrated",
    "counts",
    "fitted",
    "measure",
    "swapped",
    "trained",
]
