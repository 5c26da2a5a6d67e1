"""`finetune` in two processes, against one process with the same batches: start, loss curve, adapter.

On two GPUs where there are as many (NCCL), else on the CPU (gloo).
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ntk_attention.cli.run_folder import CHECKPOINTS, RECORD
from ntk_attention.tuner.distributed import inputs_on
from tests.tiny import save_letters

pytestmark = pytest.mark.slow

FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
OFFLOAD = [*FSDP2, "--fsdp_offload_params", "true"]
ZERO3 = ["--use_deepspeed", "--zero_stage", "3"]
LAUNCH = ["-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
LAUNCH += ["--dynamo_backend", "no", "--num_processes", "2", "--main_process_port", "0"]
ON_GPUS = torch.cuda.device_count() >= 2
# Relative, of the start, of a loss, of a tensor. CUDA takes its kernels by the shape of a batch, so half of one is
# rounded in another way, and AdamW makes more of that with every step.
START, LOSS, TENSOR = (1e-5, 1e-4, 1e-3) if ON_GPUS else (0, 2e-6, 1e-5)


def start(*arguments, status=0):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    if not ON_GPUS:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
        if "--use_deepspeed" not in arguments:  # accelerate would not ask DeepSpeed
            environment["ACCELERATE_USE_CPU"] = "true"
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (result.returncode == 0) == (status == 0), result.stderr[-3000:]
    assert status == 0 or f"exitcode  : {status} " in result.stderr, result.stderr[-3000:]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_letters(tmp_path_factory.mktemp("data") / "letters.jsonl", "abcdefghijk")


@pytest.fixture(scope="module")
def alone(model_folder, data, tmp_path_factory):
    output = tmp_path_factory.mktemp("alone") / "out"
    start("-m", "tests.cli.processes", output, model_folder, data)
    return output


def test_inputs_go_where_the_model_computes():
    """As under FSDP2 with parameters on the CPU, where `generate` sends inputs to these; meta stands for the GPU."""
    model = torch.nn.Linear(2, 3, device="meta")
    with inputs_on(torch.device("meta"), model):
        assert model(torch.ones(1, 2)).shape == model(input=torch.ones(1, 2)).shape == (1, 3)
    assert not model._forward_pre_hooks


@pytest.mark.parametrize(
    "kind", [["--multi_gpu"], FSDP2, OFFLOAD, ZERO3], ids=["DDP", "FSDP2", "FSDP2 on the CPU", "ZeRO-3"]
)
def test_two_processes_against_one(kind, alone, model_folder, data, tmp_path):
    if kind == ZERO3 and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    output = tmp_path / "out"
    command = [*LAUNCH, *kind, "-m", "tests.cli.processes"]
    if kind != ["--multi_gpu"]:  # stopped before step 8, and resumed from its shards
        start(*command, output, model_folder, data, 7, status=3)
        assert (output / CHECKPOINTS / "checkpoint-7").is_dir()
    start(*command, output, model_folder, data)
    record, expected = (json.loads((folder / RECORD).read_text()) for folder in (output, alone))
    assert (record["processes"], expected["processes"]) == (2, 1)
    assert record["hardware"].startswith("CPU") != ON_GPUS
    assert record["before"] == pytest.approx(expected["before"], rel=START, abs=0)
    assert record["start_loss"] == pytest.approx(expected["start_loss"], rel=START, abs=0)
    for name in ("train_loss", "validation_loss"):
        torch.testing.assert_close(torch.tensor(record[name]), torch.tensor(expected[name]), rtol=LOSS, atol=0)
    tensors, others = (load_file(folder / "adapter_model.safetensors") for folder in (output, alone))
    assert tensors.keys() == others.keys()
    for name, x in tensors.items():
        assert (x - others[name]).norm() < TENSOR * others[name].norm()
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    inputs = {"input_ids": torch.arange(2, 12)[None]}
    before = base(**inputs).logits
    assert not torch.equal(PeftModel.from_pretrained(base, output)(**inputs).logits, before)


def test_a_batch_that_does_not_divide_is_refused(model_folder, data, tmp_path, monkeypatch):
    from ntk_attention.cli import finetuning

    class Three:
        num_processes, is_main_process = 3, True

    monkeypatch.setattr(finetuning, "PartialState", lambda **_: Three())
    with pytest.raises(ValueError, match="expected a multiple of 3, got 16"):
        finetuning.finetune(finetuning.Settings(str(model_folder), str(data)), tmp_path / "out")
