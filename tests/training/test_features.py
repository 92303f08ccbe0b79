"""The feature cache: the same training as without it, and never features of anything else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lanistr.config import FinetuneConfig, Recipe
from lanistr.data.features import CACHE
from lanistr.data.loader import Collator, TrainLoader
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import intact, read_samples
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.tasks import Finetune
from lanistr.training import features
from lanistr.training.best import predict
from lanistr.training.features import cache_features
from lanistr.training.finetune import make_task
from tests.model.support import NAMES, recipe_with
from tests.tiny_gold import write_gold

CPU = torch.device("cpu")


def present(i: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if (i % 16) >> bit & 1] or ["text"]


def write(folder: Path, items: dict[str, int] | None = None) -> Path:
    return write_gold(folder / "gold", {"train": 40, "val": 18}, present, items=items)


class Run:
    """Splits, and a task whose weights tell samples apart."""

    def __init__(self, gold: Path, folder: Path, recipe: Recipe | None = None, **config: Any):
        self.recipe = recipe or recipe_with()
        self.config = FinetuneConfig(**{"cache": True, "global_batch": 8, "pooling": "modalities", **config})
        modalities = make_modalities(Manifest.load(gold), self.recipe.model.modalities)
        self.train, self.val = (GoldDataset(gold, split, modalities) for split in ("train", "val"))
        tuned = self.recipe.model_copy(update={"finetune": self.config})
        self.task = make_task(tuned, self.train.manifest, "cpu")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.task.parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
        self.frozen = self.config.frozen(list(modalities))
        self.task.freeze(self.frozen)
        self.positions = self.train.labelled(24, 0)
        self.folder = folder

    def cached(self) -> tuple[GoldDataset, GoldDataset]:
        shared = isinstance(self.config.cache, str)
        train = self.train.labelled(None, 0) if shared else self.positions
        wanted = {"train": train, "val": self.val.labelled(None, 0)}
        splits = {"train": self.train, "val": self.val}
        found = cache_features(self.task.model, self.config, self.frozen, splits, wanted, self.folder, CPU, 0)
        return found["train"], found["val"]

    def loader(self, train: GoldDataset) -> TrainLoader:
        dropout = self.config.modality_dropout
        collator = Collator(train.modalities, 1, 0, dropout, self.task.alone)
        return TrainLoader(
            train, collator, global_batch=8, micro_batch=None, ranks=1, rank=0, seed=0, grouping="grouped",
            positions=self.positions,
        )  # fmt: skip


def fit(task: Finetune, loader: TrainLoader, steps: int) -> list[float]:
    """Plain torch; the loss of each step."""
    # Adam would make a step of the rounding in the key biases, whose gradient is zero.
    optimizer = torch.optim.SGD([p for p in task.parameters() if p.requires_grad], lr=0.1)
    task.train()
    found = []
    for (batch,) in loader.steps(0, steps):
        optimizer.zero_grad()
        loss = sum(task.weights[name] * total / max(batch.counts[name], 1) for name, total in task(batch).items())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(
    "config",
    [
        {"freeze": "encoders", "unimodal": 0.5, "modality_dropout": 0.3},
        {"freeze": ["text", "tabular"]},
        {"freeze": "encoders", "unimodal": 1.0, "unimodal_on": "fused", "modality_dropout": 0.3},
        {"freeze": ["image", "projections", "fusion"]},
        {"freeze": "encoders", "absent_token": True},
    ],
)
def test_losses_weights_and_predictions_are_those_of_a_run_without_cache(
    config: dict[str, Any], tmp_path: Path
) -> None:
    recipe = recipe_with(model__modalities__image__absent_token=config.pop("absent_token", False))
    gold = write(tmp_path, {"image": 2, "text": 2})
    plain, ours = Run(gold, tmp_path / "run", recipe, **config), Run(gold, tmp_path / "run", recipe, **config)
    train, val = ours.cached()
    losses = fit(plain.task, plain.loader(plain.train), 9)
    assert max(losses) > min(losses)
    np.testing.assert_allclose(fit(ours.task, ours.loader(train), 9), losses, rtol=1e-5)
    for (name, mine), theirs in zip(ours.task.named_parameters(), plain.task.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4, msg=name)
    positions = ours.val.labelled(None, 0)
    np.testing.assert_allclose(
        predict(ours.task, val, positions, CPU)[0], predict(plain.task, plain.val, positions, CPU)[0], atol=1e-5
    )


def test_frozen_encoders_no_longer_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(write(tmp_path), tmp_path / "run")
    train, _ = run.cached()
    for name in NAMES:
        monkeypatch.setattr(run.task.model.encoder(name), "encode", lambda _: pytest.fail("an encoder ran"))
    fit(run.task, run.loader(train), 3)


def test_bfloat16_features_are_the_bits_that_the_encoder_gives_in_it(tmp_path: Path) -> None:
    run = Run(write(tmp_path), tmp_path / "run", precision="bfloat16")
    train, _ = run.cached()
    sample = next(run.train.read(int(p)) for p in run.positions if "text" in run.train.read(int(p)).contents)
    cached = next(train.read(int(p)) for p in run.positions if train.read(int(p)).key == sample.key)
    encoder = run.task.model.encoder("text").to(torch.bfloat16)
    batch = Collator(run.train.modalities, views=1, seed=0)([sample], [1.0], 0)
    with torch.no_grad():
        expected = encoder.encode(batch.inputs["text"])
    inputs = Collator(train.modalities, views=1, seed=0)([cached], [1.0], 0).inputs["text"]
    assert inputs.rows_RH.dtype == torch.bfloat16
    torch.testing.assert_close(inputs.rows_RH, expected, atol=2e-2, rtol=2e-2)  # other batches round otherwise


def test_a_finished_cache_is_used_again_and_a_stale_one_refused_naming_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gold, shared = write(tmp_path), str(tmp_path / "shared")
    Run(gold, tmp_path / "a", cache=shared).cached()
    written = (tmp_path / "shared" / CACHE).stat().st_mtime_ns
    Run(gold, tmp_path / "b", cache=shared).cached()
    assert (tmp_path / "shared" / CACHE).stat().st_mtime_ns == written

    def refused(run: Run, key: str) -> None:
        with pytest.raises(ValueError, match=rf"stale feature cache: it was made with {key} .*, this run has .*"):
            run.cached()

    other = Run(gold, tmp_path / "c", cache=shared)
    with torch.no_grad():
        next(other.task.model.encoder("text").encoder.parameters()).view(-1)[0] += 1e-3
    refused(other, "weights")
    shorter = recipe_with(model__modalities__text__max_tokens=8, model__modalities__text__positions=16)
    refused(Run(gold, tmp_path / "d", shorter, cache=shared), "transform")
    refused(Run(gold, tmp_path / "e", cache=shared, precision="bfloat16"), "dtype")
    elsewhere = write(tmp_path / "other", {"text": 2})
    refused(Run(elsewhere, tmp_path / "f", cache=shared), "data")
    monkeypatch.setattr(features, "hash_code", lambda: "changed")
    refused(Run(gold, tmp_path / "g", cache=shared), "code")


def test_folders_of_the_same_published_weights_share_a_cache_and_other_weights_are_refused(tmp_path: Path) -> None:
    gold, shared = write(tmp_path), str(tmp_path / "shared")
    bert = make_task(recipe_with(), Manifest.load(gold), "cpu").model.encoder("text").encoder
    folders = {name: tmp_path / name for name in ("here", "there", "other")}
    for name, folder in folders.items():
        if name == "other":
            with torch.no_grad():
                next(bert.parameters()).mul_(1.01)
        bert.save_pretrained(folder)

    def run(name: str) -> Run:
        recipe = recipe_with(model__modalities__text__pretrained=str(folders[name]))
        return Run(gold, tmp_path / f"run-{name}", recipe, cache=shared, freeze=["text"])

    run("here").cached()
    written = (tmp_path / "shared" / CACHE).stat().st_mtime_ns
    run("there").cached()
    assert (tmp_path / "shared" / CACHE).stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="it was made with weights"):
        run("other").cached()


def test_a_cache_in_the_run_folder_holds_the_samples_in_use_and_a_shared_one_all_labelled(tmp_path: Path) -> None:
    gold = write(tmp_path)
    own = Run(gold, tmp_path / "run")
    own.cached()
    np.testing.assert_array_equal(np.load(tmp_path / "run" / "features" / "train-00000-positions.npy"), own.positions)
    Run(gold, tmp_path / "b", cache=str(tmp_path / "shared")).cached()
    assert len(np.load(tmp_path / "shared" / "train-00000-positions.npy")) == 40


def test_damage_foreign_files_and_nothing_frozen_are_errors(tmp_path: Path) -> None:
    gold = write(tmp_path)
    run = Run(gold, tmp_path / "run")
    run.cached()
    rows = tmp_path / "run" / "features" / "train-00000-text-0.rows"
    rows.write_bytes(rows.read_bytes()[:-4])
    with pytest.raises(ValueError, match="remove"):
        Run(gold, tmp_path / "run").cached()
    rows.unlink()
    with pytest.raises(ValueError, match="damaged"):
        Run(gold, tmp_path / "run").cached()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("keep me")
    with pytest.raises(ValueError, match=r"holds thesis.tex"):
        Run(gold, tmp_path / "x", cache=str(tmp_path / "mine")).cached()
    assert (tmp_path / "mine" / "thesis.tex").is_file()
    with pytest.raises(ValueError, match="no encoder is frozen"):
        Run(gold, tmp_path / "x", freeze=["fusion"]).cached()


def test_an_unfinished_cache_is_made_anew(tmp_path: Path) -> None:
    gold = write(tmp_path)
    Run(gold, tmp_path / "run").cached()
    (tmp_path / "run" / "features" / CACHE).unlink()
    (tmp_path / "run" / "features" / "train-00000-text-0.rows").write_bytes(b"half")
    train, _ = Run(gold, tmp_path / "run").cached()
    assert train.read(int(train.labelled(24, 0)[0])).contents


def test_only_cached_samples_stand_in_for_a_corrupt_one(tmp_path: Path) -> None:
    run = Run(write(tmp_path), tmp_path / "run", freeze=["text"])
    train, _ = run.cached()
    stand_ins = [s for p in run.positions for s in train.substitutes(int(p), 0)]
    assert stand_ins
    assert set(stand_ins) <= set(run.positions.tolist())
    assert {s for p in run.positions for s in run.train.substitutes(int(p), 0)} - set(run.positions.tolist())


def test_training_draws_among_the_augmented_views_and_validation_sees_the_plain_one(tmp_path: Path) -> None:
    flipped = recipe_with(model__modalities__image={**recipe_with().model.modalities["image"], "flip": 0.5})
    run = Run(write(tmp_path), tmp_path / "run", flipped, cache_views=4)
    train, val = run.cached()
    with_image = [int(p) for p in run.positions if "image" in run.train.read(int(p)).contents]
    encoder = run.task.model.encoder("image")

    def drawn(position: int) -> set[bytes]:
        found = [intact(read_samples(train, [position], None, (0, epoch)))[0] for epoch in range(30)]
        return {sample.contents["image"].tobytes() for sample in found}

    seen = {position: drawn(position) for position in with_image}
    assert max(map(len, seen.values())) == 2  # as it is, and flipped
    position = max(seen, key=lambda p: len(seen[p]))

    def encoded(dataset: GoldDataset, position: int) -> np.ndarray:
        batch = Collator(dataset.modalities, views=1, seed=0)([dataset.read(position)], [1.0], 0)
        with torch.no_grad():
            return encoder.encode(batch.inputs["image"]).numpy()

    assert any(
        np.allclose(np.frombuffer(view, "<f4").reshape(-1, 16), encoded(run.train, position), atol=1e-5)
        for view in seen[position]
    )
    held_out = next(int(p) for p in run.val.labelled(None, 0) if "image" in run.val.read(int(p)).contents)
    np.testing.assert_allclose(val.read(held_out).contents["image"], encoded(run.val, held_out), atol=1e-5)
    with pytest.raises(ValueError, match=r"none of .* is augmented"):
        Run(write(tmp_path / "b"), tmp_path / "x", cache_views=2).cached()
