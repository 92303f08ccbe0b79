"""Logistic regression on frozen LANISTR: what it sees, and how it chooses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression

from lanistr.baselines import Subset
from lanistr.baselines.frozen import ADDED, STRENGTHS, FrozenLanistr, Unit, best_of_blocks, embed_labelled
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import read_samples
from lanistr.metrics import log_loss
from lanistr.model.lanistr import build_model
from tests.model.support import NAMES, RECIPE, make_modalities
from tests.tiny_gold import write_gold
from tests.tiny_run import write_pretraining


def open_tiny(folder: Path) -> tuple[Path, Subset, Subset]:
    gold = write_gold(folder / "gold", {"train": 24, "val": 12}, lambda i: NAMES if i % 3 else ["text"])
    datasets = [GoldDataset(gold, split, make_modalities()) for split in ("train", "val")]
    train, val = (Subset(dataset, dataset.labelled(None, 0)) for dataset in datasets)
    return gold, train, val


def plain(data: list[np.ndarray], train: Subset, val: Subset, strength: float) -> tuple[float, np.ndarray]:
    """Log loss on validation, and the answers: scikit-learn on the columns as they are."""
    model = LogisticRegression(C=strength, max_iter=2000).fit(data[0], train.labels_N)
    return log_loss(model.predict_proba(data[1]), val.labels_N), model.predict_proba(data[1])


def test_blocks_are_added_while_validation_gains_and_the_rotation_changes_no_answer(tmp_path: Path) -> None:
    _, train, val = open_tiny(tmp_path)
    rng = np.random.default_rng(0)
    noise = {id(subset): rng.normal(size=(len(subset), 40)) for subset in (train, val)}
    shaken = {id(subset): rng.normal(size=(len(subset), 3)) for subset in (train, val)}

    def blocks(subset: Subset) -> dict[str, np.ndarray]:
        truth = np.eye(subset.classes)[subset.labels_N]
        first = truth[:, :1] + 0.1 * shaken[id(subset)][:, :1]
        return {"noise": noise[id(subset)], "first": first, "others": truth + 0.3 * shaken[id(subset)]}

    joined = [np.hstack([blocks(s)["others"], ADDED * blocks(s)["first"]]) for s in (train, val)]
    with_noise = [np.hstack([a, ADDED * blocks(s)["noise"]]) for a, s in zip(joined, (train, val), strict=True)]
    assert plain(with_noise, train, val, STRENGTHS[1])[0] > plain(joined, train, val, STRENGTHS[1])[0]
    _, expected = min((plain(joined, train, val, c) for c in STRENGTHS), key=lambda pair: pair[0])
    np.testing.assert_allclose(best_of_blocks(blocks, train, val)(val), expected, atol=1e-3)


def test_a_modality_alone_is_embedded_as_in_samples_that_have_nothing_else(tmp_path: Path) -> None:
    _, train, _ = open_tiny(tmp_path)
    model = build_model(RECIPE.model, make_modalities(), 0).eval()
    found = embed_labelled(model, train.dataset)
    only_text = np.flatnonzero(np.arange(24) % 3 == 0)
    assert set(found) == {*NAMES, "fused", *(f"{name}_alone" for name in NAMES)}
    assert all(np.isnan(found[name][only_text]).all() for name in found if name.split("_")[0] in NAMES[1:])
    np.testing.assert_allclose(found["text_alone"][only_text], found["fused"][only_text], rtol=1e-5, atol=1e-6)


def test_a_block_is_standardised_by_the_rows_of_train_that_are_there() -> None:
    rng = np.random.default_rng(0)
    train, other = rng.normal(3, 2, size=(50, 4)), rng.normal(size=(5, 4))
    train[7], other[2] = np.nan, np.nan
    unit = Unit.of(train)
    kept = np.delete(unit(train), 7, axis=0).astype(np.float64)
    np.testing.assert_allclose(kept.mean(0), 0, atol=1e-6)
    assert abs((kept**2).sum(1).mean() - 1) < 1e-6
    assert (unit(train)[7] == 0).all()
    assert (unit(other)[2] == 0).all()
    np.testing.assert_array_equal(unit(other)[3:], unit(other[3:]))  # whatever it is asked together with
    assert (Unit.of(np.full((3, 2), np.nan))(np.zeros((1, 2))) == 0).all()


def test_an_answer_does_not_depend_on_the_other_samples_of_its_split(tmp_path: Path) -> None:
    _, train, val = open_tiny(tmp_path)
    answer = FrozenLanistr(RECIPE, None).fit(train, val, 0)
    shorter = write_gold(tmp_path / "shorter", {"train": 24, "val": 5}, lambda i: NAMES if i % 3 else ["text"])
    dataset = GoldDataset(shorter, "val", make_modalities())
    alike = Subset(dataset, dataset.labelled(None, 0))
    keys = [
        {sample.key: i for i, sample in enumerate(read_samples(s.dataset, s.positions_N.tolist()))}
        for s in (alike, val)
    ]
    assert len(keys[0]) == 5
    assert keys[0].keys() < keys[1].keys()
    whole, part = answer(val), answer(alike)
    for key, i in keys[0].items():
        np.testing.assert_allclose(part[i], whole[keys[1][key]], atol=1e-6)


def test_the_method_answers_from_scratch_and_from_a_run(tmp_path: Path) -> None:
    gold, train, val = open_tiny(tmp_path)
    run = write_pretraining(tmp_path / "run", gold)
    answers = [FrozenLanistr(RECIPE, source).fit(train, val, 0)(val) for source in (None, run)]
    for found in answers:
        assert found.shape == (len(val), val.classes)
        np.testing.assert_allclose(found.sum(1), 1, atol=1e-5)
    assert np.abs(answers[0] - answers[1]).max() > 1e-3
    few = replace(train, positions_N=train.positions_N[:9])
    assert FrozenLanistr(RECIPE, run).fit(few, val, 0)(val).shape == answers[0].shape
