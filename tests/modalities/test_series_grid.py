import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lanistr.manifest import ModalitySchema
from lanistr.modalities.timeseries import SeriesModality
from lanistr.transforms import MEMBERS, Point, SeriesGrid, SeriesSpec, encode_points, read_npy

# Two variables: a number, and a category of three; each with its flag.
VARIABLES = ["pulse", "mood->bad", "mood->fair", "mood->good", "flag->pulse", "flag->mood"]
GROUPS = [[0, 4], [1, 2, 3, 5]]
NORMAL = [70.0, 0.0, 1.0, 0.0, 0.0, 0.0]
STEPS = 6


def spec(impute: str) -> SeriesSpec:
    grid = SeriesGrid.model_validate({"impute": impute, "normal": NORMAL})
    mean, std = [80.0, 0, 0, 0, 0, 0], [10.0, 1, 1, 1, 1, 1]
    return SeriesSpec(variables=VARIABLES, groups=GROUPS, mean=mean, std=std, max_steps=STEPS, grid=grid)


def arrays(points: Sequence[Point], impute: str) -> tuple[np.ndarray, np.ndarray]:
    members = encode_points(points, spec(impute))
    return read_npy(members["ts.npy"]), read_npy(members["tsmask.npy"])


def naive(pulse: list[float | None], mood: list[str | None], impute: str) -> list[list[float]]:
    """Step by step, as one would with paper and pencil."""
    rows, last_pulse, last_mood = [], None, None
    for p, m in zip(pulse, mood, strict=True):
        flags = [float(p is not None), float(m is not None)]
        if impute == "previous":
            last_pulse, last_mood = (p if p is not None else last_pulse), (m or last_mood)
        else:
            last_pulse, last_mood = p, m
        shown_pulse = last_pulse if last_pulse is not None else (math.nan if impute == "none" else 70.0)
        shown_mood = last_mood or (None if impute == "none" else "fair")
        hot = [float(shown_mood == name) if shown_mood else math.nan for name in ("bad", "fair", "good")]
        rows.append([shown_pulse, *hot, *flags])
    return rows


@given(
    st.lists(
        st.tuples(
            st.one_of(st.none(), st.integers(30, 200).map(float)), st.sampled_from([None, "bad", "fair", "good"])
        ),
        min_size=1,
        max_size=STEPS,
    ),
    st.sampled_from(["none", "normal", "previous"]),
    st.randoms(use_true_random=False),
)
def test_the_grid_equals_a_step_by_step_loop(steps: list, impute: str, shuffle) -> None:
    points: list[Point] = [(float(len(steps) - 1), "pulse", None)]
    for t, (pulse, mood) in enumerate(steps):
        points += [(float(t), "pulse", pulse)] if pulse is not None else []
        points += [(float(t), f"mood->{mood}", 1.0)] if mood else []
    shuffle.shuffle(points)
    values, measured = arrays(points, impute)
    np.testing.assert_array_equal(values, naive([p for p, _ in steps], [m for _, m in steps], impute))
    for t, (pulse, mood) in enumerate(steps):
        assert measured[t].tolist() == [pulse is not None, *[mood is not None] * 3, 0, 0]


def test_the_last_point_says_how_far_the_series_reaches() -> None:
    values, measured = arrays([(1.0, "pulse", 90.0), (4.0, "pulse", None)], "previous")
    assert values.shape == measured.shape == (5, len(VARIABLES))
    assert values[:, 0].tolist() == [70, 90, 90, 90, 90]
    assert measured[:, 0].tolist() == [0, 1, 0, 0, 0]


@pytest.mark.parametrize("impute", ["none", "previous"])
def test_the_model_sees_imputed_values_and_flags_but_predicts_measurements_only(impute: str) -> None:
    schema = ModalitySchema(kind="timeseries", members=MEMBERS["timeseries"], spec=spec(impute).model_dump())
    modality = SeriesModality("timeseries", {"hidden": 8, "heads": 2}, schema)
    content = modality.decode(encode_points([(0.0, "pulse", 90.0), (1.0, "mood->good", 1.0)], spec(impute)))
    carried = [1.0, 1.0] if impute == "previous" else [1.0, 0.0]
    assert content.values_tC[:, 0].tolist() == carried  # (90 - 80) / 10
    assert content.values_tC[:, 4:].tolist() == [[1, 0], [0, 1]]
    everything = np.ones_like(content.observed_tC)
    collated = modality.collate([content], [everything], [1.0])
    assert collated.inputs.weights_tC.tolist() == [[1, 0, 0, 0, 0, 0], [0, 1, 1, 1, 0, 0]]
    assert collated.count == 4


def test_a_variable_is_masked_together_with_its_categories_and_flag() -> None:
    schema = ModalitySchema(kind="timeseries", members=MEMBERS["timeseries"], spec=spec("previous").model_dump())
    modality = SeriesModality("timeseries", {"hidden": 8, "heads": 2, "mask_ratio": 0.5}, schema)
    content = modality.decode(encode_points([(float(t), "pulse", 90.0) for t in range(STEPS)], spec("previous")))
    masks = np.stack([modality.corrupt(content, np.random.default_rng(seed)) for seed in range(50)])
    for group in GROUPS:
        assert (masks[:, :, group] == masks[:, :, group[:1]]).all()
    assert (masks[:, :, 0] != masks[:, :, 1]).any()
