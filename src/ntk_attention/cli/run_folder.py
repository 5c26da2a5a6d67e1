"""The folder of a training run: who may write into it, and files that are there whole or not at all.

A checkpoint is written beside its place, forced to the disk, listed with sizes and hashes, and then renamed: a process
that is killed at any moment leaves the checkpoint before. What is not whole (a folder that was copied by halves, a disk
that lost power) is told by its list, and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

RECORD = "finetune.json"  # settings and results; its presence says that a folder is ours
CONFIG = "finetune.yaml"  # the options of the command line that make the run again
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
CONTENTS = "contents.json"  # of a checkpoint: every file with its size and hash
STAGING = "writing"  # what is not whole yet
WRITTEN = (RECORD, CONFIG, "adapter_config.json", "adapter_model.safetensors", "README.md", "loss.png", "shares.png")
FREE_BYTES = 200 * 2**20  # an adapter, its optimizer state and more checkpoints


def check_folder(output: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool, name: str = RECORD) -> None:
    """Make sure that the run may write into the folder, before any long work; `name` is that of its record.

    Raises:
        ValueError: if the folder holds something else, or a run that neither `resume` nor `overwrite` was asked for,
            or one with other settings; or if its disk is nearly full or cannot be written to.
    """
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file: expected a folder to write the adapter to")
    ours = (output / name).is_file() and (overwrite or read_record(output, name) is not None)
    if output.exists() and any(path.name != LOCK for path in output.iterdir()) and not ours:
        raise ValueError(f"{output} is not empty and not a run of this program: choose another folder")
    if ours and not overwrite:
        record = read_record(output, name) or {}
        if not resume:
            raise ValueError(f"{output} already holds a run: add --resume to go on, or --overwrite to start anew")
        changed = [key for key, value in settings.items() if record["settings"].get(key) != value]
        if changed:
            raise ValueError(f"{output} was started with other settings ({', '.join(changed)}): cannot resume")
        if "after" in record:
            raise ValueError(f"the run in {output} is finished: nothing to resume")
    existing = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    if not os.access(existing, os.W_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise ValueError(f"{existing} cannot be written to")
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES:
        raise ValueError(f"{output} has {free / 2**20:.0f} MiB of free disk space, {FREE_BYTES / 2**20:.0f} are needed")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """The folder for this process alone; the lock of a process that died is no lock.

    Raises:
        ValueError: if another run has it, or the folder cannot be made.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise ValueError(f"another run is writing into {output}: wait for it, or choose another folder") from None
    except OSError as error:
        raise ValueError(f"{output} cannot be written to: {error.strerror}") from None
    try:
        yield
    finally:
        lock.release()


def clear(output: Path) -> None:
    """Take an old run away and leave other files alone."""
    for name in WRITTEN:
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)


def read_record(output: Path, name: str = RECORD) -> dict[str, Any] | None:
    path = output / name
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error.msg}, line {error.lineno}): use --overwrite") from None
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        raise ValueError(f"{path} is not the record of a run: expected an object with settings")
    return record


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    move(partial, path)


def move(partial: Path, path: Path) -> None:
    """Put a file or a folder into its place, on the disk as well."""
    for part in sorted(partial.rglob("*")) if partial.is_dir() else [partial]:
        sync(part)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def seal(checkpoint: Path) -> None:
    """List what is in a checkpoint: the last file that is written into it."""
    files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != CONTENTS]
    contents = {str(path.relative_to(checkpoint)): size_and_hash(path) for path in files}
    (checkpoint / CONTENTS).write_text(json.dumps(contents, indent=1) + "\n")


def size_and_hash(path: Path) -> list[int | str]:
    with path.open("rb") as file:
        return [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def is_whole(checkpoint: Path) -> bool:
    try:
        contents = json.loads((checkpoint / CONTENTS).read_text())
        return bool(contents) and all(size_and_hash(checkpoint / name) == found for name, found in contents.items())
    except (OSError, ValueError, AttributeError):
        return False


def last_good_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is whole."""
    for checkpoint in sorted(checkpoints.glob("checkpoint-*"), key=step_of, reverse=True):
        if step_of(checkpoint) >= 0 and is_whole(checkpoint):
            return checkpoint
    return None


def step_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1
