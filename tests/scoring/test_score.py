"""seecal.score: columns, numbers, what cannot be used, and what a folder of scores refuses."""

import copy
import dataclasses
import json
import shutil

import pyarrow.parquet
import pytest
import torch
from peft import LoraConfig, get_peft_model

import seecal
from seecal import CALOptions, VisionCollator
from seecal.core.weighting import weights_of
from seecal.scoring import read_manifest, read_scores
from seecal.scoring.manifest import digest_of_processor
from tests.support import sources
from tests.support.tiny import tiny_dataset, tiny_llava, tiny_llava_processor, tiny_records

COLUMNS = [
    *("source", "row", "record", "turn", "position", "token_id", "token", "start", "stop"),
    *("has_contrast", "delta", "logit_with", "logit_without", "weight"),
]


@pytest.fixture
def score(model, processor, tmp_path):
    def run(data, out=tmp_path / "scores", **options):
        options = {"processor": processor, "records_per_shard": 4, "batch_size": 3, **options}
        return seecal.score(options.pop("model", model), data, out, **options)

    return run


def table(folder):
    return pyarrow.parquet.read_table(folder)


def write_llava(folder, n=10, **changes):
    folder.mkdir(exist_ok=True)
    rows = []
    for record in tiny_records(n):
        row = {
            "id": record["id"],
            "conversations": sources.turn(*(message["content"] for message in record["messages"])),
        }
        if record["images"]:
            row["image"] = f"{record['id']}.png"
            record["images"][0].save(folder / row["image"])
            row["conversations"][0]["value"] = "<image>\n" + row["conversations"][0]["value"]
        rows.append({**row, **changes.get(record["id"], {})})
    return sources.write_json(folder / "data.json", rows)


def test_columns_and_numbers(score, model, processor, tmp_path):
    """Against one batch of all the records: what padding and batches do to a number is rounding."""
    data = tiny_dataset(10)
    report = score(data)
    found = table(tmp_path / "scores")
    assert found.column_names == COLUMNS
    batch = dict(VisionCollator(processor)(list(seecal.load_records(data))))
    delta = seecal.visual_delta(model, batch)
    rows = found.to_pydict()
    assert rows["source"] == ["dataset"] * len(delta)
    assert rows["row"] == delta.sample.tolist()
    assert rows["record"] == [f"r{index}" for index in delta.sample.tolist()]
    assert rows["position"] == delta.position.tolist()
    assert rows["token_id"] == delta.labels.tolist()
    assert rows["has_contrast"] == delta.has_contrast.tolist()
    for name in ("delta", "logit_with", "logit_without"):
        torch.testing.assert_close(torch.tensor(rows[name]), getattr(delta, name), atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(torch.tensor(rows["weight"]), weights_of(delta, CALOptions()), atol=2e-4, rtol=1e-4)
    assert max(rows["weight"]) > min(rows["weight"])
    assert report.with_contrast == int(delta.has_contrast.sum()) < len(delta)
    answers = [record["messages"][1]["content"] for record in tiny_records(10)]
    for number, answer in enumerate(answers):
        mine = [index for index, row in enumerate(rows["row"]) if row == number]
        assert "".join(answer[rows["start"][index] : rows["stop"][index]] for index in mine) == answer
        assert rows["token"][mine[-1]] == "<|end|>"
        assert "".join(rows["token"][index] for index in mine[:-1]) == answer
    assert (report.records, report.tokens, report.shards, report.missing, report.skipped) == (10, len(delta), 3, 0, 0)


def test_logprobs_do_not_change_the_rest(score, tmp_path):
    score(tiny_dataset(5))
    score(tiny_dataset(5), tmp_path / "with", logprobs=True)
    plain, found = table(tmp_path / "scores"), table(tmp_path / "with")
    assert found.column_names == [*COLUMNS, "logprob_with", "logprob_without"]
    assert found.select(COLUMNS).equals(plain)
    rows = found.to_pydict()
    assert max(rows["logprob_with"]) < 0
    without = [same == other for same, other in zip(rows["logprob_with"], rows["logprob_without"], strict=True)]
    assert without == [not seen for seen in rows["has_contrast"]]


def test_delta_of_logprobs(score, tmp_path):
    score(tiny_dataset(3), logprobs=True, options=CALOptions(delta="logprob"))
    rows = table(tmp_path / "scores").to_pydict()
    difference = torch.tensor(rows["logprob_with"]) - torch.tensor(rows["logprob_without"])
    torch.testing.assert_close(torch.tensor(rows["delta"]), difference)


@pytest.mark.parametrize("weighting", ["uniform", "vig", "prior", "dft"])
def test_any_weighting(score, model, processor, tmp_path, weighting):
    score(tiny_dataset(4), options=CALOptions(weighting=weighting), batch_size=4)
    options = CALOptions(weighting=weighting)
    delta = seecal.visual_delta(model, dict(VisionCollator(processor)(list(tiny_dataset(4)))), options=options)
    torch.testing.assert_close(
        torch.tensor(table(tmp_path / "scores")["weight"].to_pylist()), weights_of(delta, options), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("contrast", ["mask", "blur", "swap"])
def test_any_contrast_goes_on_the_same(score, tmp_path, contrast):
    """swap keeps an image of an earlier batch: never of one that a restart did not see."""
    options = CALOptions(contrast=contrast)
    score(tiny_dataset(10), options=options)
    whole = table(tmp_path / "scores")
    (tmp_path / "scores" / "scores-000001.parquet").unlink()
    score(tiny_dataset(10), options=options)
    assert table(tmp_path / "scores").equals(whole)
    score(tiny_dataset(10), tmp_path / "drop")
    assert not table(tmp_path / "drop")["delta"].equals(whole["delta"]) or contrast == "mask"


def test_a_loaded_model_is_left_as_it_was(score, model):
    model.train()
    try:
        score(tiny_dataset(2))
        assert model.training
        assert "forward" not in vars(model)
    finally:
        model.eval()


def test_an_adapter(score, model, processor, tmp_path):
    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(model), LoraConfig(target_modules=r".*language_model.*q_proj", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    score(tiny_dataset(3), model=adapted)
    score(tiny_dataset(3), tmp_path / "named", adapter=tmp_path / "adapter", model=copy.deepcopy(model))
    score(tiny_dataset(3), tmp_path / "plain")
    with_adapter, plain = (table(tmp_path / name)["delta"] for name in ("scores", "plain"))
    assert table(tmp_path / "named")["delta"].equals(with_adapter)
    assert not with_adapter.equals(plain)
    with pytest.raises(ValueError, match=r"no adapter_config.json here. Set adapter"):
        score(tiny_dataset(3), tmp_path / "none", adapter=tmp_path)


@pytest.mark.parametrize("writer", sources.WRITERS.values(), ids=sources.WRITERS)
def test_every_format(score, tmp_path, writer):
    content = sources.RICH if writer.__name__ in sources.CONVERSATIONS else sources.SIMPLE
    folder = sources.images_in(tmp_path / "data")
    data = writer(folder, content)
    report = score(data, image_root=folder if not hasattr(data, "__fspath__") else None)
    scored = [*read_scores(tmp_path / "scores")]
    assert [one.row for one in scored] == [0, 1, 2, 3]
    assert report.records == len(content)
    turns = [len(turns) for _, turns in content]
    assert [one.columns["turn"][-1] + 1 for one in scored] == turns
    assert [bool(one.columns["has_contrast"].any()) for one in scored] == [bool(images) for images, _ in content]


def test_a_mixture_and_loaded_records(score, tmp_path):
    one = seecal.load_records(write_llava(tmp_path / "a", 4))
    two = seecal.load_records(tiny_dataset(3))
    score(seecal.mix({"one": one, "two": two}, stopping="all_exhausted_without_replacement"))
    rows = table(tmp_path / "scores").to_pydict()
    assert {*rows["source"]} == {"one", "two"}
    assert sorted({*rows["row"]}) == [*range(7)]
    score(one, tmp_path / "records")
    score(tmp_path / "a" / "data.json", tmp_path / "file")
    records, file = table(tmp_path / "records"), table(tmp_path / "file")
    assert records.drop(["source"]).equals(file.drop(["source"]))
    assert {*file["source"].to_pylist()} == {"data.json"}


def test_doubled_ids(score, tmp_path):
    data = write_llava(tmp_path / "data", 6, r1={"id": "r0"}, r2={"id": "r0"})
    score(data)
    assert [(one.row, one.record) for one in read_scores(tmp_path / "scores")][:3] == [(0, "r0"), (1, "r0"), (2, "r0")]


# ---------------------------------------------------------------- what cannot be used


def bad_set(folder):
    """Row 1 has no answer, row 3's image is damaged, row 5's is too many, row 8 is too long."""
    data = write_llava(
        folder,
        10,
        r1={"conversations": [{"from": "human", "value": "<image>a"}]},
        r5={"conversations": sources.turn("<image><image>a", "b")},
        r8={"conversations": sources.turn("<image>a", "red. " * 60)},
    )
    (folder / "r3.png").write_bytes((folder / "r3.png").read_bytes()[:30])
    return data


def test_bad_records_stop_by_name(score, tmp_path):
    data = bad_set(tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"data.json: record 'r1' \(entry 1\): no assistant turn.* Or set on_bad to skip"
    ):
        score(data, max_length=120)
    assert not (tmp_path / "scores").exists(), "told before anything is scored"


def test_a_damaged_image_stops_by_name(score, tmp_path):
    data = write_llava(tmp_path / "data", 8)
    image = tmp_path / "data" / "r6.png"
    image.write_bytes(image.read_bytes()[:60])  # its header is whole, so loading takes it
    with pytest.raises(ValueError, match="r6"):
        score(data)
    assert [path.name for path in sorted((tmp_path / "scores").glob("*.parquet"))] == ["scores-000000.parquet"]


def test_bad_records_are_skipped_named_and_counted(score, tmp_path):
    data = bad_set(tmp_path / "data")
    report = score(data, max_length=120, on_bad="skip")
    assert (report.records, report.skipped) == (6, 4)
    assert [one.row for one in report.first_skipped] == [1, 3, 5, 8]
    reasons = [one.reason for one in report.first_skipped]
    assert "no assistant turn" in reasons[0]
    assert all("r3" in reasons[1] and "data.json: row 3" in reasons[1] for _ in [0])
    assert "more than max_length=120" in reasons[3]
    assert "4 rows left out, the first: data.json: record 'r1'" in report.sentence()
    clean = write_llava(tmp_path / "clean", 10)
    score(clean, tmp_path / "clean scores")
    expected = {one.row: one for one in read_scores(tmp_path / "clean scores")}
    for one in read_scores(tmp_path / "scores"):
        if hasattr(one, "columns"):
            assert one.columns["token_id"].tolist() == expected[one.row].columns["token_id"].tolist()
            assert one.columns["delta"] == pytest.approx(expected[one.row].columns["delta"], abs=2e-4)


def test_a_shard_without_a_usable_record(score, tmp_path):
    nothing = {"conversations": [{"from": "human", "value": "a"}], "image": None}
    data = write_llava(tmp_path / "data", 6, r0=nothing, r1=nothing, r2=nothing, r3=nothing)
    assert score(data, on_bad="skip").shards == 2
    assert table(tmp_path / "scores").column_names == COLUMNS


def test_truncated_records_keep_what_is_left(score, tmp_path):
    data = bad_set(tmp_path / "data")
    report = score(data, max_length=60, on_bad="skip", on_long="truncate")
    assert [one.row for one in report.first_skipped] == [1, 3, 5]
    (long,) = [one for one in read_scores(tmp_path / "scores") if one.row == 8]
    assert long.columns["position"][-1] == 59
    assert long.columns["stop"][-1] < len("red. " * 60)


def test_a_text_only_set(score, tmp_path):
    records = [record for record in tiny_records(15) if not record["images"]]
    report = score(records)
    assert (report.records, report.with_contrast) == (3, 0)
    assert report.sentence().endswith("in 1 shards; none has an image before it, so Δ is 0 everywhere")
    rows = table(tmp_path / "scores").to_pydict()
    assert not any(rows["has_contrast"])
    assert {*rows["delta"]} == {0.0}
    assert rows["logit_with"] == rows["logit_without"]


# ---------------------------------------------------------------- what a folder refuses


@pytest.fixture
def scored(score, tmp_path):
    data = write_llava(tmp_path / "data")
    score(data)
    return data


def test_another_model(score, scored):
    with pytest.raises(ValueError, match=r"these are scores of another model \(.*its weights are not those of"):
        score(scored, model=tiny_llava(seed=1))


def test_another_processor(score, scored):
    other = tiny_llava_processor()
    other.chat_template = other.chat_template.replace("<|start|>", "<|start|> ")
    with pytest.raises(ValueError, match="another tokenizer, chat template or image processor"):
        score(scored, processor=other)


def test_a_processor_that_was_used_is_the_same(processor):
    before = digest_of_processor(tiny_llava_processor())
    used = tiny_llava_processor()
    used.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert digest_of_processor(used) == before
    used.tokenizer.add_tokens(["red"])
    assert digest_of_processor(used) != before


def test_another_version_of_the_data(score, scored):
    rows = json.loads(scored.read_text())
    rows[3]["conversations"][1]["value"] = "It is grey."
    scored.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"scores of another version of the data: .* had 10 rows, .* has 10"):
        score(scored)


def test_a_moved_data_folder_is_the_same_data(score, scored, tmp_path):
    shutil.move(scored.parent, tmp_path / "elsewhere")
    assert score(tmp_path / "elsewhere" / "data.json").missing == 0


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 4}, "batch_size=3, not 4"),
        ({"options": CALOptions(alpha=0.5)}, r"alpha=1.0, not 0.5"),
        ({"logprobs": True}, "logprobs=False, not True"),
        ({"records_per_shard": 5}, "4 records a shard"),
        ({"max_length": 300}, "max_length=None, not 300"),
    ],
    ids=str,
)
def test_other_options(score, scored, changes, told):
    with pytest.raises(ValueError, match=f"these scores were begun with {told}.* Set --out to an empty folder"):
        score(scored, **changes)


def test_other_versions(score, scored, tmp_path):
    manifest = read_manifest(tmp_path / "scores")
    dataclasses.replace(manifest, versions={**manifest.versions, "torch": "1.0"}).write(tmp_path / "scores")
    with pytest.raises(ValueError, match=r"begun with torch='1.0', not "):
        score(scored)


@pytest.mark.parametrize("begun", [False, True], ids=["before the manifest", "after it"])
def test_what_a_kill_left_of_the_manifest_is_gone_afterwards(score, tmp_path, begun):
    data = write_llava(tmp_path / "data", 4)
    scores = tmp_path / "scores"
    if begun:
        score(data)
    scores.mkdir(exist_ok=True)
    for rank in (0, 1):
        (scores / f"._manifest.json.{rank}.part").write_text('{"version"', "utf8")
    assert score(data).missing == 0
    left = [path.name for path in scores.glob(".*.part")]
    assert left == ["._manifest.json.1.part"], "another rank may be writing its own just now"


def test_half_a_shard(score, scored, tmp_path):
    path = tmp_path / "scores" / "scores-000001.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"scores-000001.parquet: not a whole shard .* Delete it and run the same"):
        score(scored)
    with pytest.raises(ValueError, match=r"scores-000001.parquet: not a whole shard"):
        list(read_scores(tmp_path / "scores"))
    path.unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing, scores-000001.parquet first"):
        list(read_scores(tmp_path / "scores"))
    assert score(scored).missing == 0


def test_a_shard_of_another_run(score, scored, tmp_path):
    score(scored, tmp_path / "other", options=CALOptions(beta=3))
    shutil.copy(tmp_path / "other" / "scores-000001.parquet", tmp_path / "scores")
    with pytest.raises(ValueError, match=r"scores-000001.parquet: a shard of another run"):
        score(scored)


def test_folders_that_are_no_scores(score, scored, tmp_path):
    with pytest.raises(
        ValueError, match=r"no _manifest.json here, so these are no scores. Make them with seecal score"
    ):
        read_scores(tmp_path / "data")
    (tmp_path / "scores" / "_manifest.json").unlink()
    with pytest.raises(ValueError, match=r"scores-000000.parquet lies here without _manifest.json"):
        score(scored)
    (tmp_path / "scores" / "_manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"_manifest.json: cannot be read .* Score again into an empty folder"):
        score(scored)
    score(scored, tmp_path / "again")
    with pytest.raises(ValueError, match=r"has no column 'logprob_with'; it has .* Score with --logprobs"):
        read_scores(tmp_path / "again", ["logprob_with"])


def test_options_out_of_range(score):
    for wrong in ({"batch_size": 0}, {"records_per_shard": True}, {"on_long": "drop"}, {"on_bad": "no"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            score(tiny_dataset(2), **wrong)
    with pytest.raises(ValueError, match="pool_scope='released' lets a token's weight depend on the other records"):
        score(tiny_dataset(2), options=CALOptions(contrast="mask", pool_scope="released"))
    with pytest.raises(ValueError, match="pass processor="):
        score(tiny_dataset(2), processor=None)
