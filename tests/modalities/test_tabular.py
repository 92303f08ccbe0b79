import copy

import numpy as np
import pytest
import torch
from pytorch_tabnet.tab_network import TabNetEncoder, TabNetPretraining

from lanistr.manifest import ModalitySchema
from lanistr.modalities.tabular import Row, TabularEncoder, TabularModality
from lanistr.ops.ghost_norm import GhostBatchNorm
from lanistr.transforms import MEMBERS, NumericColumn, TabularSpec, npy_bytes
from tests.dispatch import CountOperators
from tests.model.support import RECIPE, SCHEMAS, make_modalities

GRID = np.linspace(0, 1, 129)


def schema() -> ModalitySchema:
    return ModalitySchema(kind="tabular", members=MEMBERS["tabular"], spec=SCHEMAS["tabular"].model_dump())


def make(norm: str = "batch", virtual_batch: int = 128) -> tuple[TabularModality, TabularEncoder]:
    config = {**RECIPE.model.modalities["tabular"], "norm": norm, "virtual_batch": virtual_batch}
    modality = TabularModality("tabular", config, schema())
    torch.manual_seed(0)
    return modality, modality.build(16, "sdpa_bucketed")


def rows(n: int, seed: int = 0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [Row(rng.normal(size=2).astype(np.float32), rng.integers(2, 5, 1), rng.random(3) < 0.8) for _ in range(n)]


def masks(contents: list[Row], modality: TabularModality) -> list[np.ndarray]:
    return [modality.corrupt(c, np.random.default_rng(i)) for i, c in enumerate(contents)]


def upstream(encoder: TabularEncoder) -> TabNetEncoder:
    """pytorch_tabnet's own module with our weights."""
    groups = torch.nn.functional.one_hot(encoder.encoder.column_of_X).T.float()
    width = encoder.encoder.width
    net = TabNetEncoder(groups.shape[1], 1, width, width, 2, group_attention_matrix=groups, virtual_batch_size=128)
    ours = encoder.encoder.blocks.state_dict()
    renamed = {}
    for name in net.state_dict():
        if not name.endswith("num_batches_tracked"):
            renamed[name] = ours[name.replace(".bn.bn.", ".bn.")]
    net.load_state_dict(renamed, strict=False)
    return net


def test_tabnet_equals_upstream_in_training_and_in_eval_mode() -> None:
    modality, encoder = make()
    inputs = modality.collate(rows(9), None, [1.0] * 9).inputs
    reference = upstream(encoder)
    for mode in (True, False):
        encoder.train(mode)
        reference.train(mode)
        ours = encoder.encode(inputs).view(9, 2, -1)
        steps, _ = reference(encoder.encoder.embed(inputs.numeric_NR, inputs.categories_NC))
        torch.testing.assert_close(ours, torch.stack(steps, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(encoder.encoder.blocks.initial_bn.running_mean, reference.initial_bn.running_mean)


def test_mfm_loss_equals_a_loop_over_masked_observed_cells() -> None:
    modality, encoder = make("frozen")
    encoder.eval()
    contents = rows(6)
    masked = masks(contents, modality)
    collated = modality.collate(contents, masked, [1.0] * 6)
    hidden = encoder.encode(collated.inputs)
    out = encoder.head(hidden.view(2, 6, 2, -1)[1], batch_statistics=False).double()
    total, count = 0.0, 0
    for i, (content, mask) in enumerate(zip(contents, masked, strict=True)):
        for column in np.flatnonzero(mask & content.observed_K):
            count += 1
            if column < 2:
                total += float((out[i, column].item() - float(content.numeric_R[column])) ** 2)
            else:
                total -= out[i, 2:].log_softmax(0)[content.categories_C[0]].item()
    assert collated.count == count
    torch.testing.assert_close(encoder.reconstruct(hidden, collated.inputs).item(), total, rtol=1e-5, atol=1e-5)


def test_a_masked_cells_value_has_no_influence_on_the_masked_view() -> None:
    modality, encoder = make("frozen")
    (content,) = rows(1)
    mask = np.array([True, False, True])
    other = Row(content.numeric_R + np.array([50, 0], dtype=np.float32), np.array([3]), content.observed_K)
    views = [encoder.encode(modality.collate([c], [mask], [1.0]).inputs).chunk(2) for c in (content, other)]
    assert torch.equal(views[0][1], views[1][1])
    assert not torch.equal(views[0][0], views[1][0])


def norms(encoder: TabularEncoder) -> list[torch.Tensor]:
    return [m.running_mean.clone() for m in encoder.encoder.modules() if isinstance(m, GhostBatchNorm)]


def test_only_real_batches_of_the_clean_view_move_the_running_statistics() -> None:
    modality, encoder = make()
    encoder.train()
    start = norms(encoder)
    dummy = modality.dummy()
    encoder.encode(modality.collate([dummy], masks([dummy], modality), [0.0]).inputs)
    encoder.encode(modality.collate(rows(1), None, [1.0]).inputs)
    assert all(map(torch.equal, start, norms(encoder)))
    twin = copy.deepcopy(encoder)
    contents = rows(8)
    encoder.encode(modality.collate(contents, None, [1.0] * 8).inputs)
    twin.encode(modality.collate(contents, masks(contents, modality), [1.0] * 8).inputs)
    assert not all(map(torch.equal, start, norms(encoder)))
    for ours, alone in zip(norms(twin), norms(encoder), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


def test_frozen_norm_uses_running_statistics_in_training() -> None:
    modality, encoder = make("frozen")
    encoder.train()
    inputs = modality.collate(rows(8), None, [1.0] * 8).inputs
    training = encoder.encode(inputs)
    assert torch.equal(training, encoder.eval().encode(inputs))


def test_every_modality_masks_at_least_one_unit_and_never_a_special_token() -> None:
    modalities = make_modalities()
    rng = np.random.default_rng(0)
    for name, modality in modalities.items():
        corruption = modality.corrupt(modality.dummy(), rng)
        assert (corruption >= 0 if name == "text" else corruption).any(), name
    text = modalities["text"]
    for _ in range(50):
        ids = np.array([2, *rng.integers(5, 50, 9), 3])
        mask = text.corrupt(ids, rng) >= 0
        assert mask.any()
        assert not mask[[0, -1]].any()


def test_series_masks_keep_a_variables_channels_together_in_runs_of_mean_length_three() -> None:
    from lanistr.modalities.timeseries import Series

    series = make_modalities()["timeseries"]
    content = Series(np.zeros((4000, 4), dtype=np.float32), np.ones((4000, 4), dtype=bool))
    mask = series.corrupt(content, np.random.default_rng(0))
    assert (mask[:, 0] == mask[:, 1]).all()
    assert abs(mask[:, 2].mean() - 0.15) < 0.03
    starts = (np.diff(mask[:, 2].astype(int)) == 1).sum()
    assert abs(mask[:, 2].sum() / starts - 3) < 0.5


def test_tabnet_needs_at_most_a_third_of_the_published_operators() -> None:
    """Both views, encoder and decoder, forward and backward; batch 64, virtual batches of 8 (the published code runs
    encoder and decoder once per view)."""
    modality = TabularModality("tabular", {"width": 64, "steps": 3, "virtual_batch": 8}, schema())
    encoder = modality.build(16, "reference").train()
    contents = rows(64)
    inputs = modality.collate(contents, masks(contents, modality), [1.0] * 64).inputs
    with CountOperators() as ours:
        hidden = encoder.encode(inputs)
        (hidden.sum() + encoder.reconstruct(hidden, inputs)).backward()
    features = len(encoder.encoder.column_of_X)
    groups = torch.nn.functional.one_hot(encoder.encoder.column_of_X).T.float()
    published = TabNetPretraining(features, 0.15, 64, 64, 3, virtual_batch_size=8, group_attention_matrix=groups)
    x = torch.randn(64, features)
    with CountOperators() as theirs:
        for _ in range(2):
            out, embedded, obfuscated = published.train()(x)
            ((out - embedded) * obfuscated).square().sum().backward()
    assert ours.total <= theirs.total / 3, f"{ours.total} operators against {theirs.total}"


def test_tabnet_equals_upstreams_pretraining_module_on_masked_rows() -> None:
    """Same mask as upstream's obfuscator would draw: whole columns at zero, and the attention prior 1 - mask."""
    modality, encoder = make()
    encoder.train()
    contents = rows(9)
    inputs = modality.collate(contents, masks(contents, modality), [1.0] * 9).inputs
    assert inputs.keep_NK is not None
    reference = upstream(encoder).train()
    x = encoder.encoder.embed(inputs.numeric_NR, inputs.categories_NC)
    hidden = encoder.encode(inputs).view(2, 9, 2, -1)
    clean, _ = reference(x)
    masked, _ = reference(x * inputs.keep_NK[:, encoder.encoder.column_of_X], prior=inputs.keep_NK)
    torch.testing.assert_close(hidden[0], torch.stack(clean, 1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden[1], torch.stack(masked, 1), rtol=1e-5, atol=1e-5)


def test_numbers_by_rank_do_not_see_the_scale_of_a_column_and_one_by_one_is_as_all_at_once() -> None:
    train = np.random.default_rng(0).normal(size=500)
    decoded = []
    for scale in (np.asarray, np.exp):
        column = NumericColumn(name="x", mean=0.0, std=1.0, quantiles=np.quantile(scale(train), GRID).tolist())
        spec = TabularSpec(numeric=[column], categorical=[])
        plain = ModalitySchema(kind="tabular", members=MEMBERS["tabular"], spec=spec.model_dump())
        modality = TabularModality("tabular", {"numbers": "quantile"}, plain)
        stored = [{"tab.npy": npy_bytes(np.array([x], dtype=np.float32))} for x in [*scale(train[:50]), np.nan]]
        rows = [modality.decode(members) for members in stored]
        for one, other in zip(rows, modality.decode_batch(stored), strict=True):
            assert isinstance(other, Row)
            assert all((a == b).all() for a, b in zip(one, other, strict=True))
        assert (rows[-1].numeric_R[0], rows[-1].observed_K[0]) == (0, False)
        decoded.append(np.concatenate([row.numeric_R for row in rows]))
    assert np.abs(decoded[0] - decoded[1]).max() < 0.02


def test_numbers_by_rank_need_a_dataset_with_quantiles() -> None:
    with pytest.raises(ValueError, match=r"model.modalities.tabular.numbers: quantile .* column a, .* --refit"):
        TabularModality("tabular", {"numbers": "quantile"}, schema())


def with_columns() -> tuple[TabularModality, TabularEncoder]:
    config = {**RECIPE.model.modalities["tabular"], "norm": "frozen", "column_tokens": True}
    modality = TabularModality("tabular", config, schema())
    torch.manual_seed(0)
    return modality, modality.build(16, "sdpa_bucketed").double()


def test_column_tokens_stand_behind_the_steps_and_equal_a_loop_over_cells() -> None:
    modality, encoder = with_columns()
    contents = rows(4)
    hidden = masks(contents, modality)
    collated = modality.collate(contents, hidden, [1.0] * 4)
    columns = encoder.encoder.columns
    assert columns is not None
    assert collated.token_counts.tolist() == modality.tokens(np.ones(4)).tolist() == [2 + 3] * 4
    found = encoder.encode(collated.inputs).view(2, 4, 5, -1)
    for n, (row, mask) in enumerate(zip(contents, hidden, strict=True)):
        for k in range(3):
            if k < 2:
                token = columns.weight[k] * float(row.numeric_R[k])
            else:
                token = columns.embedding.weight[row.categories_C[0]]
            torch.testing.assert_close(found[0, n, 2 + k], token + columns.bias[k])
            seen = encoder.head.mask_token if mask[k] else token
            torch.testing.assert_close(found[1, n, 2 + k], seen + columns.bias[k])
    plain = modality.collate(contents, None, [1.0] * 4).inputs
    assert torch.equal(found[0].flatten(0, 1), encoder.encode(plain))
    steps = encoder.encoder(encoder.encoder.embed(plain.numeric_NR, plain.categories_NC), torch.ones(4, 3), 1, False)
    torch.testing.assert_close(found[0, :, :2], steps)


def test_a_hidden_cell_is_in_no_token_of_the_masked_view() -> None:
    modality, encoder = with_columns()
    (row,), hidden = rows(1), [np.array([False, True, True])]
    other = Row(row.numeric_R + np.array([0, 3], dtype=np.float32), (row.categories_C + 1) % 5, row.observed_K)
    views = [
        encoder.encode(modality.collate([content], hidden, [1.0]).inputs).view(2, 5, -1) for content in (row, other)
    ]
    assert torch.equal(views[0][1], views[1][1])
    assert not torch.equal(views[0][0], views[1][0])


def test_column_tokens_leave_the_masked_loss_to_the_steps() -> None:
    modality, encoder = with_columns()
    contents = rows(5)
    inputs = modality.collate(contents, masks(contents, modality), [1.0] * 5).inputs
    found = encoder.encode(inputs)
    tokens = found.view(2, 5, 5, -1)
    changed = torch.cat([tokens[:, :, :2], torch.randn_like(tokens[:, :, 2:])], 2)
    assert torch.equal(encoder.reconstruct(found, inputs), encoder.reconstruct(changed.flatten(0, 2), inputs))
