"""CAL in a plain PyTorch loop: enable_cal, and model(**batch).loss is CAL's while the model trains.

python examples/plain_loop.py [STEPS]
"""

import sys

import torch
from tiny_vlm import tiny_llava, tiny_llava_processor, tiny_records

from seecal import CALOptions, VisionCollator, enable_cal

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 20
model = enable_cal(tiny_llava(), CALOptions(beta=5.0)).train()
collate = VisionCollator(tiny_llava_processor())
records = tiny_records(64)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

for step in range(steps):
    batch = collate(records[8 * step % 64 :][:8])
    output = model(**batch)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    delta = output.cal.visual_delta
    print(
        f"step {step + 1:3}  CAL loss {output.loss.item():.3f}  cross-entropy {output.cal.cross_entropy.item():.3f}  "
        f"mean Δ {delta.delta[delta.has_contrast].mean().item():.2f}"
    )

model.eval()  # from here on the plain forward, logits and all
print("plain loss", f"{model(**collate(records[:8])).loss.item():.3f}")
