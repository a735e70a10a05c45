"""Lengths against closed forms (scipy.stats) and against the published traces' own figures."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlhfsim.errors import InputError
from rlhfsim.spec.lengths import check_file, draw_lengths, mean_length, quantile
from rlhfsim.spec.loader import length_dir
from rlhfsim.spec.scenario import Lengths, Workload

FIXED = Lengths(distribution="fixed", tokens=128)
LONG_TAIL = Lengths(distribution="lognormal", mean_tokens=300, sigma=0.9, max_tokens=1024)
NOWHERE = Path("/nonexistent")


def workload(
    responses: Lengths, prompts: int = 20_000, per_prompt: int = 1, prompt_tokens: Lengths = FIXED
) -> Workload:
    return Workload(
        prompts=prompts, responses_per_prompt=per_prompt, prompt_tokens=prompt_tokens, response_tokens=responses
    )


def response_draw(responses: Lengths, prompts: int = 20_000, per_prompt: int = 1, seed: int = 0) -> np.ndarray:
    return draw_lengths(workload(responses, prompts, per_prompt), seed, 0, length_dir())[1]


def parent(lengths: Lengths) -> stats.rv_continuous:
    """The unclipped lognormal, in scipy's parametrisation (scale = the median)."""
    return stats.lognorm(s=lengths.sigma, scale=lengths.mean_tokens / math.exp(lengths.sigma**2 / 2))


def test_fixed_lengths_are_all_equal():
    prompts, responses = draw_lengths(workload(Lengths(tokens=77), 6, 3), 1, 2, NOWHERE)
    assert prompts.tolist() == [128] * 18 and responses.tolist() == [77] * 18
    assert mean_length(FIXED, NOWHERE) == 128 == quantile(FIXED, 0.99, NOWHERE)


def test_uniform_matches_scipy():
    lengths = Lengths(distribution="uniform", min_tokens=11, max_tokens=30)
    exact = stats.randint(11, 31)
    drawn = response_draw(lengths)
    assert set(drawn) == set(range(11, 31))
    assert drawn.mean() == pytest.approx(exact.mean(), abs=4 * exact.std() / math.sqrt(len(drawn)))
    assert mean_length(lengths, NOWHERE) == pytest.approx(exact.mean(), rel=1e-3)
    probabilities = np.array([0.01, 0.07, 0.5001, 0.93, 0.999])
    assert quantile(lengths, probabilities, NOWHERE).tolist() == exact.ppf(probabilities).tolist()


@pytest.mark.parametrize("sigma", [0.2, 0.9, 1.6])
@pytest.mark.parametrize("max_tokens", [200, 1024, 1_000_000])
def test_lognormal_quantiles_mean_and_clip_mass_match_scipy(sigma, max_tokens):
    lengths = Lengths(distribution="lognormal", mean_tokens=300, sigma=sigma, min_tokens=3, max_tokens=max_tokens)
    law = parent(lengths)
    probabilities = np.array([0.001, 0.1, 0.5, 0.9, 0.99])
    expected = np.clip(np.ceil(law.ppf(probabilities)), 3, max_tokens)
    assert quantile(lengths, probabilities, NOWHERE).tolist() == expected.tolist()

    # E[min(max(ceil X, 3), M)] is 3 + sum of P(X > k) from k = 3 to M - 1; beyond 200 000 the sum is below 1e-6
    exact_mean = 3 + law.sf(np.arange(3, min(max_tokens, 200_000))).sum()
    assert mean_length(lengths, NOWHERE) == pytest.approx(exact_mean, rel=1e-3)

    drawn = response_draw(lengths)
    at_maximum, at_minimum = law.sf(max_tokens - 1), law.cdf(3)
    for share, exact in (((drawn == max_tokens).mean(), at_maximum), ((drawn == 3).mean(), at_minimum)):
        assert share == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / len(drawn)) + 1e-9)
    assert drawn.min() >= 3 and drawn.max() <= max_tokens


def test_lognormal_draws_follow_the_law():
    lengths = Lengths(distribution="lognormal", mean_tokens=30_000, sigma=0.7, max_tokens=10_000_000)
    assert stats.kstest(response_draw(lengths), parent(lengths).cdf).pvalue > 0.01


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.8])
def test_correlation_of_logarithms_within_a_prompt(correlation):
    lengths = Lengths(distribution="lognormal", mean_tokens=1e5, sigma=0.8, max_tokens=10_000_000,
                      within_prompt_correlation=correlation)  # fmt: skip
    first, second = np.log(response_draw(lengths, 20_000, 2).reshape(-1, 2)).T
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(correlation, abs=4 / math.sqrt(len(first)))
    assert stats.kstest(np.exp(first), parent(lengths).cdf).pvalue > 0.01  # the marginal law is untouched


def test_full_correlation_makes_the_responses_to_a_prompt_equal():
    lengths = LONG_TAIL.model_copy(update={"within_prompt_correlation": 1.0})
    drawn = response_draw(lengths, 50, 8).reshape(50, 8)
    assert (drawn == drawn[:, :1]).all() and len(set(drawn[:, 0])) > 20


def test_responses_to_a_prompt_share_the_prompt():
    prompts, _ = draw_lengths(workload(FIXED, 40, 4, prompt_tokens=LONG_TAIL), 0, 0, NOWHERE)
    prompts = prompts.reshape(40, 4)
    assert (prompts == prompts[:, :1]).all() and len(set(prompts[:, 0])) > 20


def test_prompt_and_response_are_independent():
    prompts, responses = draw_lengths(workload(LONG_TAIL, prompt_tokens=LONG_TAIL), 0, 0, NOWHERE)
    assert abs(stats.spearmanr(prompts, responses).statistic) < 4 / math.sqrt(len(prompts))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 999), st.integers(1, 30), st.integers(1, 5))
def test_same_seed_same_samples_and_more_prompts_keep_the_first(seed, iteration, prompts, per_prompt):
    one = draw_lengths(workload(LONG_TAIL, prompts, per_prompt), seed, iteration, NOWHERE)
    again = draw_lengths(workload(LONG_TAIL, prompts, per_prompt), seed, iteration, NOWHERE)
    larger = draw_lengths(workload(LONG_TAIL, prompts + 7, per_prompt), seed, iteration, NOWHERE)
    for a, b, c in zip(one, again, larger, strict=True):
        assert a.shape == (prompts * per_prompt,) and np.issubdtype(a.dtype, np.integer)
        assert (a == b).all() and (a == c[: len(a)]).all()


def test_seeds_and_iterations_differ():
    draws = {
        tuple(draw_lengths(workload(LONG_TAIL, 50), seed, iteration, NOWHERE)[1])
        for seed in range(4)
        for iteration in range(4)
    }
    assert len(draws) == 16


# Means and 99th percentiles of the traces themselves (19,366 and 8,819 requests), not of the shipped tables.
@pytest.mark.parametrize(
    ("file", "column", "mean", "p99"),
    [
        ("azure_conversation_2023.csv", "prompt_tokens", 1154.697, 4142),
        ("azure_conversation_2023.csv", "response_tokens", 211.126, 601),
        ("azure_code_2023.csv", "prompt_tokens", 2047.848, 7436),
        ("azure_code_2023.csv", "response_tokens", 27.883, 251.46),
    ],
)
def test_shipped_tables_keep_mean_and_tail_of_the_traces(file, column, mean, p99):
    lengths = Lengths(distribution="empirical", file=file, column=column, max_tokens=100_000)
    assert mean_length(lengths, length_dir()) == pytest.approx(mean, rel=5e-3)
    assert quantile(lengths, 0.99, length_dir()) == pytest.approx(p99, rel=5e-3)
    drawn = response_draw(lengths)
    assert drawn.mean() == pytest.approx(mean, abs=4 * drawn.std() / math.sqrt(len(drawn)) + 5e-3 * mean)


def test_a_file_of_rows_is_its_own_distribution(tmp_path):
    values = [5, 9, 9, 9, 40, 0, 7, 1000, 12, 13]
    path = tmp_path / "rows.csv"
    path.write_text("id,tokens\n" + "".join(f"{i},{v}\n" for i, v in enumerate(values)))
    lengths = Lengths(distribution="empirical", file=str(path), column="tokens", max_tokens=500)
    clipped = np.clip(values, 1, 500)
    drawn = response_draw(lengths)
    assert set(drawn) == set(clipped)
    for value in set(clipped):
        share = (clipped == value).mean()
        assert (drawn == value).mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(drawn)))
    assert mean_length(lengths, NOWHERE) == pytest.approx(clipped.mean(), rel=1e-3)


@pytest.mark.parametrize(
    ("content", "fragments"),
    [
        (b"", ["there is no such column"]),
        (b"token\n5\n", [":1", "tokens", "did you mean 'token'"]),
        (b"tokens\n", ["has no rows"]),
        (b"tokens\n5\nmany\n", [":3", "is 'many', but must be a number"]),
        (b"tokens\n5\nnan\n", [":3", "is 'nan'"]),
        (b"tokens\n-1\n", [":2", "is '-1'"]),
        (b"tokens\n1e12\n", [":2", "is '1e12'"]),
        (b"id,tokens\n1\n", [":2", "is ''"]),
        (b"\xff\xfe\x00", ["is not text"]),
        (b"quantile,tokens\n0,1\n0.5,2\n", ["quantile", "must rise from 0 to 1"]),
        (b"quantile,tokens\n0,1\n0.5,2\n0.5,3\n1,4\n", ["must rise from 0 to 1"]),
        (b"quantile,tokens\n0,1\n0.5,9\n1,4\n", ["tokens", "must not fall"]),
        (b"quantile,tokens\n0,1\n2,9\n", [":3", "quantile", "is '2'"]),
    ],
)
def test_bad_length_files(tmp_path, content, fragments):
    path = tmp_path / "lengths.csv"
    path.write_bytes(content)
    lengths = Lengths(distribution="empirical", file=str(path), column="tokens", max_tokens=500)
    with pytest.raises(InputError) as error:
        check_file(lengths, NOWHERE)
    assert str(path) in str(error.value)
    for fragment in fragments:
        assert fragment in str(error.value)
