"""Who reads what, when: the order of samples as a pure function.

The order depends on (content id, seed, epoch, grouping, global batch) and on nothing else. Ranks and workers decide who
reads, never what. Shape suffixes: N samples, S steps, G global batch.
"""

import hashlib

import numpy as np


def philox(*parts: object) -> np.random.Generator:
    """A counter-based generator keyed by the parts: the same on every machine, rank and worker."""
    digest = hashlib.blake2b("|".join(map(str, parts)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def epoch_order(
    content_id: str,
    seed: int,
    epoch: int,
    grouping: str,
    global_batch: int,
    presence_N: np.ndarray,
    cost_N: np.ndarray,
) -> np.ndarray:
    """Sample positions of one epoch, (S, G).

    ``mixed`` is a plain permutation. ``stratified`` spreads every presence mask evenly over the steps and puts samples
    of similar cost into the same step, so that ranks finish together; inside a step samples are in (mask, cost) order,
    which `deal` deals out in a snake.

    Args:
        content_id, seed, epoch: name the permutation.
        grouping: ``mixed`` or ``stratified``.
        global_batch: G. The tail of fewer than G samples is dropped; which samples those are changes by epoch.
        presence_N: bitmasks.
        cost_N: relative cost.

    Raises:
        ValueError: fewer samples than one global batch.
    """
    n = len(presence_N)
    steps = n // global_batch
    if steps == 0:
        raise ValueError(f"{n} samples are fewer than one global batch of {global_batch}; lower global_batch")
    rng = philox("order", content_id, seed, epoch, grouping, global_batch)
    order = rng.permutation(n)[: steps * global_batch]
    if grouping == "mixed":
        return order.reshape(steps, global_batch)
    masks, jitter = presence_N[order], rng.random(len(order))
    # A jitter of +-20 % in cost keeps neighbours changing from epoch to epoch.
    by_cost = np.lexsort((cost_N[order] * (0.8 + 0.4 * jitter), masks))
    order, masks = order[by_cost], masks[by_cost]
    _, starts, counts = np.unique(masks, return_index=True, return_counts=True)
    rank_in_mask = np.arange(len(order)) - np.repeat(starts, counts)
    # Each mask's samples are laid evenly over [0, 1); a random phase keeps masks from aligning at step borders.
    place = (rank_in_mask + np.repeat(rng.random(len(counts)), counts)) / np.repeat(counts, counts)
    rows = order[np.argsort(place, kind="stable")].reshape(steps, global_batch)
    rows = rows[rng.permutation(steps)]
    inner = np.lexsort((cost_N[rows], presence_N[rows]))
    return np.take_along_axis(rows, inner, axis=1)


def deal(step_G: np.ndarray, ranks: int, micro_batches: int) -> np.ndarray:
    """Divide a global batch over ranks and micro-batches in a snake: (ranks, micro_batches, G / both).

    Raises:
        ValueError: the global batch is not a multiple of ranks * micro_batches.
    """
    slots = ranks * micro_batches
    if len(step_G) % slots:
        raise ValueError(
            f"global batch {len(step_G)} is not a multiple of {ranks} ranks x {micro_batches} micro-batches"
        )
    rows = step_G.reshape(-1, slots).copy()
    rows[1::2] = rows[1::2, ::-1]
    return rows.T.reshape(micro_batches, ranks, -1).transpose(1, 0, 2)


def eval_order(positions: np.ndarray, ranks: int, batch: int) -> np.ndarray:
    """Every position exactly once, (steps, ranks, batch), padded with -1 (weight 0) to equal steps on all ranks."""
    steps = -(-len(positions) // (ranks * batch))
    padded = np.full(steps * ranks * batch, -1, dtype=np.int64)
    padded[: len(positions)] = positions
    return padded.reshape(steps, ranks, batch)
