"""``seecal train``: a YAML file resolved into stages (``recipe``), and the stages trained one after another (``run``).

The YAML files beside these modules are the recipes that come with seecal.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    ["tiny"],
    {
        "launch": ["accelerate_config", "accelerate_configs"],
        "tiny": ["tiny_folder"],
        "trainable": ["LoraSettings", "prepare", "trainable_tree"],
    },
)
