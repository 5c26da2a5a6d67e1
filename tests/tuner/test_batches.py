"""Batches that no model takes are refused before it runs, in words that say what was given and what is expected."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import get_peft_model
from transformers import BatchEncoding

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.tuner.batches import calling, checked_batches
from ntk_attention.tuner.observation import prefix_shares
from tests.families import FAMILIES
from tests.tiny import INPUTS, adapted, logits

IDS = INPUTS["input_ids"]
B, L = IDS.shape
MASK = torch.ones_like(IDS)
EMBEDDINGS = torch.randn(B, L, 32)
TEXT, SHAPE = f"input_ids [{B}, {L}]", f"[{B}, {L}]"
IDS_BELOW = torch.where(IDS > 30, -100, IDS)
IMAGE = torch.randn(2, 3, 8, 8)

REFUSED = {  # before the model runs
    "no list": (None, "batches is a NoneType: expected a list, each of which is a dict of tensors"),
    "a number": (5, "batches is an int: expected a list"),
    "no dict": ([None], "batch 0 is a NoneType: expected a dict of tensors"),
    "the second": ([INPUTS, {"input_ids": IDS[0]}], f"batch 1 holds input_ids [{L}] int64: expected token ids [B, L]"),
    "one text": ([{"input_ids": IDS[0]}], "such as input_ids[None] for one text"),
    "one id": ([{"input_ids": IDS[0, 0]}], "batch 0 holds input_ids [] int64: expected token ids [B, L]"),
    "float ids": ([{"input_ids": IDS.float()}], f"{TEXT} float32: expected token ids of int64 or int32"),
    "bool ids": ([{"input_ids": IDS > 5}], f"{TEXT} bool: expected token ids of int64 or int32"),
    "byte ids": ([{"input_ids": IDS.to(torch.uint8)}], f"{TEXT} uint8: expected token ids of int64 or int32"),
    "ids of a decoder": ([{"decoder_input_ids": IDS[0]}], f"decoder_input_ids [{L}] int64: expected token ids [B, L]"),
    "arrays": ([{"input_ids": IDS.numpy()}], "batch 0 holds an ndarray under 'input_ids': expected a dict of tensors"),
    "arrays beside": ([{**INPUTS, "attention_mask": MASK.numpy()}], "an ndarray under 'attention_mask'"),
    "lists": ([{**INPUTS, "position_ids": IDS.tolist()}], "a list under 'position_ids'"),
    "no items": ([{"input_ids": IDS[:0]}], f"input_ids [0, {L}] int64: expected one item and one token at least"),
    "no tokens": ([INPUTS, {"input_ids": IDS[:, :0]}], f"batch 1 holds input_ids [{B}, 0] int64: expected one item"),
    "no pictures": ([{"pixel_values": IMAGE[:0]}], "pixel_values [0, 3, 8, 8] float32: expected one item"),
    "NaN": ([{"inputs_embeds": EMBEDDINGS * torch.nan}], "float32: expected finite numbers, got NaN or inf"),
    "inf": ([{"pixel_values": IMAGE / 0}], "pixel_values [2, 3, 8, 8] float32: expected finite numbers"),
    "flat embeddings": ([{"inputs_embeds": EMBEDDINGS[0]}], f"inputs_embeds [{L}, 32] float32: expected embeddings"),
    "sparse": ([{"input_ids": IDS.to_sparse()}], "expected a plain tensor, not a sparse_coo one"),
    "nested": ([{"input_ids": torch.nested.nested_tensor([IDS[0], IDS[0, :2]], layout=torch.jagged)}], "nested one"),
    "no data": ([{"input_ids": IDS.to("meta")}], "expected a tensor with data, not one on the meta device"),
    "a short mask": (
        [{"input_ids": IDS, "attention_mask": MASK[:, :3]}],
        f"attention_mask [{B}, 3] int64 beside {TEXT} int64: expected a mask {SHAPE}, or one of four dimensions",
    ),
    "a long mask": ([{"input_ids": IDS, "attention_mask": torch.ones(B, L + 4)}], f"expected a mask {SHAPE}"),
    "a flat mask": ([{"input_ids": IDS, "attention_mask": MASK[0]}], f"expected a mask {SHAPE}"),
    "a mask of one item": ([{"input_ids": IDS, "attention_mask": MASK[:1]}], f"expected a mask {SHAPE}"),
    "a mask of embeddings": ([{"inputs_embeds": EMBEDDINGS, "attention_mask": MASK[:, :3]}], f"a mask {SHAPE}"),
    "a mask of a decoder": (
        [{"decoder_input_ids": IDS, "decoder_attention_mask": MASK[:, :3]}],
        "decoder_attention_mask",
    ),
    "a mask of three dimensions": ([{"input_ids": IDS, "attention_mask": torch.ones(B, L, L)}], "of four dimensions"),
}


@pytest.mark.parametrize(("batches", "message"), REFUSED.values(), ids=list(REFUSED))
def test_refused(batches, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        checked_batches(batches)


TAKEN = {
    "text": INPUTS,
    "an encoding": BatchEncoding(INPUTS),
    "int32": {"input_ids": IDS.int()},
    "codes, codebooks first": {"input_ids": torch.ones(2, 4, 7).long(), "attention_mask": torch.ones(2, 7)},
    "codes, codebooks last": {"input_ids": torch.ones(2, 7, 4).long(), "attention_mask": torch.ones(2, 7)},
    "packed": {"input_ids": IDS[0], "cu_seq_lens_q": torch.tensor([0, L])},
    "packed in a row": {"input_ids": IDS[:1], "position_ids": torch.arange(L)[None], "max_length_q": L},
    "embeddings": {"inputs_embeds": EMBEDDINGS, "attention_mask": MASK},
    "a full mask": {"input_ids": IDS, "attention_mask": torch.full((B, 1, L, L), -torch.inf).triu(1)},
    "masks by kind": {"input_ids": IDS, "attention_mask": {"full_attention": torch.zeros(B, 1, L, L)}},
    "no mask": {"input_ids": IDS, "attention_mask": None},
    "a cache": {"input_ids": IDS, "attention_mask": torch.ones(B, L + 4), "past_key_values": object()},
    "sound and its mask": {"input_features": IMAGE[0], "attention_mask": torch.ones(3, 9), "decoder_input_ids": IDS},
    "NaN as no label": {**INPUTS, "labels": torch.full((B,), torch.nan)},
    "more than tensors": {**INPUTS, "texts": ["a", "b"], "image_sizes": [(2, 2)]},
    "text beside no pictures": {**INPUTS, "pixel_values": IMAGE[:0]},
}


@pytest.mark.parametrize("batch", TAKEN.values(), ids=list(TAKEN))
def test_taken(batch):
    assert checked_batches(iter([batch])) == [batch]


def test_codes_in_rows_of_their_own():
    """Of every item, which has one row of the mask."""
    batches = [{"input_ids": torch.ones(8, 7).long(), "attention_mask": torch.ones(2, 7)}]
    for config in (SimpleNamespace(num_codebooks=4), SimpleNamespace(decoder=SimpleNamespace(num_codebooks=4))):
        assert checked_batches(batches, model=SimpleNamespace(config=config)) == batches
    with pytest.raises(ValueError, match=r"expected a mask \[8, 7\]"):
        checked_batches(batches, model=SimpleNamespace(config=SimpleNamespace(num_codebooks=2)))


FAILING = {  # in the model, which alone knows
    "above the vocabulary": ({"input_ids": IDS + 64}, "input_ids holds numbers from 6[4-9] to .* from 0 to 63"),
    "below zero": ({"input_ids": IDS_BELOW}, "input_ids holds numbers from -100 to .*: model.embed_tokens has those"),
    "codes for a text": ({"input_ids": IDS[None]}, "RuntimeError: "),
    "labels alone": ({"labels": IDS}, "ValueError: You must specify exactly one of input_ids or inputs_embeds$"),
    "labels of another length": ({"input_ids": IDS, "labels": IDS[:, :3]}, "ValueError: "),
    "what it has no argument for": ({"pixel_values": IMAGE}, ""),
    "no data": ({"input_ids": IDS, "unknown": IDS.to("meta")}, "NotImplementedError: "),
}


@pytest.mark.parametrize("argument", ["batches", "others"])
@pytest.mark.parametrize(("batch", "message"), FAILING.values(), ids=list(FAILING))
def test_the_model_cannot_be_called(batch, message, argument):
    model = adapted()
    before = logits(model)
    name, x = next(iter(batch.items()))
    given = f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}"
    which = "batch 1" if argument == "batches" else "batch 1 of others"
    expected = rf"^the model cannot be called with {which}, which holds {re.escape(given)}.*: {message}"
    with pytest.raises(ValueError, match=expected) as caught:
        calibrate(model, **{"batches": [INPUTS], argument: [INPUTS, batch]})
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("family", "batch"),
    [("clip", {"input_ids": IDS}), ("whisper", {"decoder_input_ids": IDS}), ("t5", {"decoder_input_ids": IDS})],
)
def test_a_part_of_the_inputs(family, batch):
    model = get_peft_model(FAMILIES[family].build(), NTKAttentionConfig())
    with pytest.raises(ValueError, match=rf"cannot be called with batch 0, which holds \w+ \[{B}, {L}\] int64: "):
        calibrate(model, [batch])
    with pytest.raises(ValueError, match="cannot be called with batch 0"):
        prefix_shares(model, [batch])


def test_numbers_of_positions():
    """Positions are looked up as well: a text may be too long."""
    model = get_peft_model(FAMILIES["gpt2"].build(), NTKAttentionConfig())
    with pytest.raises(ValueError, match=r"holds numbers from 0 to 69: transformer.wpe has those from 0 to 63"):
        calibrate(model, [{"input_ids": torch.ones(1, 70, dtype=torch.long)}])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no room"), MemoryError(), KeyboardInterrupt()])
def test_other_errors_stay(error):
    with pytest.raises(type(error)) as caught, calling(adapted(), INPUTS, "a batch"):
        raise error
    assert caught.value is error


def test_own_errors_stay():
    with pytest.raises(ValueError, match=r"^batches is an int"), calling(adapted(), INPUTS, "a batch"):
        checked_batches(5)


def test_prefix_shares_of_wrong_batches():
    with pytest.raises(ValueError, match="batch 0 holds an ndarray"):
        prefix_shares(adapted(), [{"input_ids": np.array(IDS)}])
