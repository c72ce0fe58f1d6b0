# The public names and the modules that define them: `from .module import name as name`, nothing else.
from .core.contrasts import CONTRASTS as CONTRASTS
from .core.contrasts import Contrast as Contrast
from .core.enable import disable_cal as disable_cal
from .core.enable import enable_cal as enable_cal
from .core.enable import visual_delta as visual_delta
from .core.options import CALOptions as CALOptions
from .core.outputs import CALOutput as CALOutput
from .core.outputs import VisualDelta as VisualDelta
from .core.weighting import WEIGHTINGS as WEIGHTINGS
from .core.weighting import Weighting as Weighting
from .core.weighting import token_weights as token_weights
from .data.collators.vision import VisionCollator as VisionCollator
from .data.sources.formats import FORMATS as FORMATS
from .data.sources.formats import Format as Format
from .data.sources.load import load_records as load_records
from .data.sources.mixture import mix as mix
from .data.sources.reports import LoadReport as LoadReport
from .evaluation.run import evaluate as evaluate
from .families.table import FAMILIES as FAMILIES
from .families.table import Family as Family
from .ops.linear_cross_entropy import weighted_linear_cross_entropy as weighted_linear_cross_entropy
from .pages.alignment import alignment as alignment
from .pages.report import report as report
from .recipes.check_data import check_data as check_data
from .recipes.preview import preview as preview
from .scoring.calibration import calibrate as calibrate
from .scoring.run import score as score
from .scoring.selection import filter as filter
from .scoring.show import show as show
from .trainer.cal_config import CALConfig as CALConfig
from .trainer.cal_trainer import CALTrainer as CALTrainer
from .trainer.replay import replay as replay

__version__: str
