"""The examples on tiny models; those whose library is not installed are skipped."""

import json

import numpy
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from ntk_attention import NTKAttentionConfig
from tests.tiny import save_letters, skip_unless_transformers_takes_this_peft

pytestmark = pytest.mark.slow


@pytest.fixture
def adapter(model_folder, tmp_path):
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    get_peft_model(base, NTKAttentionConfig(task_type="CAUSAL_LM", init_weights=False)).save_pretrained(tmp_path / "a")
    return tmp_path / "a"


def test_trl(model_folder, tmp_path):
    pytest.importorskip("trl")
    from examples.trl_sft import STEPS, main

    losses = main(str(model_folder), str(save_letters(tmp_path / "data.jsonl")), str(tmp_path / "out"))
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    inputs = {"input_ids": torch.arange(2, 9)[None]}
    expected = base(**inputs).logits
    assert not torch.equal(PeftModel.from_pretrained(base, tmp_path / "out")(**inputs).logits, expected)


def test_pipeline(model_folder, adapter):
    from examples.text_generation import main

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), adapter)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    inputs = tokenizer("some words", return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert main(str(model_folder), str(adapter), "some words") == tokenizer.decode(ids, skip_special_tokens=True)


def test_lm_eval(model_folder, adapter, tmp_path):
    pytest.importorskip("lm_eval")
    from examples.lm_evaluation import main

    data = tmp_path / "items.jsonl"
    lines = [
        {"question": f"{a}{b}", "choices": ["yes", "no"], "answer": i % 2} for a in "ab" for i, b in enumerate("12")
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "letters.yaml").write_text(
        f"task: letters\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: answer\n"
        "metric_list:\n  - metric: acc\n  - metric: brier_score\n"
    )
    results = main(str(model_folder), str(adapter), "letters", str(tmp_path))
    figures = {name: found["brier_score,none"] for name, found in results.items()}
    assert figures["base"] != figures["adapter"]


def test_sentence_transformers(model_folder, tmp_path):
    pytest.importorskip("sentence_transformers")
    skip_unless_transformers_takes_this_peft()
    from sentence_transformers import SentenceTransformer

    from examples.sentence_embeddings import main

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model_folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertModel(BertConfig(vocab_size=258, **sizes)).save_pretrained(tmp_path / "bert")
    pairs = [{"anchor": f"{a}{b}{a}", "positive": f"{a}{a}{b}"} for a in "abcdefghij" for b in "0123"]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    model = main(str(tmp_path / "bert"), str(tmp_path / "pairs.jsonl"), str(tmp_path / "out"))
    texts = [pair["anchor"] for pair in pairs]
    trained = model.encode(texts)
    numpy.testing.assert_allclose(SentenceTransformer(str(tmp_path / "out")).encode(texts), trained, atol=1e-5)
    assert abs(SentenceTransformer(str(tmp_path / "bert")).encode(texts) - trained).max() > 1e-3
    assert any("ntk_states" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))
