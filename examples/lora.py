"""LoRA with CAL: adapters on the language model, the projector trained and saved with them; then merged.

    python examples/lora.py [MODEL] [OUTPUT_DIR]

MODEL is a vision-language model's folder or id; without it, a tiny one is built and trained in seconds.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel
from tiny_vlm import tiny_dataset, tiny_llava, tiny_llava_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

from seecal import CALConfig, CALTrainer
from seecal.recipes import LoraSettings, prepare, trainable_tree
from seecal.trainer import GradientCheck

name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
out = Path(sys.argv[2] if len(sys.argv) > 2 else "out/lora")


def load():
    return tiny_llava() if name == "tiny" else AutoModelForImageTextToText.from_pretrained(name)


processor = tiny_llava_processor() if name == "tiny" else AutoProcessor.from_pretrained(name)
prepared = prepare(load(), ["projector", "lora"], LoraSettings(r=8, alpha=16))
args = CALConfig(
    output_dir=str(out),
    per_device_train_batch_size=8,
    learning_rate=5e-3,
    max_steps=20,
    logging_steps=5,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
    bf16=torch.cuda.is_available(),
)
print(trainable_tree(prepared, args.learning_rate))
trainer = CALTrainer(
    prepared.model,
    args,
    train_dataset=tiny_dataset(64),
    processing_class=processor,
    callbacks=[GradientCheck()],  # every trainable tensor has a gradient after step 1, or training stops
)
trainer.train()
trainer.save_model(str(out / "adapter"))  # adapters, projector and processor

merged = PeftModel.from_pretrained(load(), str(out / "adapter")).merge_and_unload()
merged.save_pretrained(out / "merged")  # a plain transformers model again
processor.save_pretrained(out / "merged")
print(f"adapter: {out / 'adapter'}   merged: {out / 'merged'}")
