"""Rotary positions of each kind that models have, and how they are put in and undone, pair by pair."""

import math

import torch

from ntk_attention.ops.rotation import Rotation

KINDS = ("halves", "neighbours", "partial", "runs")


def make_rotation(kind, L, d, dtype=torch.float64, batch=1, scale=1.0, device="cpu"):
    """Of queries [., ., L, d]; None without a kind, and where the heads are too small for it."""
    if kind is None:
        return None
    rotated = {"halves": d // 2 * 2, "neighbours": d // 2 * 2, "partial": d // 4 * 2, "runs": d // 4 * 4}[kind]
    if rotated == 0:
        return None
    width = {"halves": rotated, "neighbours": 2, "partial": rotated, "runs": rotated // 2}[kind]
    generator = torch.Generator().manual_seed(11)
    angles = 2 * math.pi * torch.rand(batch, L, rotated // 2, dtype=torch.float64, generator=generator)
    cos, sin = ((scale * x).to(device, dtype) for x in (angles.cos(), angles.sin()))
    return Rotation.of(cos, sin, width=width, start=(d - rotated) // 2)


def places(num_pairs, width, start):
    """Where the two numbers of each pair stand."""
    half = width // 2
    firsts = [start + p // half * width + p % half for p in range(num_pairs)]
    return [(i, i + half) for i in firsts]


def pair_by_pair(x, rotation, sign):
    """Every pair (x1, x2) as (x1 cos - x2 sin, x2 cos + x1 sin), with that sign of the sines."""
    numbers = list(x.unbind(-1))
    P = rotation.num_pairs
    for p, (i, j) in enumerate(places(P, rotation.width, rotation.start)):
        cos, sin = rotation.table[:, None, :, p].to(x.dtype), sign * rotation.table[:, None, :, P + p].to(x.dtype)
        numbers[i], numbers[j] = numbers[i] * cos - numbers[j] * sin, numbers[j] * cos + numbers[i] * sin
    return torch.stack(numbers, dim=-1)


def undone(query, rotation):
    """x of y = query."""
    return query if rotation is None else pair_by_pair(query, rotation, -1)


def rotated(x, cos, sin, width, start=0):
    """y, as a model has it; cos and sin with its scale."""
    return pair_by_pair(x, Rotation(torch.cat([cos, sin], dim=-1), width, start), 1)


def in_double(rotation):
    """The same numbers."""
    return None if rotation is None else rotation._replace(table=rotation.table.double())
