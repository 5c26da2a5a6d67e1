"""Tensors that are spread over processes: by head in a tensor-parallel model, in any way under FSDP2 and ZeRO-3."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor

BY_HEAD = (Shard(0),)  # the first dimension of every tensor of a state counts heads
ON_ALL = (Replicate(),)
SLICES = (None, "colwise", "colwise_gather_output", "rowwise", "rowwise_split_input")  # whole or one slice, in order
SPLIT = "rowwise"  # transformers' style of an output projection that gets a part of the heads on each process


def head_mesh(model: Any, name: str) -> DeviceMesh | None:
    """The processes that hold a part of an attention module's heads each; None where each holds all of them.

    Args:
        model: of transformers, loaded with a `distributed_config` or without.
        name: of the attention module.

    Raises:
        ValueError: if the model is spread in another way as well.
    """
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None or (getattr(model, "_tp_size", None) or 1) == 1:
        return None
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    styles = {style for key, style in model.tp_plan.items() if key.rpartition(".")[0] == generic}
    if SPLIT not in styles:
        return None
    if mesh.size() > model._tp_size:
        spread = dict(zip(mesh.mesh_dim_names, mesh.shape, strict=True))
        raise ValueError(
            f"expected tensor parallelism alone, got {spread}: an adapter would see a part of the batch only"
        )
    return mesh["tp"] if mesh.ndim > 1 else mesh


def spread(
    x: Tensor, mesh: DeviceMesh, placements: Sequence[Placement] = BY_HEAD, source: int | None = None
) -> DTensor:
    """A whole tensor, on every process, as one that is spread over the mesh.

    Args:
        x: [H, ...] where it is spread by head; the size of the mesh divides H.
        mesh, placements: where its parts go.
        source: the process whose values all take; None where they have the same.
    """
    return distribute_tensor(x, mesh, placements, src_data_rank=None if x.is_meta else source)


def own_slice(x: Tensor, dim: int, mesh: DeviceMesh) -> Tensor:
    """This process's slice of what all have, as a linear layer is cut; the gradients of all slices come together."""
    whole = sum_of_gradients(x, mesh)
    size = -(-whole.shape[dim] // mesh.size())  # the last one may be shorter
    start = min(mesh.get_local_rank() * size, whole.shape[dim])
    return whole.narrow(dim, start, min(size, whole.shape[dim] - start))


def sum_of_gradients(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """x, which is the same on all processes; its gradient is the sum of theirs."""
    if not torch.is_grad_enabled():
        return x
    return DTensor.from_local(x, mesh, ON_ALL, run_check=False).to_local(grad_placements=[Partial()])


def sum_of_parts(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of the x of all processes; its gradient is the same on all."""
    return DTensor.from_local(x, mesh, [Partial()], run_check=False).redistribute(placements=ON_ALL).to_local()


def put_together(x: Tensor, size: int, mesh: DeviceMesh | None) -> Tensor:
    """x [..., size] of a slice [..., n] on each process; x itself where that is whole."""
    if mesh is None or x.shape[-1] == size:
        return x
    shape = torch.Size((*x.shape[:-1], size))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(x, mesh, [Shard(-1)], run_check=False, shape=shape, stride=stride).full_tensor()


def style_of(model: Any, name: str) -> str | None:
    """How a tensor-parallel model spreads the module of this name; None where each process has all of it."""
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
    return next((style for key, style in (model.tp_plan or {}).items() if key == generic), None)


def is_partitioned(x: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the parameter, which is empty between calls."""
    return hasattr(x, "ds_id")


@contextmanager
def gathered(parameters: Sequence[Tensor]) -> Iterator[None]:
    """With parameters that ZeRO-3 holds put together; what all processes write into them stays."""
    if not any(map(is_partitioned, parameters)):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0):
        yield


def bring_with(module: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
    """Let ZeRO-3 put parameters together for each call of a module that reads them itself."""
    import deepspeed

    for parameter in parameters:
        deepspeed.zero.register_external_parameter(module, parameter)


def whole(x: Tensor) -> Tensor:
    """All of a tensor, on every process, however it is spread; a collective call where it is."""
    if is_partitioned(x):
        with gathered([x]):
            return x.detach().clone()
    return x.full_tensor() if isinstance(x, DTensor) else x


def local(x: Tensor) -> Tensor:
    """What this process has of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: FSDP2 and accelerate may keep its parameters elsewhere."""
    parameter = next(p for p in model.parameters() if not p.is_meta)  # meta: offloaded to a disk
    if isinstance(parameter, DTensor) and parameter.device_mesh.device_type == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return parameter.device


@contextmanager
def inputs_on(device: torch.device, model: Any) -> Iterator[None]:
    """With the inputs of the model of transformers, under its adapters or not, sent to a device.

    `generate` sends them to where the first parameter is, and FSDP2 may keep that on the CPU.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model

    def send(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return send_to_device((args, kwargs), device)

    hook = base.register_forward_pre_hook(send, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
