"""Run by test_cosine_triton.py in a process of its own: TRITON_INTERPRET must be set before Triton is imported.

Prints, per case, the largest errors of the kernel's values and gradients against PyTorch in float64.
"""

import json
import sys

import torch

from lanistr.ops.cosine import neg_cosine
from lanistr.ops.cosine_triton import fused_neg_cosine


def errors(dtype: torch.dtype, rows: int, width: int, device: str) -> dict[str, float]:
    torch.manual_seed(0)
    p, z = (torch.randn(rows, width, device=device).to(dtype) for _ in range(2))
    z[0] = 0  # the norm has a floor
    p.requires_grad_()
    z.requires_grad_()
    weight = torch.randn(rows, device=device)
    out = fused_neg_cosine(p, z)
    (out * weight).sum().backward()
    assert out.dtype == torch.float32
    assert p.grad is not None
    assert p.grad.dtype == dtype
    assert z.grad is None, "the target has a stop-gradient"
    wide = p.detach().double().requires_grad_()
    expected = neg_cosine(wide, z.double())  # never the kernel
    (expected * weight.double()).sum().backward()
    assert wide.grad is not None
    return {
        "value": float((out - expected).detach().abs().max()),
        "gradient": float((p.grad.double() - wide.grad).norm() / wide.grad.norm()),
    }


if __name__ == "__main__":
    device = sys.argv[1]
    cases = [(kind, n, d) for kind in ("float32", "bfloat16", "float16") for n, d in ((5, 2048), (3, 100), (2, 3))]
    print(json.dumps({f"{k} {n}x{d}": errors(getattr(torch, k), n, d, device) for k, n, d in cases}))
