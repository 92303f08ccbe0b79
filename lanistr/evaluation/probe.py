"""A probe on parts of what is known of a sample: kernel ridge regression whose products of kernels see interactions.

A *source* (a modality, a column) is made of *atoms*: an embedding, or a column. Each atom has a linear kernel. A case, that
is a subset of the sources, is fitted with the kernel ``sum_s sum_(a in s) w_a k_a + rho * sum_(a, b) w_ab k_a k_b``: main
effects and effects of pairs, the first two orders of an ANOVA kernel (Stitson et al. 1999). The weights follow the
alignment of each kernel with what is to be said (Cortes, Mohri and Rostamizadeh 2012) in the samples fitted on, so that
eight columns of noise do not drown the ninth. Everything is in closed form: fifteen subsets, many folds and many bootstrap
draws take seconds to minutes.

Shape suffixes: N samples, T of them fitted on, F features, L outputs (classes, labels or columns), R repeats of the folds.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

RIDGES = (0.3, 1.0, 3.0, 10.0, 30.0)  # in units of a source's mean squared norm, which is 1
PRODUCTS = (0.0, 1.0, 4.0)  # rho
FOLDS, INNER = 5, 2
BY_CHANCE = 1.0  # an alignment of so many deviations is what noise has
PAIR_SHOWS = 3.0  # products of kernels are fitted from here: there are many pairs
Case = tuple[str, ...]
Sources = Mapping[str, Sequence[str]]
Bank = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """Of one fit: ridge, and weight of the products of kernels."""

    ridge: float
    products: float


@dataclass(frozen=True)
class Truth:
    """What the probe is to say.

    Attributes:
        values_NL: one-hot classes, 0 / 1 labels or standardised numbers; 0 where unknown.
        known_NL: bool.
        groups_N: samples of one group are never divided between fitting and scoring.
        strata_N: folds are alike in it.
    """

    values_NL: np.ndarray
    known_NL: np.ndarray
    groups_N: np.ndarray
    strata_N: np.ndarray

    def take(self, rows_N: np.ndarray) -> "Truth":
        """Some of the samples, or some of them twice."""
        return Truth(self.values_NL[rows_N], self.known_NL[rows_N], self.groups_N[rows_N], self.strata_N[rows_N])

    def mean(self) -> np.ndarray:
        """(L,) of what is known."""
        return (self.values_NL * self.known_NL).sum(0) / np.maximum(self.known_NL.sum(0), 1)

    def centred(self) -> np.ndarray:
        """(N, L) less the mean; 0 where unknown."""
        return np.where(self.known_NL, self.values_NL - self.mean(), 0)


def linear_kernel(features_NF: np.ndarray, present_N: np.ndarray, use_N: np.ndarray, whiten: bool) -> np.ndarray:
    """(N, N) float32: the kernel of one atom among the samples ``use_N``.

    Features are centred on the samples that have the atom; where it is absent they are zero, that is their mean, and one
    more feature says so. No label is looked at, so that all samples may shape it.

    Args:
        features_NF: anything where absent.
        present_N: bool.
        use_N: rows to keep.
        whiten: divide every principal direction by the root of its deviation: embeddings whose variance lies in a few
            directions hide what lies in the others.
    """
    x_NF = np.where(present_N[:, None], features_NF, 0).astype(np.float64)
    if present_N.any():
        x_NF[present_N] -= x_NF[present_N].mean(0)
        if whiten:
            _, deviations, axes = np.linalg.svd(x_NF[present_N], full_matrices=False)
            kept = deviations > 1e-4 * max(deviations.max(initial=0), 1e-12)
            x_NF = x_NF @ (axes[kept].T / np.sqrt(deviations[kept]))
        norm = np.sqrt((x_NF[present_N] ** 2).sum(1).mean())
        x_NF = x_NF / norm if norm > 0 else x_NF
    indicator_N1 = (present_N - present_N.mean())[:, None]
    z_NF = np.concatenate([x_NF, indicator_N1], axis=1)[use_N]
    return (z_NF @ z_NF.T).astype(np.float32)


def alignment(kernel: np.ndarray, rest_NL: np.ndarray) -> float:
    """How well similar samples agree in ``rest_NL``, in deviations of what it is by chance.

    The sum of k_ij <r_i, r_j> over pairs i != j, divided by its deviation where r is independent of the kernel.

    Args:
        kernel: (N, N), centred.
        rest_NL: centred.
    """
    diagonal_N = kernel.diagonal()
    total = ((kernel @ rest_NL) * rest_NL).sum() - (diagonal_N * (rest_NL**2).sum(1)).sum()
    spread = float(np.vdot(kernel, kernel)) - float(np.vdot(diagonal_N, diagonal_N))
    covariance_LL = rest_NL.T @ rest_NL / len(rest_NL)
    deviation = np.sqrt(2 * spread * (covariance_LL**2).sum())
    return float(total / deviation) if deviation > 0 else 0.0


@dataclass(frozen=True)
class Weights:
    """Alignments that decide how much each atom and each pair of atoms counts."""

    atoms: dict[str, float]
    pairs: dict[tuple[str, str], float]

    @classmethod
    def of(cls, bank: Bank, pairs: Sequence[tuple[str, str]], truth: Truth) -> "Weights":
        """Measured on all samples of a bank."""
        rest_NL = truth.centred().astype(np.float32)
        shown = {(a, b): alignment(bank[a] * bank[b], rest_NL) for a, b in pairs}
        return cls({name: alignment(kernel, rest_NL) for name, kernel in bank.items()}, shown)

    def parts(self, case: Case, sources: Sources) -> tuple[dict[str, float], dict[tuple[str, str], float]]:
        """Weights of the atoms of a case (1 per source) and of pairs of atoms from two of its sources (1 in all)."""
        atoms: dict[str, float] = {}
        for source in case:
            excess = {atom: max(self.atoms[atom] - BY_CHANCE, 0.0) for atom in sources[source]}
            total = sum(excess.values())
            atoms |= {atom: e / total if total else 1 / len(excess) for atom, e in excess.items()}
        where = {atom: source for source in case for atom in sources[source]}
        pairs = {
            (a, b): z
            for (a, b), z in self.pairs.items()
            if z > PAIR_SHOWS and a in where and b in where and where[a] != where[b]
        }
        total = sum(pairs.values())
        return atoms, {pair: z / total for pair, z in pairs.items()}


def assemble(bank: Bank, case: Case, sources: Sources, weights: Weights) -> tuple[np.ndarray, np.ndarray | None]:
    """The kernels of main effects and of pairs (None where no pair shows) of a case."""
    atoms, pairs = weights.parts(case, sources)
    main = sum(np.float32(w) * bank[atom] for atom, w in atoms.items() if w > 0)
    both = sum(np.float32(w) * bank[a] * bank[b] for (a, b), w in pairs.items()) if pairs else None
    assert isinstance(main, np.ndarray)
    return main, both if isinstance(both, np.ndarray) else None


def fit_predict(kernel_NT: np.ndarray, fitted: Truth, ridges: Sequence[float]) -> list[np.ndarray]:
    """(N - T, L) per ridge; unknown cells pull towards the mean.

    Args:
        kernel_NT: between all samples and those fitted on, which come first.
        fitted: truth of the first T.
        ridges: added to the diagonal.
    """
    t = kernel_NT.shape[1]
    gram = torch.from_numpy(kernel_NT[:t]).double()
    centred, mean_L = torch.from_numpy(fitted.centred()), fitted.mean()
    found, before = [], 0.0
    for ridge in ridges:
        gram.diagonal().add_(ridge - before)
        before = ridge
        weights = torch.cholesky_solve(centred, torch.linalg.cholesky(gram))
        found.append(kernel_NT[t:] @ weights.numpy().astype(np.float32) + mean_L)
    return found


def losses(predicted_NL: np.ndarray, truth: Truth) -> np.ndarray:
    """(N,): squared error, summed over what is known."""
    return (((predicted_NL - truth.values_NL) ** 2) * truth.known_NL).sum(1)


def make_folds(truth: Truth, folds: int, rng: np.random.Generator) -> np.ndarray:
    """(N,) fold of each sample: whole groups, dealt stratum by stratum."""
    _, first, group_N = np.unique(truth.groups_N, return_index=True, return_inverse=True)
    order = np.lexsort((rng.random(len(first)), truth.strata_N[first]))
    fold = np.empty(len(first), dtype=np.int64)
    fold[order] = (np.arange(len(first)) + rng.integers(folds)) % folds
    return fold[group_N]


def divide(fold_N: np.ndarray, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows to fit on, and rows to score on."""
    return np.flatnonzero(fold_N != fold), np.flatnonzero(fold_N == fold)


@dataclass(frozen=True)
class Fold:
    """One division of the samples.

    Attributes:
        bank: kernels between all samples and those fitted on, which come first, (N, T).
        fitted, scored: truth of the T and of the others.
        weights: measured on the T.
    """

    bank: Bank
    fitted: Truth
    scored: Truth
    weights: Weights

    @classmethod
    def of(
        cls, bank: Bank, pairs: Sequence[tuple[str, str]], truth: Truth, train: np.ndarray, test: np.ndarray
    ) -> "Fold":
        """Fit on the rows ``train`` of a bank, score on ``test``."""
        cells = np.ix_(np.concatenate([train, test]), train)
        own = {name: kernel[cells] for name, kernel in bank.items()}
        fitted = truth.take(train)
        weights = Weights.of({name: kernel[: len(train)] for name, kernel in own.items()}, pairs, fitted)
        return cls(own, fitted, truth.take(test), weights)

    def answers(
        self, case: Case, sources: Sources, products: Sequence[float], ridges: Sequence[float]
    ) -> Iterator[tuple[Setting, np.ndarray]]:
        """Per setting what the probe says of the samples to score, (scored, L); the simplest first."""
        main, both = assemble(self.bank, case, sources, self.weights)
        alone: list[np.ndarray] = []
        for rho in products:
            if both is not None and rho:
                found = fit_predict(main + np.float32(rho) * both, self.fitted, ridges)
            else:
                found = alone = alone or fit_predict(main, self.fitted, ridges)
            for ridge, predicted_NL in zip(ridges, found, strict=True):
                yield Setting(ridge, rho), predicted_NL


class Probe:
    """Fits and scores cases.

    Args:
        bank: kernel per atom.
        sources: atoms per source.
        cases: subsets of the sources.
        truth: of the samples.
    """

    def __init__(self, bank: Bank, sources: Sources, cases: Sequence[Case], truth: Truth):
        self.bank, self.sources, self.cases, self.truth = bank, sources, cases, truth
        self.pairs = sorted(
            {
                (a, b) if a < b else (b, a)
                for case in cases
                for one, other in itertools.combinations(case, 2)
                for a in sources[one]
                for b in sources[other]
            }
        )

    def drawn(self, rows: np.ndarray) -> "Probe":
        """The same on some of the samples, or some of them twice."""
        bank = {name: kernel[np.ix_(rows, rows)] for name, kernel in self.bank.items()}
        return Probe(bank, self.sources, self.cases, self.truth.take(rows))

    def choose(self, train: np.ndarray, rng: np.random.Generator) -> dict[Case, Setting]:
        """Per case the setting with the least squared error over inner folds of the rows ``train``."""
        fold_N = make_folds(self.truth.take(train), INNER, rng)
        totals: dict[Case, dict[Setting, float]] = {case: {} for case in self.cases}
        for number in range(INNER):
            fold = self._fold(*(train[rows] for rows in divide(fold_N, number)))
            for case in self.cases:
                for setting, predicted_NL in fold.answers(case, self.sources, PRODUCTS, RIDGES[::-1]):
                    error = float(losses(predicted_NL, fold.scored).sum())
                    totals[case][setting] = totals[case].get(setting, 0.0) + error
        return {case: min(found, key=lambda setting: found[setting]) for case, found in totals.items()}

    def _fold(self, train: np.ndarray, test: np.ndarray) -> Fold:
        return Fold.of(self.bank, self.pairs, self.truth, train, test)

    def score(self, repeats: int, seed: int, settings: Mapping[Case, Setting] | None = None) -> "Scores":
        """Every case on the same held-out folds, several times over.

        Args:
            repeats: of the division into folds.
            seed: of the folds.
            settings: fixed per case; None = chosen on inner folds of what is fitted.
        """
        n = len(self.truth.groups_N)
        scores = Scores.empty(self.cases, repeats, n)
        for repeat in range(repeats):
            rng = np.random.default_rng([seed, repeat])
            fold_N = make_folds(self.truth, FOLDS, rng)
            for number in range(FOLDS):
                train, test = divide(fold_N, number)
                chosen = settings or self.choose(train, rng)
                fold = self._fold(train, test)
                truth_NL = fold.scored.values_NL
                scores.baseline_RN[repeat, test] = losses(
                    np.broadcast_to(fold.fitted.mean(), truth_NL.shape), fold.scored
                )
                for case in self.cases:
                    rho, ridge = chosen[case].products, chosen[case].ridge
                    ((_, predicted_NL),) = fold.answers(case, self.sources, [rho], [ridge])
                    scores.chosen[case].append(chosen[case])
                    scores.errors[case][repeat, test] = losses(predicted_NL, fold.scored)
                    scores.right[case][repeat, test] = predicted_NL.argmax(1) == truth_NL.argmax(1)
        return scores


@dataclass(frozen=True)
class Scores:
    """Held-out squared errors.

    Attributes:
        errors: per case, (R, N).
        baseline_RN: those of the mean of the samples fitted on.
        right: per case, (R, N) whether the largest output is the true one.
        chosen: per case, the settings of all fits.
    """

    errors: dict[Case, np.ndarray]
    baseline_RN: np.ndarray
    right: dict[Case, np.ndarray]
    chosen: dict[Case, list[Setting]]

    @classmethod
    def empty(cls, cases: Sequence[Case], repeats: int, n: int) -> "Scores":
        """To be filled."""
        return cls(
            {case: np.zeros((repeats, n)) for case in cases},
            np.zeros((repeats, n)),
            {case: np.zeros((repeats, n), dtype=bool) for case in cases},
            {case: [] for case in cases},
        )

    def value(self, case: Case) -> float:
        """Share of the held-out variance that the case explains; of classes: the Brier skill score. 0 of no source."""
        return float(1 - self.errors[case].sum() / self.baseline_RN.sum()) if case else 0.0

    def accuracy(self, case: Case) -> float:
        """Share of held-out samples whose largest output is the true one; means something for classes."""
        return float(self.right[case].mean())

    def usual(self) -> dict[Case, Setting]:
        """Per case the setting that was chosen most often."""
        return {case: max(dict.fromkeys(found), key=found.count) for case, found in self.chosen.items()}


def bootstrap(
    probe: Probe, settings: Mapping[Case, Setting], *, draws: int, most: int, seed: int
) -> tuple[dict[Case, np.ndarray], float]:
    """Values of every case when the labelled samples are drawn anew, fitted and scored anew.

    Whole groups are drawn with replacement; a group drawn twice stays on one side of every division. With more than
    ``most`` samples only that many are drawn, and deviations are to be multiplied by the second result (m out of n:
    Bickel, Goetze and van Zwet 1997).

    Returns:
        Per case (draws,), and the factor, at most 1.
    """
    truth = probe.truth
    _, of_N = np.unique(truth.groups_N, return_inverse=True)
    members = np.split(np.argsort(of_N, kind="stable"), np.cumsum(np.bincount(of_N))[:-1])
    share = min(1.0, most / len(of_N))
    found: dict[Case, list[float]] = {case: [] for case in probe.cases}
    for draw in range(draws):
        rng = np.random.default_rng([seed, draw, 1])
        picked = rng.integers(len(members), size=max(2 * FOLDS, round(share * len(members))))
        rows = np.concatenate([members[group] for group in picked])
        scores = probe.drawn(rows).score(1, draw, settings)
        for case in probe.cases:
            found[case].append(scores.value(case))
    return {case: np.array(values) for case, values in found.items()}, share**0.5
