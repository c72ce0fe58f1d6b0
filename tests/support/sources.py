"""The same conversations written in every format that seecal reads."""

import csv
import io
import json

import datasets
import pyarrow
import pyarrow.parquet

from seecal.data.sources.load import load_records
from tests.support.tiny import tiny_image

COLOURS = ("red", "green", "blue", "yellow")
# (images, turns); <image> stands where an image goes. What every format can say:
SIMPLE = [([colour], [("<image>\nWhat colour is it?", f"It is {colour}.")]) for colour in COLOURS]
# And what only conversations can.
RICH = [
    (["red"], [("<image>\nWhat colour is it?", "It is red."), ("a b", "It is. It is red.")]),
    (["red", "blue"], [("What <image> is <image> it?", "It is red. It is blue.")]),
    ([], [("What is a?", "a b c")]),
    (["green", "yellow", "red"], [("<image>\nWhat?", "green"), ("a <image> b\n<image>", "yellow")]),
]


def images_in(folder):
    """The images as files, with an alpha channel and a grey one among them: what is decoded is the same in all formats."""
    folder.mkdir(exist_ok=True)
    for colour in COLOURS:
        tiny_image(colour).convert("RGBA" if colour == "blue" else "RGB").save(folder / f"{colour}.png")
    return folder


def encoded(folder, colours):
    return [{"bytes": (folder / f"{one}.png").read_bytes(), "path": None} for one in colours]


def names(colours):
    return [f"{one}.png" for one in colours]


def parts(text):
    """The parts that a text with placeholders means."""
    found = []
    for index, piece in enumerate(text.split("<image>")):
        found += [{"type": "image"}] * (index > 0)
        found += [{"type": "text", "text": piece}] if piece.strip() else []
    if len(found) > 1 and found[0]["type"] == "image" and found[1]["type"] == "text":
        found[1]["text"] = found[1]["text"].lstrip()
    if len(found) > 1 and found[-1]["type"] == "image":
        found[-2]["text"] = found[-2]["text"].rstrip()
    return found


def messages(turns, content=parts):
    chat = []
    for question, answer in turns:
        chat += [{"role": "user", "content": content(question)}, {"role": "assistant", "content": content(answer)}]
    return chat


def conversations(turns):
    return [
        {"from": speaker, "value": text} for turn in turns for speaker, text in zip(("human", "gpt"), turn, strict=True)
    ]


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def llava_rows(content):
    rows = []
    for index, (colours, turns) in enumerate(content):
        images = names(colours)
        image = {"image": images[0] if len(images) == 1 else images} if images else {}
        rows.append({"id": f"r{index}", **image, "conversations": conversations(turns)})
    return rows


def llava_json(folder, content):
    return write_json(folder / "data.json", llava_rows(content))


def llava_jsonl(folder, content):
    return write_jsonl(folder / "data.jsonl", llava_rows(content))


def sharegpt(folder, content):
    rows = [{"conversations": conversations(turns), "images": names(colours)} for colours, turns in content]
    return write_json(folder / "data.json", rows)


def messages_parts(folder, content):
    rows = [{"messages": messages(turns), "images": names(colours)} for colours, turns in content]
    return write_jsonl(folder / "data.jsonl", rows)


def messages_texts(folder, content):
    rows = [{"messages": messages(turns, str), "images": names(colours)} for colours, turns in content]
    return write_jsonl(folder / "data.jsonl", rows)


def hub_like(folder, content):
    """As most sets with images are published: an Image feature."""
    rows = [{"messages": messages(turns), "images": encoded(folder, colours)} for colours, turns in content]
    part = {"type": datasets.Value("string"), "text": datasets.Value("string")}
    message = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    features = datasets.Features({"messages": message, "images": datasets.List(datasets.Image())})
    return datasets.Dataset.from_list(rows, features=features)


def hub_like_streaming(folder, content):
    return hub_like(folder, content).to_iterable_dataset()


def saved(folder, content):
    hub_like(folder, content).save_to_disk(folder / "saved")
    return folder / "saved"


def parquet(folder, content):
    path = folder / "data.parquet"
    hub_like(folder, content).to_parquet(path)
    return path


def parquet_raw(folder, content):
    """Conversations beside plain bytes, without any note of `datasets` about them."""
    rows = [
        {"conversations": conversations(turns), "images": [one["bytes"] for one in encoded(folder, colours)]}
        for colours, turns in content
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "raw.parquet")
    return folder / "raw.parquet"


def in_memory(folder, content):
    """A list of rows with Pillow images."""
    return [
        {"messages": messages(turns, str), "images": [tiny_image(one) for one in colours]} for colours, turns in content
    ]


def prompt_completion(folder, content):
    rows = [
        {"prompt": turns[0][0].removeprefix("<image>\n"), "completion": turns[0][1], "image": names(colours)[0]}
        for colours, turns in content
    ]
    return write_jsonl(folder / "data.jsonl", rows)


def prompt_completion_messages(folder, content):
    rows = []
    for colours, turns in content:
        prompt, completion = messages(turns)
        rows.append({"prompt": [prompt], "completion": [completion], "images": names(colours)})
    return write_json(folder / "data.json", rows)


def caption_rows(content):
    return [
        {"file_name": names(colours)[0], "prompt": "What colour is it?", "text": turns[0][1]}
        for colours, turns in content
    ]


def captions_csv(folder, content):
    with (folder / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["file_name", "prompt", "text"])
        writer.writeheader()
        writer.writerows(caption_rows(content))
    return folder


def captions_jsonl(folder, content):
    write_jsonl(folder / "captions.jsonl", caption_rows(content))
    return folder


CONVERSATIONS = {
    one.__name__: one
    for one in (
        llava_json,
        llava_jsonl,
        sharegpt,
        messages_parts,
        messages_texts,
        hub_like,
        hub_like_streaming,
        saved,
        parquet,
        parquet_raw,
        in_memory,
    )
}


def two_parquet_files(folder):
    """``data/a.parquet`` and ``data/b.parquet`` with two records each; returns data."""
    images, data = images_in(folder / "images"), folder / "data"
    data.mkdir()
    for name, content in (("a", SIMPLE[:2]), ("b", SIMPLE[2:])):
        hub_like(images, content).to_parquet(data / f"{name}.parquet")
    return data


SINGLE_TURN = {
    one.__name__: one for one in (prompt_completion, prompt_completion_messages, captions_csv, captions_jsonl)
}
WRITERS = {**CONVERSATIONS, **SINGLE_TURN}


def load(writer, folder, content, **options):
    return load_records(writer(images_in(folder), content), **options)


def expected(folder, content):
    """The records that all of them mean, for a collator."""
    images = images_in(folder)
    return [
        {"messages": messages(turns), "images": [images / name for name in names(colours)]}
        for colours, turns in content
    ]


def png(size=(4, 4), colour="red"):
    buffer = io.BytesIO()
    tiny_image(colour, size).save(buffer, "PNG")
    return buffer.getvalue()


def turn(question="<image>a", answer="b"):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def row(**changes):
    """A good row in LLaVA's format, with changes."""
    return {"id": "r-9", "image": "red.png", "conversations": turn(), **changes}
