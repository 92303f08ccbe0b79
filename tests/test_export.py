"""An export: the model that the run had, without DeepSpeed, without pickle, whole or not at all."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lanistr
from lanistr.__main__ import main
from lanistr.config import Recipe
from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset
from lanistr.evaluation.embed import embed
from lanistr.export import export_run
from lanistr.manifest import Manifest
from lanistr.modalities import make_modalities
from lanistr.training.checkpoint import WEIGHTS, named_tensors, save_weights
from lanistr.training.finetune import make_task
from tests.model.support import NAMES, RECIPE, make_pretrain
from tests.tiny_gold import write_gold

ROOT = Path(__file__).resolve().parents[1]


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {self.target}",))


def present(i: int) -> list[str]:
    return [name for bit, name in enumerate(NAMES) if (i % 16) >> bit & 1] or ["text"]


@pytest.fixture
def gold(tmp_path: Path) -> Path:
    return write_gold(tmp_path / "gold", {"train": 20, "val": 6, "test": 6}, present)


def describe(run: Path, gold: Path, task: str, recipe: Recipe = RECIPE) -> None:
    """What `describe_run` writes, by hand: the tiny dataset has no tokenizer file."""
    manifest = Manifest.load(gold)
    run.mkdir(parents=True, exist_ok=True)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    schemas = {name: schema.model_dump() for name, schema in manifest.modalities.items()}
    (run / "schema.json").write_text(json.dumps(schemas))
    (run / "tokenizer.json").write_text("{}")
    identity = {"task": task, "labels": manifest.labels, "dataset": "tiny", "content_id": manifest.content_id}
    identity["tokenizer"] = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"  # of {}
    (run / "run.json").write_text(json.dumps(identity))


def pretraining(tmp_path: Path, gold: Path) -> tuple[Path, Any]:
    task = make_pretrain(make_modalities(Manifest.load(gold), RECIPE.model.modalities), seed=3)
    run = tmp_path / "pre"
    describe(run, gold, "pretrain")
    checkpoint = run / "checkpoints" / "step-00000007"
    save_weights(checkpoint / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (checkpoint / "meta.json").write_text(json.dumps({"step": 7, "loader": {}, "files": {}}))
    return run, task


def finetuning(tmp_path: Path, gold: Path) -> tuple[Path, Any]:
    task = make_task(RECIPE, Manifest.load(gold), "cpu")
    run = tmp_path / "tuned"
    describe(run, gold, "finetune")
    save_weights(run / "best" / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (run / "best" / "best.json").write_text(json.dumps({"step": 3}))
    return run, task


def test_a_pretrained_model_comes_back_with_all_its_tensors(tmp_path: Path, gold: Path) -> None:
    run, task = pretraining(tmp_path, gold)
    out = export_run(run, tmp_path / "out")
    assert {f.name for f in out.iterdir()} == {"config.json", "schema.json", "tokenizer.json", "model.safetensors"}
    model = lanistr.Lanistr.from_pretrained(out)
    theirs = named_tensors(task.model)
    assert named_tensors(model).keys() == theirs.keys()
    for name, tensor in named_tensors(model).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    assert not model.training
    assert json.loads((out / "config.json").read_text())["origin"]["step"] == 7


def test_a_tuned_model_embeds_as_the_run_did(tmp_path: Path, gold: Path) -> None:
    run, task = finetuning(tmp_path, gold)
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out)]) == 0
    dataset = GoldDataset(gold, "test", make_modalities(Manifest.load(gold), RECIPE.model.modalities))
    ours = embed(lanistr.Lanistr.from_pretrained(out), dataset, np.arange(6))
    theirs = embed(task.model, dataset, np.arange(6))
    np.testing.assert_array_equal(ours.fused_ND, theirs.fused_ND)


def test_loading_needs_no_deepspeed_and_importing_no_torch(tmp_path: Path, gold: Path) -> None:
    out = export_run(pretraining(tmp_path, gold)[0], tmp_path / "out")
    code = (
        "import sys; sys.modules['deepspeed'] = None; import lanistr; assert 'torch' not in sys.modules; "
        f"lanistr.Lanistr.from_pretrained({str(out)!r}); print('loaded')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "loaded", done.stderr


def test_an_export_of_published_weights_downloads_nothing(tmp_path: Path, gold: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "bert"
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=40, layer_norm_eps=1e-5, hidden_act="relu",
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(source)
    tree = RECIPE.model_dump()
    tree["model"]["modalities"]["text"] |= {"pretrained": str(source), "max_tokens": 16}
    recipe = Recipe.model_validate(tree)
    manifest = Manifest.load(gold)
    task = make_task(recipe, manifest, "cpu").eval()
    run = tmp_path / "run"
    describe(run, gold, "finetune", recipe)
    save_weights(run / "best" / WEIGHTS, {n: t.detach().clone() for n, t in named_tensors(task).items()})
    (run / "best" / "best.json").write_text('{"step": 1}')
    out = export_run(run, tmp_path / "out")
    (source / "model.safetensors").unlink()
    (source / "config.json").unlink()
    model = lanistr.Lanistr.from_pretrained(out)
    dataset = GoldDataset(gold, "train", make_modalities(manifest, RECIPE.model.modalities))
    batch = Collator(dataset.modalities, views=1, seed=0)([dataset.read(p) for p in range(8)], [1.0] * 8, 0)
    with torch.no_grad():
        torch.testing.assert_close(model(batch)[0], task.model(batch)[0], rtol=0, atol=0)


def test_a_folder_with_pickles_is_refused_and_its_payload_never_runs(tmp_path: Path, gold: Path) -> None:
    run, task = pretraining(tmp_path, gold)
    out = export_run(run, tmp_path / "out")
    fired = tmp_path / "fired"
    checkpoint = run / "checkpoints" / "step-00000007"
    (checkpoint / "engine").mkdir()
    (checkpoint / "engine" / "mp_rank_00_model_states.pt").write_bytes(pickle.dumps(Bomb(fired)))
    with pytest.raises(ValueError, match="not an exported model"):
        lanistr.Lanistr.from_pretrained(checkpoint)
    (out / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(fired)))
    lanistr.Lanistr.from_pretrained(out)  # the safetensors file is taken, the pickle is not looked at
    (out / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="which can run any code"):
        lanistr.Lanistr.from_pretrained(out)
    with pytest.raises(ValueError, match="not plain tensors"):
        lanistr.Lanistr.from_pretrained(out, trust=True)
    assert not fired.exists()
    pickle.loads(pickle.dumps(Bomb(fired)))
    assert fired.exists(), "the bomb would go off"
    weights = {n: t.detach().clone() for n, t in named_tensors(task).items() if not n.startswith("heads.")}
    torch.save(weights, out / "pytorch_model.bin")
    assert lanistr.Lanistr.from_pretrained(out, trust=True)


@pytest.mark.parametrize("damage", ["cut", "another shape", "a tensor less", "no json", "unknown key"])
def test_a_damaged_export_is_named_in_one_line(tmp_path: Path, gold: Path, damage: str) -> None:
    out = export_run(pretraining(tmp_path, gold)[0], tmp_path / "out")
    path = out / "model.safetensors"
    weights = load_file(path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == "another shape":
        save_file({**weights, "model.fusion.cls": torch.zeros(2, 16)}, path)
    elif damage == "a tensor less":
        save_file({n: t for n, t in weights.items() if n != "model.fusion.cls"}, path)
    elif damage == "no json":
        (out / "config.json").write_text("{")
    else:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "modell": 1}))
    with pytest.raises(ValueError) as error:
        lanistr.Lanistr.from_pretrained(out)
    assert str(out) in str(error.value)


def test_nothing_half_written_stays(tmp_path: Path, gold: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, _ = pretraining(tmp_path, gold)
    weights = run / "checkpoints" / "step-00000007" / WEIGHTS
    save_file({n: t for n, t in load_file(weights).items() if "fusion.cls" not in n}, weights)
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gold", "pre"]
    assert main(["export", str(tmp_path / "nothing"), "--out", str(tmp_path / "out")]) == 2
    (run / "tokenizer.json").unlink()
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "give --data GOLD" in capsys.readouterr().err


def test_a_dataset_without_a_tokenizer_is_exported_without_one(tmp_path: Path, gold: Path) -> None:
    run, _ = pretraining(tmp_path, gold)
    (run / "tokenizer.json").unlink()
    identity = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(identity | {"tokenizer": None}))
    out = export_run(run, tmp_path / "out")
    assert not (out / "tokenizer.json").exists()
    found = lanistr.Predictor.from_pretrained(out).predict({"text": "a red box"}, embeddings=True)
    assert found.error == "text: the model came without its tokenizer"
