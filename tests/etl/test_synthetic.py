import colorsys
import csv
import gzip
import hashlib
import io
import itertools
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from etl.sources import synthetic, synthetic_render

# Frozen before any model was tuned on it: an edit of the generator must not move this.
FROZEN = "5a6d44709b592a8f28f2a87fc7ab8bac8a2f75f7a8324e243e708512b32f7991"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("raw") / "shop"
    synthetic.generate(out, samples=400, seed=3, missing={"text": 0, "image": 0.3, "series": 0.3})
    return out


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            total.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    return total.hexdigest()


def test_generator_is_frozen_and_same_seed_gives_same_bytes(tmp_path: Path) -> None:
    synthetic.generate(tmp_path / "a", samples=60)
    synthetic.generate(tmp_path / "b", samples=60)
    synthetic.generate(tmp_path / "c", samples=60, seed=1)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == FROZEN
    assert digest(tmp_path / "c") != FROZEN


def naive_bayes(subset: tuple[str, ...]) -> float:
    """Every combination of label and observations, one by one."""
    total: dict[tuple[object, ...], list[float]] = defaultdict(lambda: [0.0] * 5)
    share = synthetic.SHARES

    def chance(name: str, value: int | None, y: int) -> float:
        if value is None:
            return synthetic.NULL_SUPPLIER
        p = share[name] * (value == y) + (1 - share[name]) / 5
        return p * (1 - synthetic.NULL_SUPPLIER) if name == "tabular" else p

    values = [[*range(5), None] if name == "tabular" else list(range(5)) for name in subset]
    moods = range(5) if "text" in subset else [None]
    bins = [*range(5), None] if "tabular" in subset else [None]
    for y, mood, bin_ in itertools.product(range(5), moods, bins):
        if mood is not None and bin_ is not None:
            told = synthetic.INTERACTION * ((mood + bin_) % 5 == y) + (1 - synthetic.INTERACTION) / 5
            pair = told / 5 * (1 - synthetic.NULL_WEIGHT)
        else:
            pair = (1 / 5 if mood is not None else 1) * (
                1
                if "tabular" not in subset
                else synthetic.NULL_WEIGHT
                if bin_ is None
                else (1 - synthetic.NULL_WEIGHT) / 5
            )
        for seen in itertools.product(*values):
            p = pair / 5
            for name, value in zip(subset, seen, strict=True):
                p *= chance(name, value, y)
            total[(mood, bin_, *seen)][y] += p
    return sum(max(row) for row in total.values())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_bayes_accuracy_equals_a_naive_enumeration(size: int) -> None:
    for subset in itertools.combinations(synthetic.MODALITIES, size):
        assert synthetic.bayes_accuracy(subset) == pytest.approx(naive_bayes(subset), abs=1e-12)


def test_no_modality_suffices_and_the_pair_holds_more_than_its_parts() -> None:
    truth = synthetic.truth(100, 0, synthetic.MISSING)
    bayes = truth["bayes_accuracy"]
    assert isinstance(bayes, dict)
    everything = bayes["text+image+tabular+series"]
    assert max(bayes[m] for m in synthetic.MODALITIES) < everything - 0.2
    interaction, synthetic.INTERACTION = synthetic.INTERACTION, 0.0
    try:
        alone = synthetic.bayes_accuracy(("text", "tabular"))
    finally:
        synthetic.INTERACTION = interaction
    assert bayes["text+tabular"] > alone + 0.1


def test_drawn_factors_have_the_planted_shares() -> None:
    factors = synthetic.draw_factors(100_000, 0)
    for name, share in synthetic.SHARES.items():
        assert (factors[name] == factors["y"]).mean() == pytest.approx(share + (1 - share) / 5, abs=0.006)
    told = (factors["mood"] + factors["bin"]) % 5 == factors["y"]
    expected = synthetic.INTERACTION + (1 - synthetic.INTERACTION) / 5
    assert told.mean() == pytest.approx(expected, abs=0.006)
    assert (factors["mood"] == factors["y"]).mean() == pytest.approx(0.2, abs=0.006)
    assert (factors["bin"] == factors["y"]).mean() == pytest.approx(0.2, abs=0.006)


def products(shop: Path) -> dict[str, dict[str, object]]:
    return {
        row["product_id"]: {**row, "at": i}
        for i, row in enumerate(pq.read_table(shop / "products.parquet").to_pylist())
    }


def test_text_can_be_read_back_and_is_10_to_60_words(shop: Path) -> None:
    factors, at = synthetic.draw_factors(400, 3), products(shop)
    right = 0
    lines = gzip.decompress((shop / "descriptions.jsonl.gz").read_bytes()).decode().splitlines()
    assert len(lines) == 400
    for line in map(json.loads, lines):
        words = line["description"].lower().replace(".", "").replace(",", "").split()
        assert 10 <= len(words) <= 60
        topic = [sum(w in group for w in words) for group in synthetic_render.TOPICS]
        mood = [sum(w in group for w in words) for group in synthetic_render.MOODS]
        i = at[line["product_id"]]["at"]
        right += int(np.argmax(topic)) == factors["text"][i] and int(np.argmax(mood)) == factors["mood"][i]
    assert right / len(lines) >= 0.97


def test_photo_can_be_read_back(shop: Path) -> None:
    factors, at = synthetic.draw_factors(400, 3), products(shop)
    photos = sorted((shop / "photos").glob("*.jpg"))
    right = 0
    for path in photos:
        pixels = np.asarray(Image.open(io.BytesIO(path.read_bytes()))).reshape(-1, 3) / 255
        bright = pixels[(pixels.max(1) - pixels.min(1)) > 0.35]
        hues = np.array([colorsys.rgb_to_hsv(*p)[0] for p in bright[::7]])
        gaps = [np.median(np.minimum(abs(hues - h), 1 - abs(hues - h))) for h in synthetic_render.HUES]
        right += int(np.argmin(gaps)) == factors["image"][at[path.stem]["at"]]
    assert right / len(photos) >= 0.97


def test_row_can_be_read_back(shop: Path) -> None:
    factors = synthetic.draw_factors(400, 3)
    for i, row in enumerate(products(shop).values()):
        if row["supplier"] is not None:
            assert synthetic.SUPPLIERS.index(str(row["supplier"])) // 4 == factors["tabular"][i]
        if row["weight_kg"] is not None:
            assert int(float(str(row["weight_kg"]))) // 2 == factors["bin"][i]


def test_series_can_be_read_back(shop: Path) -> None:
    factors, at = synthetic.draw_factors(400, 3), products(shop)
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    text = gzip.decompress((shop / "sales.csv.gz").read_bytes()).decode()
    for row in csv.DictReader(io.StringIO(text)):
        if row["variable"] == "units_sold":
            series[row["product_id"]].append((int(row["week"]), float(row["value"])))
    right = sum(pattern(points) == factors["series"][at[product]["at"]] for product, points in series.items())
    assert right / len(series) >= 0.97


def pattern(points: list[tuple[int, float]]) -> int:
    """The shape that explains most of the variance."""
    t, y = np.array(points).T
    y = y - y.mean()
    place = t / max(t.max(), 1)

    def unexplained(*columns: np.ndarray) -> float:
        basis = np.stack([np.ones(len(t)), *columns], axis=1)
        return float(((y - basis @ np.linalg.lstsq(basis, y, rcond=None)[0]) ** 2).sum())

    line = unexplained(place)
    waves = [unexplained(np.sin(2 * np.pi * t / p), np.cos(2 * np.pi * t / p)) for p in (4, 12)]
    steps = min(unexplained((abs(place - centre) < 0.12).astype(float)) for centre in np.linspace(0.35, 0.65, 31))
    rising = float((place * y).sum()) > 0
    return [0 if rising else 1, 2, 3, 4][int(np.argmin([line, *waves, steps]))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 10}, "at least 50"),
        ({"missing": {"images": 0.5}}, "allowed are text, image, series"),
        ({"missing": {"image": 1.0}}, "below 1"),
    ],
)
def test_bad_arguments_are_refused_and_nothing_is_written(tmp_path: Path, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthetic.generate(tmp_path / "shop", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds something else"):
        synthetic.generate(tmp_path, samples=60)
    assert (tmp_path / "mine.txt").read_text() == "precious"
