"""What calibration measures of the prefix of one feed-forward block, and what it makes of that."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from ..tuner.feed_forward import FeedForwardPrefix
from .moments import SecondMoments, inverse_root, row_rms
from .settings import CalibrationSettings


class FeedForwardStatistics:
    """Moments of the inputs of the parts, and sizes of what their modules return; a `FeedForwardObserver`.

    Hidden activations are many, and each neuron has a size of its own: of these the mean squares are measured alone.
    Sizes of outputs are those of the median token. In some layers a few tokens are a thousand times as large as all
    others ("massive activations"), and would make the rms a unit in which every step is too large.

    Args:
        parts: by name.
        hidden: names of those that see hidden activations; all others see the input of the block.
    """

    def __init__(self, parts: Mapping[str, FeedForwardPrefix], hidden: Collection[str]):
        self.parts = parts
        self.hidden = set(hidden)
        self.first = next(name for name in parts if name not in self.hidden)
        self.moments: dict[str, SecondMoments] = {}
        for name in (self.first, *sorted(self.hidden)):  # float64 would take twice the memory
            Z_A = parts[name].part("Z_A")
            shape = (len(Z_A),) * (1 if name in self.hidden else 2)
            self.moments[name] = SecondMoments(shape, torch.float32, Z_A.device)
        self.outputs: dict[str, list[Tensor]] = {name: [] for name in parts}  # [N], rms by token, of the task
        self.is_finite = True  # all that was observed

    @property
    def is_first_kind(self) -> bool:
        """Whether what is observed is the task's."""
        return not self.moments[self.first].kinds

    def observe_input(self, name: str, x: Tensor) -> None:
        """Inputs of a part, [N, in]."""
        if name in self.moments:
            self.moments[name].add(x.float())

    def observe_output(self, name: str, out: Tensor) -> None:
        """What its module returns, [N, out], without prefixes."""
        if self.is_first_kind:
            self.outputs[name].append(row_rms(out))

    def end_of_kind(self) -> None:
        """Close a kind of input; the first is the task's."""
        for moments in self.moments.values():
            moments.end_kind()
        measured = [x for moments in self.moments.values() for x in moments.kinds[-1:]]
        measured += [x for sizes in self.outputs.values() for x in sizes]
        self.is_finite = all(bool(torch.isfinite(x).all()) for x in measured)

    @torch.no_grad()
    def set_coordinates_and_start(self, settings: CalibrationSettings, generator: torch.Generator) -> None:
        """Coordinates in which inputs are white and steps are parts of the outputs; no effect at the start."""
        if self.is_first_kind:  # a block that the tokens of its attention do not pass
            return
        tiny, floor = torch.finfo(torch.float32).tiny, settings.eigenvalue_floor
        coordinates = {name: self.step(name, settings) * root for name, root in self.roots(floor).items()}
        for name, part in self.parts.items():
            size = torch.cat(self.outputs[name]).median().item()
            unit = max(settings.output_step * size * part.rank**-0.5, tiny)
            part.set_coordinates(coordinates[name if name in self.hidden else self.first], unit)
            part.reset_parameters(generator=generator)
            part.part("Z_A").div_(self.step(name, settings))
        self.moments.clear()  # in x in, no longer needed

    def step(self, name: str, settings: CalibrationSettings) -> float:
        """The unit of a part's Z_A where its inputs are white."""
        return settings.input_step / len(self.parts[name].part("Z_A"))

    def roots(self, floor: float) -> dict[str, Tensor]:
        """Coordinates in which what was measured is white, [in, in] or the diagonal [in], by the name of a part."""
        found = {}
        for name, moments in self.moments.items():
            mean = moments.mean()
            if mean.dim() == 1:
                found[name] = mean.clamp_min(floor * mean.max().clamp_min(torch.finfo(mean.dtype).tiny)).rsqrt()
            else:
                found[name] = inverse_root(mean.double(), floor).to(mean)
        return found
