"""Launches without Triton's own preparation, which takes longer than a short kernel.

What a call decides anew each time, which compiled kernel its arguments ask for, depends here on few things that a
launch knows: all pointers but a few are aligned, and sizes and strides are never special (see `compiled` in tiles.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .support import triton

if triton is not None:
    from triton import knobs
    from triton.tools.tensor_descriptor import TensorDescriptor


class Options(NamedTuple):
    """How a kernel is compiled."""

    num_warps: int
    num_stages: int = 3
    maxnreg: int | None = None  # registers of a thread, at most


class Launcher:
    """One kernel, whose parameters are descriptors, then pointers, then numbers, then constants.

    Args:
        kernel: made by `triton.jit` or `gluon.jit`.
    """

    def __init__(self, kernel: Any):
        self.kernel = kernel
        self.found: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        descriptors: Sequence[Any],
        tensors: Sequence[Tensor],
        numbers: Sequence[int | float],
        constants: tuple[Any, ...],
        options: Options,
    ) -> None:
        """Launch on the device of the tensors and on its current stream."""
        device = tensors[0].get_device()
        if device < 0:  # interpreted
            self.kernel[grid](*descriptors, *tensors, *numbers, *constants)
            return
        if device != torch._C._cuda_getDevice():  # of a model that is spread over devices
            with torch.cuda.device(device):
                self(grid, descriptors, tensors, numbers, constants, options)
            return
        key = (device, constants, options, tuple([x.dtype for x in tensors]))
        found = self.found.get(key)
        if found is None:
            arguments = (*descriptors, *tensors, *numbers, *constants)
            self.found[key] = self.kernel[grid](*arguments, **options._asdict())
            return
        pointers = [x.data_ptr() for x in tensors]  # of tensors Triton would ask the driver where they are
        found.run(
            *grid, torch._C._cuda_getCurrentRawStream(device), found.function, found.packed_metadata,
            None, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook,
            *descriptors, *pointers, *numbers, *constants,
        )  # fmt: skip


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up. triton.cdiv serves kernels too, and is much slower for that."""
    return -(-a // b)


def padded(size: int) -> int:
    """A power of two that a matrix unit takes."""
    return max(16, 1 << (size - 1).bit_length())


UNIT = 8  # numbers of 16 bits in 16 bytes, in which kernels read: strides are counted in them


def aligned(x: Tensor) -> Tensor:
    """x [..., d] of 16-bit numbers, or a copy where its rows are not in one piece from a multiple of 16 bytes on."""
    strides = x.stride()
    if strides[-1] != 1 or x.data_ptr() % 16 or any([s % UNIT for s in strides[:-1]]):
        return x.new_empty(x.shape).copy_(x)
    return x


def contiguous(x: Tensor) -> Tensor:
    """x in one piece of memory that begins at a multiple of 16 bytes."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def steps(x: Tensor) -> tuple[int, int, int]:
    """The strides of an aligned x [B, H, L, d] but for the last one, in UNITs."""
    b, h, n, _ = x.stride()
    return b // UNIT, h // UNIT, n // UNIT


def descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Blocks [..., rows, columns] of x [..., L, d]; x is copied only where the memory does not allow it."""
    x = described(x)
    block = [1] * (x.dim() - 2) + [rows, columns]
    made = object.__new__(TensorDescriptor)  # its constructor would check all this again, at every launch
    made.__dict__.update(base=x, shape=x.shape, strides=x.stride(), block_shape=block)
    return made


def described(x: Tensor) -> Tensor:
    """x, or a copy where the memory of x does not allow a descriptor."""
    strides = x.stride()
    unit = 16 // x.element_size()
    if strides[-1] != 1 or x.data_ptr() % 16 or any([s % unit or not s for s in strides[:-1]]):
        return x.new_empty(x.shape).copy_(x)
    return x
