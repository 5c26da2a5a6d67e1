"""Training steps. On a GPU they are recorded once per shape and replayed: small models wait for Python otherwise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

CLIP, WARMUP_STEPS = 1.0, 20
Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Batch], Tensor]


def own_loss(model: nn.Module, batch: Batch) -> Tensor:
    """What the model itself computes."""
    return model(**batch).loss


def linear(step: int, steps: int) -> float:
    """The share of the learning rate: up over the first steps, then down to zero."""
    warmup = min(WARMUP_STEPS, max(1, steps // 10))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


class Training:
    """A model, AdamW, gradients clipped to norm 1, and a linear schedule.

    Args:
        model: is trained.
        groups: parameters and the learning rate of each group.
        steps: how many there will be.
        precision: makes the context of the forward pass.
        weight_decay: of AdamW.
        loss: of the model on a batch.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: list[dict[str, Any]],
        steps: int,
        precision: Callable[[], AbstractContextManager[Any]],
        weight_decay: float = 0.0,
        loss: Loss = own_loss,
    ):
        self.model, self.steps, self.precision, self.loss, self.done = model, steps, precision, loss, 0
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        self.device = self.parameters[0].device
        self.rates = [group["lr"] for group in groups]
        on_gpu = self.device.type == "cuda"
        if on_gpu:  # a recorded update reads its rate from memory
            groups = [{**group, "lr": torch.tensor(group["lr"], device=self.device)} for group in groups]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=on_gpu, capturable=on_gpu)

    def step(self, batch: Batch) -> Tensor:
        """One step; returns the loss before it, still on the device."""
        self.set_rates()
        loss = self.forward_and_backward({name: x.to(self.device) for name, x in batch.items()})
        self.update()
        return loss

    def set_rates(self) -> None:
        share = linear(self.done, self.steps)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate * share)
            else:
                group["lr"] = rate * share
        self.done += 1

    def forward_and_backward(self, batch: Batch) -> Tensor:
        with self.precision():
            loss = self.loss(self.model, batch)
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.parameters, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)


class RecordedTraining(Training):
    """The same as CUDA graphs: one for every shape of a batch, and one for the update."""

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.pool = torch.cuda.graph_pool_handle()
        self.passes: dict[Any, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}
        self.recorded_update: torch.cuda.CUDAGraph | None = None

    def step(self, batch: Batch) -> Tensor:
        self.set_rates()
        shape = tuple((name, x.shape, x.dtype) for name, x in batch.items())
        if shape not in self.passes:
            self.passes[shape] = self.record_pass(batch)
        graph, inputs, loss = self.passes[shape]
        for name, x in batch.items():
            inputs[name].copy_(x, non_blocking=True)
        graph.replay()
        loss = loss.clone()  # the update may use its memory
        if self.recorded_update is not None:
            self.recorded_update.replay()
        else:  # the first one makes the optimizer's state
            self.update()
            self.recorded_update = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.recorded_update, pool=self.pool):
                self.update()
        return loss

    def record_pass(self, batch: Batch) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]:
        inputs = {name: x.to(self.device) for name, x in batch.items()}
        # Unrecorded first: kernels are compiled and chosen, gradients get the memory that they keep.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.device(self.device), MadeThere():
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.forward_and_backward(inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.optimizer.zero_grad(set_to_none=False)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                loss = self.forward_and_backward(inputs)
        return graph, inputs, loss


class MadeThere(TorchFunctionMode):
    """With `torch.device`: every new tensor is made on the device, since a graph cannot hold a copy from the CPU.

    peft's mask of a prefix needs the device; transformers' cache of a sliding window makes a tensor of a number, which
    `torch.tensor` copies from the CPU even so.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if function is torch.tensor and isinstance(args[0], bool | int | float):
            return torch.full((), *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def training_on(device: str) -> type[Training]:
    return RecordedTraining if device == "cuda" else Training
