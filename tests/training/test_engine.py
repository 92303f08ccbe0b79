import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lanistr.config import OptimizerConfig
from lanistr.training.ds_config import fill_config
from lanistr.training.engine import parameter_groups
from tests.model.support import make_modalities, make_pretrain

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))
CONFIG = OptimizerConfig(global_batch=32, micro_batch=4, clip=2.5, lr=3e-4)


def write(tmp_path: Path, tree: dict[str, Any]) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(tree))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_configuration_is_filled_completely(path: Path) -> None:
    filled = fill_config(path, "r", CONFIG, world=4)
    assert '"auto"' not in json.dumps(filled)
    assert filled["train_batch_size"] == 32
    assert filled["train_micro_batch_size_per_gpu"] == 4
    assert filled["gradient_accumulation_steps"] == 2
    assert filled["gradient_clipping"] == 2.5
    assert filled["optimizer"]["params"]["lr"] == 3e-4


def test_clipping_is_explicit_even_where_the_file_says_nothing(tmp_path: Path) -> None:
    assert fill_config(write(tmp_path, {}), "r", CONFIG, 1)["gradient_clipping"] == 2.5


def test_a_value_that_contradicts_the_recipe_names_both(tmp_path: Path) -> None:
    path = write(tmp_path, {"gradient_clipping": 1.0})
    with pytest.raises(ValueError, match=r"ds\.json: gradient_clipping = 1\.0 contradicts recipe mine \(2\.5\)"):
        fill_config(path, "mine", CONFIG, 1)


def test_bfloat16_at_stage_0_and_stage_3_are_refused(tmp_path: Path) -> None:
    bf16 = CONFIG.model_copy(update={"precision": "bfloat16"})
    with pytest.raises(ValueError, match="stage 0 with precision bfloat16"):
        fill_config(write(tmp_path, {}), "r", bf16, 1)
    with pytest.raises(ValueError, match="allowed are 0, 1, 2"):
        fill_config(write(tmp_path, {"zero_optimization": {"stage": 3}}), "r", CONFIG, 1)


@pytest.mark.parametrize("text", ["{", ""])
def test_broken_json_is_one_clear_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="not valid JSON"):
        fill_config(path, "r", CONFIG, 1)


def test_decay_only_on_matrices_and_every_trainable_parameter_in_exactly_one_group() -> None:
    task = make_pretrain(make_modalities())
    decayed, plain = parameter_groups(task, 0.1)
    names = {id(p): n for n, p in task.named_parameters()}
    assert {names[id(p)] for p in [*decayed["params"], *plain["params"]]} == set(names.values())
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert all(p.ndim >= 2 for p in decayed["params"])
    for part in ("norm", "bias", "cls", "positions", "word_embeddings", "position_embeddings", "mask_token"):
        assert not [n for p in decayed["params"] if part in (n := names[id(p)])], part
    assert isinstance(plain["params"][0], torch.nn.Parameter)
