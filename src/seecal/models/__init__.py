"""Models and processors from a folder or a hub id, answers of a model, and the demo's own small model.

``loading`` is the only way in: nothing of a model's author is run.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"generate": ["answers"]})
