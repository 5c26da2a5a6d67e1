"""The numbers of calibration, each with its meaning and the ablation that chose it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class CalibrationSettings:
    """How `calibrate` starts an adapter, and how far each of its parts moves in a step.

    The ablations are in `results/experiments/README.md`, and in words in `research/experiments/README.md`. "Sums" are
    chain-sum with SmolLM2, "sections" are package sections with MiniLM, "clothes" are fashion-64 with a ViT. After +-
    stands half of the 95 % interval of the paired difference over seeds.

    Args:
        share: of every head's attention that the prefix holds at the start, averaged over tokens; between 0 and 1. The
            smaller, the closer is the start to the frozen model. None, the default: `encoder_share` in encoders, else
            `language_share`, which falls in large heads.
        language_share: the share in models that write text. Smaller shares learn sums less well: two of three seeds
            with 15 % end at 54 to 56 % and one breaks, with 5 % they end at 53, 41 and 14 %, by default at 60 %.
        encoder_share: the share in models that look in both directions and write nothing. Against a half it gains
            1.0 +- 0.7 points on BBC with 16 texts per class (validation), 0.4 +- 0.5 on sections with 16 per class and
            0.7 +- 1.4 on clothes (test).
        large_head_dim: in heads of more dimensions than this, the steps and the `language_share` fall with the root of
            the size, since more features and directions move an output there, each as far in a step of Adam. None: in
            none. Gemma 3, whose heads have 256, gains 3.0 +- 3.2 points on worked problems and loses 0.4 +- 1.0 on
            sums; its validation losses fall from 0.0695 to 0.0621 and from 0.508 to 0.491, and it forgets less.
        log_k_step: how far a step of log k moves an output, relative to a step of Z. The unit of log k is this over the
            share, since log k moves an output by the share times as much. Chosen on validation data; a larger one was
            not better with encoders of text. Without k, sums end at 33.9, 3.6 and 1.5 %.
        eigenvalue_floor: of the whitening, relative to the largest eigenvalue; directions below it are noise. The
            whitening itself gains most: with scale and start alone, sums end at 49.6 %, with whitening alone at 57.5 %.
        last_picture_step: steps of Z in the last layer of an encoder of pictures, relative to those in the first; they
            fall evenly with depth. Against even steps, 1.0, it gains 1.1 +- 0.8 points on clothes. Steps that fall or
            rise with depth were no better with text.
        head_step: how far a step of Z moves the output of a small head, relative to its size. At the rate of 3e-3 a
            third was behind on each of five development tasks (one seed, with an `output_step` of 1).
        input_step: how far a step of Z_A of a feed-forward part moves what it makes of a white input of size 1, where
            all inputs agree: the unit of a number is this over how many there are, as steps of Adam add up.
        output_step: how far a step of Z_B moves the output of the part's module, relative to its size; over the root
            of the rank, since as many directions move it. At the rate of 3e-3 equations, time intervals and letters end
            at losses of 1.00, 0.226 and 0.713, with a step of 1 at 1.10, 0.262 and 0.717 (one seed). At 1e-2 two break.
        own_rows, own_length: size of the text that a language model writes for its coordinates, in rows and tokens. On
            training data alone sums broke at the rate of 1e-2 (validation loss 1.53, with own text 0.41).
        max_bytes: of moments and coordinates. Above it `calibrate` refuses instead of running out of memory.

    Raises:
        ValueError: for a value out of its range; the message says which, what was given and what is expected.
    """

    share: float | None = None
    language_share: float = 0.5
    encoder_share: float = 0.15
    large_head_dim: int | None = 64
    log_k_step: float = 0.15
    eigenvalue_floor: float = 1e-3
    last_picture_step: float = 0.1
    head_step: float = 1.0
    input_step: float = 240.0
    output_step: float = 3.0
    own_rows: int = 32
    own_length: int = 128
    max_bytes: int = 8 * 2**30

    def __post_init__(self) -> None:
        for name in ("language_share", "encoder_share", "eigenvalue_floor"):
            self._check(name, is_fraction(getattr(self, name)), "a number between 0 and 1, both excluded")
        self._check("share", self.share is None or is_fraction(self.share), "a number between 0 and 1, or None")
        step = self.last_picture_step
        self._check("last_picture_step", is_positive(step) and step <= 1, "a number above 0 and at most 1")
        for name in ("log_k_step", "head_step", "input_step", "output_step"):
            value = getattr(self, name)
            self._check(name, is_positive(value) and value < math.inf, "a finite number above 0")
        for name, least in (("own_rows", 1), ("own_length", 2), ("max_bytes", 1)):
            self._check(name, is_count(getattr(self, name), least), f"a whole number of at least {least}")
        size = self.large_head_dim
        self._check("large_head_dim", size is None or is_count(size, 1), "a whole number of at least 1, or None")

    def _check(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(f"CalibrationSettings: {name} must be {expected}, got {getattr(self, name)!r}")

    def size_step(self, head_dim: int) -> float:
        """How far heads of a size go in a step, relative to small ones: 1 up to `large_head_dim`, then less."""
        return 1.0 if self.large_head_dim is None else min(1.0, math.sqrt(self.large_head_dim / head_dim))

    def share_of(self, head_dim: int, encodes: bool) -> float:
        """The prefix's share of the attention at the start in heads of a size, of an encoder or of another model."""
        if self.share is not None:
            return self.share
        return self.encoder_share if encodes else self.language_share * self.size_step(head_dim)


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def is_fraction(value: Any) -> bool:
    return is_positive(value) and value < 1


def is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


DEFAULT = CalibrationSettings()
