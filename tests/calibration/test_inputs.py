"""What calibration looks at beside a task's batches: text that the model writes itself."""

import pytest
import torch
from peft import get_peft_model

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.calibration.inputs import own_text
from ntk_attention.calibration.settings import DEFAULT, CalibrationSettings
from tests.families import FAMILIES
from tests.tiny import INPUTS, adapted


def test_a_language_model_writes_text():
    model = adapted()
    state = torch.random.get_rng_state()
    (found,) = own_text(model, [INPUTS], DEFAULT)
    assert torch.equal(torch.random.get_rng_state(), state)
    ids = found["input_ids"]
    assert ids.shape == (DEFAULT.own_rows, min(DEFAULT.own_length, model.config.max_position_embeddings // 2))
    assert set(ids[:, 0].tolist()) == {model.config.bos_token_id}
    assert len({tuple(row) for row in ids.tolist()}) == DEFAULT.own_rows
    with model.disable_adapter(), torch.no_grad():  # likely under the model itself, unlike tokens drawn at random
        own, drawn = (
            model(input_ids=x, labels=x).loss for x in (ids, torch.randint_like(ids, model.config.vocab_size))
        )
    assert own < drawn
    assert torch.equal(own_text(model, [INPUTS], DEFAULT)[0]["input_ids"], ids)
    (short,) = own_text(model, [INPUTS], CalibrationSettings(own_rows=3, own_length=5))
    assert short["input_ids"].shape == (3, 5)


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_other_models_write_none(name):
    family = FAMILIES[name]
    assert own_text(get_peft_model(family.build(), NTKAttentionConfig()), [family.inputs()], DEFAULT) == []


def test_a_model_without_a_first_token_writes_none():
    model = adapted()
    model.config.bos_token_id = model.config.eos_token_id = None
    assert own_text(model, [INPUTS], DEFAULT) == []


def test_a_model_that_needs_more_than_its_first_token(monkeypatch):
    model = adapted()

    def generate(**inputs):
        raise ValueError("no picture")

    monkeypatch.setattr(model.get_base_model(), "generate", generate)
    with pytest.warns(UserWarning, match="does not write text from its first token alone .*no picture") as record:
        calibrate(model, [INPUTS])
    assert record[0].filename == __file__
    with pytest.warns(UserWarning, match="first token"):
        assert own_text(model, [INPUTS], DEFAULT) == []
