"""Write src/seecal/demo/emoji_words.json: what kind of thing each emoji is, and words that go with it.

    npm pack emojibase-data && tar xzf emojibase-data-*.tgz
    python scripts/make_emoji_words.py package

No package on PyPI has the groups and tags of Unicode's CLDR, so this small table travels with seecal. It is derived from
emojibase-data (MIT, copyright Miles Johnson), which takes them from Unicode CLDR (Unicode Licence v3). One row a drawing:
``hexcode: [subgroup, tag, tag, ...]``. Names are not in it: they come from the ``emoji`` package.
"""

import json
import sys
from pathlib import Path

OUT = Path(__file__).parents[1] / "src/seecal/demo/emoji_words.json"

# Flags are asked to be left out of the figures; the others are letters in boxes, clock hands or bare colours of skin and
# hair: their names cannot be told from a small drawing, so they would only measure the resolution.
LEFT_OUT = {"flag", "country-flag", "subdivision-flag", "keycap", "alphanum", "skin-tone", "hair-style"}
CLOCKS = {f"{code:X}" for code in range(0x1F550, 0x1F568)}
# An emoji with one of these parts is a variant of another one: woman, man, facing right, hair.
VARIANT_PARTS = {"2640", "2642", "27A1", "1F9B0", "1F9B1", "1F9B2", "1F9B3"}
MAX_TAGS = 6


def is_variant(hexcode: str) -> bool:
    parts = hexcode.split("-")
    return len(parts) > 1 and (bool(VARIANT_PARTS & set(parts)) or parts[0] in ("1F468", "1F469"))


def main(folder: str) -> None:
    source = Path(folder)
    rows = json.loads((source / "en/data.json").read_text("utf8"))
    groups = json.loads((source / "meta/groups.json").read_text("utf8"))
    table = {}
    for row in rows:
        subgroup = groups["subgroups"].get(str(row.get("subgroup", "")))
        hexcode = row["hexcode"]
        if subgroup is None or subgroup in LEFT_OUT or hexcode in CLOCKS or is_variant(hexcode):
            continue
        name = set(row["label"].lower().split())
        tags = [
            tag for tag in row.get("tags", []) if tag.isascii() and tag.isalpha() and tag not in name and len(tag) > 2
        ]
        table[hexcode] = [subgroup, *tags[:MAX_TAGS]]
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(table.items()))
    OUT.write_text("{\n" + lines + "\n}\n")
    print(f"{len(table)} drawings, {OUT.stat().st_size / 1000:.0f} kB -> {OUT}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
