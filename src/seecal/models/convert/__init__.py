"""Checkpoints of the original LLaVA code to transformers and back: ``seecal.convert``.

``names`` says what each tensor is called in the layouts, ``configs``
does the same for config.json, ``run`` puts them together.
"""
