from hypothesis import given
from hypothesis import strategies as st

from lanistr.training.retention import Saved, surplus


def hourly(scores: list[float | None]) -> list[Saved]:
    return [Saved(100 * i, 3600.0 * i, score) for i, score in enumerate(scores)]


def test_the_newest_the_best_and_one_per_so_many_hours_stay() -> None:
    saved = hourly([None, -5.0, -1.0, -1.0, -3.0, None, -2.0])
    assert surplus(saved, 1, False, None) == [0, 100, 200, 300, 400, 500]
    assert surplus(saved, 2, True, None) == [0, 100, 300, 400]
    assert surplus(saved, 1, True, 3.0) == [100, 400, 500]


@given(
    st.lists(st.tuples(st.floats(0, 50), st.none() | st.floats(-9, 9)), min_size=1, max_size=20),
    st.integers(1, 4),
    st.booleans(),
    st.none() | st.floats(0.5, 9),
)
def test_pruning_after_every_save_keeps_what_pruning_once_would_have_to(
    gaps: list[tuple[float, float | None]], keep: int, best: bool, hours: float | None
) -> None:
    kept: list[Saved] = []
    time = 0.0
    for step, (gap, score) in enumerate(gaps):
        time += gap * 3600
        kept.append(Saved(step, time, score))
        gone = surplus(kept, keep, best, hours)
        assert step not in gone, "the one just saved stays"
        assert gone == sorted(set(gone))
        kept = [s for s in kept if s.step not in gone]
    assert {s.step for s in kept} >= set(range(max(0, len(gaps) - keep), len(gaps)))
    scores = [(score, -step) for step, (_, score) in enumerate(gaps) if score is not None]
    if best and scores:
        assert -max(scores)[1] in {s.step for s in kept}
