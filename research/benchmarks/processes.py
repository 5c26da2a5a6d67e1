"""Training in two processes, one GPU each, against one process with the same batches: losses, time, memory.

Every way makes the same random model, adapter (calibrated) and items, and trains with `AdapterTrainer`, as `finetune`
does: AdamW, learning rate 3e-3, clipped gradients. Two models: a small one in float32, whose losses show what the way
itself changes, and the one of the benchmark `training` in bfloat16, whose losses differ by rounding as well. Items are
random tokens out of the first 16 of the vocabulary, which the adapter can learn.

- one process: the same program without `accelerate launch`.
- DDP, FSDP2 (sharded by decoder layer), FSDP2 with parameters offloaded to the CPU: by `accelerate launch`.
- tensor parallelism: the heads of each layer on two GPUs, each with the whole batch; loaded from a folder.
- twice the batch: each process of DDP has the batch of one process.

The time of a step goes from the end of one to the end of the next, as the first process sees it, with loading of data
and logging; the first `WARM_UP` steps are not timed. Memory is that of the process with the most: what it holds between
steps, and the step at its peak. On a CPU, where accelerate shards nothing, it is told that each process had a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, gather_object
from peft import get_peft_model
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments, set_seed
from transformers.distributed import DistributedConfig

from ntk_attention import NTKAttentionConfig, calibrate
from ntk_attention.cli.trainer import AdapterTrainer, share_calibration

from .models import ATTENTION_ALONE, LLAMA_1B, TINY, shaped
from .rows import SEED, Recorder
from .timing import Result, allocated, release, synchronize
from .training import BATCH, CALIBRATION_TOKENS, LENGTH

SMALL = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 2048,
    "vocab_size": 4096,
    "max_position_embeddings": 1024,
}
PROCESSES = 2
STEPS, WARM_UP = 20, 5
LIMIT_S = 200  # of one way, which takes about 25 on two H100
LEARNING_RATE = 3e-3  # the default of `finetune`
TOKENS = 16  # that items are made of
ALONE, TENSOR_PARALLEL, TWICE = "one process", "tensor parallelism", ", twice the batch"
LAUNCH = ["accelerate.commands.launch", "--num_processes", str(PROCESSES), "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
FSDP2 += ["--fsdp_cpu_ram_efficient_loading", "false"]  # calibration needs the model on every process
WAYS = {
    ALONE: [],
    "DDP": [*LAUNCH, "--multi_gpu", "-m"],
    "FSDP2": [*LAUNCH, *FSDP2, "-m"],
    "FSDP2, CPU offload": [*LAUNCH, *FSDP2, "--fsdp_offload_params", "true", "-m"],
    TENSOR_PARALLEL: ["torch.distributed.run", "--standalone", "--nproc_per_node", str(PROCESSES), "-m"],
}


@dataclass(frozen=True)
class Training:
    """A row: a way to train one model."""

    way: str
    sizes: dict[str, Any]  # B: the batch of all processes together, where it is not doubled
    twice: bool = False

    @property
    def method(self) -> str:
        return self.way + (TWICE if self.twice else "")

    @property
    def batch(self) -> int:
        return self.sizes["B"] * (1 + self.twice)


@dataclass
class Launch:
    """All that is trained in one way, in one start of its processes."""

    way: str
    trainings: list[Training]

    @property
    def sizes(self) -> dict[str, str]:
        return {"way": self.way}

    def run(self, recorder: Recorder, device: str) -> None:
        """Train what has no row yet."""
        missing = [t for t in self.trainings if not recorder.has(t.method, t.sizes)]
        if not missing:
            return
        release(device)  # what the parent holds is not there for the first process
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "trainings.json").write_text(json.dumps([asdict(t) for t in missing]))
            error = start(self.way, Path(folder), device)
            for i, training in enumerate(missing):
                path = Path(folder, f"{i}.json")
                result = Result(**json.loads(path.read_text())) if path.exists() else Result(error=error)
                recorder.add(training.method, training.sizes, "wall", result)


def cases(device: str, tiny: bool) -> list[Launch]:
    kinds = (
        [(8, 16, "float32", TINY)] if tiny else [(BATCH, 256, "float32", SMALL), (BATCH, LENGTH, "bfloat16", LLAMA_1B)]
    )
    launches = []
    for way in WAYS:
        trainings = [Training(way, {"B": B, "L": L, "dtype": dtype, **sizes}) for B, L, dtype, sizes in kinds]
        if way == "DDP":
            trainings.append(Training(way, trainings[-1].sizes, twice=True))
        launches.append(Launch(way, trainings))
    return launches


def start(way: str, folder: Path, device: str) -> str:
    """Run the processes of a way; what went wrong, for the rows that they did not write."""
    needed = 1 if way == ALONE else PROCESSES
    if device == "cuda" and torch.cuda.device_count() < needed:
        return f"unsupported: expected {needed} GPUs, got {torch.cuda.device_count()}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    if device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", *WAYS[way], "research.benchmarks.processes", way, str(folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as run:
        try:
            _, told = run.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            run.terminate()  # which launchers pass on
            _, told = run.communicate()
    if run.returncode:
        print(f"{way}: status {run.returncode}\n{told[-6000:]}", file=sys.stderr)
    errors = [line for line in told.splitlines() if "Error: " in line and "ChildFailedError" not in line]
    return f"status {run.returncode}: {errors[-1] if errors else ''}"[:160]


def main(way: str, folder: Path) -> None:
    """What each process does."""
    transformers.logging.set_verbosity_error()
    if not torch.cuda.is_available() and way != "DDP":
        pretend_gpus()
    for i, training in enumerate(json.loads((folder / "trainings.json").read_text())):
        result = train(Training(**training), folder / str(i))
        if PartialState().is_main_process:
            (folder / f"{i}.json").write_text(json.dumps(asdict(result)))
    PartialState().destroy_process_group()


def pretend_gpus() -> None:
    """Tell accelerate, which shards over GPUs only, that each process of a CPU had one: the rest is its own path."""
    initialise = PartialState.__init__

    def with_a_gpu_each(self: PartialState, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = with_a_gpu_each
    CPUOffloadPolicy.__init__.__defaults__ = (False,)  # pinned memory needs a GPU


def train(training: Training, folder: Path) -> Result:
    """What a user's program does, measured."""
    spread = training.way == TENSOR_PARALLEL
    cuda = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=training.batch // (1 if training.way in (ALONE, TENSOR_PARALLEL) else PROCESSES),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=SEED,
        use_cpu=not cuda,
    )
    device = arguments.device.type  # with the processes connected
    release(device)
    before = allocated(device)
    model = get_peft_model(
        make_model(training.sizes, arguments.device, folder if spread else None),
        NTKAttentionConfig(**ATTENTION_ALONE),
    )
    items = make_items(training)
    calibrate(model, [{"input_ids": items[0]["input_ids"][None, :CALIBRATION_TOKENS].to(arguments.device)}])
    if not spread:
        share_calibration(model, PartialState())
    watch = Watch(device)
    trainer = AdapterTrainer(model=model, args=arguments, train_dataset=items, callbacks=[watch], pad_token_id=0)
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    figures = {
        "processes": arguments.world_size,
        "tokens": training.batch * training.sizes["L"],
        "losses": watch.losses,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
    }
    memory = [None, None]
    if cuda:
        memory = [max(x) for x in zip(*gather_object([(watch.peak - watch.held, watch.held - before)]), strict=True)]
    return Result(watch.milliseconds, *memory, figures)


class Watch(TrainerCallback):
    """Losses, times and memory of the steps."""

    def __init__(self, device: str):
        self.device = device
        self.losses: list[float] = []
        self.milliseconds: list[float] = []
        self.peak = self.held = self.ended = 0.0

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.losses += [logs["loss"]] if "loss" in logs else []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        now = time.perf_counter()
        if state.global_step > WARM_UP:
            self.milliseconds.append(1e3 * (now - self.ended))
        elif state.global_step == WARM_UP and self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        if self.device == "cuda":
            self.held, self.peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        self.ended = now


def make_model(sizes: Mapping[str, Any], device: torch.device, folder: Path | None) -> Any:
    """The same in every process; spread over them by way of a folder where one is given."""
    set_seed(SEED)
    shape = {name: size for name, size in sizes.items() if name not in ("B", "L", "dtype")}
    model = shaped(shape, device, getattr(torch, sizes["dtype"]))
    if folder is None:
        return model
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(folder)
    state.wait_for_everyone()
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=model.dtype, distributed_config=DistributedConfig(tp_size=state.num_processes)
    )


def make_items(training: Training) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(TOKENS, (STEPS * training.batch, training.sizes["L"]), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
