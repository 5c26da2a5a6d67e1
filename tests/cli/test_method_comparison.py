"""Our experiments for PEFT's method comparison: they load, attach and have their sizes; a dry run beside stand-ins."""

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from examples.method_comparison.run_ntk import calibrated
from ntk_attention import NTKAttentionConfig

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples/method_comparison"
EXPERIMENTS = sorted((FOLDER / "experiments/ntk_attention").iterdir())
LLAMA_3B = {
    "hidden_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128,
    "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip
TINY = {**LLAMA_3B, "hidden_size": 96, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 50,
        "num_attention_heads": 6, "num_key_value_heads": 2}  # fmt: skip
MILLIONS = {"attention": 11.2, "attention-quarter": 2.8, "default": 11.1, "default-quarter": 2.8}  # as the README says


def name_of(path):
    return path.name.removeprefix("llama-3.2-3B-")


def test_sizes_on_the_real_architecture():
    assert {name_of(path) for path in EXPERIMENTS} == MILLIONS.keys()
    for path in EXPERIMENTS:
        with torch.device("meta"):
            base = LlamaForCausalLM(LlamaConfig(**LLAMA_3B))
        model = get_peft_model(base, PeftConfig.from_pretrained(path))
        trained, _ = model.get_nb_trainable_parameters()
        assert round(trained / 1e6, 1) == MILLIONS[name_of(path)]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=name_of)
def test_experiments_attach_and_train(path):
    """With the settings that theirs are merged with; none of our keys is unknown there."""
    config = PeftConfig.from_pretrained(path)
    assert isinstance(config, NTKAttentionConfig)
    assert json.loads((path / "training_params.json").read_text()).keys() == {"optimizer_kwargs"}
    torch.manual_seed(0)
    ids = torch.randint(50, (4, 12))

    def get_model(*, compile, peft_config):
        return get_peft_model(LlamaForCausalLM(LlamaConfig(**TINY)), peft_config)

    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    get = calibrated(get_model, lambda: batches)
    model = get(compile=False, peft_config=config)
    options = json.loads((path / "training_params.json").read_text())["optimizer_kwargs"]
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    losses = []
    for _ in range(8):
        loss = model(**batches[0], labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert any(layer.abs().sum() > 0 for name, layer in model.named_buffers() if name.endswith("log_scale"))
    with pytest.raises(ValueError, match="cannot be calibrated"):
        get(compile=True, peft_config=config)


STANDINS = {
    "utils.py": """
        import json
        from types import SimpleNamespace
        import torch
        from peft import get_peft_model
        from transformers import LlamaConfig, LlamaForCausalLM
        FILE_NAME_TRAIN_PARAMS = "training_params.json"
        def get_train_config(path):
            own = json.load(open(path))
            return SimpleNamespace(model_id="tiny", max_seq_length=9, query_template="Q: {query}", compile=False, **own)
        class Tokenizer:
            def pad(self, rows, return_tensors):
                longest = max(map(len, rows["input_ids"]))
                return {name: torch.tensor([x + [0] * (longest - len(x)) for x in own]) for name, own in rows.items()}
        def get_tokenizer(*, model_id, max_seq_length):
            assert (model_id, max_seq_length) == ("tiny", 9)
            return Tokenizer()
        def get_model(*, model_id, compile, peft_config):
            torch.manual_seed(0)
            sizes = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=128)
            model = LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=1, **sizes))
            return get_peft_model(model, peft_config)
    """,
    "data.py": """
        def get_train_valid_test_datasets(*, tokenizer, query_template, print_fn):
            assert query_template == "Q: {query}"
            print_fn("sizes")
            rows = [list(range(1, 3 + i % 6)) for i in range(30)]
            masks = [[1] * len(row) for row in rows]
            class Dataset:
                def __getitem__(self, place):
                    return {"input_ids": rows[place], "attention_mask": masks[place], "response": rows[place]}
            return Dataset(), None, None
    """,
    "run.py": """
        import sys
        from utils import get_model, get_train_config
        from peft import PeftConfig
        if __name__ == "__main__":
            assert sys.argv[1] == "-v"
            config = get_train_config(sys.argv[2] + "training_params.json")
            peft_config = PeftConfig.from_pretrained(sys.argv[2])
            model = get_model(model_id=config.model_id, compile=config.compile, peft_config=peft_config)
            scales = [x for name, x in model.named_buffers() if name.endswith("log_scale")]
            print(peft_config.peft_type, len(scales), all((x != 0).all() for x in scales))
    """,
}


def test_their_run_starts_calibrated(tmp_path):
    """Through stand-ins with the names and arguments of their modules."""
    for name, text in STANDINS.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    shutil.copytree(FOLDER / "experiments", tmp_path / "experiments")
    shutil.copy(FOLDER / "run_ntk.py", tmp_path)
    experiment = "experiments/ntk_attention/llama-3.2-3B-default/"
    done = subprocess.run(
        [sys.executable, "run_ntk.py", "-v", experiment], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["2", "True"]
    assert "NTK_ATTENTION" in done.stdout
