"""What a collator draws at random: anew in every epoch, the same again in the same one."""

import pytest
import torch
from PIL import Image

from seecal import VisionCollator
from tests.support.tiny import tiny_llava_processor

PICTURE = Image.effect_mandelbrot((40, 40), (-2.0, -1.5, 1.0, 1.5), 60).convert("RGB")
RECORD = {
    "id": "a",
    "messages": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "It is red."}],
    "images": [PICTURE],
}


@pytest.mark.parametrize(("contrast", "strength"), [("noise", 0.5), ("patch_mask", 0.5)])
def test_batches_of_two_epochs_differ_in_what_the_second_pass_sees(contrast, strength):
    collator = VisionCollator(tiny_llava_processor(), contrast=contrast, strength=strength)
    made = []
    for epoch in (0, 1, 0):
        collator.epoch = epoch
        made.append(collator([RECORD]))
    first, second, again = (batch["contrast_pixel_values"] for batch in made)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert torch.equal(made[0]["pixel_values"], made[1]["pixel_values"]), "what is trained on stays"
