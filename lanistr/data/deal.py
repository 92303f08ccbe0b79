"""Who gets what of a step: global batches over ranks and micro-batches, evaluation over ranks.

Shape suffixes: G samples of a step.
"""

import numpy as np

from lanistr.data.plan import Step


def deal(step: Step, ranks: int, micro_batches: int, equal_counts: bool = True) -> list[list[np.ndarray]]:
    """Divide a global batch over ranks and micro-batches so that none waits: ``[rank][micro_batch]`` = items.

    Strata come one after the other, the heaviest first, each from long to short. Every row of as many samples as there
    are slots is dealt to the slots, the heaviest sample to the slot with the fewest tokens so far: a snake that looks at
    the loads. Each slot gets its share of every stratum, give or take one, and as many samples as any other.

    Args:
        step: at least a sample per slot.
        ranks, micro_batches: their product is the number of slots.
        equal_counts: False (token budgets): a row is one sample, so that a slot with a heavy sample gets fewer of them.

    Raises:
        ValueError: fewer samples than slots.
    """
    slots = ranks * micro_batches
    if len(step.items_G) < slots:
        raise ValueError(
            f"a step of {len(step.items_G)} samples is less than one for each of {ranks} ranks x {micro_batches} micro-batches"
        )
    if slots == 1:
        return [[step.items_G]]
    code_G = np.unique(step.strata_G, return_inverse=True)[1]
    mean = np.bincount(code_G, weights=step.tokens_G) / np.bincount(code_G)
    order = np.lexsort((-step.tokens_G, code_G, -mean[code_G]))
    slot_of = np.empty(len(order), dtype=np.int64)
    loads = np.zeros(slots)
    begin = 0
    while begin < len(order):
        row = order[begin : begin + (slots if equal_counts or begin == 0 else 1)]
        row = row[np.argsort(-step.tokens_G[row], kind="stable")]
        lightest = np.argsort(loads, kind="stable")[: len(row)]
        slot_of[row] = lightest
        loads[lightest] += step.tokens_G[row]
        begin += len(row)
    return [[step.items_G[slot_of == micro * ranks + rank] for micro in range(micro_batches)] for rank in range(ranks)]


def eval_order(positions: np.ndarray, ranks: int, batch: int) -> np.ndarray:
    """Every position exactly once, (steps, ranks, batch), padded with -1 (weight 0) to equal steps on all ranks."""
    steps = -(-len(positions) // (ranks * batch))
    padded = np.full(steps * ranks * batch, -1, dtype=np.int64)
    padded[: len(positions)] = positions
    return padded.reshape(steps, ranks, batch)
