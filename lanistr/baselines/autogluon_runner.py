"""The other side of `lanistr.baselines.autogluon`: run by an interpreter that has ``autogluon.multimodal``.

``python autogluon_runner.py fit|predict FOLDER``; imports nothing of lanistr.
"""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

ENCODERS = {  # of AutoGluon, per fusion, for each type of column
    "mlp": {
        "text": "hf_text",
        "image_path": "timm_image",
        "numerical": "numerical_mlp",
        "categorical": "categorical_mlp",
    },
    "transformer": {
        "text": "hf_text",
        "image_path": "timm_image",
        "numerical": "ft_transformer",
        "categorical": "ft_transformer",
    },
}


def hyperparameters(job: dict[str, Any]) -> dict[str, Any]:
    """Encoders of the columns that are there, and the fusion."""
    kinds = job["columns"].values()
    encoders = dict.fromkeys(name for kind, name in ENCODERS[job["fusion"]].items() if kind in kinds)
    return {"model.names": [*encoders, f"fusion_{job['fusion']}"], **job["hyperparameters"]}


def fit(folder: Path, job: dict[str, Any], pandas: Any, multimodal: Any) -> None:
    """Train on ``train.parquet``; ``val.parquet`` is for early stopping."""
    predictor = multimodal.MultiModalPredictor(
        label=job["label"], problem_type="multiclass", path=str(folder / "model"), verbosity=1
    )
    predictor.fit(
        train_data=pandas.read_parquet(folder / "train.parquet"),
        tuning_data=pandas.read_parquet(folder / "val.parquet"),
        hyperparameters=hyperparameters(job),
        column_types=job["columns"],
        seed=job["seed"],
    )


def predict(folder: Path, job: dict[str, Any], pandas: Any, multimodal: Any) -> None:
    """Probabilities of ``test.parquet``; a class that no label showed has probability 0."""
    predictor = multimodal.MultiModalPredictor.load(str(folder / "model"))
    test = pandas.read_parquet(folder / "test.parquet")
    found = predictor.predict_proba(test, as_pandas=True, as_multiclass=True)
    probabilities_NC = np.zeros((len(test), job["classes"]))
    probabilities_NC[:, [int(name) for name in found.columns]] = found.to_numpy()
    np.save(folder / "probabilities.npy", probabilities_NC)


def main(what: str, folder: Path) -> None:
    """Do one half of an exchange."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    pandas, multimodal = (importlib.import_module(name) for name in ("pandas", "autogluon.multimodal"))
    {"fit": fit, "predict": predict}[what](folder, job, pandas, multimodal)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
