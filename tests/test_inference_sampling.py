"""Choosing tokens: the filters against plain NumPy, the draws against their probabilities."""

import jax
import numpy as np
import pytest

from qwenvl_jax.inference.errors import InputError
from qwenvl_jax.inference.sampling import Sampling, choose, keep_likely, stack

V = 37


def logits_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=3, size=(rows, V)).astype(np.float32)


def choose_all(logits_BV, rows, seen_BV=None, step=0):
    seen_BV = np.zeros(logits_BV.shape, bool) if seen_BV is None else seen_BV
    step_B = np.full(len(logits_BV), step, np.int32)
    return np.asarray(jax.jit(choose)(logits_BV, seen_BV, stack(rows), step_B)).tolist()


def kept(logits_V: np.ndarray, top_k: int, top_p: float, temperature: float) -> set[int]:
    """Returns the tokens that may be drawn, by sorting in float64."""
    order = np.argsort(-logits_V)[: top_k or V]
    weight = np.exp(logits_V[order].astype(np.float64) / temperature)
    before = np.cumsum(weight / weight.sum()) - weight / weight.sum()
    return set(order[(before < top_p) | (top_p == 1)].tolist())


def test_temperature_zero_takes_the_likeliest():
    logits_BV = logits_of(6)
    rows = [Sampling(), Sampling(top_k=3), Sampling(top_p=0.1), Sampling(seed=9)]
    rows += [Sampling(temperature=1e-3), Sampling(temperature=1e-3, seed=7)]
    assert choose_all(logits_BV, rows) == logits_BV.argmax(axis=-1).tolist()


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"),
    [(0, 1.0, 1.0), (1, 1.0, 2.0), (7, 1.0, 1.0), (0, 0.3, 1.0), (0, 0.9, 4.0), (5, 0.6, 3.0)],
)
def test_filters_keep_what_sorting_keeps(top_k, top_p, temperature):
    logits_BV = logits_of(6, seed=1)
    row = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    filtered = np.asarray(jax.jit(keep_likely)(logits_BV, stack([row] * 6)))
    for b in range(6):
        expected = kept(logits_BV[b], top_k, top_p, temperature)
        assert set(np.flatnonzero(np.isfinite(filtered[b])).tolist()) == expected
        finite = np.isfinite(filtered[b])
        below = logits_BV[b][finite] - logits_BV[b].max()
        np.testing.assert_allclose(filtered[b][finite], below / temperature, 1e-6)


def test_a_tiny_top_p_still_leaves_the_likeliest():
    logits_BV = logits_of(6, seed=2)
    rows = [Sampling(temperature=1.0, top_p=1e-6, seed=b) for b in range(6)]
    assert choose_all(logits_BV, rows) == logits_BV.argmax(axis=-1).tolist()


@pytest.mark.parametrize("temperature", [1e-30, 6e-38, 1.2e-38, 1e-39, 1e-45, 1e-300])
def test_the_smallest_temperatures_take_the_likeliest(temperature):
    logits_BV = logits_of(6, seed=4) + 40
    rows = [Sampling(temperature=temperature, top_k=b, seed=b) for b in range(6)]
    assert choose_all(logits_BV, rows) == logits_BV.argmax(axis=-1).tolist()


def test_a_top_k_beyond_the_devices_integers_keeps_all():
    logits_BV = logits_of(6, seed=5)
    rows = [Sampling(temperature=2.0, top_k=2**31, seed=b) for b in range(6)]
    everything = [Sampling(temperature=2.0, seed=b) for b in range(6)]
    assert choose_all(logits_BV, rows) == choose_all(logits_BV, everything)


def test_draws_follow_the_probabilities():
    logits_V = np.array([2.0, 1.0, 0.0, -1.0, 1.5], np.float32)
    temperature, draws = 1.7, 4000
    rows = [Sampling(temperature=temperature, top_k=4, seed=b) for b in range(draws)]
    tokens = choose_all(np.tile(logits_V, (draws, 1)), rows)
    weight = np.exp(logits_V / temperature) * (logits_V > -1)
    expected = weight / weight.sum()
    seen = np.bincount(tokens, minlength=5) / draws
    assert seen[3] == 0
    # Five standard deviations of a share near a half are 0.04.
    assert np.abs(seen - expected).max() < 0.04


def test_a_row_draws_the_same_alone_and_in_company():
    logits_BV = logits_of(6, seed=3)
    rows = [Sampling(temperature=2.0, top_p=0.9, seed=70 + b) for b in range(6)]
    together = choose_all(logits_BV, rows, step=4)
    alone = [choose_all(logits_BV[b : b + 1], rows[b : b + 1], step=4)[0] for b in range(6)]
    assert together == alone
    assert choose_all(logits_BV, [Sampling(), *rows[1:]], step=4)[1:] == alone[1:]


def test_seed_and_step_both_change_the_draw():
    logits_BV = np.zeros((6, V), np.float32)
    rows = [Sampling(temperature=1.0, seed=5)] * 6
    assert len(set(choose_all(logits_BV, rows))) == 1

    def draw(seed: int, step: int) -> int:
        return choose_all(logits_BV[:1], [Sampling(temperature=1.0, seed=seed)], step=step)[0]

    assert len({draw(5, step) for step in range(40)}) > 10
    assert len({draw(seed, 0) for seed in range(40)}) > 10
    assert len({draw(seed << 32, 0) for seed in range(40)}) > 10  # the upper half counts


def test_repetition_penalty_divides_positive_and_multiplies_negative_scores():
    logits_BV = np.full((6, V), -9.0, np.float32)
    logits_BV[:, 4], logits_BV[:, 8] = 3.0, 2.0
    seen_BV = np.zeros((6, V), bool)
    seen_BV[1:, 4] = True
    rows = [Sampling(repetition_penalty=1.6)] * 5 + [Sampling(repetition_penalty=1.4)]
    assert choose_all(logits_BV, rows, seen_BV) == [4, 8, 8, 8, 8, 4]  # 3 / 1.6 < 2 < 3 / 1.4
    logits_BV = np.full((1, V), -4.0, np.float32)
    logits_BV[:, 6], seen_BV = -3.0, np.arange(V)[None] == 6
    assert choose_all(logits_BV, rows[:1], seen_BV) == [0]  # -3 * 1.6 < -4


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.2},
        {"repetition_penalty": 0.0},
        {"seed": -1},
    ],
    ids=str,
)
def test_values_out_of_range_are_named(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)
