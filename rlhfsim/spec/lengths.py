"""What is drawn for an iteration: prompt and response lengths, which prompts are kept, how long rewards take."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import InputError, nearest
from .scenario import Latency, Lengths, Workload

MAX_FILE_BYTES = 64 << 20
MAX_ROW_TOKENS = 1_000_000_000
PROMPTS, RESPONSES, KEPT, REWARDS, TURNS, OBSERVATIONS, TOOLS = range(7)  # streams of random numbers


class Turn(NamedTuple):
    """tokens: generated. observation_tokens: of a tool's answer, which comes after the call was at work so long."""

    tokens: int
    observation_tokens: int = 0
    tool_seconds: float = 0.0


@dataclass(frozen=True)
class DrawnTurns:
    """Turns of an iteration's samples: arrays of shape (samples, most turns), 0 where a sample has none.

    The last turn of a sample has no observation and no tool.
    """

    tokens: np.ndarray
    observation_tokens: np.ndarray
    tool_seconds: np.ndarray

    @property
    def response_tokens(self) -> np.ndarray:
        """All tokens after the prompt."""
        return np.asarray((self.tokens + self.observation_tokens).sum(axis=1))

    @cached_property
    def by_sample(self) -> list[tuple[Turn, ...]]:
        columns = self.tokens.tolist(), self.observation_tokens.tolist(), self.tool_seconds.tolist()
        return [tuple(Turn(*turn) for turn in zip(*row, strict=True) if turn[0]) for row in zip(*columns, strict=True)]


def draw_lengths(workload: Workload, seed: int, iteration: int, data_dir: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """(prompt_tokens, response_tokens), integers of shape (samples,); the responses to one prompt are neighbours.

    They depend on workload, seed and iteration only, so all strategies get the same samples, and more prompts keep
    the first ones. Prompt and response length are independent. Responses to one prompt are joined by a Gaussian
    copula: x = sqrt(r) a + sqrt(1 - r) b with a per prompt and b per response, both standard normal, and the length
    at the quantile of x. So r is the correlation of the logarithms of unclipped lognormal lengths, and of normal
    scores (ranks) otherwise. With `workload.turns` a response is all that follows the prompt.
    """
    shape = (workload.prompts, workload.responses_per_prompt)
    prompts = _normal((seed, iteration, PROMPTS, 0), (shape[0], 1))
    prompt_tokens = _at_score(workload.prompt_tokens, prompts, data_dir)
    if workload.turns is None:
        response_tokens = _of_responses(workload, workload.response_tokens, (seed, iteration, RESPONSES), data_dir)
    else:
        response_tokens = draw_turns(workload, seed, iteration, data_dir).response_tokens
    return np.broadcast_to(prompt_tokens, shape).reshape(-1).copy(), response_tokens


def draw_turns(workload: Workload, seed: int, iteration: int, data_dir: str | Path) -> DrawnTurns:
    """The turns of an iteration's samples, as many and as long as `workload.turns` has them.

    Turns are independent of each other; the first one is as long as a response without turns.
    """
    turns = workload.turns
    assert turns is not None
    most, samples = turns.number.longest, workload.samples
    number = _of_responses(workload, turns.number, (seed, iteration, TURNS), data_dir)
    tokens, observed = np.zeros((samples, most), dtype=np.int64), np.zeros((samples, most), dtype=np.int64)
    seconds = np.zeros((samples, most))
    for k in range(most):
        tokens[:, k] = _of_responses(workload, workload.response_tokens, (seed, iteration, RESPONSES), data_dir, turn=k)
        if turns.observation_tokens is not None:
            key = (seed, iteration, OBSERVATIONS)
            observed[:, k] = _of_responses(workload, turns.observation_tokens, key, data_dir, turn=k)
        seconds[:, k] = _seconds_at(turns.tool_latency, _normal((seed, iteration, TOOLS, k), (samples, 1)), data_dir)
    before = np.cumsum(tokens + observed, axis=1) - tokens - observed  # tokens of the response, when a turn begins
    limit = turns.max_tokens or np.iinfo(np.int64).max
    exists = (np.arange(most) < number[:, None]) & (before < limit)
    followed = np.zeros_like(exists)
    followed[:, :-1] = exists[:, 1:]
    return DrawnTurns(np.where(exists, np.minimum(tokens, limit - before), 0), observed * followed, seconds * followed)


def draw_kept(probability: float, prompts: int, seed: int, iteration: int) -> np.ndarray:
    """Whether each of so many prompts is kept, each by its own draw with this probability; more keep the first ones."""
    return np.asarray(np.random.default_rng((seed, iteration, KEPT, 0)).random(prompts) < probability)


def draw_seconds(latency: Latency, samples: int, seed: int, iteration: int, data_dir: str | Path) -> np.ndarray:
    """Seconds that the reward of each sample takes, once it is at work; more samples keep the first ones."""
    return _seconds_at(latency, _normal((seed, iteration, REWARDS, 0), (samples, 1)), data_dir)


def quantile(lengths: Lengths, probability: float | np.ndarray, data_dir: str | Path) -> np.ndarray:
    """The smallest length, in tokens, that is reached with this probability (between 0 and 1)."""
    from scipy.special import ndtri

    return _at_score(lengths, ndtri(np.asarray(probability, dtype=float)), data_dir)


def mean_length(lengths: Lengths, data_dir: str | Path) -> float:
    """The expected length in tokens, clipping included: the mean over 100 001 equally likely quantiles."""
    points = 100_001
    return float(quantile(lengths, (np.arange(points) + 0.5) / points, data_dir).mean())


def check_file(lengths: Lengths | Latency, data_dir: str | Path) -> None:
    """Raises InputError, with file and line, unless the file of an empirical distribution can be drawn from."""
    _table(Path(data_dir) / str(lengths.file), str(lengths.column))


def _normal(key: tuple[int, ...], shape: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(key).standard_normal(shape)


def _of_responses(
    workload: Workload, lengths: Lengths, key: tuple[int, int, int], data_dir: str | Path, *, turn: int = 0
) -> np.ndarray:
    """One draw for each response, joined within a prompt; another for each turn."""
    shape = (workload.prompts, workload.responses_per_prompt)
    common, own = _normal((*key, 2 * turn), (shape[0], 1)), _normal((*key, 2 * turn + 1), shape)
    shared = lengths.within_prompt_correlation
    return _at_score(lengths, math.sqrt(shared) * common + math.sqrt(1.0 - shared) * own, data_dir).reshape(-1)


def _seconds_at(latency: Latency, score: np.ndarray, data_dir: str | Path) -> np.ndarray:
    """The latency at standard normal scores of shape (samples, 1), one entry a sample."""
    score, most = score[:, 0], latency.max_seconds or math.inf
    if latency.distribution == "fixed":
        seconds = np.full(len(score), latency.seconds)
    elif latency.distribution == "lognormal":
        assert latency.mean_seconds is not None and latency.sigma is not None
        seconds = np.exp(math.log(latency.mean_seconds) - latency.sigma**2 / 2 + latency.sigma * score)
    else:
        from scipy.special import ndtr

        seconds = np.interp(ndtr(score), *_table(Path(data_dir) / str(latency.file), str(latency.column)))
    return np.asarray(np.minimum(seconds, most))


def _at_score(lengths: Lengths, score: np.ndarray, data_dir: str | Path) -> np.ndarray:
    """The length in tokens at a standard normal score, as int64."""
    if lengths.distribution == "fixed":
        return np.full(np.shape(score), lengths.tokens, dtype=np.int64)
    if lengths.distribution == "lognormal":
        assert lengths.mean_tokens is not None and lengths.sigma is not None
        # the mean of a lognormal is exp(mu + sigma^2 / 2)
        drawn = np.ceil(np.exp(math.log(lengths.mean_tokens) - lengths.sigma**2 / 2 + lengths.sigma * score))
    else:
        from scipy.special import ndtr

        probability = ndtr(score)
        if lengths.distribution == "uniform":
            drawn = lengths.min_tokens + np.floor(probability * (lengths.longest - lengths.min_tokens + 1))
        else:
            drawn = np.rint(np.interp(probability, *_table(Path(data_dir) / str(lengths.file), str(lengths.column))))
    tokens: np.ndarray = np.clip(drawn, lengths.min_tokens, lengths.longest).astype(np.int64)
    return tokens


@lru_cache(maxsize=64)
def _table(path: Path, column: str) -> tuple[np.ndarray, np.ndarray]:
    """Quantiles from 0 to 1 and the tokens there.

    A file with a column `quantile` is that table; in any other file a row is a sequence, and the rows are the
    distribution: row i of n in ascending order from quantile i/n to (i + 1)/n.
    """
    quantiles, tokens = _columns(path, column)
    if quantiles is None:
        tokens.sort()
        edges = np.arange(len(tokens) + 1) / len(tokens)
        return np.repeat(edges, 2)[1:-1], np.repeat(tokens, 2)
    if quantiles[0] != 0 or quantiles[-1] != 1 or np.any(np.diff(quantiles) <= 0):
        raise InputError("must rise from 0 to 1", field="quantile", where=str(path))
    if np.any(np.diff(tokens) < 0):
        raise InputError("must not fall as the quantile rises", field=column, where=str(path))
    return quantiles, tokens


def _columns(path: Path, column: str) -> tuple[np.ndarray | None, np.ndarray]:
    """The columns `quantile`, if there is one, and `column`."""
    quantiles, tokens = list[float](), list[float]()
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"is larger than {MAX_FILE_BYTES} bytes", where=str(path))
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, restval="")
            names = list(rows.fieldnames or ())
            if column not in names:
                raise InputError(f"there is no such column{nearest(column, names)}", field=column, where=f"{path}:1")
            for row in rows:
                place = f"{path}:{rows.line_num}"
                tokens.append(_number(row[column], column, MAX_ROW_TOKENS, place))
                if "quantile" in names:
                    quantiles.append(_number(row["quantile"], "quantile", 1, place))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}", where=str(path)) from None
    except UnicodeDecodeError:
        raise InputError("is not text in UTF-8", where=str(path)) from None
    except csv.Error as error:
        raise InputError(f"is not CSV: {error}", where=str(path)) from None
    if not tokens:
        raise InputError("has no rows", where=str(path))
    return (np.array(quantiles) if quantiles else None), np.array(tokens)


def _number(text: str, column: str, largest: float, place: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value <= largest:
        raise InputError(f"is {text!r}, but must be a number from 0 to {largest}", field=column, where=place)
    return value
