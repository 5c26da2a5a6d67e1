"""What there are kernels for."""

from functools import cache
from typing import Any

import torch

try:
    import triton

    INTERPRETED = bool(triton.knobs.runtime.interpret)  # on a CPU: for tests
except ImportError:  # torch for a CPU comes without Triton
    triton = None
    INTERPRETED = False
try:
    from . import forward_sm90
except (ImportError, AttributeError):  # Gluon, which changes from version to version
    forward_sm90 = None  # type: ignore[assignment]

__all__ = ["INTERPRETED", "covers", "covers_random", "covers_sm90", "forward_sm90", "properties", "triton"]

MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 128}
MAX_RANDOM_FEATURES = 512
MAX_DECODE_ROWS = 64  # query heads of one KV head times query length


def covers(device: torch.device, dtype: torch.dtype, d: int, d_v: int) -> bool:
    """Whether there are kernels for these sizes of heads (with the map elu and no mask, or a bool one)."""
    return (
        triton is not None
        and (device.type == "cuda" or INTERPRETED)
        and dtype in MAX_HEAD_DIM
        and min(d, d_v) >= 16
        and max(d, d_v) <= MAX_HEAD_DIM[dtype]
        and d % 8 == d_v % 8 == 0  # rows of 16 bytes
    )


def covers_random(device: torch.device, dtype: torch.dtype, d: int, d_v: int, r: int) -> bool:
    """The same for the map positive_random with r features."""
    return covers(device, dtype, d, d_v) and dtype == torch.bfloat16 and max(d, d_v) <= 128 and r <= MAX_RANDOM_FEATURES


def covers_sm90(device: torch.device, dtype: torch.dtype, d: int, d_v: int) -> bool:
    """Whether there is a kernel for Hopper (with the map elu and without a mask)."""
    return (
        forward_sm90 is not None
        and device.type == "cuda"
        and properties(device).major == 9
        and dtype == torch.bfloat16
        and d == d_v
        and d in (64, 128)
    )


@cache
def properties(device: torch.device) -> Any:
    return torch.cuda.get_device_properties(device)
