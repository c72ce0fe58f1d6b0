"""Mini-Gemini (MGM, MGM-HD; arXiv 2403.18814) in transformers' own form: ``from_pretrained``, ``generate``, Auto classes.

Importing this package registers the classes. After ``import seecal`` that happens by itself when a folder that names them
is read. Read :mod:`.mining` first (what is special about MGM), then :mod:`.modeling`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration import MGMConfig
from .modeling import MGMForConditionalGeneration, MGMModel
from .processing import MGMProcessor

AutoConfig.register(MGMConfig.model_type, MGMConfig, exist_ok=True)
AutoModel.register(MGMConfig, MGMModel, exist_ok=True)
AutoModelForImageTextToText.register(MGMConfig, MGMForConditionalGeneration, exist_ok=True)
AutoProcessor.register(MGMConfig, MGMProcessor, exist_ok=True)

__all__ = ["MGMConfig", "MGMForConditionalGeneration", "MGMModel", "MGMProcessor"]
