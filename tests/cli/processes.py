"""Fine-tune a tiny model in several processes: what `accelerate launch` starts in test_processes.py.

    accelerate launch --num_processes 2 -m tests.cli.processes OUT MODEL DATA

In float32, so that runs agree to its rounding.
"""

import os
import sys
from pathlib import Path

import torch
import transformers

from ntk_attention.cli.finetuning import Settings, finetune
from ntk_attention.cli.trainer import AdapterTrainer
from research.benchmarks.processes import pretend_gpus


def main(output: str, model: str, data: str, stop_at: int = 0) -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not torch.cuda.is_available():
        pretend_gpus()
    options = {"epochs": 2, "batch_size": 8, "learning_rate": 0.01, "max_new_tokens": 4, "dtype": "float32"}
    settings = Settings(model, data, 104, 12, **options)
    step = AdapterTrainer.training_step

    def stop(self, *args, **kwargs):
        assert (type(next(self.model.parameters())).__name__ == "DTensor") == self.is_fsdp_enabled
        assert (type(self.model_wrapped).__name__ == "DeepSpeedEngine") == self.is_deepspeed_enabled
        assert self.is_deepspeed_enabled == (os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
        if stop_at and self.state.global_step == stop_at:
            os._exit(3)  # as a kill: threads that still wait would abort an orderly end
        return step(self, *args, **kwargs)

    AdapterTrainer.training_step = stop
    finetune(settings, Path(output), resume=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
