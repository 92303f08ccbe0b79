"""TensorBoard, W&B and CSV through DeepSpeed's monitor: switched on in the ZeRO configuration, filled here.

``"tensorboard": {"enabled": true}`` in ``ds_configs/*.json`` is enough: logs go into the run folder. DeepSpeed itself would
write them into the home directory, and fail in the middle of the start where a package is missing.
"""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None}


def fill_trackers(config: dict[str, Any], path: Path, run: Path) -> None:
    """Fill where each tracker that is enabled writes.

    Args:
        config: DeepSpeed's, from `fill_config`; changed.
        path: where it was read, for messages.
        run: run folder.

    Raises:
        ValueError: a tracker whose package is missing, or one that DeepSpeed knows and we do not.
    """
    if config.get("comet", {}).get("enabled"):
        raise ValueError(f"{path}: comet is not supported; use {', '.join(PACKAGES)}")
    for name, package in PACKAGES.items():
        block = config.get(name, {})
        if not block.get("enabled"):
            continue
        if package and find_spec(package) is None:
            raise ValueError(
                f"{path}: {name} is enabled and its package {package} is missing: pip install 'lanistr[track]', or set "
                f'"{name}": {{"enabled": false}}'
            )
        if name == "wandb":
            block.setdefault("project", "lanistr")
            os.environ.setdefault("WANDB_DIR", str(run))
            os.environ.setdefault("WANDB_NAME", run.name)
        else:
            block.setdefault("output_path", str(run))
            block.setdefault("job_name", name)
