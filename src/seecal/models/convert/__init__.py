"""Checkpoints of the original LLaVA code to transformers and back: ``seecal.convert``.

``tensors`` reads and writes files a tensor at a time, ``names`` says what each tensor is called in the layouts, ``configs``
does the same for config.json, ``run`` puts them together.
"""
