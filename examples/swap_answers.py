"""Noise in the labels, as in the paper's Figure 3: a share of the records gets the answers of other records.

    python examples/swap_answers.py data/llava_v1_5_mix665k.json data/mix665k-swapped-20.json --share 0.2

DATA is in LLaVA's format, and so is what is written: the same records in the same order with their own images and
questions. Answers change places among drawn records with an image and the same number of turns, whole conversations at a
time; none keeps its own. Those of a number of turns that no other drawn one has stay as they are; how many were swapped is
printed.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

ANSWERS = ("gpt", "assistant")


def answers(record):
    return [turn["value"] for turn in record["conversations"] if turn["from"] in ANSWERS]


def swapped(records, share, seed):
    """(the records, how many of them have another's answers). The records given are left alone."""
    rng = random.Random(seed)
    with_image = [index for index, record in enumerate(records) if record.get("image")]
    alike = defaultdict(list)
    for index in rng.sample(with_image, round(share * len(with_image))):
        alike[len(answers(records[index]))].append(index)
    taken_from = {}
    for drawn in alike.values():
        if len(drawn) > 1:  # in a ring each has the next one's
            taken_from.update(zip(drawn, [*drawn[1:], drawn[0]], strict=True))
    made = list(records)
    for index, other in taken_from.items():
        new = iter(answers(records[other]))
        turns = [{**t, "value": next(new)} if t["from"] in ANSWERS else t for t in records[index]["conversations"]]
        made[index] = {**records[index], "conversations": turns}
    return made, len(taken_from)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--share", type=float, required=True, help="of the records with an image: 0.1, 0.2, 0.3")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if not 0 <= given.share <= 1:
        parser.error(f"--share {given.share}: expected a share from 0 to 1")
    found = json.loads(given.data.read_text("utf8"))
    made, count = swapped(found, given.share, given.seed)
    given.out.write_text(json.dumps(made), "utf8")
    print(f"{given.out}: {count:,} of {len(found):,} records have the answers of another")
