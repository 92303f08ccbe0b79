"""Run by test_cosine_triton.py in a process of its own: compiles the kernels for an A100 (sm_80); needs no GPU."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lanistr.ops import cosine_triton

FLOAT32 = {"out_ptr", "grad_ptr"}
KERNELS = {"_forward": ("p_ptr", "z_ptr", "out_ptr"), "_backward": ("p_ptr", "z_ptr", "grad_ptr", "dp_ptr")}

if __name__ == "__main__":
    for name, pointers in KERNELS.items():
        for dtype in ("fp32", "bf16"):
            signature: dict[str, Any] = {p: "*fp32" if p in FLOAT32 else f"*{dtype}" for p in pointers}
            signature |= {"D": "i32", "BLOCK": "constexpr"}
            source = ASTSource(fn=getattr(cosine_triton, name), signature=signature, constexprs={"BLOCK": 2048})
            assert triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["cubin"]
            print(name, dtype)
