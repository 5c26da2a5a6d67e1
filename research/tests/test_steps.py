"""Training steps of the comparison: recorded ones, and what a recording cannot hold."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from research.experiments.steps import MadeThere, RecordedTraining, Training


def test_numbers_become_tensors_on_the_device():
    """What a CUDA graph cannot hold is a copy from the CPU; "meta" stands for the GPU."""
    with torch.device("meta"), MadeThere():
        made = [torch.tensor(x) for x in (True, 3, 0.5)] + [torch.tensor(7, dtype=torch.int32)]
    assert {x.device.type for x in made} == {"meta"}
    expected = [torch.tensor(x) for x in (True, 3, 0.5, [1.0, 2.0])]
    with MadeThere():
        for x in expected:
            torch.testing.assert_close(torch.tensor(x.tolist()), x)
        assert torch.tensor(7, dtype=torch.int32).dtype == torch.int32


@pytest.mark.gpu
def test_recorded_steps_are_ordinary_steps():
    def train(kind):
        torch.manual_seed(0)
        model = Regression().cuda()
        groups = [{"params": [model.linear.weight], "lr": 1e-2}, {"params": [model.linear.bias], "lr": 1e-3}]
        training = kind(model, groups, 12, nullcontext)
        generator = torch.Generator().manual_seed(1)
        batches = [{"x": torch.randn(4 + step % 2, 8, generator=generator)} for step in range(12)]
        return [training.step(batch).item() for batch in batches], model.linear.weight

    (losses, weight), (expected_losses, expected) = (train(kind) for kind in (RecordedTraining, Training))
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    torch.testing.assert_close(weight, expected)


class Regression(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(8, 1)

    def forward(self, x):
        error = self.linear(x) - torch.tensor(1.5).to(x.device) * x.sum(dim=1, keepdim=True)
        return SimpleNamespace(loss=error.square().mean())
