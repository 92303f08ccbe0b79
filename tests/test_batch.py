import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lanistr.batch import Batch, make_fusion_index, map_leaves
from lanistr.data.transfer import pack


@settings(max_examples=80)
@given(size=st.integers(1, 6), modalities=st.integers(1, 4), views=st.integers(1, 2), seed=st.integers(0, 999))
def test_fusion_sequences_are_assembled_as_a_loop_over_samples_would(
    size: int, modalities: int, views: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(rng.random(size) < 0.6) for _ in range(modalities)]
    counts = [rng.integers(1, 5, len(r)) for r in rows]
    pools = [int(c.sum()) or 1 for c in counts]  # an absent modality has a dummy of one token
    weights = rng.random(size).astype(np.float32)
    index = make_fusion_index(counts, rows, pools, weights, views)

    gather, lengths, slots = [], [], []
    for view in range(views):
        for sample in range(size):
            sequence, sources = [0], [0]
            start = 1
            for source in range(modalities):
                at = start + view * pools[source]
                for row, count in zip(rows[source], counts[source], strict=True):
                    if row == sample:
                        sequence += range(at, at + count)
                        sources += [source + 1] * count
                    at += count
                start += views * pools[source]
            gather += sequence
            lengths.append(len(sequence))
            if view == 0:
                slots += [(sample * (1 + modalities) + source, sources.count(source)) for source in sources]
    assert index.gather_T.tolist() == gather
    assert index.layout.cu_seqlens.diff().tolist() == lengths
    assert index.slot_T.tolist() == [slot for slot, _ in slots]
    assert torch.allclose(index.slot_weight_T, torch.tensor([1 / n for _, n in slots]))
    expected = np.repeat(weights / lengths[:size], lengths[:size])
    assert torch.allclose(index.token_weight_T, torch.from_numpy(expected.astype(np.float32)))


@dataclasses.dataclass(frozen=True)
class Tree:
    numbers: torch.Tensor
    more: tuple[torch.Tensor, dict[str, torch.Tensor | str | None]]
    size: int


def test_a_tree_survives_its_journey_in_one_buffer() -> None:
    tree = Tree(
        torch.randn(3, 5).T,  # not contiguous
        (torch.zeros(0, 7, dtype=torch.int64), {"a": torch.tensor(True), "b": None, "c": "text"}),
        4,
    )
    parcel = pack(tree)
    assert parcel.buffer.dtype == torch.uint8
    assert not [leaf for leaf in _leaves(parcel.tree) if isinstance(leaf, torch.Tensor)]
    back = parcel.unpack()
    assert torch.equal(back.numbers, tree.numbers)
    assert back.more[0].shape == (0, 7)
    assert back.more[0].dtype == torch.int64
    assert torch.equal(back.more[1]["a"], torch.tensor(True))
    assert (back.more[1]["b"], back.more[1]["c"], back.size) == (None, "text", 4)


def _leaves(tree: object) -> list[object]:
    found: list[object] = []
    map_leaves(tree, torch.Tensor, found.append)
    return found


def test_a_batch_needs_no_loading_report() -> None:
    assert next(f for f in dataclasses.fields(Batch) if f.name == "loading").default.replaced == ()
