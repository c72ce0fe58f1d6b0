"""seecal trains vision-language models on the tokens that see the image.

The public names stand in ``__init__.pyi`` and are loaded when they are first used, so that ``import seecal`` and
``seecal --help`` stay instant: neither torch nor transformers nor trl is imported here.
"""

import importlib
from typing import Any

import lazy_loader
import wrapt

__version__ = "0.1.0.dev0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_DEMO_TOWER = "seecal_efficientnet_lite"


def _meet_our_classes(read: Any, reader: Any, args: Any, kwargs: Any) -> Any:
    """transformers' reading of a config: where it names a class of ours, that is registered first."""
    found = read(*args, **kwargs)
    vision = found[0].get("vision_config")
    if _DEMO_TOWER in (found[0].get("model_type"), vision.get("model_type") if isinstance(vision, dict) else None):
        importlib.import_module("seecal.models.micro").register()
    if found[0].get("model_type") == "mgm" or found[0].get("processor_class") == "MGMProcessor":
        importlib.import_module("seecal.models.mgm")
    return found


def _watch_configs(module: Any) -> None:
    wrapt.wrap_function_wrapper(module, "PreTrainedConfig.get_config_dict", _meet_our_classes)


def _watch_processors(module: Any) -> None:
    wrapt.wrap_function_wrapper(module, "ProcessorMixin.get_processor_dict", _meet_our_classes)


# The demo's vision tower and Mini-Gemini are classes of ours, and their checkpoints load after `import seecal`, before or
# after transformers. Registering them at import would change transformers' registries for everybody who imports seecal; so
# it waits until such a checkpoint's config is read. The hooks import nothing: `seecal --help` stays fast.
wrapt.register_post_import_hook(_watch_configs, "transformers.configuration_utils")
wrapt.register_post_import_hook(_watch_processors, "transformers.processing_utils")
