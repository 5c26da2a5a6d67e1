"""The settings of calibration: what they refuse, and what they give for heads of some size."""

import math
import re
from dataclasses import FrozenInstanceError, fields

import pytest

from ntk_attention.calibration import CalibrationSettings

FRACTIONS = ("share", "language_share", "encoder_share", "eigenvalue_floor", "last_picture_step")
SCALES = ("log_k_step", "head_step", "input_step", "output_step")
COUNTS = ("large_head_dim", "own_rows", "own_length", "max_bytes")
WRONG = [
    *((name, value) for name in FRACTIONS for value in (0.0, 1.5, -0.1, math.nan, "0.5", True)),
    *((name, 1.0) for name in FRACTIONS if name != "last_picture_step"),
    *((name, value) for name in SCALES for value in (0.0, -1.0, math.nan, "1", None, True)),
    *((name, value) for name in COUNTS for value in (0, -1, 1.5, "1", True)),
    *((name, None) for name in (*FRACTIONS[1:], *COUNTS[1:])),
    *((name, math.inf) for name in (*SCALES, "large_head_dim")),
    ("own_length", 1),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!r}" for name, value in WRONG])
def test_what_settings_refuse(name, value):
    with pytest.raises(ValueError, match=rf"CalibrationSettings: {name} must be .*, got {re.escape(repr(value))}"):
        CalibrationSettings(**{name: value})


def test_every_field_is_checked_and_stays():
    assert {field.name for field in fields(CalibrationSettings)} == {*FRACTIONS, *SCALES, *COUNTS}
    settings = CalibrationSettings()
    with pytest.raises(FrozenInstanceError):
        settings.share = 0.1


@pytest.mark.parametrize(
    ("options", "head_dim", "encodes", "share", "step"),
    [
        ({}, 64, False, 0.5, 1.0),
        ({}, 256, False, 0.25, 0.5),
        ({}, 64, True, 0.15, 1.0),
        ({}, 256, True, 0.15, 0.5),
        ({"share": 0.3}, 256, False, 0.3, 0.5),
        ({"share": 0.3}, 256, True, 0.3, 0.5),
        ({"large_head_dim": None}, 256, False, 0.5, 1.0),
        ({"language_share": 0.8, "large_head_dim": 16}, 64, False, 0.4, 0.5),
    ],
)
def test_share_and_step_of_heads(options, head_dim, encodes, share, step):
    settings = CalibrationSettings(**options)
    assert settings.share_of(head_dim, encodes) == share
    assert settings.size_step(head_dim) == step
