"""Memory of forward and backward of the sdpa backend on a CPU: linear in L, up to L = 8,192."""

import subprocess
import sys

PROGRAM = """
import resource, sys, torch
from ntk_attention import PrefixState, ntk_attention

def peak():  # of the process so far, MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def run(L):
    q, k, v = (torch.randn(1, 8, L, 64, requires_grad=True) for _ in range(3))
    state = PrefixState(torch.randn(8, 64, 64, requires_grad=True), torch.rand(8, 64) + 0.1)
    ntk_attention(q, k, v, state, is_causal=True, backend="sdpa").sum().backward()

run(64)
before = peak()
run(int(sys.argv[1]))
print(peak() - before)
"""


def peak_memory(L):
    """MiB that a fresh process needs on top of what it had."""
    result = subprocess.run([sys.executable, "-c", PROGRAM, str(L)], capture_output=True, text=True, check=True)
    return float(result.stdout)


def test_linear_in_length():
    """Against twice the length; the score matrix alone would be 2 GiB at L = 8,192, and four times as large each time."""
    sizes = [peak_memory(L) for L in (2048, 4096, 8192)]
    assert sizes[1] < 2.5 * sizes[0]
    assert sizes[2] < 2.5 * sizes[1]
    assert sizes[2] < 1024
