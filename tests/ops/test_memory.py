"""Memory of forward and backward of the sdpa backend on a CPU: linear in L, up to L = 8,192 (Linux)."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import re, sys, torch
from ntk_attention import PrefixState, ntk_attention

def read(field):  # of this process, MiB
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read()).group(1)) / 1024

def run(L):
    q, k, v = (torch.randn(1, 8, L, 64, requires_grad=True) for _ in range(3))
    state = PrefixState(torch.randn(8, 64, 64, requires_grad=True), torch.rand(8, 64) + 0.1)
    ntk_attention(q, k, v, state, is_causal=True, backend="sdpa").sum().backward()

run(64)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = read("VmRSS")
run(int(sys.argv[1]))
print(read("VmHWM") - before)
"""


def peak_memory(L):
    """MiB that a fresh process needs on top of what it had."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, str(L)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return float(result.stdout)


def test_linear_in_length():
    """Against a quarter of the length: four times as much, where the score matrix would be 16 times as large, 2 GiB.

    What the allocator keeps makes single sizes differ by a fifth.
    """
    short, long = peak_memory(2048), peak_memory(8192)
    assert long < 6 * short
    assert long < 1024
