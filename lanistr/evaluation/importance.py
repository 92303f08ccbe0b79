"""Which modalities are worth having, before anything is fine-tuned: probes on embeddings, subset by subset.

Shape suffixes: N samples (the labelled ones first, then unlabelled ones that only shape the features), F features.
"""

import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from lanistr.config import Recipe, load_recipe
from lanistr.data.reader import GoldDataset, load_manifest, open_split
from lanistr.describe import count_work
from lanistr.evaluation.advice import advise
from lanistr.evaluation.material import Material, gather
from lanistr.evaluation.probe import FOLDS, Case, Probe, bootstrap, linear_kernel
from lanistr.evaluation.shapley import interactions, shapley_values, subsets
from lanistr.modalities import make_modalities
from lanistr.training.run import read_run
from lanistr.training.transfer import pretrained_weights

logger = logging.getLogger(__name__)
MOST_LABELS = 2000  # kernels are (labels, labels): more take minutes per subset
MOST_PLAYERS = 8  # 255 subsets
DRAWN = 500  # samples per draw of the bootstrap
Z95 = NormalDist().inv_cdf(0.975)


def importance(run: Path, data: Path, labels: int | None, seed: int, draws: int) -> dict[str, Any]:
    """Measure a pretraining run's modalities on a number of labelled samples of the train split.

    Args:
        run: of pretraining (or fine-tuning).
        data: gold dataset.
        labels: how many; None = all.
        seed: of the draw of labels, the folds and the bootstrap.
        draws: of the bootstrap, at least 2.

    Returns:
        See `measure`; with ``cost`` per modality and ``about``.

    Raises:
        ValueError: no run, no labels, fewer than asked for, more than `MOST_LABELS`, or too few to divide.
    """
    read_run(run)
    pretrained_weights(run)
    recipe = load_recipe(str(run / "recipe.yaml"))
    manifest = load_manifest(data, recipe.data)
    if not manifest.labels:
        raise ValueError(f"{data}: dataset {manifest.name} has no labels")
    dataset = open_split(data, "train", make_modalities(manifest, recipe.model.modalities), recipe.data)
    labelled = dataset.labelled(labels, seed)
    _check(dataset, labelled)
    material = gather(run, recipe, dataset, labelled, seed)
    found = measure(material, draws, seed)
    found["cost"] = cost(recipe, dataset)
    found["about"] = {
        "run": run.name,
        "dataset": manifest.name,
        "content_id": manifest.content_id,
        "target": manifest.target,
        "labels": len(labelled),
        "seed": seed,
        "draws": draws,
    }
    return found


def _check(dataset: GoldDataset, labelled: np.ndarray) -> None:
    if len(labelled) > MOST_LABELS:
        raise ValueError(f"{len(labelled)} labels: the probe takes at most {MOST_LABELS}; give --labels {MOST_LABELS}")
    groups = len(np.unique(dataset.group[labelled]))
    if groups < 4 * FOLDS:
        raise ValueError(f"{len(labelled)} labels of {groups} groups: at least {4 * FOLDS} groups are needed")
    if not 2 <= len(dataset.modalities) <= MOST_PLAYERS:
        raise ValueError(f"{len(dataset.modalities)} modalities: 2 to {MOST_PLAYERS} can be compared")


@dataclass(frozen=True)
class Game:
    """Which subsets are asked about.

    Attributes:
        players: the modalities.
        sources: atoms per source, see `Probe`. ``m`` is an embedding, ``m~`` what is known without an encoder, ``m/c``
            column c of modality m; ``m/`` all its columns; ``m-c`` all but c.
    """

    players: list[str]
    columns: list[tuple[str, str]]
    sources: dict[str, list[str]]

    @classmethod
    def of(cls, material: Material) -> "Game":
        """All modalities, and the columns of those that have some."""
        players = list(material.features)
        plain = {m: [f"{m}~"] if m in material.plain else [] for m in players}
        sources = {m: [m, *plain[m], *(f"{m}/{c}" for c in material.cells.get(m, {}))] for m in players}
        sources["fused"] = ["fused"]
        columns = [(m, c) for m, cells in material.cells.items() for c in cells]
        for m, cells in material.cells.items():
            sources[f"{m}/"] = [f"{m}/{c}" for c in cells]
            sources |= {f"{m}/{c}": [f"{m}/{c}"] for c in cells}
            if len(cells) > 1:
                sources |= {f"{m}-{c}": [f"{m}/{o}" for o in cells if o != c] for c in cells}
        return cls(players, columns, sources)

    def others(self, modality: str) -> tuple[str, ...]:
        """The players but one."""
        return tuple(p for p in self.players if p != modality)

    def without(self, modality: str, column: str) -> Case:
        """Everything but one column, which must not come back through the modality's embedding."""
        rest = (f"{modality}-{column}",) if f"{modality}-{column}" in self.sources else ()
        return (*self.others(modality), *rest)

    def cases(self) -> list[Case]:
        """All that has to be fitted."""
        found: list[Case] = [*subsets(self.players), ("fused",)]
        for modality, column in self.columns:
            found += [(*self.others(modality), f"{modality}/"), self.without(modality, column)]
            found += [(f"{modality}/{column}",), *((p, f"{modality}/{column}") for p in self.others(modality))]
        return list(dict.fromkeys(found))

    def bank(self, material: Material) -> dict[str, np.ndarray]:
        """Kernels of all atoms among the labelled samples."""
        use_N = np.arange(len(material.truth.groups_N))
        everyone_N = np.ones(len(material.fused), dtype=bool)
        found = {m: linear_kernel(material.features[m], material.present[m], use_N, True) for m in self.players}
        for m, plain_NF in material.plain.items():
            found[f"{m}~"] = linear_kernel(plain_NF, material.present[m], use_N, False)
        found["fused"] = linear_kernel(material.fused, everyone_N, use_N, True)
        for m, c in self.columns:
            found[f"{m}/{c}"] = linear_kernel(material.cells[m][c], material.present[m], use_N, False)
        return found


@dataclass(frozen=True)
class Values:
    """Values of cases, and the same in every draw of the bootstrap.

    Attributes:
        factor: by which deviations of the draws are multiplied, see `bootstrap`.
    """

    value: Mapping[Case, float]
    draws: Mapping[Case, np.ndarray]
    factor: float

    def figure(self, value: float, drawn: np.ndarray, z: float = Z95) -> dict[str, Any]:
        """A number with its interval: normal, with the deviation of the draws."""
        half = z * float(np.std(drawn, ddof=1)) * self.factor
        return {"value": float(value), "ci95": [float(value) - half, float(value) + half]}

    def difference(self, plus: Sequence[Case], minus: Sequence[Case], z: float = Z95) -> dict[str, Any]:
        """Sum of the values of some cases less that of others; the empty case is worth nothing."""
        value = sum(self.value[c] for c in plus if c) - sum(self.value[c] for c in minus if c)
        drawn = np.sum([self.draws[c] for c in plus if c], axis=0) - np.sum([self.draws[c] for c in minus if c], axis=0)
        return self.figure(value, drawn, z)


def measure(material: Material, draws: int, seed: int) -> dict[str, Any]:
    """Values of all subsets, Shapley values, pairs, columns, the learning curve, and what to do about it.

    A value is the share of held-out variance explained (of classes: the Brier skill score).
    """
    game = Game.of(material)
    cases = game.cases()
    probe = Probe(game.bank(material), game.sources, cases, material.truth)
    n = len(material.truth.groups_N)
    repeats = int(np.clip(round(1000 / n), 1, 5))
    logger.info("probing %d subsets, %d x %d folds", len(cases), repeats, FOLDS)
    scores = probe.score(repeats, seed)
    logger.info("drawing the labelled samples anew, %d times", draws)
    drawn, factor = bootstrap(probe, scores.usual(), draws=draws, most=DRAWN, seed=seed)
    values = Values({case: scores.value(case) for case in cases}, drawn, factor)
    found: dict[str, Any] = {
        "repeats": repeats,
        "folds": FOLDS,
        "subsets": [
            {
                "modalities": list(case),
                **values.difference([case], []),
                "accuracy": scores.accuracy(case) if material.classes else None,
            }
            for case in subsets(game.players)
        ],
        "fused": values.difference([("fused",)], []),
        "shapley": _shapley(values, game.players),
        "order": _order(values, game.players),
        "pairs": _pairs(values, game.players),
        "columns": _columns(values, game),
        "column_pairs": _column_pairs(values, game),
        "curve": _curve(probe, tuple(game.players), seed),
        "missing": {m: float(1 - material.present[m].mean()) for m in game.players},
    }
    found["advice"] = advise(found)
    return found


def _games(values: Values, players: Sequence[str]) -> tuple[dict[frozenset[str], Any], dict[frozenset[str], Any]]:
    """Value of every subset, in the estimate and in the draws."""
    one: dict[frozenset[str], Any] = {frozenset(case): values.value[case] for case in subsets(players)}
    many: dict[frozenset[str], Any] = {frozenset(case): values.draws[case] for case in subsets(players)}
    one[frozenset()] = 0.0
    many[frozenset()] = np.zeros_like(next(iter(many.values())))
    return one, many


def _shapley(values: Values, players: Sequence[str]) -> list[dict[str, Any]]:
    one, many = (shapley_values(game, players) for game in _games(values, players))
    rows = [{"modality": p, **values.figure(float(one[p]), np.asarray(many[p]))} for p in players]
    return sorted(rows, key=lambda row: -row["value"])


def _order(values: Values, players: Sequence[str]) -> list[dict[str, Any]]:
    """Each modality less the one that follows it; their order is told only where the interval is above zero."""
    one, many = (shapley_values(game, players) for game in _games(values, players))
    ranked = sorted(players, key=lambda player: -float(one[player]))
    rows = []
    for above, below in itertools.pairwise(ranked):
        row = values.figure(float(one[above] - one[below]), np.asarray(many[above] - many[below]))
        rows.append({"pair": [above, below], **row, "told": row["ci95"][0] > 0})
    return rows


def _pairs(values: Values, players: Sequence[str]) -> list[dict[str, Any]]:
    one, many = (interactions(game, players) for game in _games(values, players))
    rows = [{"pair": list(pair), **values.figure(float(one[pair]), np.asarray(many[pair]))} for pair in one]
    return sorted(rows, key=lambda row: -row["value"])


def _columns(values: Values, game: Game) -> list[dict[str, Any]]:
    """Each column alone, and on top of everything else; ``value`` is the mean of both."""
    rows = []
    for modality, column in game.columns:
        alone: Case = (f"{modality}/{column}",)
        everything, without = (*game.others(modality), f"{modality}/"), game.without(modality, column)
        last = values.difference([everything], [without])
        both_value = (values.value[alone] + last["value"]) / 2
        drawn = (values.draws[alone] + values.draws[everything] - values.draws[without]) / 2
        rows.append(
            {
                "modality": modality,
                "column": column,
                "alone": values.difference([alone], []),
                "on_top": last,
                **values.figure(both_value, drawn),
            }
        )
    return sorted(rows, key=lambda row: -row["value"])


def _column_pairs(values: Values, game: Game) -> list[dict[str, Any]]:
    """What a column and another modality tell together beyond the sum of both alone; found only where all tests hold.

    Two that tell nothing overfit, each alone and both together: a sum below zero is no proof. So together they must also
    tell more than the better of them.
    """
    pairs = [(p, m, c) for m, c in game.columns for p in game.others(m)]
    z = NormalDist().inv_cdf(1 - 0.025 / max(1, len(pairs)))  # Bonferroni
    rows = []
    for player, modality, column in pairs:
        one: Case = (f"{modality}/{column}",)
        better = max(((player,), one), key=lambda case: values.value[case])
        strict = [values.difference([(player, *one)], alone, z) for alone in ([(player,), one], [better])]
        row = values.difference([(player, *one)], [(player,), one])
        found = all(test["ci95"][0] > 0 for test in strict)
        rows.append({"pair": [player, f"{modality}/{column}"], **row, "found": found})
    return sorted(rows, key=lambda row: -row["value"])


def _curve(probe: Probe, everything: Case, seed: int, repeats: int = 3) -> list[dict[str, Any]]:
    """Value of all modalities with a quarter, half and all of the labels."""
    rows = []
    for share in (0.25, 0.5, 1.0):
        found, sizes = [], []
        for repeat in range(repeats):
            rng = np.random.default_rng([seed, 3, repeat])
            groups = np.unique(probe.truth.groups_N)
            kept = rng.permutation(groups)[: max(2 * FOLDS, round(share * len(groups)))]
            rows_N = np.flatnonzero(np.isin(probe.truth.groups_N, kept))
            part = Probe(probe.bank, probe.sources, [everything], probe.truth).drawn(rows_N)
            found.append(part.score(1, seed + repeat).value(everything))
            sizes.append(len(rows_N))
        rows.append(
            {"labels": round(float(np.mean(sizes))), "value": float(np.mean(found)), "spread": float(np.std(found))}
        )
    return rows


def cost(recipe: Recipe, dataset: GoldDataset) -> dict[str, dict[str, float]]:
    """Per modality: stored bytes of a sample that has it, and forward FLOPs of its encoder and projection for the largest."""
    work = count_work(recipe, dataset.manifest)
    places = [dataset.index[shard].places_NM3 for shard in range(len(dataset.shards))]
    found = {}
    for name, modality in dataset.modalities.items():
        own = [i for i, member in enumerate(dataset.index.members) if member.lstrip("0123456789.") in modality.members]
        sizes = np.concatenate([np.where(p[:, own, 0] >= 0, p[:, own, 1], 0).sum(1) for p in places])
        # `count_work` counts the clean and the masked view.
        flops = (work[f"{name} encoder"].flops + work[f"{name} projection"].flops) / 2
        found[name] = {"bytes": float(sizes[sizes > 0].mean()) if (sizes > 0).any() else 0.0, "flops": float(flops)}
    return found
