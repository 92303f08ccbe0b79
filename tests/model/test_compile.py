"""`model.compile` and `model.checkpoint_activations`: no graph breaks, the same numbers, less memory."""

from typing import Any

import pytest
import torch

from tests.model.support import (
    NAMES,
    make_batch,
    make_modalities,
    make_pretrain,
    random_samples,
    recipe_with,
    total_loss,
)


def step(task: Any, batch: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss, _ = total_loss(task, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in task.named_parameters() if p.grad is not None}


# "eager" traces, and so finds graph breaks; "aot_eager" traces the backward too and takes twice as long.
@pytest.mark.parametrize("backend", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_blocks_compile_without_graph_breaks_and_equal_eager(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    original = torch.nn.Module.compile

    def whole(module: torch.nn.Module, **options: Any) -> None:
        compiled.append(module)
        original(module, fullgraph=True, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", whole)
    one_layer = {
        "model__modalities__text__layers": 1,
        "model__modalities__image__layers": 1,
        "model__fusion__layers": 1,
    }
    recipe = recipe_with(model__compile=True, **one_layer)
    modalities = make_modalities(recipe)
    batch = make_batch(modalities, *random_samples(modalities, [NAMES] * 2, 0))
    task = make_pretrain(modalities, recipe=recipe)
    assert len(compiled) == 4  # a layer of BERT, of ViT, of the series encoder and of fusion
    loss, grads = step(task, batch)
    expected_loss, expected = step(make_pretrain(modalities, recipe=recipe_with(**one_layer)), batch)
    torch.testing.assert_close(loss, expected_loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def saved_bytes(task: Any, batch: Any) -> int:
    total = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = total_loss(task, batch)
    loss.backward()
    return total


def test_checkpointed_activations_need_less_memory() -> None:
    sizes = {}
    for switch in (False, True):
        recipe = recipe_with(model__checkpoint_activations=switch, model__fusion__layers=6)
        modalities = make_modalities(recipe)
        batch = make_batch(modalities, *random_samples(modalities, [NAMES] * 4, 0))
        sizes[switch] = saved_bytes(make_pretrain(modalities, recipe=recipe).train(), batch)
    assert sizes[True] < 0.6 * sizes[False], sizes
