"""seecal trains vision-language models on the tokens that see the image.

The public names stand in ``__init__.pyi`` and are loaded when they are first used, so that ``import seecal`` and
``seecal --help`` stay instant: neither torch nor transformers nor trl is imported here.
"""

import importlib

import lazy_loader
import wrapt

__version__ = "0.1.0.dev0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def _register_micro(_: object) -> None:
    importlib.import_module("seecal.models.micro").register()


# The demo's vision tower is a class of ours. AutoModel must know it whenever seecal and transformers are both imported,
# in either order, and importing transformers here would make `seecal --help` slow: so wait until someone else does.
wrapt.register_post_import_hook(_register_micro, "transformers.models.auto.modeling_auto")
