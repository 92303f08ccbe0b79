"""The health monitors against brute force, and a run that is made to collapse."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lanistr.tasks import Pretrain
from lanistr.training import health
from lanistr.training.health import CollapseWatch, Health, Probe, effective_rank, mean_std, spread
from tests.model.support import (
    NAMES,
    make_batch,
    make_modalities,
    make_pretrain,
    random_samples,
    recipe_with,
    total_loss,
)

PRESENCE = [[name for bit, name in enumerate(NAMES) if (i * 5 + 6) >> bit & 1] for i in range(40)]


@given(n=st.integers(2, 12), d=st.integers(1, 12), seed=st.integers(0, 10))
def test_rank_and_spread_equal_brute_force(n: int, d: int, seed: int) -> None:
    x = np.random.default_rng(seed).normal(size=(n, d)) * np.random.default_rng(seed + 1).exponential(size=d) + 3
    centred = x - x.mean(0)
    p = np.linalg.svd(centred, compute_uv=False)
    p = p[p > 1e-12] / p[p > 1e-12].sum()
    assert effective_rank(x) == pytest.approx(np.prod(p**-p), rel=1e-4)
    assert spread(x) == pytest.approx(sum(row @ row for row in centred) / sum(row @ row for row in x))
    assert mean_std(x) == pytest.approx(np.mean([x[:, j].std(ddof=1) for j in range(d)]))


def test_known_ranks() -> None:
    axes = np.concatenate([np.eye(4), -np.eye(4)])  # four directions, all as strong
    assert effective_rank(axes + 100) == pytest.approx(4)
    line = np.outer(np.arange(8.0), np.ones(5))
    assert effective_rank(line) == pytest.approx(1, abs=1e-5)
    assert effective_rank(np.ones((8, 5))) == 0
    assert spread(np.ones((8, 5))) == 0
    assert spread(axes) == 1


def sample_alone(task: Pretrain, contents: dict[str, Any], masks: dict[str, Any]) -> tuple[np.ndarray, list[str], Any]:
    """Fused rows of the clean view before the last norm, the source of each, and the heads' outputs: one sample."""
    batch = make_batch(task_modalities, [contents], [masks])
    tokens, _ = task.model.tokens(batch)
    for block in task.model.fusion.blocks:
        tokens = block(tokens, batch.fusion.layout)
    heads = task.heads(task.model.fusion.norm(tokens))
    sources = ["cls"]
    for name in NAMES:
        if name in contents:
            sources += [name] * int(task_modalities[name].collate([contents[name]], None, [1.0]).token_counts.sum())
    return tokens.chunk(2)[0].numpy(), sources, heads


task_modalities = make_modalities()


@torch.no_grad()
def test_a_probe_sees_what_a_loop_over_single_samples_computes() -> None:
    task = make_pretrain(task_modalities)
    contents, masks = random_samples(task_modalities, PRESENCE, seed=3)
    probe = Probe(task)
    for rows in (slice(0, 10), slice(10, 40)):  # two micro-batches
        total_loss(task, make_batch(task_modalities, contents[rows], masks[rows]))
    probe.remove()
    found = probe.gather()
    weighted, shares = dict.fromkeys(probe.sources, 0.0), dict.fromkeys(probe.sources, 0.0)
    by_source: dict[str, list[np.ndarray]] = {name: [] for name in ("fused", *probe.sources)}
    for content, mask in zip(contents, masks, strict=True):
        tokens, sources, (z, p) = sample_alone(task, content, mask)
        by_source["fused"].append(tokens.mean(0))
        (z0, z1), (p0, p1) = z.chunk(2), p.chunk(2)
        cosine = torch.nn.functional.cosine_similarity
        similarity = -(cosine(p0, z1) + cosine(p1, z0)) / 2
        for name in dict.fromkeys(sources):
            own = [i for i, source in enumerate(sources) if source == name]
            by_source[name].append(tokens[own].mean(0))
            weighted[name] += float(similarity[own].sum()) / len(sources)
            shares[name] += len(own) / len(sources) / len(contents)
    figures = health.embedding_figures(found, probe.sources) | health.similarity_figures(found, probe.sources)
    for name, vectors in by_source.items():
        if len(vectors) < health.FEWEST:
            assert f"rank/{name}" not in figures
            continue
        x = np.stack(vectors).astype(np.float64)
        assert figures[f"rank/{name}"] == pytest.approx(effective_rank(x), rel=1e-3)
        assert figures[f"std/{name}"] == pytest.approx(mean_std(x), rel=1e-4)
        assert figures[f"spread/{name}"] == pytest.approx(spread(x), rel=1e-4)
    assert sum(f"rank/{name}" in figures for name in by_source) >= 3
    for name in probe.sources:
        assert figures[f"mmm_share/{name}"] == pytest.approx(shares[name])
        assert figures[f"mmm/{name}"] == pytest.approx(weighted[name] / shares[name] / len(contents), abs=1e-4)


def test_shares_times_means_are_the_term_and_the_hooks_are_gone_afterwards() -> None:
    task = make_pretrain(task_modalities)
    contents, masks = random_samples(task_modalities, PRESENCE, seed=4)
    probe = Probe(task)
    _, terms = total_loss(task, make_batch(task_modalities, contents, masks))
    probe.remove()
    figures = health.similarity_figures(probe.gather(), probe.sources)
    product = sum(figures[f"mmm/{name}"] * figures[f"mmm_share/{name}"] for name in probe.sources)
    assert product == pytest.approx(float(terms["mmm"].detach()), abs=1e-5)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in task.modules())


def train(decorrelation: float, mmm: float, steps: int, every: int) -> list[tuple[int, str | None, dict[str, float]]]:
    """A plain loop with the monitors in it; the samples stay the same."""
    weights = {"mlm": 0.0, "mim": 0.0, "mfm": 0.0, "mtm": 0.0, "mmm": mmm}
    recipe = recipe_with(objective__weights=weights, objective__decorrelation=decorrelation)
    task = make_pretrain(task_modalities, recipe=recipe)
    contents, masks = random_samples(task_modalities, [NAMES] * 32, seed=5)
    batch = make_batch(task_modalities, contents, masks)
    batch.counts["decorrelation"] = 1.0
    engine = cast(Any, SimpleNamespace(module=task, stage=0, device=torch.device("cpu")))
    monitor, watch, optimizer = Health(engine, every), CollapseWatch(), torch.optim.AdamW(task.parameters(), lr=1e-2)
    said = []
    for step in range(steps):
        monitor.begin(step)
        optimizer.zero_grad()
        total_loss(task, batch)[0].backward()
        monitor.before_update()
        optimizer.step()
        figures = monitor.end()
        if figures:
            said.append((step + 1, watch.note(step + 1, figures), figures))
    return said


def test_a_run_made_to_collapse_is_flagged_within_two_measurements_and_a_healthy_one_is_not() -> None:
    torch.manual_seed(0)
    found = train(decorrelation=0.0, mmm=1.0, steps=80, every=5)
    start = found[0][2]["spread/fused"]
    fell = next(step for step, _, figures in found if figures["spread/fused"] < 0.05 * start)
    flagged = [(step, advice) for step, advice, _ in found if advice and "fused" in advice]
    assert len(flagged) == 1, "said once"
    step, advice = flagged[0]
    assert step <= fell + 2 * 5
    assert "objective.decorrelation=0.01" in advice
    assert f"at step {found[0][0]}" in advice
    assert not [advice for _, advice, _ in train(decorrelation=0.1, mmm=0.02, steps=80, every=5) if advice]


def test_a_resumed_run_remembers_how_good_it_was() -> None:
    rows = [{"step": s, "rank/fused": 12.0, "spread/fused": 0.5, "loss": 1.0} for s in (10, 20)]
    watch = CollapseWatch([*rows, {"step": 25, "loss": 1.0}])
    bad = {"rank/fused": 12.0, "spread/fused": 0.001}
    assert watch.note(30, bad) is None
    advice = watch.note(40, bad)
    assert advice is not None
    assert "was 50.0% at step 10" in advice
    assert watch.note(50, bad) is None
