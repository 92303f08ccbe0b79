"""Raw records of the demo shop against the gold dataset that the ETL made of them."""

import csv
import gzip
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

import lanistr
from etl import recipe as recipes
from etl.build import build
from etl.sources import synthetic
from lanistr.config import Recipe, load_recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import load_tokenizer_bytes, open_split
from lanistr.evaluation.embed import embed
from lanistr.evaluation.evaluate import evaluate_run
from lanistr.export import export_run
from lanistr.manifest import Manifest, sample_key
from lanistr.modalities import make_modalities
from lanistr.model.lanistr import build_model
from lanistr.predict import Prediction
from lanistr.predict_file import latency, read_records, write_predictions
from lanistr.tasks import Pretrain
from lanistr.training.best import predict
from lanistr.training.checkpoint import WEIGHTS, load_weights, named_tensors, save_weights
from lanistr.training.finetune import make_task
from lanistr.training.run import describe_run

ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "model.fusion={width: 32, layers: 2, heads: 2, intermediate: 64, projector: [32], predictor: 8}",
    "model.modalities.text={hidden: 32, layers: 1, heads: 2, intermediate: 64, max_tokens: 96}",
    "model.modalities.image={size: 64, patch: 16, hidden: 32, layers: 1, heads: 2, intermediate: 64}",
    "model.modalities.timeseries={hidden: 32, layers: 1, heads: 2, intermediate: 64, max_steps: 52}",
    "model.modalities.tabular.numbers=quantile",
    "model.modalities.tabular.column_tokens=true",
    "finetune.unimodal_on=fused",
]


def make_run(run: Path, gold: Path, recipe: Recipe) -> Any:
    """A fine-tuning run with random weights that tell samples apart, and the norms' statistics as training leaves them."""
    manifest = Manifest.load(gold)
    task = make_task(recipe, manifest, "cpu")
    dataset = open_split(gold, "train", make_modalities(manifest, recipe.model.modalities), recipe.data)
    collator = Collator(dataset.modalities, views=1, seed=0, alone=task.alone)
    batch = collator([dataset.read(i) for i in range(64)], [1.0] * 64, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        for _ in range(30):  # else TabNet's activations grow from layer to layer, and magnify rounding
            task(batch)
    task.eval()
    tokenizer = load_tokenizer_bytes(gold, recipe.data, manifest)
    describe_run(run, recipe, manifest, {}, {"task": "finetune", "from": None, "n_labels": 1}, tokenizer)
    save_weights(run / "best" / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (run / "best" / "best.json").write_text('{"step": 1}')
    return task


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """raw/, lake/, run/, model/ of a small demo shop."""
    folder = tmp_path_factory.mktemp("shop")
    synthetic.generate(folder / "raw", samples=240)
    gold = build(recipes.load("demo"), folder / "raw", folder / "lake")
    make_run(folder / "run", gold, load_recipe("demo", SMALL))
    export_run(folder / "run", folder / "model")
    return folder


def raw_records(raw: Path) -> dict[str, dict[str, Any]]:
    """By product, read with nothing of ours."""
    products = pq.read_table(raw / "products.parquet").to_pylist()
    records = {p["product_id"]: {k: v for k, v in p.items() if k not in ("product_id", "label")} for p in products}
    with gzip.open(raw / "descriptions.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in map(json.loads, file):
            records[line["product_id"]]["text"] = line["description"]
    points: dict[str, list[tuple[float, str, float]]] = defaultdict(list)
    with gzip.open(raw / "sales.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            points[row["product_id"]].append((float(row["week"]), row["variable"], float(row["value"])))
    for product, series in points.items():
        records[product]["timeseries"] = series
    for product, record in records.items():
        photo = raw / "photos" / f"{product}.jpg"
        if photo.is_file():
            record["image"] = str(photo)
    return records


def test_raw_records_give_what_evaluate_gives(shop: Path) -> None:
    gold, run = shop / "lake" / "gold" / "demo", shop / "run"
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    by_key = {sample_key("demo", i, i): record for i, record in raw_records(shop / "raw").items()}
    recipe = load_recipe(str(run / "recipe.yaml"))
    manifest = Manifest.load(gold)
    dataset = open_split(gold, "train", make_modalities(manifest, recipe.model.modalities), recipe.data)
    assert len(set(dataset.presence.tolist())) >= 5, "several presence patterns"
    task = make_task(recipe, manifest, "cpu")
    load_weights(task, run / "best" / WEIGHTS)
    expected, _ = predict(task, dataset, np.arange(dataset.n), torch.device("cpu"))
    found = predictor.predict([by_key[key] for key in dataset.keys], batch=13)
    assert all(p.error is None for p in found)
    ours = np.array([[p.probabilities[name] for name in manifest.labels] for p in found])
    assert expected.std(0).max() > 0.01, "the model tells samples apart"
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    assert [p.label for p in found] == [manifest.labels[i] for i in expected.argmax(1)]
    of_gold = dict(predictor.predict_gold(gold, "train"))
    for key, one in zip(dataset.keys, found, strict=True):
        assert of_gold[key].probabilities == pytest.approx(one.probabilities, abs=1e-5)


def test_accuracy_is_that_of_the_evaluation(shop: Path) -> None:
    gold = shop / "lake" / "gold" / "demo"
    result = evaluate_run(shop / "run", gold, "test")
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    records = raw_records(shop / "raw")
    labels = {p["product_id"]: p["label"] for p in pq.read_table(shop / "raw" / "products.parquet").to_pylist()}
    keys = set(open_split(gold, "test", predictor.modalities, load_recipe("demo").data).keys)
    mine = [i for i in records if sample_key("demo", i, i) in keys]
    found = predictor.predict([records[i] for i in mine])
    right = np.mean([p.label == labels[i] for i, p in zip(mine, found, strict=True)])
    assert result["n"] == len(mine)
    assert result["metrics"]["accuracy"]["value"] == pytest.approx(right)


def test_one_record_of_any_subset_and_of_unseen_values(shop: Path) -> None:
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    record = next(r for r in raw_records(shop / "raw").values() if {"text", "image", "timeseries"} <= r.keys())
    parts = [["text"], ["image"], ["timeseries"], ["price"], ["text", "image"], list(record)]
    found = [predictor.predict({key: record[key] for key in part}, embeddings=True) for part in parts]
    assert all(isinstance(p, Prediction) and p.error is None for p in found)
    assert len({tuple(p.probabilities.values()) for p in found}) == len(parts)
    assert [sorted(set(p.embeddings) - {"fused", "cls"}) for p in found[:4]] == [
        ["text"], ["image"], ["timeseries"], ["tabular"],
    ]  # fmt: skip
    assert found[0].embeddings["fused"].shape == (32,)
    whole, alone = found[-1].embeddings, found[0].embeddings
    np.testing.assert_allclose(whole["text"], alone["text"], atol=1e-5)
    odd = {"supplier": "nobody has heard of it", "price": "3.5", "rating": None, "season": 7}
    assert sum(predictor.predict(odd).probabilities.values()) == pytest.approx(1)
    assert predictor.predict([]) == []


def test_one_at_a_time_and_in_batches_are_the_same_answers(shop: Path) -> None:
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    records = list(raw_records(shop / "raw").values())[:24]
    assert len({frozenset(r) for r in records}) >= 4, "several presence patterns"
    together, by_fives = predictor.predict(records, embeddings=True), predictor.predict(records, batch=5)
    for record, one, other in zip(records, together, by_fives, strict=True):
        alone = predictor.predict(record, embeddings=True)
        for found in (one, other):
            assert found.probabilities == pytest.approx(alone.probabilities, abs=1e-6)
        assert one.embeddings.keys() == alone.embeddings.keys()
        for name, vector in alone.embeddings.items():
            np.testing.assert_allclose(one.embeddings[name], vector, rtol=1e-5, atol=1e-5)
        assert not other.embeddings, "not asked for"


def test_values_never_seen_in_training_are_one_category_of_their_own(shop: Path) -> None:
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    known = next(r["supplier"] for r in raw_records(shop / "raw").values() if r["supplier"])
    values = ["never heard of", "nor of this", None, known]
    new, newer, missing, old = (predictor.predict({"price": 3.5, "supplier": v}).probabilities for v in values)
    assert new == newer
    assert len({tuple(p.values()) for p in (new, missing, old)}) == 3


def test_embeddings_of_raw_records_are_those_of_the_gold_samples(shop: Path) -> None:
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    by_key = {sample_key("demo", i, i): record for i, record in raw_records(shop / "raw").items()}
    dataset = predictor.open(shop / "lake" / "gold" / "demo", "test")
    expected = embed(predictor.model, dataset, np.arange(dataset.n))
    for i, key in enumerate(dataset.keys):
        found = predictor.predict(by_key[key], embeddings=True).embeddings
        np.testing.assert_allclose(found["fused"], expected.fused_ND[i], rtol=1e-5, atol=1e-5)
        for name, means in expected.modalities.items():
            assert (name in found) == expected.present[name][i]
            if name in found:
                np.testing.assert_allclose(found[name], means[i], rtol=1e-5, atol=1e-5)


def test_latency_times_each_record_alone(shop: Path) -> None:
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    found = latency(predictor, [{"text": "a red box"}, {"price": 3.5}], repeats=3)
    assert found["n"] == 6
    assert 0 < found["p50_ms"] <= found["p95_ms"]
    with pytest.raises(ValueError, match="no records"):
        latency(predictor, [], repeats=3)


def test_series_as_points_in_any_order_or_as_columns(shop: Path) -> None:
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    spec = predictor.modalities["timeseries"].spec  # type: ignore[attr-defined]
    a, b = spec.variables[:2]
    points = [(0, a, 1.0), (1, a, 2.0), (2, a, None), (0, b, 5.0), (2, b, 6.0)]
    one = predictor.predict({"timeseries": points})
    two = predictor.predict({"timeseries": points[::-1]})
    three = predictor.predict({"timeseries": {a: [1.0, 2.0, None], b: [5.0, None, 6.0]}})
    assert one.probabilities == two.probabilities == three.probabilities


def test_each_bad_record_gets_one_clear_error_and_the_others_an_answer(shop: Path, tmp_path: Path) -> None:
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    Image.new("1", (9000, 9000)).save(tmp_path / "huge.png")
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 no image at all")
    bad: list[tuple[Any, str]] = [
        ({}, "nothing is present"),
        ({"text": None, "image": "", "timeseries": []}, "nothing is present"),
        ({"text": 3}, "text: int 3: must be str"),
        ({"text": ["a", "b"]}, "text: 2 values; at most 1"),
        ({"image": str(tmp_path / "none.jpg")}, "none.jpg: no such file"),
        ({"image": str(tmp_path)}, "no such file"),
        ({"image": str(tmp_path / "huge.png")}, "too large"),
        ({"image": str(tmp_path / "broken.jpg")}, "not a readable image"),
        ({"image": "a\0b"}, "image: "),
        ({"price": "cheap"}, "tabular: price: 'cheap' is not a number"),
        ({"price": [1]}, "is not a number"),
        ({"price": 10**400}, "is not a number"),
        ({"supplier": {"name": "x"}}, "supplier: dict is neither text nor number"),
        ({"prise": 1}, "did you mean 'price'?"),
        ({"timeseries": "no"}, "give points"),
        ({"timeseries": [(0, "nothing", 1.0)]}, "unknown variable 'nothing'"),
        ({"timeseries": [(0, 1.0)]}, "a point is (time, variable, value)"),
        ("text", "a record is a map"),
        (None, "a record is a map"),
    ]
    good = {"text": "a red box"}
    expected = predictor.predict(good)
    records = [one for record, _ in bad for one in (record, good)]
    found = predictor.predict(records)
    for (record, message), answer in zip(bad, found[::2], strict=True):
        assert answer.error is not None, record
        assert message in answer.error
        assert "\n" not in answer.error
        assert not answer.probabilities
    for answer in found[1::2]:
        assert answer.error is None
        assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-6)


def test_another_schema_is_refused(shop: Path, tmp_path: Path) -> None:
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    synthetic.generate(tmp_path / "raw", samples=60, seed=9)
    tree = recipes.load("demo").model_dump(mode="json")
    other = build(recipes.Recipe.model_validate(tree), tmp_path / "raw", tmp_path / "lake")
    with pytest.raises(ValueError, match="is not the model's"):
        next(predictor.predict_gold(other, "test"))


def test_a_pretrained_model_gives_embeddings_only(shop: Path, tmp_path: Path) -> None:
    recipe = load_recipe(str(shop / "run" / "recipe.yaml"))
    gold = shop / "lake" / "gold" / "demo"
    manifest = Manifest.load(gold)
    modalities = make_modalities(manifest, recipe.model.modalities)
    model = build_model(recipe.model, modalities, 0)
    task = Pretrain(model, modalities, recipe.model.fusion, recipe.objective, 0)
    describe_run(
        tmp_path, recipe, manifest, {}, {"task": "pretrain"}, load_tokenizer_bytes(gold, recipe.data, manifest)
    )
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    save_weights(checkpoint / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (checkpoint / "meta.json").write_text('{"step": 2, "loader": {}, "files": {}}')
    predictor = lanistr.Predictor.from_pretrained(export_run(tmp_path, tmp_path / "out"))
    with pytest.raises(ValueError, match="only pretrained"):
        predictor.predict({"text": "a red box"})
    found = predictor.predict({"text": "a red box"}, embeddings=True)
    assert found.label is None
    assert set(found.embeddings) == {"fused", "cls", "text"}


def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "launchers" / "predict.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_launcher_answers_files_and_gold(shop: Path, tmp_path: Path) -> None:
    records = list(raw_records(shop / "raw").items())[:5]
    lines = [json.dumps({"product_id": i, "junk": 1, **r}) for i, r in records]
    lines[2] = "{broken"
    (tmp_path / "in.jsonl").write_text("\n".join(lines) + "\n")
    done = launch(
        "--model", str(shop / "model"), "--input", str(tmp_path / "in.jsonl"), "--id", "product_id", "--embeddings",
        "--out", str(tmp_path / "out.parquet"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "4 answered, 1 not" in done.stderr
    assert "junk" in done.stderr
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [row["product_id"] for row in rows] == [i for i, _ in records[:2]] + [None] + [i for i, _ in records[3:]]
    assert "not JSON" in rows[2]["error"]
    expected = lanistr.Predictor.from_pretrained(shop / "model").predict(records[0][1])
    assert rows[0]["prediction"] == expected.label
    for name, p in expected.probabilities.items():
        assert rows[0][f"p/{name}"] == pytest.approx(p, abs=1e-6)
    assert len(rows[0]["embedding/fused"]) == 32
    gold = str(shop / "lake" / "gold" / "demo")
    done = launch(
        "--model", str(shop / "model"), "--input", gold, "--split", "val", "--out", str(tmp_path / "g.parquet")
    )
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "g.parquet").num_rows == Manifest.load(gold).n("val")


def test_launcher_leaves_nothing_half_written(shop: Path, tmp_path: Path) -> None:
    done = launch("--model", str(shop / "model"), "--input", str(tmp_path / "no.jsonl"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == f"error: {tmp_path / 'no.jsonl'}: no such file"
    assert "Traceback" not in done.stderr
    with pytest.raises(ValueError, match=r"give \.jsonl, \.csv, \.parquet"):
        list(read_records(tmp_path / "records.xml"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_tables_are_read_as_records(shop: Path, tmp_path: Path, ending: str) -> None:
    rows = pq.read_table(shop / "raw" / "products.parquet").slice(0, 6)
    path = tmp_path / f"in.{ending}"
    if ending == "csv":
        pa_csv.write_csv(rows, path)
    else:
        pq.write_table(rows, path)
    predictor = lanistr.Predictor.from_pretrained(shop / "model")
    out = tmp_path / "out.parquet"
    assert write_predictions(predictor, path, out).answered == 6
    expected = predictor.predict([{k: v for k, v in r.items() if k in predictor.keys} for r in rows.to_pylist()])
    for row, one in zip(pq.read_table(out).to_pylist(), expected, strict=True):
        assert row["prediction"] == one.label
