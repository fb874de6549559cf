"""Temperature scaling against scipy's minimiser, and where there is no minimum."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.evaluator.metrics.base import log_softmax
from services.evaluator.scoring.temperature import HIGHEST, LOWEST, fit
from shared.errors import InvalidInput


def nll(logits, labels, temperature):
    return -log_softmax(np.asarray(logits, dtype=np.float64) / temperature)[np.arange(len(labels)), labels].mean()


@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 80), c=st.integers(2, 6), scale=st.floats(0.05, 60))
def test_no_other_temperature_is_more_likely(seed, n, c, scale):
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, c, n)
    logits = scale * (rng.normal(size=(n, c)) + rng.uniform(0, 2) * np.eye(c)[labels])
    found = fit(logits, labels)
    reference = optimize.minimize_scalar(
        lambda log_t: nll(logits, labels, np.exp(log_t)), bounds=np.log([LOWEST, HIGHEST]), method="bounded"
    )
    assert LOWEST <= found.value <= HIGHEST
    assert found.nll_after <= reference.fun + 1e-7
    assert found.nll_after == pytest.approx(nll(logits, labels, found.value))
    assert found.nll_before == pytest.approx(nll(logits, labels, 1.0))
    assert found.nll_after <= found.nll_before + 1e-12
    assert found.images == n


@pytest.mark.parametrize("factor", [0.1, 3.0, 25.0])
def test_logits_that_were_scaled_are_scaled_back(factor):
    rng = np.random.default_rng(1)
    logits = 2 * rng.normal(size=(20_000, 5))
    labels = (log_softmax(logits) + rng.gumbel(size=logits.shape)).argmax(1)  # drawn from these very probabilities
    assert fit(factor * logits, labels).value == pytest.approx(factor, rel=0.05)


def test_where_every_image_is_right_the_lowest_is_taken():
    found = fit(np.eye(3), [0, 1, 2])
    assert (found.value, found.at_bound) == (LOWEST, True)
    assert found.nll_after < found.nll_before


def test_where_the_logits_mislead_the_highest_is_taken():
    found = fit(-50 * np.eye(3), [0, 1, 2])
    assert (found.value, found.at_bound) == (HIGHEST, True)
    assert found.nll_after < found.nll_before


@pytest.mark.parametrize("logits", [np.zeros((4, 3)), np.full((4, 1), 7.0)])
def test_where_it_makes_no_difference_it_is_one(logits):
    found = fit(logits, [0, 0, 0, 0])
    assert (found.value, found.at_bound) == (1.0, False)
    assert found.nll_after == found.nll_before


@pytest.mark.parametrize("scale", [1e-30, 1e6, 1e30])
def test_extreme_logits_give_finite_numbers(scale):
    rng = np.random.default_rng(2)
    found = fit(scale * rng.normal(size=(30, 4)), rng.integers(0, 4, 30))
    assert np.isfinite([found.value, found.nll_after]).all()
    assert LOWEST <= found.value <= HIGHEST


def test_no_images_are_refused():
    with pytest.raises(InvalidInput):
        fit(np.zeros((0, 3)), [])
