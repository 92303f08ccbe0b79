"""Nearest neighbours of embeddings: any present subset of modalities may ask, and any may be found.

Shape suffixes: Q queries, N samples of the gallery, D width, K neighbours.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Neighbours:
    """The K most similar samples of each query, the best first; of equally similar ones the earlier.

    Attributes:
        positions_QK: int64, in the gallery.
        similarity_QK: float32 cosines.
    """

    positions_QK: np.ndarray
    similarity_QK: np.ndarray


class Gallery:
    """Embeddings to search in, exactly, by cosine.

    Args:
        embeddings_ND: of one kind, for example `Embeddings.fused_ND` of whole samples.

    Raises:
        ValueError: none, or one that is not finite (a modality that is absent has no embedding).
    """

    def __init__(self, embeddings_ND: np.ndarray):
        if not len(embeddings_ND):
            raise ValueError("nothing to search in")
        self.unit_ND = normalise(embeddings_ND)

    def search(self, queries_QD: np.ndarray, k: int, batch: int = 1024) -> Neighbours:
        """The ``k`` nearest (all, where there are fewer).

        Args:
            queries_QD: embeddings of the same width, for example of samples of which only the text is given.
            k: at least 1.
            batch: queries at a time.

        Raises:
            ValueError: another width, ``k`` below 1, or a query that is not finite.
        """
        if k < 1 or queries_QD.ndim != 2 or queries_QD.shape[1] != self.unit_ND.shape[1]:
            raise ValueError(
                f"k {k} and queries of shape {queries_QD.shape}: k must be at least 1, the width {self.unit_ND.shape[1]}"
            )
        k = min(k, len(self.unit_ND))
        parts = [self._search(queries_QD[start : start + batch], k) for start in range(0, len(queries_QD), batch)]
        if not parts:
            return Neighbours(np.zeros((0, k), dtype=np.int64), np.zeros((0, k), dtype=np.float32))
        return Neighbours(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def _search(self, queries_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        similarity_QN = normalise(queries_QD) @ self.unit_ND.T
        order_QK = np.argsort(-similarity_QN, axis=1, kind="stable")[:, :k]
        return order_QK, np.take_along_axis(similarity_QN, order_QK, axis=1)


def normalise(embeddings_ND: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays one. Raises ValueError where one is not finite."""
    if not np.isfinite(embeddings_ND).all():
        raise ValueError("an embedding is not finite: leave out samples that lack the modality")
    lengths_N = np.linalg.norm(embeddings_ND, axis=1, keepdims=True)
    return (embeddings_ND / np.where(lengths_N > 0, lengths_N, 1)).astype(np.float32)


def recall_at(found: Neighbours, target_Q: np.ndarray, k: int) -> float:
    """Share of queries whose own sample is among the first ``k``.

    Args:
        found: at least ``k`` neighbours.
        target_Q: position of each query's own sample in the gallery.
        k: at most as many as were searched for.
    """
    assert k <= found.positions_QK.shape[1], "search for at least k"
    return float((found.positions_QK[:, :k] == target_Q[:, None]).any(1).mean())


def mean_reciprocal_rank(found: Neighbours, target_Q: np.ndarray) -> float:
    """Mean of 1 / rank of each query's own sample; 0 where it was not found."""
    hit_QK = found.positions_QK == target_Q[:, None]
    rank_Q = hit_QK.argmax(1) + 1
    return float(np.where(hit_QK.any(1), 1 / rank_Q, 0).mean())


def precision_at(found: Neighbours, query_labels_Q: np.ndarray, gallery_labels_N: np.ndarray, k: int) -> float:
    """Mean share of the first ``k`` neighbours that have the query's class."""
    return float((gallery_labels_N[found.positions_QK[:, :k]] == query_labels_Q[:, None]).mean())
