"""seecal.alignment's numbers: attention and features that were planted are found where they were planted."""

import copy
import dataclasses
import functools
import itertools
import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image

import seecal
from seecal.families.image_grids import ImageGrid
from seecal.families.table import FAMILIES, decoder_of
from seecal.scoring.alignment import align, chosen
from seecal.scoring.vocabulary import Words
from tests.scoring.test_score import write_llava
from tests.support import processors, sources
from tests.support.tiny import tiny_image, tiny_llava, tiny_llava_processor
from tests.support.zoo import model_of

LAYERS, HEADS, PATCHES = 4, 4, 16
TWO_TURNS = [*sources.turn("<image>\nWhat?", "It is red."), *sources.turn("a b", "It is.")]


class Planted(torch.nn.Module):
    """A projector that says what it is told of each patch."""

    def __init__(self, table_PD):
        super().__init__()
        self.table_PD = torch.nn.Parameter(table_PD)

    def forward(self, features):
        return self.table_PD.expand(len(features), -1, -1)


def planted(layer, cells, processor):
    """A tiny LLaVA whose head 0 of one layer looks from a token to its cell (``cells``: word → cell), whose other heads and
    layers look everywhere alike, and whose patches are: at the cells, a word; elsewhere, nothing in particular.

    Dimensions 0, 1, … of the stream mark the words, 8, 9, … their cells. The pair of query and key that meets is the
    one that the rotation turns least.
    """
    model = tiny_llava(num_hidden_layers=LAYERS).eval()
    decoder, vocabulary = decoder_of(model), processor.tokenizer.get_vocab()
    head_dim = decoder.config.hidden_size // HEADS
    with torch.no_grad():
        for one in decoder.layers:
            for part in (one.self_attn.q_proj, one.self_attn.k_proj, one.self_attn.o_proj, one.mlp.down_proj):
                part.weight.zero_()
        embeddings = model.get_input_embeddings().weight
        embeddings[:, :16] = 0
        patches = torch.randn(PATCHES, embeddings.shape[1], generator=torch.Generator().manual_seed(0))
        patches[:, :16] = 0
        attention = decoder.layers[layer].self_attn
        for number, (word, cell) in enumerate(cells.items()):
            embeddings[vocabulary[word], number] = 20.0
            named = vocabulary[["Ġyellow", "Ġsystem"][number]]
            embeddings[named, 8 + number] = 20.0
            patches[cell] = embeddings[named]
            slow = head_dim // 2 - 1 + number * head_dim // 2
            attention.q_proj.weight[slow, number] = 12.0
            attention.k_proj.weight[slow, 8 + number] = 12.0
    model.model.multi_modal_projector = Planted(patches)
    return model


@pytest.fixture
def processor():
    return tiny_llava_processor()


@pytest.fixture
def data(tmp_path):
    return write_llava(tmp_path / "data", 6, r1={"conversations": TWO_TURNS})


def test_planted_attention_and_words_are_found(data, processor):
    """The token after "It" looks at cell 6 and the one after " is" at cell 13: attention is that of the predecessor."""
    model = planted(2, {"It": 6, "Ġis": 13}, processor)
    found = align(model, chosen(data, ["r1"]), processor=processor)
    assert (found.layer, found.layers, found.family) == (2, LAYERS, "llava")
    (record,) = found.records
    texts = [token.text for token in record.tokens]
    assert "".join(texts) == "It is red.It is."
    (image,) = record.images
    assert (image.rows, image.columns, image.attention.shape) == (4, 4, (len(texts), 4, 4))
    flat = image.attention.reshape(len(texts), -1)
    looking = {
        index: {"It": 6, " is": 13}[texts[index - 1]]
        for index in range(1, len(texts))
        if texts[index - 1] in ("It", " is")
    }
    assert sorted(looking.values()) == [6, 6, 13, 13]
    for index, cell in looking.items():
        assert flat[index].argmax() == cell
        # One head of four looks there alone, three at everything before it alike
        assert flat[index, cell] == pytest.approx(0.25 * 1 + 0.75 / (PATCHES + 30), abs=0.03)
    plain = [index for index in range(len(texts)) if index not in looking]
    assert flat[plain].max() < 0.1
    words = [cell[0] for cell in image.words]
    assert words[6][0] == "yellow"
    assert words[13][0] == "system"
    assert words[6][1] == pytest.approx(1.0, abs=1e-5)
    assert words[0][1] < 0.9
    assert all(first >= second for cell in image.words for (_, first), (_, second) in itertools.pairwise(cell))
    assert record.questions == ["What?", "a b"]


@pytest.mark.parametrize("layer", [0, 3, -4, -2, None])
def test_the_layer_is_the_one_that_was_asked_for(data, processor, layer):
    model = planted(2, {"It": 6}, processor)
    found = align(model, chosen(data, ["r1"]), processor=processor, layer=layer)
    looks = found.records[0].images[0].attention.reshape(-1, PATCHES).max() > 0.2
    assert looks == (layer in (-2, None))
    assert found.layer == {0: 0, 3: 3, -4: 0, -2: 2, None: 2}[layer]


def test_attention_and_features_are_the_models_own(data, processor):
    """Against the model's own output_attentions and get_image_features."""
    model = tiny_llava().eval()
    rows = chosen(data, ["r1"])
    found = align(model, rows, processor=processor, layer=1)
    batch = dict(seecal.VisionCollator(processor)([rows[0].record]))
    labels = batch.pop("labels")
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(**batch, output_attentions=True).attentions[1][0].mean(0)
        features = model.get_image_features(pixel_values=batch["pixel_values"]).pooler_output[0]
    (image_at,) = (batch["input_ids"][0] == model.config.image_token_index).nonzero(as_tuple=True)
    (label_at,) = (labels[0] != -100).nonzero(as_tuple=True)
    expected = attentions[label_at - 1][:, image_at].numpy()
    (image,) = found.records[0].images
    np.testing.assert_allclose(image.attention.reshape(len(expected), -1), expected, atol=1e-6)
    words = Words.of(model, processor.tokenizer)
    cosine = torch.nn.functional.cosine_similarity(features[3], model.get_input_embeddings().weight[words.ids], dim=-1)
    assert image.words[3][0][1] == pytest.approx(cosine.max().item(), abs=1e-5)
    assert image.words[3][0][0] == words.texts[int(cosine.argmax())]


def test_the_picture_is_what_the_tower_sees(data, processor):
    found = align(tiny_llava(), chosen(data, ["r0"]), processor=processor)
    record = chosen(data, ["r0"])[0].record
    with Image.open(record["images"][0]["path"]) as file:
        original = np.asarray(file.convert("RGB").resize((32, 32)), dtype=int)
    shown = np.asarray(found.records[0].images[0].picture, dtype=int)
    assert np.abs(shown - original).max() <= 1


def interrupted(forward):
    """Ends as Ctrl-C ends it, while eager attention is set."""

    @functools.wraps(forward)
    def run(*args, **kwargs):
        output = forward(*args, **kwargs)
        if decoder_of(args[0]).config._attn_implementation == "eager":
            raise KeyboardInterrupt
        return output

    return run


def test_the_model_is_left_as_it_was(data, processor, monkeypatch):
    model = tiny_llava().train()
    before = decoder_of(model).config._attn_implementation
    assert before == "sdpa"
    align(model, chosen(data, ["r0"]), processor=processor)
    monkeypatch.setattr(type(model.model), "forward", interrupted(type(model.model).forward))
    with pytest.raises(KeyboardInterrupt):  # in the middle of a record
        align(model, chosen(data, ["r0"]), processor=processor)
    assert model.training
    assert decoder_of(model).config._attn_implementation == before
    hooks = [
        hook for part in model.modules() for hook in [*part._forward_hooks.values(), *part._forward_pre_hooks.values()]
    ]
    assert [hook for hook in hooks if hook.__module__.startswith("seecal")] == [], "transformers leaves its own"


def test_image_tokens_without_a_grid_are_told_with_the_record(data, processor, monkeypatch):
    odd = dataclasses.replace(FAMILIES["llava"], grid=lambda config, batch, runs, images: [ImageGrid(3, 5, 15)])
    monkeypatch.setitem(FAMILIES, "llava", odd)
    with pytest.raises(ValueError, match=r"record 'r0': its image tokens form no grid .* 'llava': 1 grids of 15 cells"):
        align(tiny_llava(), chosen(data, ["r0"]), processor=processor)


def test_no_other_layers_attention_is_kept(data, processor):
    """When the decoder is through, only the layer that was asked for may have its weights, and those of the answer."""
    model = tiny_llava(num_hidden_layers=LAYERS)
    made, alive = {}, []

    def watch(number):
        def keep(module, args, output):
            if isinstance(output, tuple) and output[1] is not None:
                made[number] = weakref.ref(output[1])

        return keep

    for number, layer in enumerate(decoder_of(model).layers):
        layer.self_attn.register_forward_hook(watch(number))
    decoder_of(model).norm.register_forward_hook(
        lambda *_: alive.append([number for number, weights in made.items() if weights() is not None])
    )
    align(model, chosen(data, ["r0"]), processor=processor, layer=1)
    assert set(made) == set(range(LAYERS)), "each has made some"
    assert alive[-1] == []


def test_max_tokens(data, processor):
    record = align(tiny_llava(), chosen(data, ["r1"]), processor=processor, max_tokens=3).records[0]
    whole = align(tiny_llava(), chosen(data, ["r1"]), processor=processor).records[0]
    assert (len(record.tokens), record.more, len(record.delta)) == (3, len(whole.tokens) - 3, 3)
    np.testing.assert_array_equal(record.images[0].attention, whole.images[0].attention[:3])


# ---- siblings with other grids, their own processors


@pytest.mark.parametrize(("name", "rows", "columns", "left_out"), [("qwen2_5_vl", 2, 5, 0), ("llava_next", 4, 4, 72)])
def test_other_grids(tmp_path, name, rows, columns, left_out):
    processor = getattr(processors, name)()
    model = with_vocabulary_of(model_of(name, "sdpa"), processor)
    data = write_llava(tmp_path / "data", 2)
    tiny_image("red", (64, 32) if name == "qwen2_5_vl" else (64, 64)).save(tmp_path / "data" / "r0.png")
    found = align(model, chosen(data, ["r0"]), processor=processor)
    (image,) = found.records[0].images
    assert (image.rows, image.columns, image.left_out) == (rows, columns, left_out)
    assert len(image.words) == rows * columns
    assert image.attention.min() > 0
    assert image.attention.sum((1, 2)).max() < 1


def with_vocabulary_of(model, processor):
    """A copy of a zoo's model that reads this processor's ids."""
    model = copy.deepcopy(model)
    model.resize_token_embeddings(len(processor.tokenizer))
    ids = processor.tokenizer.get_vocab()
    config = model.config
    for name, token in (
        ("image_token_id", "<|image_pad|>"),
        ("image_token_index", "<image>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
        ("video_token_id", "<|video_pad|>"),
    ):
        if token in ids and hasattr(config, name):
            setattr(config, name, ids[token])
            for part in model.modules():
                if getattr(part, "config", None) is not None and hasattr(part.config, name):
                    setattr(part.config, name, ids[token])
    return model


# ---- words


def test_words_are_words(processor):
    words = Words.of(tiny_llava(), processor.tokenizer)
    assert {"is", "red", "yellow"} <= set(words.texts)
    assert all(text.isalpha() for text in words.texts)
    assert all(len(text) > 1 for text in words.texts)
    names = processor.tokenizer.convert_ids_to_tokens(words.ids.tolist())
    assert all(name.startswith("Ġ") for name in names), "those inside words are none"


def test_spellings_count_once_and_chunks_agree(monkeypatch):
    table = torch.eye(6)
    table[1] = torch.tensor([0.9, 0.4, 0, 0, 0, 0])
    words = Words(torch.arange(6), ["Cat", "cat", "dog", "emu", "fox", "gnu"], table)
    feature = torch.tensor([[1.0, 0.1, 0.05, 0.04, 0.03, 0.02]])
    expected = words.nearest(feature, 3)
    assert [word for word, _ in expected[0]] == ["Cat", "dog", "emu"]
    monkeypatch.setattr("seecal.scoring.vocabulary._AT_ONCE", 2)
    assert [word for word, _ in words.nearest(feature, 3)[0]] == ["Cat", "dog", "emu"]


# ---- what cannot be drawn


def test_ids_that_are_not_there_and_records_without_images(data, processor):
    with pytest.raises(ValueError, match=r"no record has the id 'r99', 'r98'. Its ids are such as 'r0', 'r1', 'r2'"):
        chosen(data, ["r1", "r99", "r98"])
    with pytest.raises(ValueError, match=r"record 'r4' \(row 4\) has no image, so nothing to look at"):
        chosen(data, ["r1", "r4"])
    with pytest.raises(ValueError, match="ids: name one record at least"):
        chosen(data, [])
    rows = json.loads(data.read_text("utf8"))
    data.write_text(json.dumps([*rows, rows[1]]))
    assert [row.row for row in chosen(data, ["r2", "r1"])] == [2, 1, 6], "in the order of ids; doubled ones all"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "mllama",
            r"does not know which part of an image each image token of the family 'mllama' is.*works with.*llava",
        ),
        ("idefics2", r"of the family 'idefics2' is"),
    ],
)
def test_families_without_a_grid(name, told):
    with pytest.raises(ValueError, match=told):
        align(model_of(name), [], processor=tiny_llava_processor())


@pytest.mark.parametrize(
    ("name", "layer", "told"),
    [
        ("llava", 3, r"layer=3: LlavaForConditionalGeneration has layers 0 to 2 \(or -3 to -1\)"),
        ("llava", -4, "layer=-4"),
        ("qwen3_5", 0, r"layer=0: that layer of .* has no attention; those that have: 1, 3"),
    ],
)
def test_layers_that_are_not_there(name, layer, told, processor):
    with pytest.raises(ValueError, match=told):
        align(model_of(name), [], processor=processor, layer=layer)


def test_a_model_without_eager_attention(data, processor, monkeypatch):
    model = tiny_llava()
    decoder = decoder_of(model)

    def refuse(name):
        raise ValueError(f"{name} is not supported")

    monkeypatch.setattr(decoder, "set_attn_implementation", refuse)
    with pytest.raises(ValueError, match=r"LlamaModel has no eager attention.*eager is not supported"):
        align(model, chosen(data, ["r0"]), processor=processor)
    monkeypatch.undo()
    attention = decoder.layers[1].self_attn
    own = attention.forward
    monkeypatch.setattr(attention, "forward", lambda *args, **kwargs: (own(*args, **kwargs)[0], None))
    with pytest.raises(ValueError, match=r"layer 1 of LlamaModel \(LlamaAttention\) gives no attention weights"):
        align(model, chosen(data, ["r0"]), processor=processor, layer=1)
    assert decoder.config._attn_implementation == "sdpa"


def test_a_loaded_model_needs_its_processor(data):
    with pytest.raises(ValueError, match=r"model is a loaded LlavaForConditionalGeneration: pass processor=..."):
        align(tiny_llava(), chosen(data, ["r0"]))
