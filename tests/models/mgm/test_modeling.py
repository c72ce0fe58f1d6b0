"""Mini-Gemini against its equations, computed once more in plain loops from the original's own names of tensors."""

import subprocess
import sys

import pytest
import torch
import transformers as T

from seecal.models.loading import load_vlm
from seecal.models.mgm import MGMConfig, MGMForConditionalGeneration, MGMModel
from seecal.models.mgm.mining import MGMMining, tiled, windows
from seecal.models.mgm.original_keys import to_original
from tests.support import mgm_reference as reference
from tests.support import processors
from tests.support.builders import Row
from tests.support.processes import environment, limit
from tests.support.zoo import batch_of, model_of, scaled
from tests.support.zoo_models import ZOO, mgm
from tests.support.zoo_parts import IMAGE, VOCABULARY, convnext

KINDS = ("mgm", "mgm, HD", "mgm, Gemma", "mgm, HD, Gemma")
# two images, text before; text only; an image at the end
ROWS = [Row([3, "image", 2, "image", -4]), Row([5, -3]), Row([2, -3, "image"])]


@pytest.fixture(params=KINDS, scope="module")
def double(request):
    """(model in float64, batch): several images in a row, none, and padding."""
    torch.manual_seed(0)
    kind = ZOO[request.param]
    model = scaled(kind.model(), kind).double().eval()
    with torch.no_grad():
        for one in model.parameters():
            if one.ndim == 1:  # norms and biases that do something
                one.add_(torch.randn_like(one) * 0.1)
    batch = batch_of(request.param, ROWS)
    return model, {name: one.double() if one.is_floating_point() else one for name, one in batch.items()}


def pictures_of(batch):
    """What the reference takes of each image."""
    pixels = batch["pixel_values"]
    return list(zip(pixels if pixels.ndim == 5 else pixels[:, None], batch["pixel_values_aux"], strict=True))


def collapsed(ids, tokens):
    """One placeholder for each image instead of ``tokens``."""
    kept, at = [], 0
    while at < len(ids):
        kept.append(int(ids[at]))
        at += tokens if ids[at] == IMAGE else 1
    return torch.tensor(kept)


def test_logits_are_those_of_the_equations(double):
    model, batch = double
    config = model.config
    state = to_original(model.state_dict(), config)
    with torch.no_grad():
        found = model(**{name: one for name, one in batch.items() if name != "labels"})
    images = pictures_of(batch)
    for row, count in enumerate((2, 0, 1)):
        used = batch["attention_mask"][row].bool()
        ids = collapsed(batch["input_ids"][row][used], config.image_seq_length)
        own, images = images[:count], images[count:]
        settings = {"heads": config.vision_config.num_attention_heads, "image_id": IMAGE, "grid": config.image_grid}
        expected = reference.logits(state, config.text_config, ids, own, **settings)
        assert expected.abs().max() > 0.1
        torch.testing.assert_close(found.logits[row][used], expected, atol=1e-9, rtol=1e-9)
    assert not images


def test_image_features_are_those_of_the_equations(double):
    model, batch = double
    config, state = model.config, to_original(model.state_dict(), model.config)
    with torch.no_grad():
        found = model.get_image_features(batch["pixel_values"], batch["pixel_values_aux"]).pooler_output
    assert len(found) == 3
    for image, (pictures, large) in zip(found, pictures_of(batch), strict=True):
        heads = config.vision_config.num_attention_heads
        expected = reference.image_features(state, pictures, large, heads=heads, grid=config.image_grid)
        assert image.shape == (config.image_seq_length, config.text_config.hidden_size)
        torch.testing.assert_close(image, expected * config.image_feature_scale, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_stay_near(dtype):
    """1e-5 in float32, as the equations are written; bfloat16's eight bits."""
    torch.manual_seed(0)
    mining = MGMMining(32, 60).double()
    tokens, cells = torch.randn(2, 16, 32).double(), torch.randn(2, 60, 16, 16).double()
    expected = mining(tokens, cells)
    found = mining.to(dtype)(tokens.to(dtype), cells.to(dtype))
    allowed = 1e-5 if dtype == torch.float32 else 0.02
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found.double(), expected, atol=allowed, rtol=0)


# ---- orders ----


def test_a_token_sees_its_own_window_and_no_other():
    torch.manual_seed(0)
    mining = MGMMining(8, 12)
    tokens, cells = torch.randn(1, 9, 8), torch.randn(1, 12, 6, 6)
    before = mining(tokens, cells)
    for row, column in ((0, 0), (1, 4), (5, 2)):
        changed = cells.clone()
        changed[..., row, column] += 1
        moved = (mining(tokens, changed) != before).any(-1)[0].nonzero().flatten().tolist()
        assert moved == [row // 2 * 3 + column // 2]


@pytest.mark.parametrize("side", [1, 2, 4])
def test_windows_and_tiles_are_cut_row_by_row(side):
    cells = torch.arange(64.0).view(1, 1, 8, 8)
    own = windows(cells, side * side)
    tiles = tiled(cells, side)
    width = 8 // side
    for number in range(side * side):
        row, column = divmod(number, side)
        expected = cells[0, :, row * width : (row + 1) * width, column * width : (column + 1) * width]
        assert torch.equal(tiles[0, number], expected)
        assert torch.equal(own[0, number, :, 0], expected.flatten())


@pytest.mark.parametrize(("tokens", "side"), [(9, 8), (8, 8), (16, 6)])
def test_windows_that_do_not_divide_are_refused(tokens, side):
    with pytest.raises(ValueError, match=f"{tokens} low-resolution tokens cannot share {side} × {side}"):
        windows(torch.zeros(1, 3, side, side), tokens)


@pytest.mark.parametrize(("picture", "block"), [(4, 0), (0, 1), (1, 2), (2, 3), (3, 4)])
def test_the_whole_picture_comes_first_then_the_tiles(picture, block):
    """In ``pixel_values`` it is the last. Another picture changes its own tokens, all of them, and no others."""
    model, batch = model_of("mgm, HD"), batch_of("mgm, HD", [Row([2, "image", -2])])
    pixels, large = batch["pixel_values"], batch["pixel_values_aux"]
    other = pixels.clone()
    other[:, picture] = torch.randn(3, 32, 32, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        first, second = (model.get_image_features(one, large).pooler_output[0] for one in (pixels, other))
    moved = (first != second).any(-1)
    assert moved[block * 16 : (block + 1) * 16].all()
    assert int(moved.sum()) == 16


def test_tiles_alone_are_in_their_own_order():
    """``image_global`` false: the original's 2,304 tokens; here 4 × 16."""
    torch.manual_seed(0)
    both = scaled(mgm(image_grid=2, image_global=True, image_size_aux=128), ZOO["mgm"]).eval()
    alone = mgm(image_grid=2, image_size_aux=128).eval()
    alone.load_state_dict(both.state_dict())
    pixels, large = torch.randn(1, 5, 3, 32, 32), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        whole = both.get_image_features(pixels, large).pooler_output[0]
        tiles = alone.get_image_features(pixels[:, :4], large).pooler_output[0]
    assert alone.config.image_seq_length == len(tiles) == 64
    torch.testing.assert_close(tiles, whole[16:], atol=1e-5, rtol=1e-5)


# ---- the config ----


def test_the_defaults_are_the_papers():
    plain, large = MGMConfig(), MGMConfig(image_grid=2, image_global=True, image_size_aux=1536)
    assert (plain.image_seq_length, large.image_seq_length) == (576, 2880)
    assert sum(plain.vision_aux_config.hidden_sizes) == 2880
    assert plain.vision_aux_config.drop_path_rate == 0
    assert plain.image_token_id == plain.text_config.vocab_size == 32000
    with torch.device("meta"):
        model = MGMModel(MGMConfig(text_config=T.LlamaConfig(num_hidden_layers=0)))
    of_original = [name for name in model.vision_tower_aux.state_dict() if not name.startswith("layernorm")]
    assert len(of_original) == 340
    assert sum(model.vision_tower_aux.state_dict()[name].numel() for name in of_original) == 196_227_264


@pytest.mark.parametrize(("grid", "tokens"), [(1, 576), (2, 2880)])
def test_the_papers_sizes_fit_each_other(grid, tokens):
    """Shapes alone, without numbers: 336 and 768 pixels; four tiles, the whole, and 1,536."""
    pictures = (5,) if grid == 2 else ()
    config = MGMConfig(
        text_config=T.GemmaConfig(hidden_size=2048, num_hidden_layers=0),
        image_grid=grid,
        image_global=grid == 2,
        image_size_aux=768 * grid,
    )
    with torch.device("meta"):
        model = MGMModel(config)
        pixels, large = torch.zeros(2, *pictures, 3, 336, 336), torch.zeros(2, 3, 768 * grid, 768 * grid)
        found = model.get_image_features(pixels, large).pooler_output
    assert [one.shape for one in found] == [(tokens, 2048)] * 2


@pytest.mark.parametrize(
    ("text", "factor"), [(T.LlamaConfig(hidden_size=64), 1.0), (T.GemmaConfig(hidden_size=2048), 45.254833995939045)]
)
def test_gemmas_factor_is_in_the_config(text, factor):
    assert MGMConfig(text_config=text).image_feature_scale == factor
    assert MGMConfig(text_config=text, image_feature_scale=2.0).image_feature_scale == 2.0


def test_gemmas_factor_is_rounded_as_gemma_rounds_it():
    """45.25 in bfloat16, where √2048 times a feature is now and then another number."""
    torch.manual_seed(0)
    plain = scaled(mgm(), ZOO["mgm"]).to(torch.bfloat16).eval()
    large = mgm(image_feature_scale=2048**0.5).to(torch.bfloat16).eval()
    large.load_state_dict(plain.state_dict())
    pixels, aux = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features, found = (model.get_image_features(pixels, aux).pooler_output[0] for model in (plain, large))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, features * 45.25)
    assert not torch.equal(found, features * 2048**0.5)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"image_global": True}, "one tile is the whole picture"),
        ({"image_grid": 0}, "image_grid=0"),
        ({"image_size_aux": 700}, "Set a multiple of 96"),
        ({"image_grid": 2, "image_size_aux": 864}, "Set a multiple of 192"),
        ({"vision_feature_select_strategy": "cls_patch"}, "'default' leaves out the class token"),
        ({"mm_vision_tower": "clip"}, "Run `seecal convert`"),
    ],
)
def test_a_config_that_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        MGMConfig(**settings)


# ---- inputs ----


def test_inputs_that_do_not_fit_are_refused():
    model, batch = model_of("mgm"), batch_of("mgm", [Row([2, "image", -2])])
    ids, pixels, large = (batch[name] for name in ("input_ids", "pixel_values", "pixel_values_aux"))
    for said, given in (
        ("pixel_values without pixel_values_aux", {"input_ids": ids, "pixel_values": pixels}),
        ("pixel_values_aux without pixel_values", {"input_ids": ids, "pixel_values_aux": large}),
        ("16 image tokens in input_ids, but 2 images", {"input_ids": ids, **_twice(pixels, large)}),
        (
            "image_grid=1",
            {"input_ids": ids, "pixel_values": pixels.expand(5, -1, -1, -1)[None], "pixel_values_aux": large},
        ),
        ("either input_ids or inputs_embeds", {}),
        (
            "read off input_ids",
            {"inputs_embeds": torch.zeros(1, 4, 64), "pixel_values": pixels, "pixel_values_aux": large},
        ),
    ):
        with pytest.raises(ValueError, match=said):
            model(**given)


def _twice(pixels, large):
    return {"pixel_values": torch.cat([pixels, pixels]), "pixel_values_aux": torch.cat([large, large])}


def test_an_image_token_beyond_the_vocabulary():
    """As in a converted checkpoint, whose vocabulary stays the original's."""
    torch.manual_seed(0)
    inside = mgm().eval()
    beyond = mgm().eval()
    beyond.load_state_dict(inside.state_dict())
    beyond.config.image_token_id = beyond.model.config.image_token_id = VOCABULARY
    batch = batch_of("mgm", ROWS)
    moved = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, VOCABULARY)}
    with torch.no_grad():
        assert torch.equal(inside(**batch).logits, beyond(**moved).logits)


# ---- generation ----


@pytest.mark.parametrize("name", KINDS)
def test_generation_with_and_without_an_image(name):
    """Step by step with a cache as in one forward, and the image is looked at once."""
    model, calls = model_of(name), []
    hook = model.model.vision_tower_aux.register_forward_hook(lambda *_: calls.append(1))
    try:
        for rows in ([Row([3, "image", 4])], [Row([6])], [Row([3, "image", 4]), Row([2])]):
            batch = batch_of(name, rows, padding="left")
            batch.pop("labels")
            calls.clear()
            made = model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
            assert len(calls) == any("image" in row.parts for row in rows)
            length = batch["input_ids"].shape[1]
            assert made.shape[1] == length + 3
            mask = torch.cat([batch["attention_mask"], torch.ones(len(rows), 3, dtype=torch.long)], 1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            whole = {**batch, "input_ids": made, "attention_mask": mask, "position_ids": positions}
            with torch.no_grad():
                expected = model(**whole).logits[:, length - 1 : -1].argmax(-1)
            assert made[:, length:].tolist() == expected.tolist()
    finally:
        hook.remove()


# ---- files ----


@pytest.mark.parametrize("name", KINDS)
def test_saved_and_loaded_again(name, tmp_path):
    model, batch = model_of(name), batch_of(name, ROWS)
    model.save_pretrained(tmp_path)
    loaded, _ = load_vlm(str(tmp_path), processor=False)
    assert type(loaded) is MGMForConditionalGeneration
    for field in ("image_grid", "image_global", "image_size_aux", "image_feature_scale", "image_token_id"):
        assert getattr(loaded.config, field) == getattr(model.config, field)
    assert {n: tuple(one.shape) for n, one in loaded.state_dict().items()} == {
        n: tuple(one.shape) for n, one in model.state_dict().items()
    }
    tied = "Gemma" in name
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    loaded.set_attn_implementation("eager")
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_plain_model_goes_on_with_tiles(tmp_path):
    """MGM-HD starts from the plain stage 1: the grid is all that differs, and a recipe's ``model_init_kwargs`` set it."""
    settings = {"image_grid": 2, "image_global": True, "image_size_aux": 128}
    plain = model_of("mgm")
    plain.save_pretrained(tmp_path / "plain")
    large, _ = load_vlm(str(tmp_path / "plain"), processor=False, **settings)
    assert large.config.image_seq_length == 80
    batch = batch_of("mgm, HD", ROWS)
    same = mgm(**settings).eval()
    same.load_state_dict(plain.state_dict())
    with torch.no_grad():
        assert torch.equal(large(**batch).logits, same(**batch).logits)
    large.save_pretrained(tmp_path / "large")
    again, _ = load_vlm(str(tmp_path / "large"), processor=False)
    assert {name: getattr(again.config, name) for name in settings} == settings


@pytest.mark.parametrize("attention", ["sdpa", "eager", {"text_config": "eager"}], ids=str)
def test_the_attention_is_the_callers_choice_and_the_convnext_has_none(attention, tmp_path):
    mgm().save_pretrained(tmp_path)
    model = T.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation=attention)
    asked = attention if isinstance(attention, str) else attention["text_config"]
    assert model.model.language_model.config._attn_implementation == asked
    model.set_attn_implementation("sdpa")
    assert model.model.language_model.config._attn_implementation == "sdpa"
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


_FRESH = """
import sys, seecal
assert not any(name in sys.modules for name in ("torch", "transformers", "seecal.models.mgm"))
import transformers
processor = transformers.AutoProcessor.from_pretrained(sys.argv[1])
print(type(processor).__name__, processor.image_seq_length, processor.image_processor.do_pad)
model = transformers.AutoModelForImageTextToText.from_pretrained(sys.argv[1])
print(type(model).__name__, type(transformers.AutoModel.from_pretrained(sys.argv[1])).__name__)
"""


def test_a_folder_opens_after_import_seecal_alone(tmp_path):
    mgm().save_pretrained(tmp_path)
    processors.mgm().save_pretrained(tmp_path)
    command = [sys.executable, "-c", _FRESH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=limit(), check=False)
    assert done.returncode == 0, done.stderr
    expected = ["MGMProcessor 16 True", "MGMForConditionalGeneration MGMModel"]
    assert done.stdout.splitlines()[-2:] == expected


def test_drop_path_is_off_unless_asked_for():
    def rates(model):
        return [
            getattr(layer.drop_path, "drop_prob", 0.0)
            for s in model.model.vision_tower_aux.encoder.stages
            for layer in s.layers
        ]

    assert rates(mgm()) == [0.0] * 5
    asked = mgm(vision_aux_config=convnext(drop_path_rate=0.1))
    assert rates(asked) == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])  # rising over the blocks, as timm's
    pixels, large = torch.randn(1, 3, 32, 32), torch.randn(1, 3, 64, 64)
    off = mgm().train()
    with torch.no_grad():
        first, second = (off.get_image_features(pixels, large).pooler_output[0] for _ in range(2))
    assert torch.equal(first, second)
