"""A model as bitsandbytes loads it in 4 bits, and what its weights stand for, decoded here."""

import torch
from transformers import BitsAndBytesConfig


def four_bits(**changed):
    settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32, **changed}
    return BitsAndBytesConfig(load_in_4bit=True, **settings)


def in_four_bits(model, folder, **changed):
    """``model`` saved to ``folder`` and loaded from it in 4 bits, on the CPU, in eval mode."""
    model.save_pretrained(folder)
    options = {"quantization_config": four_bits(**changed), "device_map": {"": "cpu"}, "dtype": torch.float32}
    return type(model).from_pretrained(folder, **options).eval()


def decoded(weight):
    """[out, in] float32: each half byte's entry of the code, times its block's scale."""
    state, packed = weight.quant_state, weight.data.view(torch.uint8).flatten().long()
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()
    blocks = state.code[codes].view(-1, state.blocksize) * state.absmax[:, None]
    return blocks.view(state.shape)
