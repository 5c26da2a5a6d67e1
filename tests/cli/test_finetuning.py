"""The main job on a tiny model: figures, files, resume, and what is refused before any work."""

import json
import shutil

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainingArguments

from ntk_attention.cli import finetuning
from ntk_attention.cli.finetuning import Settings, finetune
from ntk_attention.cli.models import load_model
from ntk_attention.cli.run_folder import RECORD
from ntk_attention.cli.sources import load_data
from ntk_attention.cli.splits import split_items
from ntk_attention.cli.trainer import AdapterTrainer
from tests.tiny import adapted, save_letters, save_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_letters(tmp_path_factory.mktemp("data") / "letters.jsonl")


@pytest.fixture(scope="module")
def settings(model_folder, data):
    return Settings(
        str(model_folder),
        str(data),
        items=100,
        held_out=10,
        epochs=2,
        batch_size=8,
        learning_rate=0.1,
        max_new_tokens=4,
    )


@pytest.fixture(scope="module")
def run(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "out"
    return finetune(settings, folder), folder


def test_it_learns_and_says_so(run):
    record, folder = run
    assert record["after"]["loss"] < record["before"]["loss"] - 0.1
    losses = [loss for _, loss in record["train_loss"]]
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])
    assert record["before"]["exact_match"] <= record["after"]["exact_match"]
    assert record["train_items"] + 20 == 100
    assert record["test_items"] == 10
    assert record["steps"] == 20
    assert record == json.loads((folder / RECORD).read_text())
    heads, d, r, rank, D, hidden, in_block = 4, 8, 8 + 1, 1, 32, 64, 1
    assert record["trainable_parameters"] == 2 * (heads * (r * rank + rank * d + r) + 3 * (D + hidden) * in_block)


def test_the_folder_is_an_ordinary_adapter(run):
    _, folder = run
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", RECORD} <= names
    assert "checkpoints" not in names
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    saved = load_file(folder / "adapter_model.safetensors")
    name, Z = next((n, x) for n, x in saved.items() if n.endswith("ntk_states.Z_A"))
    assert torch.equal(model.get_parameter(name.removesuffix(".Z_A") + ".default.Z_A"), Z)


def test_an_interrupted_run_resumes_to_the_same_end(run, settings, tmp_path):
    """Stopped in the middle and resumed, against the run that was not: loss curve and adapter."""
    record, folder = run

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 11:
                raise KeyboardInterrupt

    make_trainer = finetuning.make_trainer
    with pytest.MonkeyPatch.context() as patch:

        def interrupted(*args):
            trainer = make_trainer(*args)
            trainer.add_callback(Stop())
            return trainer

        patch.setattr(finetuning, "make_trainer", interrupted)
        with pytest.raises(KeyboardInterrupt):
            finetune(settings, tmp_path / "out")
    assert (tmp_path / "out" / "checkpoints").is_dir()
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        finetune(settings, tmp_path / "out")
    resumed = finetune(settings, tmp_path / "out", resume=True)
    assert resumed["before"] == record["before"]
    for name in ("start_loss", "train_loss", "validation_loss", "after"):
        assert resumed[name] == record[name]
    expected, actual = ((f / "adapter_model.safetensors").read_bytes() for f in (folder, tmp_path / "out"))
    assert actual == expected


def test_text_has_no_exact_match(model_folder, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("It was the best of times, it was the worst of times. " * 60)
    small = Settings(str(model_folder), str(path), items=8, held_out=2, batch_size=2, max_length=64)
    record = finetune(small, tmp_path / "out")
    assert set(record["after"]) == {"loss"}
    assert record["train_tokens"] == 64 * record["train_items"]
    assert record["after"]["loss"] < record["before"]["loss"]


def test_nothing_held_out_was_trained_on(settings, tmp_path):
    """Prompts, and texts without a prompt, that a file holds several times."""
    for field in ("prompt", "completion"):
        lines = [{"prompt": "", "completion": "x", field: f"{i % 20} and"} for i in range(100)]
        path = tmp_path / f"{field}.jsonl"
        path.write_text("\n".join(json.dumps(line) for line in lines))
        split = split_items(settings, load_data(str(path)).items)
        parts = (split.train, split.validation, split.test)
        train, *others = ({vars(item)[field] for item in part} for part in parts)
        assert train
        assert all(part and not part & train for part in others)
        assert split.repeated + sum(map(len, parts)) == 100
    path.write_text("\n".join([json.dumps({"prompt": "a", "completion": "b"})] * 100))
    with pytest.raises(ValueError, match="0 training and 20 held-out items: too few"):
        split_items(settings, load_data(str(path)).items)


def test_a_model_whose_tokenizer_adds_tokens(tmp_path):
    """It trains, and what it learns is there when the adapter answers."""
    folder = save_model(tmp_path / "model", "<start> $A <end>")
    letters = save_letters(tmp_path / "letters.jsonl")
    record = finetune(Settings(str(folder), str(letters), 100, 10, 2, 8, 0.1, 4), tmp_path / "out")
    assert record["after"]["loss"] < record["before"]["loss"] - 0.1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": 0}, "items must be positive and finite, got 0"),
        ({"epochs": float("inf")}, "epochs must be positive and finite, got inf"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"learning_rate": float("nan")}, "learning_rate must be positive and finite, got nan"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"seed": 2**32}, "seed must be a whole number from 0 to"),
    ],
)
def test_bad_settings(settings, changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{**vars(settings), **changes})


def test_folders_that_are_not_ours(settings, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        finetune(settings, tmp_path / "file")
    with pytest.raises(ValueError, match="not empty and not a run"):
        finetune(settings, tmp_path, overwrite=True)
    assert (tmp_path / "file").read_text() == "x"


def test_overwrite_leaves_other_files_alone(run, settings, tmp_path):
    shutil.copytree(run[1], tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / RECORD).write_text("damaged")
    finetune(settings, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_other_settings_and_damage_are_named(run, settings, tmp_path):
    _, folder = run
    shutil.copytree(folder, tmp_path / "out")
    other = Settings(**{**vars(settings), "seed": 1})
    with pytest.raises(ValueError, match=r"other settings \(seed\)"):
        finetune(other, tmp_path / "out", resume=True)
    with pytest.raises(ValueError, match="is finished: nothing to resume"):
        finetune(settings, tmp_path / "out", resume=True)
    (tmp_path / "out" / RECORD).write_text('{"name": 1}')
    with pytest.raises(ValueError, match="is not the record of a run"):
        finetune(settings, tmp_path / "out", resume=True)
    (tmp_path / "out" / RECORD).write_text('{"settings": ')
    with pytest.raises(ValueError, match="is damaged"):
        finetune(settings, tmp_path / "out", resume=True)


def test_overwrite_keeps_the_old_run_until_the_new_one_can_start(run, settings, tmp_path):
    _, folder = run
    shutil.copytree(folder, tmp_path / "out")
    with pytest.raises(ValueError, match="no data at"):
        finetune(Settings(**{**vars(settings), "data": "nothing.jsonl"}), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_full_disk_is_seen_at_the_start(settings, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2**20))
    with pytest.raises(ValueError, match="1 MiB of free disk space, 200 are needed"):
        finetune(settings, tmp_path / "out")


def test_one_process_uses_one_gpu(tmp_path):
    arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=4, use_cpu=True, report_to=[])
    assert arguments.n_gpu == 0
    arguments._n_gpu = 2  # what transformers counts where there are two
    assert arguments.train_batch_size == 8
    trainer = AdapterTrainer(model=adapted(), args=arguments, pad_token_id=0)
    assert (trainer.args.n_gpu, trainer.args.train_batch_size) == (1, 4)


def broken_at(step, breaks, monkeypatch):
    """A run that something breaks in this step."""
    training_step = AdapterTrainer.training_step

    def step_of_a_broken_run(self, model, inputs, *args, **kwargs):
        if self.state.global_step + 1 == step:
            breaks(model, monkeypatch)
        return training_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(AdapterTrainer, "training_step", step_of_a_broken_run)


def poison_state(model, _):
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "layers.1" in n and n.endswith("default.Z_A"))[0, 0, 0] = (
            torch.nan
        )


def poison_gradient(model, _):
    next(p for n, p in model.named_parameters() if "layers.1" in n and n.endswith(".log_k")).register_hook(
        lambda gradient: gradient / 0
    )


@pytest.mark.parametrize(
    ("breaks", "message"),
    [
        (poison_state, "the loss is not finite at step 12: .*layers.1.self_attn is the first module that makes"),
        (poison_gradient, "the gradient is not finite at step 12: the last layer .*layers.1.self_attn.*log_k"),
    ],
    ids=["state", "gradient"],
)
def test_numbers_that_are_not_finite_stop_the_run(breaks, message, run, settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        broken_at(12, breaks, patch)
        checkpoint = tmp_path / "out" / "checkpoints" / "checkpoint-11"
        with pytest.raises(ValueError, match=f"{message}.*lower the learning rate.*checkpoint is {checkpoint} "):
            finetune(settings, tmp_path / "out")
    assert finetune(settings, tmp_path / "out", resume=True)["after"] == run[0]["after"]


@pytest.mark.parametrize(("fast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], ids=["fast", "slow"])
def test_dtype_of_a_base_model_on_a_cpu(fast, dtype, model_folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    assert load_model(str(model_folder))[0].dtype == dtype
