"""A resume goes on with the same run, and loads what that run has written: anything else is refused in one line."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lanistr.manifest import Manifest, Tokenizer
from lanistr.training.durable import digest
from tests.model.support import NAMES, RECIPE
from tests.ranks import finish, launch
from tests.tiny_gold import write_gold

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.dist


class Bomb:
    """Unpickling it writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.target}",)


def make_gold(folder: Path, seed: int, tokenizer: bytes) -> Path:
    gold = write_gold(folder, {"train": 24}, lambda _: NAMES, seed)
    (gold / "tokenizer.json").write_bytes(tokenizer)
    manifest = Manifest.load(gold)
    manifest.tokenizer = Tokenizer(file="tokenizer.json", sha256=hashlib.sha256(tokenizer).hexdigest())
    manifest.content_id = manifest.compute_content_id()
    manifest.save(gold)
    return gold


def command(run: Path, gold: Path, *more: str) -> list[str]:
    recipe = gold.parent / "tiny.yaml"
    return [
        str(ROOT / "launchers" / "pretrain.py"),
        *("--recipe", str(recipe), "--data", str(gold), "--run", str(run), *more),
    ]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps that was stopped after two: ``run`` beside its data ``gold``."""
    folder = tmp_path_factory.mktemp("refusals")
    gold = make_gold(folder / "gold", 0, b"{}")
    tree = RECIPE.model_dump(mode="json")
    tree["pretrain"] |= {"global_batch": 8, "max_steps": 4, "epochs": 9, "save_every": 2, "eval_every": None}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree))
    finish(launch(1, command(folder / "run", gold)))
    shutil.rmtree(folder / "run" / "checkpoints" / "step-00000004")
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained / "run", tmp_path / "run"))


@pytest.mark.parametrize("other", ["data", "recipe", "tokenizer"])
def test_another_run_is_refused_naming_both_and_the_override_which_goes_on(
    trained: Path, run: Path, other: str
) -> None:
    gold, more, expected = trained / "gold", [], "pretrain.lr was 0.0001, is 0.5"
    if other == "recipe":
        more = ["pretrain.lr=0.5"]
    else:
        seed, tokenizer = (1, b"{}") if other == "data" else (0, b'{"another": 1}')
        gold = make_gold(trained / other, seed, tokenizer)
        then, now = (Manifest.load(folder) for folder in (trained / "gold", gold))
        assert then.tokenizer
        assert now.tokenizer
        expected = f"content_id was {then.content_id}, is {now.content_id}"
        if other == "tokenizer":
            expected = f"tokenizer was {then.tokenizer.sha256}, is {now.tokenizer.sha256}"
    (process,) = launch(1, command(run, gold, "--resume", "auto", *more))
    output = process.communicate()[0]
    assert process.returncode == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert expected in line
    assert line.endswith("; --resume force goes on all the same")
    assert line.count("content_id was") <= 1
    assert "Traceback" not in output

    (output,) = finish(launch(1, command(run, gold, "--resume", "force", *more)))
    assert expected in next(line for line in output.splitlines() if line.startswith("resumed by force: "))
    assert "resumed after step 2" in output
    assert (run / "checkpoints" / "latest").read_text() == "step-00000004"


@pytest.mark.parametrize("where", ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"])
def test_a_resume_never_runs_what_a_pickle_among_deepspeeds_files_says(
    trained: Path, run: Path, tmp_path: Path, where: str
) -> None:
    fired = tmp_path / "fired"
    folder = run / "checkpoints" / "step-00000002"
    path = folder / "engine" / where
    content = torch.load(path, weights_only=False)  # our own
    torch.save({**content, "ds_config": Bomb(fired)}, path)
    meta = json.loads((folder / "meta.json").read_text())
    meta["files"][f"engine/{where}"] = digest(path)  # whoever plants a pickle can count, too
    (folder / "meta.json").write_text(json.dumps(meta))
    (process,) = launch(1, command(run, trained / "gold", "--resume", "auto"))
    output = process.communicate()[0]
    assert process.returncode == 2, output
    assert not fired.exists()
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert f"{where}: refused: " in line
    assert "Traceback" not in output
    torch.load(path, weights_only=False)
    assert fired.exists(), "the bomb would go off"
