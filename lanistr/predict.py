"""Prediction on raw records, with any subset of the modalities, through the transforms that made the training data."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from lanistr.batch import to_device
from lanistr.config import DataConfig
from lanistr.data.loader import Collator
from lanistr.data.reader import GoldDataset, open_split
from lanistr.data.samples import CorruptSample, Fetched, Fetches, Sample, read_samples
from lanistr.evaluation.embed import Embeddings, embed_batch
from lanistr.modalities.base import Modality, RawContext
from lanistr.model.exported import TOKENIZER, Exported, fill, read_export
from lanistr.model.lanistr import Lanistr, build_model
from lanistr.tasks import Finetune
from lanistr.transforms import load_tokenizer

BATCH = 64
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Prediction:
    """The answer to one record.

    Attributes:
        label: the most probable class; None where the target is no class.
        labels: of a multi-label target, those with a probability of at least 0.5.
        probabilities: per class or label.
        values: per column of a regression.
        embeddings: on request: ``fused`` (mean of the fused tokens), ``cls``, and the mean hidden state of each modality
            that the record has, by its name; float32.
        error: why there is no answer, in one line; everything else is empty then.
    """

    label: str | None = None
    labels: list[str] = field(default_factory=list)
    probabilities: dict[str, float] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    embeddings: dict[str, np.ndarray] = field(default_factory=dict)
    error: str | None = None


class Predictor:
    """A loaded model and what turns raw values into its input. Not for use from several threads at a time.

    Args:
        exported: as read.
        device: where to run.
    """

    def __init__(self, exported: Exported, device: str = "cpu"):
        config, self.device = exported.config, torch.device(device)
        self.config, self.modalities = config, exported.modalities
        self.schemas = exported.schemas
        model = build_model(config.model, exported.modalities, 0, device)
        self.task: Finetune | None = None
        if config.finetune:
            width = config.model.fusion.width
            self.task = Finetune(model, width, len(config.labels), config.finetune, 0, config.target)
            fill(self.task, exported.weights, str(exported.folder))
            self.task.to(self.device).eval()
        else:
            own = {name.removeprefix("model."): tensor for name, tensor in exported.weights.items()}
            fill(model, own, str(exported.folder))
        self.model: Lanistr = model.to(self.device).eval()
        tokenizer = exported.folder / TOKENIZER
        self.context = RawContext(
            folder=Path(),
            tokenizer=load_tokenizer(tokenizer) if tokenizer.is_file() else None,
            max_chars=config.max_chars,
        )
        self.collator = Collator(self.modalities, views=1, seed=0, alone=self.task.alone if self.task else ())

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, trust: bool = False, device: str = "cpu") -> "Predictor":
        """The predictor of an exported model.

        Args:
            folder: made by ``python -m lanistr export``.
            trust: also take weights in a pickle, see `lanistr.model.exported.read_export`.
            device: where to run.

        Raises:
            ValueError: not an export, or not its own weights.
        """
        return cls(read_export(folder, trust), device)

    @property
    def keys(self) -> list[str]:
        """Keys that a record may have: modalities, and the columns of a table."""
        return [key for modality in self.modalities.values() for key in modality.raw_keys()]

    @overload
    def predict(self, records: Record, *, embeddings: bool = False, batch: int = BATCH) -> Prediction: ...

    @overload
    def predict(
        self, records: Sequence[Record], *, embeddings: bool = False, batch: int = BATCH
    ) -> list[Prediction]: ...

    def predict(
        self, records: Record | Sequence[Record], *, embeddings: bool = False, batch: int = BATCH
    ) -> Prediction | list[Prediction]:
        """Answer records.

        Args:
            records: one, or several: what there is of each under the names of the modalities (a text; path or bytes of an
                image; a series as points ``(time, variable, value)`` or as ``{variable: values}``) and of the table's
                columns. What is absent or None is missing.
            embeddings: return them, too; a model that was only pretrained has nothing else to return.
            batch: records at a time.

        Returns:
            An answer per record, in order; for a record that cannot be answered one that says why.

        Raises:
            ValueError: the model was only pretrained, and no ``embeddings`` are asked for.
        """
        if isinstance(records, Mapping):
            return self.predict([records], embeddings=embeddings)[0]
        found = self.answer(RawRecords(records, self), range(len(records)), embeddings=embeddings, batch=batch)
        return list(found)

    def predict_gold(
        self, data: str | Path, split: str, *, embeddings: bool = False, batch: int = BATCH
    ) -> Iterator[tuple[str, Prediction]]:
        """Key and answer of every sample of a split of a gold dataset, in its order.

        Raises:
            ValueError: no such dataset, or one whose schema is not the model's.
        """
        dataset = self.open(data, split)
        keys = dataset.keys
        answers = self.answer(dataset, range(dataset.n), embeddings=embeddings, batch=batch)
        yield from zip(keys, answers, strict=True)

    def open(self, data: str | Path, split: str) -> GoldDataset:
        """A split of a dataset with the model's schema. Raises ValueError naming the first difference."""
        dataset = open_split(data, split, self.modalities, DataConfig())
        for name in self.modalities:
            if name not in dataset.manifest.modalities:
                raise ValueError(f"{data}: no modality {name}, which the model has")
            if dataset.manifest.modalities[name] != self.schemas[name]:
                raise ValueError(
                    f"{data}: its schema of {name} is not the model's: build it with `fit_from`, or give raw records"
                )
        return dataset

    def answer(
        self, source: Fetches, positions: Sequence[int], *, embeddings: bool = False, batch: int = BATCH
    ) -> Iterator[Prediction]:
        """An answer per position of a source of samples, in order; see `predict`."""
        if self.task is None and not embeddings:
            raise ValueError("the model was only pretrained: it gives embeddings (embeddings=True), no predictions")
        for start in range(0, len(positions), batch):
            found = read_samples(source, list(positions[start : start + batch]))
            good = [sample for sample in found if isinstance(sample, Sample)]
            answers = iter(self._run(good, embeddings)) if good else iter(())
            for sample in found:
                yield Prediction(error=sample.reason) if isinstance(sample, CorruptSample) else next(answers)

    @torch.no_grad()
    def _run(self, samples: list[Sample], embeddings: bool) -> list[Prediction]:
        batch = to_device(self.collator(samples, [1.0] * len(samples), 0), self.device)
        outputs = self.task.predict(batch).double().cpu().numpy() if self.task else None
        embedded = embed_batch(self.model, batch) if embeddings else None
        return [
            self._prediction(
                None if outputs is None else outputs[i].tolist(), _row(embedded, i) if embedded is not None else {}
            )
            for i in range(len(samples))
        ]

    def _prediction(self, outputs: list[float] | None, embeddings: dict[str, np.ndarray]) -> Prediction:
        if outputs is None:
            return Prediction(embeddings=embeddings)
        named = dict(zip(self.config.labels, outputs, strict=True))
        if self.config.target == "regression":
            return Prediction(values=named, embeddings=embeddings)
        if self.config.target == "multilabel":
            labels = [name for name, p in named.items() if p >= 0.5]
            return Prediction(labels=labels, probabilities=named, embeddings=embeddings)
        return Prediction(label=max(named, key=lambda n: named[n]), probabilities=named, embeddings=embeddings)


def _row(found: Embeddings, i: int) -> dict[str, np.ndarray]:
    own = {name: means[i] for name, means in found.modalities.items() if found.present[name][i]}
    return {"fused": found.fused_ND[i], "cls": found.cls_ND[i], **own}


class RawRecords:
    """Raw records as a source of samples: what cannot be read is a `CorruptSample` that says why."""

    def __init__(self, records: Sequence[Record], predictor: Predictor):
        self.records, self.context = records, predictor.context
        self.known = predictor.keys
        self._modalities = predictor.modalities

    @property
    def modalities(self) -> Mapping[str, Modality[Any, Any]]:
        """The model's."""
        return self._modalities

    def fetch(self, position: int) -> Fetched:
        """The members of one record. Raises `CorruptSample`."""
        record, key = self.records[position], str(position)
        members: dict[str, bytes] = {}
        presence = 0
        try:
            self._check(record)
            for bit, (name, modality) in enumerate(self.modalities.items()):
                try:
                    own = modality.encode(record, self.context)
                except ValueError as error:
                    raise ValueError(f"{name}: {error}") from None
                presence |= bool(own) << bit
                members |= own
            if not members:
                raise ValueError(f"nothing is present: give at least one of {', '.join(self.known)}")
        except ValueError as error:
            raise CorruptSample(key, str(error)) from None
        return Fetched(key, presence, -1, None, members, "record")

    def _check(self, record: Any) -> None:
        if not isinstance(record, Mapping):
            raise ValueError(f"a record is a map from names to values, not {type(record).__name__}")
        for key in record:
            if key not in self.known:
                near = difflib.get_close_matches(str(key), self.known, 1, 0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(self.known)}"
                raise ValueError(f"unknown key {key!r}; {hint}")
