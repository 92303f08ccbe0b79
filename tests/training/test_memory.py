"""The memory plan against what is really held: by autograd, by DeepSpeed, by a process."""

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lanistr.__main__ import main
from lanistr.batch import make_layout
from lanistr.config import load_recipe
from lanistr.describe import schemas_of
from lanistr.ops.transformer import Block, checkpoint_blocks
from lanistr.plan import ZERO, Model, largest_fitting, measured_table
from lanistr.training.measured import largest_batch, make_task, saved_bytes
from lanistr.training.memory import count_states, count_step
from tests.model.support import make_modalities, make_pretrain
from tests.ranks import finish, launch

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("memory_worker.py")


class Stack(nn.Module):
    """Blocks as a task: its batch is anything with counts."""

    weights: ClassVar = {"loss": 1.0}

    def __init__(self, layers: int, width: int, heads: int, inner: int):
        super().__init__()
        self.blocks = nn.ModuleList(
            Block(width, heads, inner, 1e-5, "sdpa_bucketed", pre_norm=True, init_std=0.02) for _ in range(layers)
        )

    def forward(self, batch: Any) -> dict[str, Tensor]:
        x_TD = batch.x_TD.requires_grad_()
        for block in self.blocks:
            x_TD = block(x_TD, batch.layout)
        return {"loss": x_TD.sum()}


class Rows:
    """Sequences of 40 rows."""

    counts = {"loss": 1.0}

    def __init__(self, sequences: int, width: int):
        self.layout = make_layout([40] * sequences)
        self.x_TD = torch.zeros(40 * sequences, width)


def test_held_bytes_of_a_transformer_equal_the_textbook_formula() -> None:
    layers, width, heads, inner, rows = 3, 64, 4, 256, 40 * 5
    held = count_step(Stack(layers, width, heads, inner), Rows(5, width)).held  # type: ignore[arg-type]
    # Per row: its input, two norms, q k v, attention's output, the sum (8 widths), up before and after GELU; the first
    # layer's input is the batch's. Statistics: two per norm, the log-sum-exp of each head.
    expected = layers * rows * 4 * (8 * width + 2 * inner + 2 * 2 + heads) - rows * 4 * width
    assert held == pytest.approx(expected, abs=64)


def test_checkpointing_holds_one_width_per_layer_and_peaks_at_one_layer_more() -> None:
    layers, width, heads, inner, rows = 8, 64, 4, 256, 40 * 5
    kept, checkpointed = Stack(layers, width, heads, inner), Stack(layers, width, heads, inner).train()
    checkpoint_blocks(checkpointed.blocks)
    whole = count_step(kept, Rows(5, width))  # type: ignore[arg-type]
    found = count_step(checkpointed, Rows(5, width))  # type: ignore[arg-type]
    assert found.held == pytest.approx((layers - 1) * rows * width * 4, abs=64)  # the first one's input is the batch's
    assert found.held + whole.held / layers <= found.peak < whole.held / 2


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_prediction_is_within_2_percent_of_what_autograd_saves_at_demo_size(precision: str) -> None:
    recipe = load_recipe("demo", [f"pretrain.precision={precision}"])
    schemas = schemas_of(recipe, None)
    task, modalities = make_task(recipe, schemas)
    for samples in (2, 16):
        measured = saved_bytes(task, largest_batch(modalities, samples))
        assert Model(recipe, schemas).step(samples).held == pytest.approx(measured, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["amazon_pretrain", "mimic_pretrain"])
def test_the_prediction_is_within_5_percent_at_full_size(name: str) -> None:
    recipe = load_recipe(name, ["pretrain.precision=float32"])
    schemas = schemas_of(recipe, None)
    task, modalities = make_task(recipe, schemas)
    measured, predicted = saved_bytes(task, largest_batch(modalities, 2)), Model(recipe, schemas).step(2).held
    print(f"{name}: predicted {predicted:,}, measured {measured:,}, error {predicted / measured - 1:+.1%}")
    assert predicted == pytest.approx(measured, rel=0.05)


def test_the_largest_micro_batch_fits_and_one_more_does_not() -> None:
    recipe = load_recipe("demo")
    model = Model(recipe, schemas_of(recipe, None))
    room = 100 * 2**20
    found = largest_fitting(model, room, 0)
    assert found > 1
    assert model.step(found).peak <= room < model.step(found + 1).peak
    assert largest_fitting(model, 1000, 0) == 0
    assert largest_fitting(model, room, room + 1) == 0


@pytest.mark.dist
def test_states_are_what_two_ranks_of_deepspeed_hold(tmp_path: Path) -> None:
    (tmp_path / "zero0.json").write_text("{}")
    files = {0: tmp_path / "zero0.json", 1: ROOT / "ds_configs" / "zero1.json", 2: ROOT / "ds_configs" / "zero2.json"}
    kinds = [(stage, p) for stage in files for p in ("float32", "bfloat16") if (stage, p) != (0, "bfloat16")]
    cases = [
        {"ds": str(files[stage]), "precision": p, "out": str(tmp_path / f"{stage}-{p}.json")} for stage, p in kinds
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    finish(launch(2, [str(WORKER), str(tmp_path / "cases.json")]))
    every = sum(p.numel() for p in make_pretrain(make_modalities()).parameters())
    for (stage, precision), case in zip(kinds, cases, strict=True):
        found = json.loads(Path(case["out"]).read_text())
        states = count_states(every, 0, {"stage": stage}, 2, precision)
        assert states.parameters == pytest.approx(found["parameters"], rel=0.001), (stage, precision)
        assert states.optimizer == pytest.approx(found["optimizer"], rel=0.02), (stage, precision)  # groups are aligned


def test_the_command_prints_a_plan_and_refuses_what_cannot_be(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpus", "2", "--gpu-memory", "4", "--stage", "1", "--measure", "0"]) == 0
    out = capsys.readouterr().out
    assert "2 GPUs of 4 GiB, ZeRO-1, activations kept" in out
    assert "largest that fits" in out
    assert "micro-batch of 16 (global batch 32 on 2 GPUs) fits" in out
    assert "measured" not in out
    for wrong, message in (
        (["--gpus", "0", "--gpu-memory", "4"], "at least one GPU"),
        (["--gpus", "99", "--gpu-memory", "4"], "only 32 samples"),
        (["--gpus", "1", "--gpu-memory", "4", "--stage", "0", "pretrain.precision=bfloat16"], "refused"),
        (["--gpus", "1", "--gpu-memory", "4", "--measure", "-1"], "--measure -1: give a number"),
        (["--gpus", "1", "--gpu-memory", "4", "--deepspeed", "nowhere.json"], "nowhere.json"),
    ):
        assert main(["plan", *wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.dist
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_a_plan_sets_what_a_real_step_holds_beside_its_counts(
    capsys: pytest.CaptureFixture[str], precision: str
) -> None:
    assert main(["plan", "--gpus", "2", "--gpu-memory", "3", "--measure", "4", f"pretrain.precision={precision}"]) == 0
    out = capsys.readouterr().out
    assert "a real step on this CPU, 1 rank, ZeRO-2, micro-batch 4" in out
    table = [line.rsplit(maxsplit=3) for line in out.partition("predicted")[2].splitlines()[1:]]
    errors = {name.strip(): float(error.rstrip("%")) for name, _, _, error in table}
    for name in ("parameters", "gradients", "optimizer", "buckets", "held between forward and backward"):
        assert errors.pop(name) == pytest.approx(0, abs=2), out
    assert errors == {"the process at the peak of both": pytest.approx(0, abs=25)}, out


def test_a_step_that_does_not_fit_here_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("demo")
    monkeypatch.setattr("lanistr.plan.free_memory", lambda: 2**20)
    (line,) = measured_table(Model(recipe, schemas_of(recipe, None)), ZERO, 1)
    assert line.startswith("not measured: a step of one rank here needs some 0.")
