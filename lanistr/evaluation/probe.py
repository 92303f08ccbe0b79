"""A probe on parts of what is known of a sample: kernel ridge regression whose products of kernels see interactions.

A *source* (a modality, a column) is made of *atoms*: an embedding, or a column. Each atom has a linear kernel. A case, that
is a subset of the sources, is fitted with the kernel ``sum_s sum_(a in s) w_a k_a + rho * sum_(a, b) w_ab k_a k_b``: main
effects and effects of pairs, the first two orders of an ANOVA kernel (Stitson et al. 1999). The weights follow the
alignment of each kernel with what is to be said (Cortes, Mohri and Rostamizadeh 2012) in the samples fitted on, so that
eight columns of noise do not drown the ninth. Everything is in closed form: fifteen subsets, many folds and many bootstrap
draws take seconds to minutes.

Shape suffixes: N samples, F features, L outputs (classes, labels or columns), R repeats of the folds.
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
    spread = (kernel.astype(np.float64) ** 2).sum() - (diagonal_N.astype(np.float64) ** 2).sum()
    covariance_LL = rest_NL.T @ rest_NL / len(rest_NL)
    deviation = np.sqrt(2 * spread * (covariance_LL**2).sum())
    return float(total / deviation) if deviation > 0 else 0.0


@dataclass(frozen=True)
class Weights:
    """Alignments that decide how much each atom and each pair of atoms counts."""

    atoms: dict[str, float]
    pairs: dict[tuple[str, str], float]

    @classmethod
    def of(cls, bank: Bank, pairs: Sequence[tuple[str, str]], truth: Truth, rows: np.ndarray) -> "Weights":
        """Measured on some rows only."""
        rest_NL = truth.take(rows).centred().astype(np.float32)
        own = {name: kernel[np.ix_(rows, rows)] for name, kernel in bank.items()}
        shown = {(a, b): alignment(own[a] * own[b], rest_NL) for a, b in pairs}
        return cls({name: alignment(kernel, rest_NL) for name, kernel in own.items()}, shown)

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


def fit_predict(kernel: np.ndarray, truth: Truth, train: np.ndarray, test: np.ndarray, ridge: float) -> np.ndarray:
    """(test, L): fitted on rows ``train`` of an (N, N) kernel; unknown cells pull towards the mean."""
    fitted = truth.take(train)
    gram = torch.from_numpy(kernel[np.ix_(train, train)]).double()
    gram.diagonal().add_(ridge)
    weights = torch.cholesky_solve(torch.from_numpy(fitted.centred()), torch.linalg.cholesky(gram))
    return kernel[np.ix_(test, train)] @ weights.numpy() + fitted.mean()


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
        for fold in range(INNER):
            fitted, scored = (train[rows] for rows in divide(fold_N, fold))
            weights = Weights.of(self.bank, self.pairs, self.truth, fitted)
            for case in self.cases:
                main, both = assemble(self.bank, case, self.sources, weights)
                for setting in _settings(len(case)):
                    kernel = main if both is None or not setting.products else main + setting.products * both
                    error = losses(
                        fit_predict(kernel, self.truth, fitted, scored, setting.ridge), self.truth.take(scored)
                    )
                    totals[case][setting] = totals[case].get(setting, 0.0) + float(error.sum())
        return {case: min(found, key=lambda setting: found[setting]) for case, found in totals.items()}

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
            for fold in range(FOLDS):
                train, test = divide(fold_N, fold)
                chosen = settings or self.choose(train, rng)
                held_out = self.truth.take(test)
                mean_NL = np.broadcast_to(self.truth.take(train).mean(), held_out.values_NL.shape)
                scores.baseline_RN[repeat, test] = losses(mean_NL, held_out)
                for case, predicted_NL in self._predict(train, test, chosen):
                    scores.chosen[case].append(chosen[case])
                    scores.errors[case][repeat, test] = losses(predicted_NL, held_out)
                    scores.right[case][repeat, test] = predicted_NL.argmax(1) == held_out.values_NL.argmax(1)
        return scores

    def _predict(
        self, train: np.ndarray, test: np.ndarray, chosen: Mapping[Case, Setting]
    ) -> Iterator[tuple[Case, np.ndarray]]:
        weights = Weights.of(self.bank, self.pairs, self.truth, train)
        for case in self.cases:
            main, both = assemble(self.bank, case, self.sources, weights)
            products = chosen[case].products
            kernel = main if both is None or not products else main + np.float32(products) * both
            yield case, fit_predict(kernel, self.truth, train, test, chosen[case].ridge)


def _settings(size: int) -> list[Setting]:
    products = PRODUCTS if size > 1 else PRODUCTS[:1]
    return [Setting(ridge, rho) for rho in products for ridge in RIDGES[::-1]]  # of equals the simplest


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
