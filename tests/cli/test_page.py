"""The page of an adapter: all of it in one file, and its figures those of the attention."""

import json
import re
from html.parser import HTMLParser

import pytest
import torch

from ntk_attention.cli.page import Seen, page, read_run, write_page
from ntk_attention.cli.run_folder import RECORD as RECORD_NAME
from ntk_attention.tuner.observation import prefix_shares, token_shares
from tests.tiny import adapted

RECORD = {
    "settings": {"model": "m", "data": "<data>", "packing": False, "items": None, "adapter": {"rank": 2}},
    "train_loss": [[1, 3.0], [2, 2.0]],
    "validation_loss": [[2, 2.5]],
    "start_loss": 3.5,
    "before": {"loss": 3.0, "exact_match": 0.1},
    "after": {"loss": 2.0, "exact_match": 0.25},
    "trainable_parameters": 1000,
    "train_items": 1440,
    "validation_items": 64,
    "test_items": 96,
    "train_tokens": 12345,
    "steps": 90,
    "seconds": 66.0,
    "hardware": "CPU",
}


class Checker(HTMLParser):
    """What is open, and everything that a browser would fetch."""

    def __init__(self):
        super().__init__()
        self.open, self.fetched = [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.fetched += [value for name, value in attributes if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_shares_by_token_are_those_of_the_attention():
    ids = torch.arange(2, 9)[None]
    model = adapted()
    shares = token_shares(model, ids)
    expected = prefix_shares(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    assert shares.shape == (*expected.shape, 7)
    torch.testing.assert_close(shares.mean(dim=-1), expected)
    with pytest.raises(ValueError, match="no token reached the adapter"), model.disable_adapter():
        token_shares(model, ids)


def test_the_page_is_whole_and_fetches_nothing(tmp_path):
    seen = Seen(torch.rand(3, 2, 4), ["a", "<b>", " $", "\n"])
    text = page("out, an adapter of <m>", [("covers", "2 of 2 & more")], RECORD, seen)
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert all(link.startswith("#") or link.startswith("data:") for link in checker.fetched)
    assert "url(http" not in text
    for part in ("&lt;b&gt;", "2 of 2 &amp; more", "&lt;data&gt;", "1,440 train", "12,345 tokens", "10.0%", "25.0%"):
        assert part in text
    assert text.count("<svg") == 3
    assert "packing" not in text  # an option that was not used
    write_page(tmp_path / "page.html", text)
    assert (tmp_path / "page.html").read_text() == text
    with pytest.raises(ValueError, match="cannot be written to: No such file"):
        write_page(tmp_path / "nowhere" / "page.html", text)


def test_shade_says_who_looks_at_the_prefix_most():
    shares = torch.tensor([0.1, 0.4, 0.2]).expand(1, 1, 3)
    (text,) = [part for part in Seen(shares, ["a", "b", "c"]).sections() if 'class="text"' in part]
    shades = [float(x) for x in re.findall(r"rgba\(31, 119, 180, ([\d.]+)\)", text)]
    assert shades == pytest.approx([0, 0.75, 0.25], abs=1e-3)


def test_an_adapter_without_a_run(tmp_path):
    text = page("adapter", [("covers", "all")], None, None)
    assert "Training" not in text
    unfinished = page("adapter", [("covers", "all")], {"settings": RECORD["settings"]}, None)
    assert "Training" not in unfinished
    assert "&lt;data&gt;" in unfinished


def test_a_record_of_something_else_is_refused(tmp_path):
    assert read_run(tmp_path) is None
    path = tmp_path / RECORD_NAME
    path.write_text(json.dumps({"settings": {}, "before": {}}))  # a run that has not ended: nothing is shown of it
    assert read_run(tmp_path) == {"settings": {}, "before": {}}
    path.write_text(json.dumps(RECORD))
    assert read_run(tmp_path) == RECORD
    path.write_text(json.dumps({name: x for name, x in RECORD.items() if name not in ("seconds", "train_tokens")}))
    with pytest.raises(ValueError, match=r"finetune.json lacks train_tokens, seconds, which the page shows: expected"):
        read_run(tmp_path)
