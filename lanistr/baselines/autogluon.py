"""AutoGluon MultiModal (Erickson et al. 2022), in an environment of its own, by exchange of files.

Its pins and ours do not fit one environment, so another interpreter (``--autogluon-python``) runs `autogluon_runner.py`:
this side writes the labelled samples as a Parquet file and PNG images, that side writes probabilities. Texts, images,
numbers and categories are what `Modality.decode` gives LANISTR; series are left out, as in the paper.

Files of an exchange: ``job.json``, ``train.parquet``, ``val.parquet``, ``test.parquet``, ``images/``, ``model/``,
``probabilities.npy``.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from lanistr.baselines import Predict, Subset
from lanistr.baselines.features import names_of, read_all, texts_of
from lanistr.data.reader import GoldDataset
from lanistr.data.samples import Sample, Several
from lanistr.modalities.tabular import Row, TabularModality
from lanistr.transforms import MISSING_ID

RUNNER = Path(__file__).with_name("autogluon_runner.py")
LABEL = "label"
Fusion = Literal["mlp", "transformer"]


@dataclass(frozen=True)
class AutoGluon:
    """Where AutoGluon is.

    Attributes:
        python: interpreter that has ``autogluon.multimodal``.
        config: JSON file of AutoGluon's hyperparameters, such as the checkpoints to start from; None = its defaults.
    """

    python: Path
    config: Path | None = None

    def hyperparameters(self) -> dict[str, Any]:
        """Of the file. Raises ValueError where it is none."""
        if self.config is None:
            return {}
        try:
            found = json.loads(self.config.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"--autogluon-config {self.config}: {error}") from None
        if not isinstance(found, dict):
            raise ValueError(f"--autogluon-config {self.config}: must be an object, is {type(found).__name__}")
        return found


@dataclass(frozen=True)
class AutoGluonMethod:
    """AutoGluon trained on the labelled samples.

    Attributes:
        autogluon: where it is.
        work: folder for exchanges, each removed when its predictor is.
        fusion: ``fusion_mlp`` or ``fusion_transformer``.
    """

    autogluon: AutoGluon
    work: Path
    fusion: Fusion

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        self.work.mkdir(parents=True, exist_ok=True)
        exchange = TemporaryDirectory(prefix=f"{len(train)}-{seed}-", dir=self.work)
        folder = Path(exchange.name)
        known = Subset(val.dataset, val.positions_N[np.isin(val.labels_N, train.labels_N)])
        columns = write_samples(train, folder, "train", labelled=True)
        write_samples(known, folder, "val", labelled=True)
        job = {
            "label": LABEL,
            "columns": columns,
            "fusion": self.fusion,
            "seed": seed,
            "classes": train.classes,
            "hyperparameters": self.autogluon.hyperparameters(),
        }
        (folder / "job.json").write_text(json.dumps(job, indent=1), encoding="utf-8")
        self._run("fit", folder)

        def predict(subset: Subset) -> np.ndarray:
            assert exchange.name == str(folder)  # lives as long as this function does
            write_samples(subset, folder, "test", labelled=False)
            self._run("predict", folder)
            return read_probabilities(folder / "probabilities.npy", len(subset), subset.classes)

        return predict

    def _run(self, what: str, folder: Path) -> None:
        """Raises ValueError with the other interpreter's last line where it fails."""
        # Isolated: neither this file, which is named as the package is, nor our PYTHONPATH is in its way.
        command = [str(self.autogluon.python), "-I", str(RUNNER), what, str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except OSError as error:
            raise ValueError(f"--autogluon-python {self.autogluon.python}: {error.strerror}") from None
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise ValueError(f"AutoGluon ({what}, exit code {done.returncode}): {lines[-1]}")


def write_samples(subset: Subset, folder: Path, split: str, *, labelled: bool) -> dict[str, str]:
    """Write ``<split>.parquet``, with a column of class ids where ``labelled``, and its images.

    Returns:
        AutoGluon's type of each column but the label.
    """
    dataset = subset.dataset
    samples = read_all(dataset, subset.positions_N)
    columns: dict[str, tuple[str, list[Any]]] = {}
    if names_of(dataset, "text"):
        columns["text"] = ("text", texts_of(dataset, samples))
    for name in names_of(dataset, "image"):
        columns[name] = ("image_path", [_write_image(sample, name, folder / "images") for sample in samples])
    for name in names_of(dataset, "tabular"):
        columns |= _table(samples, dataset, name)
    table = {name: pa.array(values) for name, (_, values) in columns.items()}
    if labelled:
        table[LABEL] = pa.array(subset.labels_N)
    pq.write_table(pa.table(table), folder / f"{split}.parquet")
    return {name: kind for name, (kind, _) in columns.items()}


def _write_image(sample: Sample, name: str, folder: Path) -> str | None:
    """Path of the first image; None = absent, which AutoGluon replaces by zeros."""
    content = sample.contents.get(name)
    if content is None:
        return None
    folder.mkdir(exist_ok=True)
    path = folder / f"{sample.key}-{name}.png"
    Image.fromarray(content[0] if isinstance(content, Several) else content).save(path)
    return str(path)


def _table(samples: Sequence[Sample], dataset: GoldDataset, name: str) -> dict[str, tuple[str, list[Any]]]:
    """Columns as numbers, NaN where missing, and as strings, None where missing."""
    modality = cast(TabularModality, dataset.modalities[name])
    rows: list[Row | None] = [sample.contents.get(name) for sample in samples]
    found: dict[str, tuple[str, list[Any]]] = {}
    for k, column in enumerate(modality.spec.numeric):
        values = [float(r.numeric_R[k]) if r is not None and r.observed_K[k] else float("nan") for r in rows]
        found[f"{name}/{column.name}"] = ("numerical", values)
    for k, column in enumerate(modality.spec.categorical):
        ids = [int(r.categories_C[k]) if r is not None else MISSING_ID for r in rows]
        values = [column.name_of(i) if i != MISSING_ID else None for i in ids]
        found[f"{name}/{column.name}"] = ("categorical", values)
    return found


def read_probabilities(path: Path, samples: int, classes: int) -> np.ndarray:
    """(N, C). Raises ValueError where the other side wrote something else."""
    if not path.is_file():
        raise ValueError(f"AutoGluon wrote no {path.name}")
    found_NC = np.load(path, allow_pickle=False)
    if found_NC.shape != (samples, classes):
        raise ValueError(f"AutoGluon wrote {path.name} of shape {found_NC.shape}; it must be {(samples, classes)}")
    return found_NC.astype(np.float64)
