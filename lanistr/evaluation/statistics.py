"""How sure a metric is, and whether one method is better than another: bootstrap and permutation, paired by sample.

Shape suffixes: N samples.

Outputs of a method are a list with one array per seed, all over the same samples in the same order. An interval or a test
draws samples and, where there are several, seeds: it speaks of other samples *and* other seeds. Samples of one group
(a reviewer, a patient) are drawn together where groups are given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lanistr.metrics import Metric

DRAWS = 1000


@dataclass(frozen=True)
class Estimate:
    """A metric: its mean over the seeds, their standard deviation (0 for one), and a 95 % interval."""

    value: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Method a against method b.

    Attributes:
        difference: metric of a - metric of b, mean over the seeds.
        low, high: 95 % percentile interval of the paired bootstrap.
        p_bootstrap: two-sided, from the share of bootstrap differences on the other side of zero.
        p_permutation: two-sided; under the null hypothesis the two outputs of a sample may be exchanged.
    """

    difference: float
    low: float
    high: float
    p_bootstrap: float
    p_permutation: float


def estimate(
    metric: Metric,
    outputs: Sequence[np.ndarray],
    truth_N: np.ndarray,
    *,
    groups_N: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Estimate:
    """The metric with a bootstrap interval (percentiles).

    Args:
        metric: of `lanistr.metrics`.
        outputs: per seed, (N, ...).
        truth_N: (N, ...).
        groups_N: samples of one group are drawn together.
        draws, seed: of the bootstrap.

    Raises:
        ValueError: no samples.
    """
    _check(truth_N, outputs)
    values = [metric(output, truth_N) for output in outputs]
    drawn = np.array(
        [
            np.mean([metric(outputs[s][picks], truth_N[picks]) for s in seeds])
            for picks, seeds in _draw(len(truth_N), len(outputs), groups_N, draws, seed)
        ]
    )
    low, high = _interval(drawn)
    return Estimate(float(np.mean(values)), _std(values), low, high)


def compare(
    metric: Metric,
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    truth_N: np.ndarray,
    *,
    groups_N: np.ndarray | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Comparison:
    """Paired bootstrap and paired permutation test of two methods over the same samples and seeds.

    Raises:
        ValueError: no samples, or not as many seeds in both.
    """
    _check(truth_N, [*a, *b])
    if len(a) != len(b):
        raise ValueError(f"a paired test needs the same seeds in both methods: got {len(a)} and {len(b)}")
    pairs = list(zip(a, b, strict=True))
    observed = float(np.mean([metric(x, truth_N) - metric(y, truth_N) for x, y in pairs]))
    drawn = np.array(
        [
            np.mean([metric(a[s][picks], truth_N[picks]) - metric(b[s][picks], truth_N[picks]) for s in seeds])
            for picks, seeds in _draw(len(truth_N), len(pairs), groups_N, draws, seed)
        ]
    )
    low, high = _interval(drawn)
    known = drawn[np.isfinite(drawn)]
    tail = min((known <= 0).sum(), (known >= 0).sum())
    p_bootstrap = min(1.0, 2 * (tail + 1) / (len(known) + 1))
    p_permutation = _permutation(metric, pairs, truth_N, groups_N, draws, seed, observed)
    return Comparison(observed, low, high, float(p_bootstrap), p_permutation)


def _permutation(
    metric: Metric,
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    truth_N: np.ndarray,
    groups_N: np.ndarray | None,
    draws: int,
    seed: int,
    observed: float,
) -> float:
    """Share of exchanges that give at least the observed difference; the observed one counts as one of them."""
    rng = np.random.default_rng([seed, 1])
    group_N = np.arange(len(truth_N)) if groups_N is None else np.unique(groups_N, return_inverse=True)[1]
    extreme = 1
    for _ in range(draws):
        swap_N = (rng.random(group_N.max() + 1) < 0.5)[group_N]
        differences = []
        for x, y in pairs:
            swap = swap_N.reshape(-1, *[1] * (x.ndim - 1))
            differences.append(metric(np.where(swap, y, x), truth_N) - metric(np.where(swap, x, y), truth_N))
        extreme += abs(np.mean(differences)) >= abs(observed) - 1e-12
    return extreme / (draws + 1)


def _draw(
    n: int, seeds: int, groups_N: np.ndarray | None, draws: int, seed: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Samples and seeds, with replacement."""
    rng = np.random.default_rng([seed, 0])
    members: list[np.ndarray] = []
    if groups_N is not None:
        of_N = np.unique(groups_N, return_inverse=True)[1]
        members = np.split(np.argsort(of_N, kind="stable"), np.cumsum(np.bincount(of_N))[:-1])
    for _ in range(draws):
        if members:
            picks = np.concatenate([members[g] for g in rng.integers(0, len(members), len(members))])
        else:
            picks = rng.integers(0, n, n)
        yield picks, rng.integers(0, seeds, seeds)


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return float("nan"), float("nan")
    low, high = np.percentile(known, [2.5, 97.5])
    return float(low), float(high)


def _std(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _check(truth_N: np.ndarray, outputs: Sequence[np.ndarray]) -> None:
    if not len(truth_N):
        raise ValueError("no labelled samples to evaluate")
    for output in outputs:
        if len(output) != len(truth_N):
            raise ValueError(f"outputs of {len(output)} samples, truth of {len(truth_N)}: not the same samples")
