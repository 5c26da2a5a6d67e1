"""A training run that is killed again and again must end as the run that is not.

    python -m tests.cli.kills --kills 30 --seed 0

One undisturbed run, then runs with `resume` that get SIGKILL at random moments, from the first write to the last. After
the kills the last run ends by itself. Compared are all figures of the record, the whole loss curve bit by bit, and the
bytes of the adapter. Each run is a fork of this process, which has everything imported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from ntk_attention.cli.finetuning import Settings, finetune
from ntk_attention.cli.run_folder import CHECKPOINTS, RECORD, STAGING, last_good_checkpoint, step_of
from tests.tiny import save_letters, save_model

COMPARED = ("before", "start_loss", "train_loss", "validation_loss", "after", "steps", "trainable_parameters")


def fork(task: Callable[[], object]) -> int:
    """Do something in a child, and return its id. This process never computes: a fork has no threads of torch."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        task()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def spawn(settings: Settings, output: Path) -> int:
    """Start or resume the run in a child."""
    return fork(lambda: finetune(settings, output, resume=True))


def wait(child: int) -> None:
    _, status = os.waitpid(child, 0)
    if status:
        raise AssertionError(f"a child ended with status {status}")


def is_finished(output: Path) -> bool:
    return (output / RECORD).is_file() and "after" in json.loads((output / RECORD).read_text())


def state_of(output: Path) -> str:
    """What a killed run left behind."""
    if not (output / RECORD).is_file():
        return "before the record"
    if is_finished(output):
        return "after the record"
    if any((output / CHECKPOINTS / STAGING).glob("*")):
        return "in a checkpoint"
    checkpoint = last_good_checkpoint(output / CHECKPOINTS)
    return "before a checkpoint" if checkpoint is None else "between checkpoints"


def outcome(output: Path) -> dict:
    record = json.loads((output / RECORD).read_text())
    return {name: record[name] for name in COMPARED}


def compare(expected: Path, actual: Path) -> None:
    for name, value in outcome(expected).items():
        if outcome(actual)[name] != value:
            raise AssertionError(
                f"{name} is {str(outcome(actual)[name])[-80:]} after the kills, {str(value)[-80:]} without"
            )
    adapters = [(folder / "adapter_model.safetensors").read_bytes() for folder in (expected, actual)]
    if adapters[0] != adapters[1]:
        raise AssertionError("the adapter is another after the kills")


def kill_and_resume(folder: Path, kills: int, seed: int) -> Counter[str]:
    """Returns how many kills fell where; raises AssertionError if an end is another."""
    rng = random.Random(seed)
    wait(fork(lambda: save_model(folder / "model")))
    settings = Settings(
        str(folder / "model"),
        str(save_letters(folder / "letters.jsonl", "abcdefghijklmnopqrst")),
        items=200,
        held_out=10,
        epochs=8,
        batch_size=8,
        learning_rate=0.05,
        max_new_tokens=4,
    )
    started = time.time()
    wait(spawn(settings, folder / "whole"))
    seconds = time.time() - started
    found: Counter[str] = Counter()
    runs = 0
    while sum(found.values()) < kills:
        output = folder / f"killed-{runs}"
        steps = -1
        while sum(found.values()) < kills:
            child = spawn(settings, output)
            deadline = time.time() + rng.uniform(0, seconds / 2)
            ended, status = 0, 0
            while time.time() < deadline and not ended:
                time.sleep(0.001)
                ended, status = os.waitpid(child, os.WNOHANG)
            if status:
                raise AssertionError(f"the run in {output} ended with status {status}")
            if ended:
                break
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            found[state_of(output)] += 1
            if is_finished(output):
                break
            checkpoint = last_good_checkpoint(output / CHECKPOINTS)
            if checkpoint is not None:
                if step_of(checkpoint) < steps:
                    raise AssertionError(f"went back from step {steps} to {checkpoint}")
                steps = step_of(checkpoint)
        if not is_finished(output):
            wait(spawn(settings, output))
        compare(folder / "whole", output)
        runs += 1
    found["runs"] = runs
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        found = kill_and_resume(Path(folder), arguments.kills, arguments.seed)
    runs = found.pop("runs")
    where = ", ".join(f"{n} {name}" for name, n in sorted(found.items()))
    print(
        f"{arguments.kills} kills over {runs} runs in {time.time() - started:.0f} s, every end bit-equal to that of "
        f"the undisturbed run: {where}"
    )


if __name__ == "__main__":
    main()
