"""Inputs of unit norm for the stylized model: random ones, and pieces of a photograph."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

PATCH = 16  # pixels along one side


def random_inputs(n: int, d: int, generator: torch.Generator) -> Tensor:
    """X [n, d], uniform on the sphere, float64."""
    X = torch.randn(n, d, dtype=torch.float64, generator=generator, device=generator.device)
    return X / X.norm(dim=1, keepdim=True)


def image_inputs(n: int, d: int, generator: torch.Generator) -> Tensor:
    """X [n, d]: n patches of the photograph that comes with matplotlib, each less its mean, projected by one Gaussian
    matrix and scaled to unit norm; float64. Patches without contrast are left out."""
    from matplotlib import cbook, image

    path = str(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))
    pixels = image.imread(path).astype(np.float64) / 255
    grey = torch.from_numpy(pixels.mean(axis=2))  # [height, width]
    patches = grey.unfold(0, PATCH, PATCH).unfold(1, PATCH, PATCH).reshape(-1, PATCH * PATCH)
    patches = patches - patches.mean(dim=1, keepdim=True)
    patches = patches[patches.norm(dim=1) > 0.5].to(generator.device)
    if n > len(patches):
        raise ValueError(f"the photograph has {len(patches)} patches, asked for {n}")
    order = torch.randperm(len(patches), generator=generator, device=generator.device)[:n]
    projection = torch.randn(PATCH * PATCH, d, dtype=torch.float64, generator=generator, device=generator.device)
    X = patches[order] @ projection
    return X / X.norm(dim=1, keepdim=True)


INPUTS = {"random": random_inputs, "image": image_inputs}
