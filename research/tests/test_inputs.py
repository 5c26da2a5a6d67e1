"""Random inputs beside a task's: other contents of the same kind."""

import torch

from research.experiments.inputs import with_random_inputs
from tests.tiny import INPUTS, adapted


def test_random_inputs_stand_beside_text():
    model = adapted()
    config = model.config
    special = {config.bos_token_id, config.eos_token_id, config.pad_token_id} - {None}
    batch = {**INPUTS, "labels": INPUTS["input_ids"]}
    (found,) = with_random_inputs(model, [batch])
    places = sum(INPUTS["input_ids"] == token for token in special).bool()
    assert torch.equal(found["input_ids"][places], INPUTS["input_ids"][places])
    assert not torch.equal(found["input_ids"], INPUTS["input_ids"])
    assert found["input_ids"].max() < config.vocab_size
    assert not set(found["input_ids"][~places].tolist()) & special
    assert found["labels"] is batch["labels"]


def test_noise_stands_beside_pictures():
    model = adapted()
    picture = {"pixel_values": 3 + 2 * torch.randn(2, 3, 32, 32), "labels": torch.zeros(2)}
    (found,) = with_random_inputs(model, [picture])
    assert found["labels"] is picture["labels"]
    difference = found["pixel_values"] - picture["pixel_values"]
    assert difference.mean().abs() < 0.2
    assert 2.5 < difference.std() < 3.2  # 2 sqrt(2): not the same, as wide
    assert with_random_inputs(model, [{**picture, "input_ids": INPUTS["input_ids"]}]) == []
