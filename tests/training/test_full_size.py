"""The published recipes take a step on two CPU ranks under ZeRO-2: about 12 GB and a few minutes each."""

import json
import math
from pathlib import Path

import psutil
import pytest

from tests.ranks import finish, launch

WORKER = Path(__file__).with_name("full_size_worker.py")


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("recipe", ["amazon_pretrain", "mimic_pretrain"])
def test_a_whole_recipe_takes_a_step_under_zero_2(recipe: str, tmp_path: Path) -> None:
    if psutil.virtual_memory().available < 16 << 30:
        pytest.skip("needs 16 GiB of free memory")
    finish(launch(2, [str(WORKER), recipe, str(tmp_path / "out.json")]))
    report = json.loads((tmp_path / "out.json").read_text())
    print(report)
    assert report["parameters"] > 250e6
    assert math.isfinite(report["loss"])
    assert math.isfinite(report["grad_norm"])
    assert not report["skipped"]
    assert report["changed"] > 0.5 * report["tensors"], "bfloat16 rounds small updates away, but not half of them"
