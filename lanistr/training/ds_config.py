"""The recipe and a ZeRO configuration become DeepSpeed's configuration.

DeepSpeed drops ``"auto"`` silently and clips at 1.0 by default: every such key is filled here from the recipe, and one
that contradicts the recipe is an error.
"""

import json
from pathlib import Path
from typing import Any

from lanistr.config import OptimizerConfig


def fill_config(path: Path, recipe: str, config: OptimizerConfig, world: int) -> dict[str, Any]:
    """DeepSpeed's configuration: the JSON, with every absent or ``"auto"`` key filled from the recipe.

    Args:
        path: the JSON.
        recipe: its name, for messages.
        config: batch, clipping, precision, optimizer.
        world: number of ranks.

    Raises:
        ValueError: unreadable JSON; a value that contradicts the recipe; bfloat16 at stage 0.
    """
    try:
        merged: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; ds_configs/ has zero1.json, zero2.json, zero2_offload.json") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    return fill_tree(merged, path, recipe, config, world)


def fill_tree(
    merged: dict[str, Any], path: Path | str, recipe: str, config: OptimizerConfig, world: int
) -> dict[str, Any]:
    """As `fill_config`, of a tree that was read from ``path``; it is changed."""
    per_rank = config.global_batch // world
    micro = config.micro_batch or per_rank
    offload = "offload_optimizer" in merged.get("zero_optimization", {})
    adam = {
        "lr": config.lr,
        "betas": list(config.betas),
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    if not offload:
        # torch's own, in one pass over the parameters: DeepSpeed's would be compiled at the first start.
        adam |= {"torch_adam": True, "fused": True}
    wanted = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": max(1, per_rank // micro),
        "gradient_clipping": config.clip,
        "bf16.enabled": config.precision == "bfloat16",
        "optimizer.type": "AdamW",
        "steps_per_print": 1 << 30,
        **{f"optimizer.params.{key}": value for key, value in adam.items()},
    }
    for key, value in wanted.items():
        _fill(merged, key, value, path, recipe)
    stage = merged.setdefault("zero_optimization", {}).setdefault("stage", 0)
    if stage == 0 and config.precision == "bfloat16":
        raise ValueError(f"{path}: stage 0 with precision bfloat16 (recipe {recipe}) trains wrong; use stage 1 or 2")
    if stage not in (0, 1, 2):
        raise ValueError(f"{path}: ZeRO stage {stage}; allowed are 0, 1, 2")
    return merged


def _fill(tree: dict[str, Any], key: str, value: Any, path: Path | str, recipe: str) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    if tree.get(last, "auto") == "auto":
        tree[last] = value
    elif tree[last] != value:
        raise ValueError(f'{path}: {key} = {tree[last]!r} contradicts recipe {recipe} ({value!r}); write "auto"')
