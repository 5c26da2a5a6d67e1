"""What options make of a run: steps, schedule, best checkpoint, whom it tells, and what is refused first."""

import importlib.util
import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import TrainerCallback

from ntk_attention.cli import finetuning
from ntk_attention.cli.finetuning import Settings, finetune, training_arguments
from ntk_attention.cli.models import load_model
from ntk_attention.cli.run_folder import CHECKPOINTS, RECORD
from ntk_attention.cli.trainer import AdapterTrainer
from tests.tiny import save_letters


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_letters(tmp_path_factory.mktemp("data") / "letters.jsonl")


@pytest.fixture
def settings(model_folder, data):
    def make(**options):
        given = {"items": 60, "held_out": 6, "batch_size": 8, "learning_rate": 0.05, "max_new_tokens": 2, **options}
        return Settings(str(model_folder), str(data), **{"dtype": "float32", **given})

    return make


def test_schedules(settings, tmp_path):
    def arguments(**options):
        return training_arguments(settings(**options), 160, tmp_path)

    assert arguments().lr_scheduler_type == "linear"
    assert arguments(scheduler="cosine").lr_scheduler_type == "cosine"
    assert arguments(scheduler="constant").lr_scheduler_type == "constant_with_warmup"  # so that --warmup holds
    assert [arguments(**x).get_warmup_steps(20) for x in ({}, {"warmup": 0}, {"warmup": 7}, {"warmup": 0.5})] == [
        2,
        0,
        7,
        10,
    ]
    assert arguments(gradient_accumulation=4).max_steps == 5
    assert arguments(epochs=1.5).max_steps == 30
    best = arguments(save_best=True)
    assert best.eval_steps == best.save_steps


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"too_long": "squeeze"}, "too_long must be one of refuse, drop, cut, got 'squeeze'"),
        ({"scheduler": "wavy"}, "scheduler must be one of linear, cosine, constant, got 'wavy'"),
        ({"dtype": "int8"}, "dtype must be one of auto, float32, bfloat16, float16, got 'int8'"),
        ({"warmup": 1.5}, "warmup must be a number of steps, or below 1 a share of them, got 1.5"),
        ({"warmup": -1}, "warmup must be a number of steps"),
        ({"patience": 0}, "patience must be positive and finite, got 0"),
        ({"gradient_accumulation": 0}, "gradient_accumulation must be positive and finite, got 0"),
        ({"max_length": 0}, "max_length must be positive and finite, got 0"),
        ({"packing": True}, "packing fills rows of max_length tokens: say how many"),
    ],
)
def test_bad_options(options, message, settings):
    with pytest.raises(ValueError, match=message):
        settings(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"report_to": "wandbb"}, r"report_to must be one or several of .*tensorboard.*, got 'wandbb'"),
        ({"report_to": "mlflow"}, "report_to needs mlflow, which is not installed: pip install mlflow"),
        ({"push_to_hub": "a/b/c"}, "push_to_hub: 'a/b/c' is no name of a repository"),
        ({"push_to_hub": "me/mine"}, "push_to_hub: the hub does not let us in .hf auth login"),
    ],
)
def test_services_are_asked_before_anything_else(options, message, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(finetuning, "prepare", lambda *_: pytest.fail("data were read"))
    with pytest.raises(ValueError, match=message):
        finetune(settings(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_4_bits_need_their_library(settings):
    with pytest.raises(ValueError, match="load_in_4bit needs bitsandbytes, which is not installed"):
        settings(load_in_4bit=True)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.slow
def test_4_bits(settings, tmp_path):
    record = finetune(settings(load_in_4bit=True), tmp_path / "out")
    assert record["after"]["loss"] < record["before"]["loss"]


def test_dtype(model_folder):
    for dtype in (torch.float16, torch.float32):
        assert load_model(str(model_folder), dtype)[0].dtype == dtype


@pytest.mark.slow
def test_gradient_accumulation_is_a_larger_batch(settings, tmp_path):
    small = finetune(settings(batch_size=4, gradient_accumulation=2), tmp_path / "small")
    large = finetune(settings(batch_size=8), tmp_path / "large")
    assert small["steps"] == large["steps"]
    for name in ("train_loss", "validation_loss"):
        torch.testing.assert_close(torch.tensor(small[name]), torch.tensor(large[name]), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_packed_run_learns(settings, tmp_path):
    record = finetune(settings(packing=True, max_length=32, batch_size=2, epochs=3), tmp_path / "out")
    assert record["after"]["loss"] < record["before"]["loss"]
    assert record["train_rows"] < record["train_items"] / 6


class Worsens:
    """Validation losses that fall three times, and then rise."""

    def __init__(self, monkeypatch):
        self.calls, self.losses = 0, [3.0, 2.0, 1.0]
        monkeypatch.setattr(AdapterTrainer, "evaluate", self.evaluate_of())

    def evaluate_of(self):
        def evaluate(trainer, *args, **kwargs):
            step = trainer.state.global_step
            metrics = {"eval_loss": self.losses[step - 1] if step <= len(self.losses) else float(step)}
            trainer.log(metrics)
            trainer.control = trainer.callback_handler.on_evaluate(
                trainer.args, trainer.state, trainer.control, metrics
            )
            return metrics

        return evaluate


class KeepAdapter(TrainerCallback):
    """The adapter after a step."""

    def __init__(self, step):
        self.step, self.tensors = step, {}

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == self.step:
            self.tensors.update(finetuning.adapter_tensors(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "last"), [({"save_best": True}, 6), ({"patience": 2}, 5)], ids=["best", "patience"]
)
def test_the_best_is_kept(options, last, settings, tmp_path, monkeypatch):
    """It is the adapter of step 3, whether the run goes on or stops after two that were worse, resumed or not."""
    Worsens(monkeypatch)
    kept, make_trainer = KeepAdapter(3), finetuning.make_trainer

    def watched(*args):
        trainer = make_trainer(*args)
        trainer.add_callback(kept)
        return trainer

    monkeypatch.setattr(finetuning, "make_trainer", watched)
    save_whole = finetuning.save_whole
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "save_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(settings(**options), tmp_path / "stopped")
    assert finetuning.save_whole is save_whole
    checkpoints = {path.name for path in (tmp_path / "stopped" / CHECKPOINTS).glob("checkpoint-*")}
    assert checkpoints == {"checkpoint-3", f"checkpoint-{last - 1}", f"checkpoint-{last}"}
    record = finetune(settings(**options), tmp_path / "stopped", resume=True)
    again = finetune(settings(**options), tmp_path / "out")
    assert record["steps"] == again["steps"] == last
    assert record["best_step"] == again["best_step"] == 3
    for folder in ("stopped", "out"):
        saved = load_file(tmp_path / folder / "adapter_model.safetensors")
        for name, x in kept.tensors.items():
            found = next(y for key, y in saved.items() if key == name.replace(".default", ""))
            torch.testing.assert_close(found, x)


@pytest.mark.slow
def test_other_data_are_not_resumed(settings, data, tmp_path, monkeypatch):
    copy = shutil.copy(data, tmp_path / "letters.jsonl")
    chosen = Settings(**{**vars(settings()), "data": str(copy)})
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "save_whole", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            finetune(chosen, tmp_path / "out")
    lines = copy.read_text().splitlines(keepends=True)
    copy.write_text("".join([*lines[:20], json.dumps({"prompt": "new", "completion": "x"}) + "\n", *lines[20:]]))
    with pytest.raises(ValueError, match="was started with other data than are there now: cannot resume"):
        finetune(chosen, tmp_path / "out", resume=True)


@pytest.mark.slow
def test_the_hub_gets_the_adapter_alone(settings, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **options: calls.append((name, options)) or "url")

    def upload(self, *, repo_id, folder_path, allow_patterns):
        from huggingface_hub.utils import filter_repo_objects

        names = sorted(path.name for path in folder_path.iterdir())
        calls.append((repo_id, sorted(filter_repo_objects(names, allow_patterns=allow_patterns))))

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    finetune(settings(push_to_hub="me/mine"), tmp_path / "out")
    (created, options), (name, files) = calls
    assert (created, name, options) == ("me/mine", "me/mine", {"private": True, "exist_ok": True})
    assert files == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert (tmp_path / "out" / RECORD).is_file()

    def fail(*args, **options):
        raise ConnectionError("no net")

    monkeypatch.setattr(HfApi, "upload_folder", fail)
    with pytest.raises(
        ValueError, match=r"the adapter is in .*late, but could not be put on the hub: no net; `hf upload"
    ):
        finetune(settings(push_to_hub="me/mine"), tmp_path / "late")
    assert (tmp_path / "late" / "adapter_model.safetensors").is_file()
