"""A TRL script that trains with CAL: two names changed, nothing else.

    python examples/trl_swap.py [MODEL] [OUTPUT_DIR]

MODEL is a vision-language model's folder or id; without it, a tiny one is built and trained in seconds. What every field
and argument becomes stands in docs/trl.md.
"""

import sys

import torch
from tiny_vlm import tiny_dataset, tiny_llava, tiny_llava_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

from seecal import CALConfig, CALTrainer  # before: from trl import SFTConfig, SFTTrainer

name = sys.argv[1] if len(sys.argv) > 1 else "tiny"
model = tiny_llava() if name == "tiny" else AutoModelForImageTextToText.from_pretrained(name)
processor = tiny_llava_processor() if name == "tiny" else AutoProcessor.from_pretrained(name)

args = CALConfig(
    output_dir=sys.argv[2] if len(sys.argv) > 2 else "out/trl_swap",
    per_device_train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=2e-3,
    max_steps=10,
    logging_steps=5,
    eval_strategy="steps",
    eval_steps=5,
    report_to="none",
    use_cpu=not torch.cuda.is_available(),
)
trainer = CALTrainer(
    model=model,
    args=args,
    train_dataset=tiny_dataset(64),  # columns: messages, images
    eval_dataset=tiny_dataset(10, seed=1),
    processing_class=processor,
)
trainer.train()
trainer.save_model()
