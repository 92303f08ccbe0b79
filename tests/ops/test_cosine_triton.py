"""The Triton kernels of negative cosine: their numerics in Triton's interpreter, compiled for an A100, on a real GPU.

The first two run on any machine that has Triton; the scripts beside this file run in processes of their own, because
Triton decides at import whether it interprets.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from lanistr.ops.cosine import neg_cosine

pytestmark = pytest.mark.skipif(
    find_spec("triton") is None, reason="no Triton: PyTorch's CUDA builds bring it; on a CPU, pip install triton"
)
ROUNDING = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 6e-4}  # of the gradient, which has the dtype of p


def run(script: str, *arguments: str, **environment: str) -> str:
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **path, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout


def assert_close_to_float64(device: str, **environment: str) -> None:
    found = json.loads(run("interpreted_cosine.py", device, **environment).splitlines()[-1])
    assert len(found) == 9
    for case, error in found.items():
        assert error["value"] < 1e-6, case
        assert error["gradient"] < ROUNDING[case.split()[0]], case


def test_kernels_equal_float64_in_values_and_gradients_in_the_interpreter() -> None:
    assert_close_to_float64("cpu", TRITON_INTERPRET="1")


def test_kernels_compile_for_an_a100(tmp_path: Path) -> None:
    assert len(run("compiled_cosine.py", TRITON_CACHE_DIR=str(tmp_path)).splitlines()) == 4


@pytest.mark.gpu
def test_kernels_equal_float64_on_a_gpu_and_are_what_neg_cosine_runs() -> None:
    assert_close_to_float64("cuda")
    p = torch.randn(4, 2048, device="cuda", requires_grad=True)
    assert "_NegCosine" in type(neg_cosine(p, p.detach()).grad_fn).__name__
