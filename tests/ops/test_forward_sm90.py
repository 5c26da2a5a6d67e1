"""The kernel for Hopper cannot be interpreted: without such a GPU it is at least compiled, by whatever Triton is here.

On a GPU test_fused.py compares its results with the reference.
"""

import os
import subprocess
import sys

import pytest

from ntk_attention.ops.triton import support

pytestmark = pytest.mark.slow

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource
from ntk_attention.ops.triton import launch
from ntk_attention.ops.triton.forward_sm90 import shared_layout

for head_dim, length, constant, rotated, is_causal, mixed in (
    (64, 300, True, True, True, False),
    (128, 300, False, False, False, True),
    (128, 4096, True, True, True, False),
    (128, 4096, False, False, True, True),
):
    sizes = launch.sm90_sizes(head_dim, length)
    is_persistent = sizes.rows == launch.PERSISTENT_ROWS
    kernel = launch.sm90_kernels[is_persistent].kernel
    rows, columns = (1, 1, sizes.rows // (1 + is_persistent), head_dim), (1, 1, sizes.columns, head_dim)
    blocks = {"Q": rows, "Table": rows, "Out": rows, "K": columns, "V": columns, "Z_blocks": columns}
    constants = {
        "D": head_dim, "CONSTANT": constant, "ROTATED": rotated, "MIXED": mixed, "IS_CAUSAL": is_causal,
        "BM": sizes.rows, "BN": sizes.columns, "STAGES": sizes.stages,
    }
    kinds = dict.fromkeys(("Z", "k_state", "b_state", "Lse"), "*fp32")
    kinds |= dict.fromkeys(("scale", "factor"), "fp32")
    kinds |= dict.fromkeys(constants, "constexpr") | {"Index": "*i32" if mixed else "*fp32"}
    for name, block in blocks.items():
        kinds[name] = f"tensordesc<bf16[{','.join(map(str, block))}],{shared_layout(block)!r}>"
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=values)
    triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": sizes.warps})
"""


@pytest.mark.skipif(support.forward_sm90 is None, reason="needs Triton")
def test_compiles_without_a_gpu(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
