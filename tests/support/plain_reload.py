"""Run alone, without seecal: loads models as transformers and PEFT do, offline, and writes their logits.

    python tests/support/plain_reload.py JOBS

JOBS is a JSON list of {model, adapter, quantization, batch, logits}: folders, arguments of BitsAndBytesConfig, files.
"""

import json
import socket
import sys

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig


def refuse(*args):
    raise OSError("this process is offline")


def main(jobs):
    socket.socket.connect = refuse
    for job in jobs:
        options = {"dtype": torch.float32}
        if job["quantization"]:
            options |= {"quantization_config": BitsAndBytesConfig(**job["quantization"]), "device_map": {"": "cpu"}}
        model = AutoModelForImageTextToText.from_pretrained(job["model"], **options)
        if job["adapter"]:
            model = PeftModel.from_pretrained(model, job["adapter"])
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # bitsandbytes' kernel that rounds scales to bfloat16
        with torch.no_grad():
            save_file({"logits": model.eval()(**load_file(job["batch"])).logits.contiguous()}, job["logits"])
    assert not any(name.split(".")[0] in ("seecal", "tests") for name in sys.modules)


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        main(json.load(file))
