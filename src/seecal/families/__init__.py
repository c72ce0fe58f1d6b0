"""What makes each model family of transformers special: one row in ``FAMILIES``, and how to find its parts.

Everything that a row does not say is read off the model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    ["dummy_images"],
    {
        "table": ["FAMILIES", "Family"],
        "module_groups": ["GROUPS"],
    },
)
