"""Claims are checked where they are printed, and claims that could never fail are refused."""

import pytest
import torch

from metalearn_utils import ClaimError, claim
from metalearn_utils.claims import check_claims
from metalearn_utils.settings import settings_now

SENTENCE = "MAML {m:.1f} % beats pixels {p:.1f} %"


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Every test runs in the verified configuration unless it says otherwise."""
    for name in ("METALEARN_MODE", "METALEARN_CUT"):
        monkeypatch.delenv(name, raising=False)
    settings_now.cache_clear()
    yield
    settings_now.cache_clear()


def test_a_true_claim_prints_its_sentence_with_its_figures(capsys):
    claim(SENTENCE, lambda m, p: m > p, m=77.12, p=39.04)
    assert capsys.readouterr().out == "✓ MAML 77.1 % beats pixels 39.0 %\n"


def test_a_false_claim_raises_with_what_was_expected_and_what_came(capsys):
    with pytest.raises(ClaimError) as caught:
        claim(SENTENCE, lambda m, p: m > p, m=30.0, p=39.04)
    assert "MAML 30.0 % beats pixels 39.0 %" in str(caught.value)
    assert "(expected m > p; got m = 30, p = 39.04)" in str(caught.value)
    assert capsys.readouterr().out == ""


def test_nan_holds_no_comparison():
    with pytest.raises(ClaimError):
        claim("{m:.1f}", lambda m: m > 0, m=float("nan"))


@pytest.mark.parametrize(("name", "value"), [("METALEARN_MODE", "full"), ("METALEARN_CUT", "2")])
def test_outside_the_verified_configuration_a_false_claim_warns(name, value, monkeypatch, capsys):
    monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"expected m > p; got m = 30, p = 39\)"):
        claim(SENTENCE, lambda m, p: m > p, m=30.0, p=39.0)
    assert capsys.readouterr().out == "✗ MAML 30.0 % beats pixels 39.0 %\n"


def test_tensors_and_their_comparisons_may_stand_in_a_claim(capsys):
    claim("{m:.2f}", lambda m: m > 0, m=torch.tensor(0.25))
    assert capsys.readouterr().out == "✓ 0.25\n"


@pytest.mark.parametrize("condition", [lambda m: m, lambda m: None, lambda m: "no"])
def test_a_condition_that_compares_nothing_is_refused_when_it_runs(condition):
    with pytest.raises(TypeError, match="condition must give True or False"):
        claim("{m}", condition, m=3.0)


def test_a_value_that_the_condition_does_not_take_is_an_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'p'"):
        claim(SENTENCE, lambda m: m > 0, m=1.0, p=2.0)


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ('claim("{m}", lambda m: True, m=m)', "compares nothing"),
        ('claim("{m}", lambda m: True, m=m)', "uses none of its values"),
        ('claim("{m}", lambda m: 2 > 1, m=m)', "uses none of its values"),
        ('claim("{m}", lambda m: m > 0 or True, m=m)', "cannot be false"),
        ('claim("{m}", lambda m: m == m, m=m)', "cannot be false"),
        ('claim("{m}", lambda m: m > 0 or m <= 0, m=m)', "cannot be false"),
        ('claim("{m}", lambda m: m > 1, m=77.1)', "m is a figure typed by hand"),
        ('claim("{m}", lambda m: m > 1, m=float("77.1"))', "m is a figure typed by hand"),
        ('claim("{m}", lambda m: m > 1, m=70 + 7)', "m is a figure typed by hand"),
        ('best = 77.1\nclaim("{m}", lambda m: m > 1, m=best)', "tests only constants"),
        ('claim("{m} beats 39.0", lambda m: m > 1, m=m)', "39.0 in the sentence is typed by hand"),
        ('claim("{m} and {p}", lambda m: m > 1, m=m)', "p in the sentence has no value"),
        ('claim("{m}", lambda m, p: m > 1, m=m, p=p)', "p is neither in the sentence nor in the condition"),
        ('claim("{m}", better, m=m)', "needs a sentence and a lambda"),
        ('claim("{m}", m=m)', "needs a sentence and a lambda"),
        ('%pip list\nclaims.claim("{m}", lambda m: True, m=m)', "line 2: claim's condition"),
    ],
)
def test_a_planted_fault_is_found(source, fault):
    assert any(fault in found for found in check_claims(source))


@pytest.mark.parametrize(
    "source",
    [
        'claim("{m:.1f} % beats {p:.1f} %", lambda m, p: m > p, m=score.mean, p=scores["pixels"])',
        'claim("{gap:+.1f} ± {half:.1f} points", lambda gap, half: abs(gap) > half, gap=gap[0], half=gap[1])',
        'claim("below {bound:.0e}", lambda gap, bound: gap < bound, gap=gap, bound=bound)',
        'claim("at rate 0.01 {d} of {n} runs diverge", lambda d, n: d == n, d=diverged, n=len(runs))',
        'claim("after {n} iterations {m:.2f}", lambda m, n: m < 1, m=after.item(), n=len(losses))',
        'n = 3\nfor n in counts:\n    claim("{n}", lambda n: n > 2, n=n)',
        '%matplotlib inline\n!ls\nx = 1',
        'claim("all {k} fall", lambda k, path: all(a > b for a, b in zip(path, path[1:])), k=len(path), path=path)',
    ],
)
def test_an_honest_claim_passes(source):
    assert check_claims(source) == []
