"""Parameters that train in coordinates where every direction matters alike, and are saved in plain ones."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor

from .distributed import BY_HEAD, is_partitioned, spread
from .kept import kept
from .untrusted import check_shape, check_values

T = TypeVar("T")


class Coordinated(nn.Module):
    """A module whose leading parameter X, [..., r, n], trains as X' in X = C X', and the scaled one as x' in
    x = unit x'.

    Calibration sets `coordinates`, C [..., r, r] or the diagonal [..., r] of such, and `unit`. State dicts always hold
    the plain X and x, and loading one takes them.
    """

    leading_name: str  # of X
    scaled_name: str  # of x
    constants: tuple[str, ...] = ()  # buffers that are saved, spread as parameters are
    placements: Sequence[Placement] = BY_HEAD  # of the parameters on a mesh

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("coordinates", None, persistent=False)
        self.unit = 1.0
        self.is_loaded = False  # whether a state dict was, and nobody looked since
        self.mesh: DeviceMesh | None = None  # of a tensor-parallel model

    @property
    def leading(self) -> Tensor:
        """X', as it trains; see `plain_leading` for X."""
        return getattr(self, self.leading_name)

    @property
    def scaled(self) -> Tensor:
        """x', as it trains; see `plain_scaled` for x."""
        return getattr(self, self.scaled_name)

    def set_coordinates(self, coordinates: Tensor | None, unit: float) -> None:
        """Train in these coordinates from here on; the parameters must be given anew."""
        like = self.scaled
        self.coordinates = None if coordinates is None else coordinates.to(like.device, like.dtype)
        self.unit = unit

    def shard(self, mesh: DeviceMesh) -> None:
        """Keep a part of the parameters, as `placements` has it, with the values of the first process of the mesh."""
        self.mesh = mesh
        for name, parameter in list(self.named_parameters(recurse=False)):
            part = spread(parameter.detach(), mesh, self.placements, source=0)
            # Not setattr: PEFT's low_cpu_mem_usage takes that over, and cannot rebuild a DTensor.
            self._parameters[name] = nn.Parameter(part, requires_grad=parameter.requires_grad)
        for name, constant in self.own_constants().items():
            self._buffers[name] = spread(constant, mesh, self.placements, source=0)

    def own_constants(self) -> dict[str, Tensor]:
        """The buffers that go into files, without those of children."""
        return {name: x for name in self.constants if (x := self._buffers[name]) is not None}

    def part(self, name: str) -> Tensor:
        """What this process has of a parameter or a constant."""
        parameter = getattr(self, name)
        return parameter if self.mesh is None else parameter.to_local()

    def plain_leading(self) -> Tensor:
        """X in plain coordinates, of this process's part."""
        X = self.part(self.leading_name)
        return X if self.coordinates is None else times(self.coordinates.to(X.dtype), X)

    def plain_scaled(self) -> Tensor:
        """x in plain units, of this process's part."""
        x = self.part(self.scaled_name)
        return x if self.unit == 1.0 else self.unit * x  # a kernel less in each layer, when all wait for launches

    def kept(self, what: Hashable, make: Callable[[], T]) -> T:
        """What is made of this module's tensors, see `kept`; made anew where they are parts of spread ones."""
        if self.mesh is not None or torch.is_grad_enabled():
            return make()
        return kept((self, what, self.unit), (*self._parameters.values(), *self._buffers.values()), make)

    @torch.no_grad()
    def set_plain(self, leading: Tensor, scaled: Tensor) -> None:
        """Give both by their plain values."""
        X = self.part(self.leading_name)
        X.copy_(self._to_coordinates(leading.to(X)))
        self.part(self.scaled_name).copy_(scaled / self.unit)

    @torch.no_grad()
    def follow(self, other: Coordinated) -> None:
        """Train in the coordinates of another one of the same shapes, with the values that are there."""
        if self.has_coordinates_of(other):  # not one bit changes
            return
        if self.scaled.is_meta:  # a state dict follows, with plain values
            self.set_coordinates(other.coordinates, other.unit)
            return
        leading, scaled = self.plain_leading().clone(), self.plain_scaled().clone()
        self.set_coordinates(other.coordinates, other.unit)
        self.set_plain(leading, scaled)

    def has_coordinates_of(self, other: Coordinated) -> bool:
        C, D = self.coordinates, other.coordinates
        if C is None or D is None:
            return C is D and self.unit == other.unit
        return self.unit == other.unit and C.shape == D.shape and torch.equal(C, D.to(C))

    def make_plain(self, tensors: dict[str, Any], prefix: str) -> None:
        """Bring the trained values in a state dict, whose names start so, into plain coordinates."""
        if self.coordinates is not None:
            C = self.coordinates
            leading, scaled = prefix + self.leading_name, prefix + self.scaled_name
            tensors[leading] = self._on_whole(tensors[leading], lambda X: times(C.to(X), X))
            tensors[scaled] = self.unit * tensors[scaled]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # ZeRO-3 makes state dicts of its parameters without asking: there all hold them as they are trained, and the
        # tuner takes the plain ones of them.
        if not is_partitioned(self.scaled):
            self.make_plain(destination, prefix)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        own_names = {*self._parameters, *self.constants}
        for name, parameter in [*self.named_parameters(), *self.own_constants().items()]:
            given = state_dict.get(prefix + name)
            if given is None:
                continue
            check_shape("the state dict", f"{prefix}{name}", tuple(given.shape), tuple(parameter.shape))
            check_values("the state dict", f"{prefix}{name}", given)
            self.is_loaded = True
            if local_metadata.get("assign_to_params_buffers"):  # what is loaded may change, what was given must not
                state_dict[prefix + name] = given.clone()
            own = name in own_names  # a child with other placements sees to its own
            if own and self.mesh is not None and isinstance(parameter, DTensor) and not isinstance(given, DTensor):
                state_dict[prefix + name] = spread(given.to(self.mesh.device_type), self.mesh, self.placements)
        if self.coordinates is not None and not is_partitioned(self.scaled):
            leading, scaled = prefix + self.leading_name, prefix + self.scaled_name
            if leading in state_dict:
                state_dict[leading] = self._to_coordinates(state_dict[leading])
            if scaled in state_dict:
                state_dict[scaled] = state_dict[scaled] / self.unit
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _to_coordinates(self, plain: Tensor) -> Tensor:
        if self.coordinates is None:
            return plain
        C = self.coordinates.double()
        return self._on_whole(plain, lambda X: solved(C, X.to(C)).to(X.dtype))

    def _on_whole(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The function, which has the coordinates in it, of a tensor that may be spread over processes."""
        if not isinstance(x, DTensor):
            return function(x)
        if self.mesh is None:  # FSDP2, which cuts heads apart: this process has the coordinates of all
            return distribute_tensor(function(x.full_tensor()), x.device_mesh, x.placements)
        return DTensor.from_local(function(x.to_local()), x.device_mesh, x.placements, run_check=False)


def times(C: Tensor, X: Tensor) -> Tensor:
    """C X for coordinates [..., r, r], or their diagonal [..., r], and X [..., r, n]."""
    return C[..., None] * X if C.dim() < X.dim() else C @ X


def solved(C: Tensor, X: Tensor) -> Tensor:
    """C^-1 X, likewise."""
    return X / C[..., None] if C.dim() < X.dim() else solve_by_qr(C, X)


def solve_by_qr(A: Tensor, B: Tensor) -> Tensor:
    """A^-1 B of batches of matrices [..., n, n] and [..., n, m].

    Not torch.linalg.solve: on a CPU with several threads its LU of such a batch is wrong from about n = 150 on
    (pytorch issue 142815).
    """
    Q, R = torch.linalg.qr(A)
    return torch.linalg.solve_triangular(R, Q.mT @ B, upper=True)
