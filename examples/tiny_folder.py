"""Write a tiny model and tiny data sets into a folder, for recipes to train: everything runs offline in seconds.

    python examples/tiny_folder.py [FOLDER]        default: out/tiny

FOLDER/model, FOLDER/data.json (64 records in LLaVA's format), FOLDER/eval.json (12) and their images.
"""

import json
import sys
from pathlib import Path

from tiny_vlm import tiny_llava, tiny_llava_processor, tiny_records


def write_records(path: Path, count: int, seed: int) -> None:
    rows = []
    for record in tiny_records(count, seed):
        row = {"id": record["id"]}
        user, assistant = (message["content"] for message in record["messages"])
        for number, image in enumerate(record["images"]):
            row["image"] = f"images/{path.stem}-{record['id']}-{number}.png"
            image.save(path.parent / row["image"])
            user = "<image>\n" + user
        row["conversations"] = [{"from": "human", "value": user}, {"from": "gpt", "value": assistant}]
        rows.append(row)
    path.write_text(json.dumps(rows, indent=1))


def main(folder: Path) -> None:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    tiny_llava().save_pretrained(folder / "model")
    tiny_llava_processor().save_pretrained(folder / "model")
    write_records(folder / "data.json", 64, seed=0)
    write_records(folder / "eval.json", 12, seed=1)
    print(f"{folder}: model, data.json, eval.json")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "out/tiny"))
