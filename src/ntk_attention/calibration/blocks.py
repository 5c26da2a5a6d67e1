"""What calibration measures of one feed-forward block, and what it makes of that."""

from __future__ import annotations

import torch
from torch import Tensor

from ..tuner.feed_forward import FeedForwardPrefix
from .moments import SecondMoments, inverse_root, row_rms
from .settings import CalibrationSettings


class FeedForwardStatistics:
    """Moments of a block's inputs, and sizes of its outputs and of its layer's hidden states; a `FeedForwardObserver`.

    Sizes are those of the median token. In some layers a few tokens are a thousand times as large as all others
    ("massive activations"), and would make the rms a unit in which every step is too large.
    """

    def __init__(self, prefix: FeedForwardPrefix):
        self.prefix = prefix
        D = len(prefix.Z_A)
        self.moments = SecondMoments((D, D), torch.float32, prefix.Z_A.device)  # float64 would take twice the memory
        self.outputs: list[Tensor] = []  # [N], rms of the block's output by token, of the task
        self.streams: list[Tensor] = []  # [N], rms of the layer's hidden states, likewise
        self.is_finite = True  # all that was observed

    def observe_input(self, x: Tensor) -> None:
        """Inputs of the block, [N, D]."""
        self.moments.add(x.float())

    def observe_output(self, out: Tensor) -> None:
        """Outputs of the block, [N, D], without prefixes."""
        if not self.moments.kinds:
            self.outputs.append(row_rms(out))

    def observe_stream(self, hidden: Tensor) -> None:
        """Hidden states after the layer, [N, D]."""
        if not self.moments.kinds:
            self.streams.append(row_rms(hidden))

    def end_of_kind(self) -> None:
        """Close a kind of input; the first is the task's."""
        self.moments.end_kind()
        measured = (*self.moments.kinds[-1:], *self.outputs, *self.streams)
        self.is_finite = all(bool(torch.isfinite(x).all()) for x in measured)

    @torch.no_grad()
    def set_coordinates_and_start(self, settings: CalibrationSettings, generator: torch.Generator) -> None:
        """Coordinates in which inputs are white and steps are parts of the hidden states; no effect at the start."""
        if not self.moments.kinds:  # a block that the tokens of its attention do not pass
            return
        stream, output = (torch.cat(sizes).median().item() for sizes in (self.streams, self.outputs))
        unit = min(settings.stream_unit * stream, settings.output_unit * output)
        unit = max(unit, torch.finfo(torch.float32).tiny)
        root = inverse_root(self.moments.mean().double(), settings.eigenvalue_floor)
        self.prefix.set_coordinates(settings.input_unit * root, unit)
        self.moments.kinds.clear()  # D x D, no longer needed
        self.prefix.reset_parameters(generator=generator)
        self.prefix.part("Z_A").div_(settings.input_unit)
