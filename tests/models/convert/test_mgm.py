"""seecal.convert of Mini-Gemini: its original's files to transformers, the same logits, and back."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

import seecal
from tests.models.mgm.test_original_keys import GEMMA, ORIGINAL, TOWERS, made_up
from tests.support import mgm_reference, original_llava, processors

KINDS = {"mgm": ORIGINAL, "mgm_gemma": GEMMA}


def towers(folder):
    """The folders of both towers, without weights: they only tell the sizes."""
    clip, aux = folder / "clip", folder / "aux"
    for one, config in ((clip, TOWERS["vision_config"]), (aux, TOWERS["vision_aux_config"])):
        one.mkdir(parents=True)
        kind = "clip_vision_model" if one == clip else "convnext"
        (one / "config.json").write_text(json.dumps({"model_type": kind, **config}))
    return {"vision_tower": str(clip), "aux_tower": str(aux)}
