"""What a tuned model rests on, against brute force: written datasets, loops in float64, upstream's own masks."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.__main__ import main
from lanistr.config import FinetuneConfig
from lanistr.data.loader import Collator
from lanistr.data.samples import Sample
from lanistr.evaluation.attribution import attention_shares, explain, token_shares
from lanistr.metrics import accuracy
from lanistr.model.lanistr import build_model
from lanistr.tasks import Finetune
from tests.evaluation.test_robustness import N, outputs_on, present, write_tuned
from tests.model.support import NAMES, RECIPE, make_modalities, random_samples, recipe_with
from tests.tiny_gold import write_gold


@pytest.fixture(scope="module")
def gold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gold(tmp_path_factory.mktemp("explain") / "gold", {"train": 16, "val": 6, "test": N}, present)


@pytest.fixture(scope="module")
def run(gold: Path) -> Path:
    return write_tuned(gold.parent / "tuned", gold, recipe_with(finetune__pooling="mean"))


def make_task(pooling: str) -> Finetune:
    model = build_model(RECIPE.model, make_modalities(), 0)
    task = Finetune(model, 16, 3, FinetuneConfig(pooling=pooling), 0).eval()  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return task


def naive_shares(task: Finetune, tokens: np.ndarray, source: list[int], only_cls: bool) -> list[list[float]]:
    """Of one sample: per layer and source. Layers in float64, attention weight by weight."""
    layers, x = [], torch.from_numpy(tokens).double()
    for block in copy.deepcopy(task.model.fusion.blocks).double():
        assert isinstance(block.heads, int)
        y = block.norm1(x)  # type: ignore[operator]
        q, k, v = block.qkv(y).detach().chunk(3, dim=-1)  # type: ignore[operator]
        width = q.shape[1] // block.heads
        shares, mixed = [0.0] * (1 + len(NAMES)), torch.zeros_like(q)
        queries = [0] if only_cls else range(len(x))
        for head in range(block.heads):
            part = slice(head * width, (head + 1) * width)
            for i in range(len(x)):
                powers = [math.exp(float(q[i, part] @ k[j, part]) / math.sqrt(width)) for j in range(len(x))]
                for j, power in enumerate(powers):
                    mixed[i, part] += power / sum(powers) * v[j, part]
                    if i in queries:
                        shares[source[j]] += power / sum(powers) / block.heads / len(queries)
        layers.append(shares)
        x = x + block.out(mixed)  # type: ignore[operator]
        x = x + block.down(torch.nn.functional.gelu(block.up(block.norm2(x))))  # type: ignore[operator]
    return layers


@pytest.mark.parametrize("pooling", ["cls", "mean", "modalities"])
def test_attention_shares_are_those_of_loops_in_float64(pooling: str) -> None:
    task, modalities = make_task(pooling), make_modalities()
    patterns = [["text", "tabular"], NAMES, ["image"], [], ["timeseries", "text"]]
    contents, _ = random_samples(modalities, patterns, seed=3)
    samples = [Sample(key=f"{i:016x}", presence=0, label=0, contents=c) for i, c in enumerate(contents)]
    batch = Collator(modalities, views=1, seed=0)(samples, [1.0] * len(samples), 0)
    found = attention_shares(task, batch)
    with torch.no_grad():
        tokens_TD = task.model.tokens(batch)[0].numpy()
    begin = 0
    for i, content in enumerate(contents):
        lengths = {"text": len, "image": lambda _: 5, "tabular": lambda _: 2, "timeseries": lambda c: len(c.values_tC)}
        counts = [1, *(lengths[name](content[name]) if name in content else 0 for name in NAMES)]
        source = [s for s, count in enumerate(counts) for _ in range(count)]
        expected = naive_shares(task, tokens_TD[begin : begin + len(source)], source, pooling == "cls")
        np.testing.assert_allclose(found[:, i].numpy(), expected, atol=1e-5)
        np.testing.assert_allclose(token_shares(batch, 5)[i].numpy(), np.array(counts) / sum(counts), atol=1e-6)
        begin += len(source)
    assert np.ptp(found[:, 1].numpy(), axis=0).max() > 0.01, "layers differ"


def test_column_shares_are_upstream_s_masks_weighted_by_their_steps() -> None:
    task, modality = make_task("mean"), make_modalities()["tabular"]
    contents, _ = random_samples({"tabular": modality}, [["tabular"]] * 20, seed=5)
    encoder: Any = task.model.encoder("tabular")
    inputs = modality.collate([c["tabular"] for c in contents], None, [1.0] * 20).inputs
    found = encoder.cell_shares(inputs).detach().numpy()
    tabnet = encoder.encoder
    with torch.no_grad():
        explained_NX, _ = tabnet.blocks.forward_masks(tabnet.embed(inputs.numeric_NR, inputs.categories_NC))
    first_of_column = [int((tabnet.column_of_X == k).nonzero()[0]) for k in range(found.shape[1])]
    expected = explained_NX.numpy()[:, first_of_column]
    np.testing.assert_allclose(found, expected / expected.sum(1, keepdims=True), atol=1e-5)
    assert list(modality.cells(contents[0]["tabular"])) == ["a", "b", "c"]
    assert found.std(0).max() > 0.01, "rows differ"


def test_hidden_and_alone_are_what_a_dataset_without_the_others_gives(gold: Path, run: Path, tmp_path: Path) -> None:
    found = explain(run, gold, "test", None, 8, 0)
    whole, truth = outputs_on(run, gold), np.arange(N) % 3
    assert found["whole"]["value"] == accuracy(whole, truth)
    kept_of = {"without": lambda name: set(NAMES) - {name}, "alone": lambda name: {name}}
    for row in found["modalities"]:
        own = np.array([row["modality"] in present(i) for i in range(N)])
        assert row["n"] == own.sum()
        assert row["whole"]["value"] == accuracy(whole[own], truth[own])
        for key, kept in kept_of.items():
            names = kept(row["modality"])
            other = write_gold(
                tmp_path / f"{key}-{row['modality']}", {"train": 16, "val": 6, "test": N},
                lambda i, names=names: [name for name in present(i) if name in names],
            )  # fmt: skip
            assert row[key]["value"] == accuracy(outputs_on(run, other)[own], truth[own]), (key, row["modality"])
        assert row["adds"]["value"] == pytest.approx(row["whole"]["value"] - row["without"]["value"])
        assert row["adds"]["ci95"][0] <= row["adds"]["value"] <= row["adds"]["ci95"][1]
    nothing = write_gold(tmp_path / "nothing", {"train": 16, "val": 6, "test": N}, lambda _: [])
    assert found["nothing"]["value"] == accuracy(outputs_on(run, nothing), truth)
    assert any(row["without"]["value"] != row["whole"]["value"] for row in found["modalities"])


def test_less_is_better_turns_the_sign(gold: Path, run: Path) -> None:
    found = explain(run, gold, "test", "log_loss", 8, 0)
    for row in found["modalities"]:
        assert row["adds"]["value"] == pytest.approx(row["without"]["value"] - row["whole"]["value"])


def test_rows_that_are_looked_at_do_not_depend_on_batches(
    gold: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = explain(run, gold, "test", None, 11, 0)
    monkeypatch.setattr("lanistr.evaluation.attribution.BATCH", 4)  # 11 is no multiple: the last one is padded
    two = explain(run, gold, "test", None, 11, 0)
    for a, b in zip(one["attention"]["sources"], two["attention"]["sources"], strict=True):
        assert (a["source"], a["n"], a["tokens"]) == (b["source"], b["n"], b["tokens"])
        assert a["layers"] == pytest.approx(b["layers"], abs=1e-6)
    assert {c["cell"]: c["share"] for c in one["columns"]} == pytest.approx(
        {c["cell"]: c["share"] for c in two["columns"]}, abs=1e-6
    )
    assert sum(c["share"] for c in one["columns"]) == pytest.approx(1)


def test_command_writes_report_and_drawing_or_says_in_one_line_why_not(
    gold: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "card"
    assert main(["importance", str(run), "--data", str(gold), "--out", str(out), "--rows", "9"]) == 0
    printed = capsys.readouterr().out
    assert "## Where it looks" in printed
    assert {p.name for p in out.iterdir()} == {"importance.json", "importance.md", "importance.png"}
    assert json.loads((out / "importance.json").read_text())["looked_at"] == 9
    for wrong in (["--rows", "0"], ["--metric", "speed"], ["--split", "train", "--data", str(tmp_path)]):
        assert main(["importance", str(run), "--data", str(gold), "--out", str(tmp_path / "no"), *wrong]) == 2
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("error: ")
    assert not (tmp_path / "no").exists()
