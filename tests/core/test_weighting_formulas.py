"""Every weighting against its formula in plain Python, given no more than it says it reads; functions by dotted name."""

import math

import pytest
import torch

import seecal
from seecal import CALOptions, VisualDelta
from seecal.core.weighting import passes_read, weighting_named, weights_of

# (sample, position, has_contrast) of every label token
CASES = {
    "no label": [],
    "one label": [(0, 5, True)],
    "one label directly after an image": [(0, 5, False)],
    "text only": [(0, 3, False), (0, 4, False), (1, 2, False)],
    "mixed": [
        *((0, position, position > 10) for position in range(10, 18)),  # the first directly after an image
        *((1, position, False) for position in range(1, 5)),  # text only, and touching what follows by its position
        (3, 5, True),  # sample 2 has no label
        *((4, position, position > 20) for position in (2, 3, 21, 22, 23, 30, 31)),  # before the image; two answers
        (7, 9, False),
    ],
    "rows beyond the number of labels": [(5, 3, True), (9, 4, True), (9, 5, False), (11, 2, False)],
    "many": [(index // 17, index % 17 + 1, index % 5 != 0) for index in range(200)],
}


def measured(case, name, seed=0):
    """A random VisualDelta with what the weighting of that name reads, and nothing else."""
    generator = torch.Generator().manual_seed(seed)
    sample, position, contrast = (
        torch.tensor([row[column] for row in CASES[case]], dtype=torch.long) for column in range(3)
    )
    passes, contrast = passes_read(name), contrast.bool()
    if "without" not in passes:
        contrast = torch.zeros_like(contrast)
    draw = lambda: torch.randn(len(sample), generator=generator)  # noqa: E731
    with_image = -(2 * draw()).exp()
    logprobs = {"with": with_image, "without": torch.where(contrast, -(2 * draw()).exp(), with_image)}
    if not getattr(weighting_named(name), "needs_logprob", False):
        logprobs = {}
    return VisualDelta(
        delta=torch.where(contrast, 5 * draw(), 0.0),
        labels=torch.arange(len(sample)),
        sample=sample,
        position=position,
        has_contrast=contrast,
        **{f"logprob_{one}": logprobs[one] for one in passes if one in logprobs},
    )


def pooled(values, found, options):
    """CAL's equations: a mean over the neighbours in the same answer."""
    places = list(zip(found.sample.tolist(), found.position.tolist(), strict=True))
    clamped = {place: min(max(value, options.alpha), options.beta) for place, value in zip(places, values, strict=True)}
    weights = []
    for sample, position in places:
        near = [clamped[sample, position]]
        for step in (-1, 1):
            for distance in range(1, options.window // 2 + 1):
                if (sample, position + step * distance) not in clamped:
                    break
                near.append(clamped[sample, position + step * distance])
        weights.append(sum(near) / len(near))
    return weights


def vig(found, options):
    gains = (found.logprob_with - found.logprob_without).tolist()
    samples, contrast = found.sample.tolist(), found.has_contrast.tolist()
    weights = []
    for mine, gain in zip(samples, gains, strict=True):
        others = [index for index, sample in enumerate(samples) if sample == mine]
        mean = sum(gains[index] for index in others) / len(others)
        untouched = not any(contrast[index] for index in others)
        weights.append(1.0 if untouched or (gain >= options.threshold and mean >= options.threshold) else 0.0)
    return weights


def prior(found, options):
    samples = found.sample.tolist()
    plain = [(1 - math.exp(one)) ** options.prior_exponent for one in found.logprob_without.tolist()]
    weights = []
    for mine, weight in zip(samples, plain, strict=True):
        of_sample = [one for one, sample in zip(plain, samples, strict=True) if sample == mine]
        weights.append(weight * len(of_sample) / sum(of_sample))
    return weights


FORMULAS = {
    "cal": lambda found, options: pooled(found.delta.tolist(), found, options),
    "uniform": lambda found, options: [1.0] * len(found),
    "vig": vig,
    "prior": prior,
    "negative": lambda found, options: pooled([-one for one in found.delta.tolist()], found, options),
    "dft": lambda found, options: [math.exp(one) for one in found.logprob_with.tolist()],
    "dpa": lambda found, options: pooled(found.delta.tolist(), found, options),
}
OPTIONS = [
    {},
    {"window": 5, "alpha": 0.5, "beta": 3.0, "threshold": 0.7, "prior_exponent": 0.5},
    {"window": 1, "threshold": -0.5, "prior_exponent": 2.0},
]


def test_every_weighting_has_a_formula_here():
    assert list(FORMULAS) == list(seecal.WEIGHTINGS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", FORMULAS)
def test_is_its_formula(name, case):
    for seed, changes in enumerate(OPTIONS):
        options, found = CALOptions(weighting=name, **changes), measured(case, name, seed)
        got = weights_of(found, options)
        expected = torch.tensor(FORMULAS[name](found, options))
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
        if name != "uniform" and case == "many":
            assert len(got.unique()) > 1


@pytest.mark.parametrize("name", ["vig", "prior", "dft"])
def test_what_was_measured_without_log_probabilities_is_told(name):
    with pytest.raises(ValueError, match=r"reads logprob_with.*CALOptions\(delta='logprob'\)"):
        seecal.WEIGHTINGS[name](measured("mixed", "cal"), CALOptions())


def test_vig_drops_a_whole_sample_whose_mean_is_below():
    found = measured("mixed", "vig")
    found.logprob_with[:8] = torch.tensor([-1.0, -1, -1, -1, -1, -1, -1, -1])
    found.logprob_without[:8] = torch.tensor([-1.0, -2, 0, 0, 0, 0, 0, 0])  # one token gains, the sample loses
    weights = weights_of(found, CALOptions(weighting="vig"))
    assert not weights[:8].any()
    assert weights[8:12].all(), "text alone keeps its tokens"
    found.logprob_without[2:8] = -1.0
    assert weights_of(found, CALOptions(weighting="vig"))[:8].all()
    assert weights_of(found, CALOptions(weighting="vig", threshold=0.1))[:8].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
    assert not weights_of(found, CALOptions(weighting="vig", threshold=0.2))[:8].any()


@pytest.mark.parametrize(("name", "sign"), [("cal", 1), ("negative", -1)])
def test_the_released_pooling_runs_over_the_flattened_batch(name, sign):
    options = CALOptions(weighting=name, contrast="mask", pool_scope="released")
    found = measured("mixed", name)
    found.delta_grid = 5 * torch.randn(8, 40, generator=torch.Generator().manual_seed(3))
    flat = [min(max(sign * one, 1.0), 5.0) for one in found.delta_grid.flatten().tolist()]
    places = (found.sample * 40 + found.position - 1).tolist()
    expected = [sum(flat[max(at - 1, 0) : at + 2]) / len(flat[max(at - 1, 0) : at + 2]) for at in places]
    torch.testing.assert_close(weights_of(found, options), torch.tensor(expected))


@pytest.mark.parametrize("name", ["cal", "negative"])
def test_the_released_pooling_leaves_out_what_lies_beyond_the_batch(name):
    """The first and the last position of the flattened batch have one neighbour, not one and a zero."""
    options = CALOptions(weighting=name, contrast="mask", pool_scope="released")
    grid = torch.full((2, 3), -9.0 if name == "cal" else 9.0)  # every weight is alpha, so every mean is
    ends = torch.tensor([0, 1])
    found = VisualDelta(torch.zeros(2), ends, ends, torch.tensor([1, 3]), ends.bool(), delta_grid=grid)
    assert weights_of(found, options).tolist() == [1.0, 1.0]


MODULE = """
import torch

calls = []

def only_seen(visual_delta, options):
    calls.append(options)
    return visual_delta.delta > options.alpha

def surprising(visual_delta, options):
    return -visual_delta.logprob_with

surprising.needs_logprob = True
surprising.passes = ("with",)

class Inside:
    @staticmethod
    def doubled(visual_delta, options):
        return torch.full_like(visual_delta.delta, 2.0)

a_number = 3

def by_letters(visual_delta, options):
    return torch.ones_like(visual_delta.delta)

by_letters.passes = "without"
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_pkg").mkdir()
    (tmp_path / "own_pkg" / "weightings.py").write_text(MODULE)
    (tmp_path / "own_pkg" / "broken.py").write_text("import a_package_that_nobody_has\n")
    (tmp_path / "own_pkg" / "worse.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("name", ["own_pkg.weightings:only_seen", "own_pkg.weightings.only_seen"])
def test_a_function_by_its_dotted_name(own, name):
    found = measured("mixed", name)
    got = weights_of(found, CALOptions(weighting=name, alpha=2.0))
    assert got.dtype == torch.float32
    assert got.tolist() == [float(one > 2) for one in found.delta.tolist()]
    assert weighting_named(name) is weighting_named(name)
    assert passes_read(name) == ("with", "without")


def test_a_function_that_says_what_it_reads(own):
    name = "own_pkg.weightings:surprising"
    assert passes_read(name) == ("with",)
    found = measured("mixed", name)
    assert found.logprob_without is None
    assert torch.equal(weights_of(found, CALOptions(weighting=name)), -found.logprob_with)
    inside = CALOptions(weighting="own_pkg.weightings:Inside.doubled")
    assert set(weights_of(found, inside).tolist()) == {2.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("magic", r"'magic' is not in seecal.WEIGHTINGS; it has cal, .*my_module:function"),
        ("no_such_pkg.part:f", "'no_such_pkg.part:f': there is no module 'no_such_pkg'.*PYTHONPATH"),
        ("own_pkg.part:f", "there is no module 'own_pkg.part'"),
        ("own_pkg.broken:f", "importing 'own_pkg.broken' failed: ModuleNotFoundError.*a_package_that_nobody_has"),
        ("own_pkg.worse:f", "importing 'own_pkg.worse' failed: ZeroDivisionError"),
        ("own_pkg.weightings:nothing", "has no 'nothing'; it defines Inside, by_letters, only_seen, surprising"),
        ("own_pkg.weightings:Inside.nothing", "has no 'Inside.nothing'"),
        ("own_pkg.weightings:", "has no ''"),
        ("own_pkg.weightings:a_number", "is a int: it must be a function"),
        ("own_pkg.weightings:by_letters", "passes='without': expected a tuple"),
        (len, "is not in seecal.WEIGHTINGS"),
    ],
)
def test_a_name_that_leads_nowhere(own, name, message):
    with pytest.raises(ValueError, match=message):
        passes_read(name)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda ones: ones[:-1], r"'odd' gave weights of shape \(20,\).*expected \(21,\), one for each label token"),
        (lambda ones: ones.sum(), r"shape \(\)"),
        (lambda ones: ones.tolist(), "gave a list: expected a tensor"),
        (lambda ones: ones.to("meta"), "on meta: expected .* on cpu"),
        (lambda ones: ones.index_fill(0, torch.tensor([3, 5]), -2.0), r"the weight -2 \(2 of 21 such.*not negative"),
        (lambda ones: ones.index_fill(0, torch.tensor([3]), math.nan), "the weight nan"),
        (lambda ones: ones / 0, "the weight inf"),
    ],
)
def test_weights_that_are_none_are_refused_by_name(monkeypatch, given, message):
    monkeypatch.setitem(seecal.WEIGHTINGS, "odd", lambda delta, options: given(torch.ones_like(delta.delta)))
    with pytest.raises(ValueError, match=message):
        weights_of(measured("mixed", "cal"), CALOptions(weighting="odd"))


def test_values_are_looked_at_in_the_first_batch_that_has_any_and_shapes_always(monkeypatch):
    gives = [torch.ones(0), torch.ones(21), -torch.ones(21), torch.ones(20)]
    monkeypatch.setitem(seecal.WEIGHTINGS, "odd", lambda delta, options: gives.pop(0))
    options, found = CALOptions(weighting="odd"), measured("mixed", "cal")
    weights_of(measured("no label", "cal"), options)
    weights_of(found, options)
    weights_of(found, options)  # asking for the values would wait for the device in every step
    with pytest.raises(ValueError, match=r"\(20,\)"):
        weights_of(found, options)
    monkeypatch.setitem(seecal.WEIGHTINGS, "odd", lambda delta, options: -torch.ones(21))  # another one of that name
    with pytest.raises(ValueError, match="not negative"):
        weights_of(found, options)
