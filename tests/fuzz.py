"""Untrusted adapters: mutated configurations and weights, loaded into a tiny model.

    python -m tests.fuzz --inputs 100000 --seed 0

Each input is a saved adapter of which one or more things were changed: the fields of its JSON, the bytes of a file, the
header of the weights, single values. It is read as PEFT reads it. Allowed are two ends: the adapter loads and runs, or
`AdapterError` names what is wrong and the base model is as it was. Anything else is a failure: another exception, a
changed model, more than ten seconds, an unpickled class, a process, a connection, a file opened for writing.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel
from peft.utils import TaskType

from ntk_attention import NTKAttentionConfig
from ntk_attention.tuner.untrusted import CONFIG, PICKLE, WEIGHTS, AdapterError

from .tiny import adapted, logits, tiny

SECONDS = 10
SEEDS: tuple[dict[str, Any], ...] = (
    {},
    {"rank": 2, "state_heads": "kv"},
    {"feature_map": "taylor", "layers_to_transform": [1]},
    {"feature_map": "positive_random", "feature_map_options": {"num_features": 6, "seed": 3}},
    {"modules_to_save": ["lm_head"], "target_modules": r".*\.self_attn", "constant_feature": False},
)
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 64, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, -0.0, 1e308, "", "x", "elu",
    "taylor", "positive_random", "kv", "query", "published", "../../x", "/etc/passwd", "\x1b[31m", "\ud800", "a" * 5000,
    "(a+)+$", "(.*)*x", "[", ".*", "a?" * 30 + "a" * 30, "(?P<n>.*)(?P=n)", "(" * 500 + ")" * 500, "a{99999999999}",
    "self_attn", "model", "layers", "lm_head", "q_proj", "embed_tokens", "default", "ntk_states", "e", ".", [], {},
    [[]], [None], ["x"], ["self_attn"], ["lm_head"], ["layers"], ["model"], ["(a+)+$"], [0], [1, 1], [0.5], [True],
    ["a"] * 2000, {"x": 1}, {"degree": 64}, {"degree": 2**62}, {"degree": 4}, {"degree": 3},
    {"num_features": 2**40}, {"seed": -1},
    {"constant": 1}, {"self": 1}, {"": {}}, {"parent_library": "antigravity", "base_model_class": "x"},
    {"num_modules": 2, "sizes": [[4, 2, 8, 8, 32]]}, {"num_modules": 2, "sizes": [[4, 2, 8, 8]]},
    {"num_modules": [], "sizes": 1},
)  # fmt: skip
ODD_FIELDS = ("runtime_config", "__class__", "weights", "self", "cls", "r", "target_parameters", "", "\x00")
NUMBERS = (float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 1e-45, 0.0, 1e4, 100.0)
NOTHING_TO_CHANGE = (ValueError, AttributeError, TypeError, KeyError, IndexError, struct.error, RecursionError)
PICKLED = b"cos\nsystem\n(S'touch /tmp/ntk-fuzz-was-here'\ntR."


class Hit(BaseException):
    """Something that no adapter may cause; not an Exception, which a library might swallow."""


class Watch:
    """An audit hook: while it is on, nothing may be run, unpickled, written or connected to."""

    NEVER = ("pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect",
             "os.mkdir", "os.rename", "os.remove", "shutil.rmtree", "os.symlink", "os.link")  # fmt: skip

    def __init__(self) -> None:
        self.is_on = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if not self.is_on:
            return
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in self.NEVER or writes:
            raise Hit(f"{event} {arguments[:2]}")


@contextmanager
def at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hit(f"took longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- mutations: each takes the two files and returns them changed ---

Files = tuple[bytes, bytes]


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


def change_field(rng: random.Random, files: Files) -> Files:
    config = json.loads(files[0])
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice([*config, *ODD_FIELDS]) if config else rng.choice(ODD_FIELDS)
        action = rng.random()
        if action < 0.1:
            config.pop(name, None)
        elif action < 0.2 and isinstance(config.get(name), list | dict):
            config[name] = change_inside(rng, config[name])
        elif action < 0.3:
            config[name] = rng.choice(list(config.values()) or [None])
        elif action < 0.35:
            config["task_type"] = rng.choice([task.value for task in TaskType])
        else:
            config[name] = rng.choice(ODD)
    return json.dumps(config).encode(), files[1]


def change_inside(rng: random.Random, value: Any) -> Any:
    value = copy.deepcopy(value)
    if isinstance(value, dict):
        value[rng.choice([*value, "x"])] = rng.choice(ODD)
    elif value:
        i = rng.randrange(len(value))
        value[i] = change_inside(rng, value[i]) if isinstance(value[i], list) else rng.choice(ODD)
    else:
        value.append(rng.choice(ODD))
    return value


def change_bytes(rng: random.Random, content: bytes) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(5)
        if action == 0:
            del data[at:]
        elif action == 1:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        elif action == 2:
            del data[at : at + rng.choice((1, 4, 64))]
        elif at < len(data):
            data[at] = rng.choice((data[at] ^ (1 << rng.randrange(8)), rng.randrange(256), ord(rng.choice('"{}[],:0'))))
    return bytes(data)


def change_config_bytes(rng: random.Random, files: Files) -> Files:
    if rng.random() < 0.05:
        deep = nested(rng.choice((10, 500, 900, 1000, 100_000)))
        swap = rng.choice((deep, files[0].replace(b"{}", deep), b"", b"null", b"[]", b"1" * 5000, b"{" + b" " * 2**20))
        return swap, files[1]
    return change_bytes(rng, files[0]), files[1]


def change_weight_bytes(rng: random.Random, files: Files) -> Files:
    return files[0], change_bytes(rng, files[1])


def change_header(rng: random.Random, files: Files) -> Files:
    """Names, shapes, dtypes and offsets of the tensors."""
    (length,) = struct.unpack("<Q", files[1][:8])
    header, data = json.loads(files[1][8 : 8 + length]), files[1][8 + length :]
    tensors = [name for name in header if name != "__metadata__"]
    name = rng.choice(tensors)
    action = rng.randrange(8)
    if action == 0:
        header[rng.choice(("", "x", "../x", "\x1b", name + ".x", name[:-1], name.replace("1", "7")))] = header.pop(name)
    elif action == 1:
        del header[name]
    elif action == 2:
        header[name]["shape"] = rng.choice(([], [0], [2**63], [-1], [4, 72], [288], header[name]["shape"][::-1], 3))
    elif action == 3:
        header[name]["dtype"] = rng.choice(("F16", "BF16", "F64", "I64", "I32", "BOOL", "F8_E4M3", "U8", "x", None, 3))
    elif action == 4:
        header[name]["data_offsets"] = rng.choice(([0, 0], [2**62, 2**63], [-4, 8], [8, 4], [0, len(data)], None))
    elif action == 5:
        other = rng.choice(tensors)
        header[name], header[other] = header[other], header[name]
    elif action == 6:
        header["__metadata__"] = rng.choice((None, 1, {"x": 1}, {"format": "tf"}, {"a" * 10000: "b"}))
    else:  # half of the bytes, twice the numbers, and so on
        header[name]["dtype"] = {"F32": "F16"}.get(header[name]["dtype"], "F32")
        header[name]["shape"] = [2 * n for n in header[name]["shape"][:1]] + header[name]["shape"][1:]
    text = json.dumps(header).encode()
    size = rng.choice((len(text), len(text), len(text), len(text), len(text) + 1, 0, 2**64 - 1))
    return files[0], struct.pack("<Q", size) + text + data


def change_values(rng: random.Random, files: Files) -> Files:
    data = bytearray(files[1])
    (length,) = struct.unpack("<Q", files[1][:8])
    for _ in range(rng.choice((1, 5))):
        at = 8 + length + 4 * rng.randrange((len(data) - 8 - length) // 4)
        data[at : at + 4] = struct.pack("<f", rng.choice(NUMBERS))
    return files[0], bytes(data)


MUTATIONS: tuple[tuple[int, Callable[[random.Random, Files], Files]], ...] = (
    (8, change_field),
    (4, change_config_bytes),
    (3, change_weight_bytes),
    (4, change_header),
    (1, change_values),
)


class Fuzzer:
    """Saved adapters to start from, the model they are loaded into, and what came of each input."""

    def __init__(self, folder: Path, seed: int):
        self.rng = random.Random(seed)
        self.folder, self.counts = folder, Counter[str]()
        self.files: list[Files] = []
        for options in SEEDS:
            saved = folder / "seed"
            adapted(**options).save_pretrained(saved)
            self.files.append(((saved / CONFIG).read_bytes(), (saved / WEIGHTS).read_bytes()))
            shutil.rmtree(saved)
        self.base = tiny()
        self.frozen, self.names = logits(self.base), list(self.base.state_dict())
        self.target = folder / "adapter"
        self.target.mkdir()
        self.watch = Watch()

    def input(self) -> None:
        """Write the next input into the folder."""
        files = self.rng.choice(self.files)
        weights, mutations = zip(*MUTATIONS, strict=True)
        for mutation in self.rng.choices(mutations, weights, k=self.rng.choice((1, 1, 1, 2))):
            with suppress(*NOTHING_TO_CHANGE):
                files = mutation(self.rng, files)
        if self.rng.random() < 0.02:  # the weights of another adapter
            files = files[0], self.rng.choice(self.files)[1]
        for name in (CONFIG, WEIGHTS, PICKLE):
            (self.target / name).unlink(missing_ok=True)
        (self.target / CONFIG).write_bytes(files[0])
        kind = self.rng.random()
        if kind > 0.01:
            (self.target / WEIGHTS).write_bytes(files[1])
        if kind < 0.02:
            (self.target / PICKLE).write_bytes(PICKLED)

    def check(self) -> None:
        """Load what is in the folder; raise Hit for anything but the two ends that are allowed."""
        try:
            with at_most(SECONDS):
                self.watch.is_on = True
                try:
                    NTKAttentionConfig.from_pretrained(self.target)
                    model = PeftModel.from_pretrained(self.base, self.target)
                finally:
                    self.watch.is_on = False
                logits(model.eval())
                self.base = model.unload()
            self.counts["loaded"] += 1
            if list(self.base.state_dict()) != self.names:
                raise Hit("the model is not what it was after unload")
        except AdapterError as error:
            self.counts["configuration refused" if CONFIG in str(error) else "weights refused"] += 1
            if list(self.base.state_dict()) != self.names or any("ntk" in str(m) for m in self.base.modules()):
                raise Hit(f"a refused adapter changed the model: {error}") from error
        if hasattr(self.base, "peft_config"):
            del self.base.peft_config

    def run(self, inputs: int) -> None:
        for i in range(inputs):
            self.input()
            try:
                self.check()
            except (Exception, Hit) as error:
                kept = self.folder.parent / f"ntk-fuzz-{i}"
                shutil.copytree(self.target, kept, dirs_exist_ok=True)
                raise AssertionError(f"input {i}, kept in {kept}: {type(error).__name__}: {error}") from error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        fuzzer = Fuzzer(Path(folder), arguments.seed)
        fuzzer.run(arguments.inputs)
    counts = ", ".join(f"{n:,} {name}" for name, n in sorted(fuzzer.counts.items()))
    print(f"{arguments.inputs:,} inputs in {time.time() - started:.0f} s, no failure: {counts}")


if __name__ == "__main__":
    main()
