"""Three data sets in three formats, mixed by weights, and trained on with CAL. Offline, in seconds, on a tiny model.

python examples/mixture.py [OUTPUT_DIR]
"""

import csv
import json
import sys
from collections import Counter
from pathlib import Path

import torch
from tiny_vlm import tiny_image, tiny_llava, tiny_llava_processor

from seecal import CALConfig, CALTrainer, LoadReport, load_records, mix

output = Path(sys.argv[1] if len(sys.argv) > 1 else "out/mixture")
data = output / "data"
data.mkdir(parents=True, exist_ok=True)
COLOURS = ("red", "green", "blue", "yellow")
for colour in COLOURS:
    tiny_image(colour).save(data / f"{colour}.png")

# Captions in a table, questions as LLaVA writes them, conversations without images; one record names no image that exists.
with open(data / "captions.csv", "w", newline="") as file:
    csv.writer(file).writerows([("file_name", "text"), *((f"{one}.png", f"It is {one}.") for one in COLOURS * 10)])
questions = [
    {
        "id": f"{one}-{number}",
        "image": f"{one}.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat colour is it?"},
            {"from": "gpt", "value": f"It is {one}."},
        ],
    }
    for number in range(20)
    for one in (*COLOURS, *(["black"] if number == 7 else []))
]
(data / "questions.json").write_text(json.dumps(questions))
chat = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c."}]}
(data / "chat.jsonl").write_text(f"{json.dumps(chat)}\n" * 20)

sets = {}
for name in ("captions.csv", "questions.json", "chat.jsonl"):
    report = LoadReport()
    sets[name] = load_records(data / name, on_bad="skip", report=report)
    print(f"{name}: {report.accepted} records as {report.format}, {report.rejected} left out")
    for record, reason in report.reasons:
        print(f"  {record}: {reason}")

# Every record at least once; the small sets are repeated as their weights ask.
mixture = mix(sets, {"captions.csv": 0.5, "questions.json": 0.4, "chat.jsonl": 0.1}, seed=0)
drawn = Counter(mixture["source"])
print(
    "mixture:", ", ".join(f"{name} {count / len(mixture):.0%}" for name, count in drawn.items()), f"of {len(mixture)}"
)

trainer = CALTrainer(
    model=tiny_llava(),
    args=CALConfig(
        output_dir=str(output),
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        max_steps=10,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    ),
    train_dataset=mixture,
    processing_class=tiny_llava_processor(),
)
trainer.train()
