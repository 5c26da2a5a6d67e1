"""The folder of a saved adapter is data, perhaps a stranger's: what is checked before any of it reaches a model.

The configuration is read here as strict JSON, and `config.py` checks its fields; `model.py` compares the header of the
weights with what the model needs, before it allocates or changes anything. Only safetensors files are read: a pickle
may run code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
# Of the two files. In files of 3 and 2 prefixes of feed-forward blocks were beside them, in files of 2 phi saw queries
# with their rotary positions; 1 is version 0.1.0 of the library, which wrote no number.
FORMAT_VERSION = 4
EARLIER = {3: {"feed_forward": "beside"}, 2: {"feed_forward": "beside", "positions": "rotary"}}  # what they do not say
MAX_CONFIG_BYTES = 2**20
MAX_LOG_K = 80.0  # exp of more is too close to the end of float32
FLOATING = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class AdapterError(ValueError):
    """The folder of an adapter, or a state dict, is not what the model can take; the message names file and field."""


def shown(value: Any) -> str:
    """A value of a stranger's file in an error message: short, on one line and without control characters."""
    if isinstance(value, str | int | float | bool) or value is None:
        text = ascii(value) if not isinstance(value, int) or value.bit_length() < 200 else "an integer of many digits"
    else:
        text = f"a {type(value).__name__} of {len(value)}" if hasattr(value, "__len__") else type(value).__name__
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_config(path: Path, fields: set[str]) -> dict[str, Any]:
    """The JSON object in the file; its names are among `fields`, what they hold is not checked yet.

    Raises:
        AdapterError: if the file is no regular file, too large, not strict JSON, nested too deeply, is of another
            format, or has other names.
    """
    if not path.is_file():
        raise AdapterError(f"{path} is not there: expected the folder of a saved adapter")
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise AdapterError(f"{path} has {size:,} bytes, at most {MAX_CONFIG_BYTES:,} are expected")
    try:
        text = path.read_bytes().decode("utf-8")
        found = json.loads(text, object_pairs_hook=_each_name_once, parse_constant=_refuse_constant)
    except RecursionError:
        raise AdapterError(f"{path} is nested too deeply to be the configuration of an adapter") from None
    except ValueError as error:  # not UTF-8, not JSON, an integer of thousands of digits
        raise AdapterError(f"{path} is not JSON: {shown(str(error))}") from None
    if not isinstance(found, dict):
        raise AdapterError(f"{path} holds {shown(found)}, expected an object")
    if found.get("peft_type") != "NTK_ATTENTION":
        raise AdapterError(f"{path}: peft_type is {shown(found.get('peft_type'))}, expected 'NTK_ATTENTION'")
    check_format(path, found)
    if unknown := sorted(set(found) - fields):
        names = ", ".join(shown(name) for name in unknown[:5])
        raise AdapterError(f"{path}: unknown fields {names}: was the adapter made by a newer version?")
    return found


def check_format(path: Path, found: dict[str, Any]) -> None:
    """Files of another format are made anew, not guessed at; those that say less are filled in.

    Raises:
        AdapterError: if the number is missing or another.
    """
    version = found.get("format_version")
    if type(version) is int and version == FORMAT_VERSION:
        return
    if type(version) is int and version in EARLIER and not EARLIER[version].keys() & found.keys():
        found |= {"format_version": FORMAT_VERSION, **EARLIER[version]}
        return
    number = f"format_version is {shown(version)}" if "format_version" in found else "there is no format_version"
    raise AdapterError(
        f"{path}: {number}, expected {FORMAT_VERSION}: the adapter was saved by another version of ntk-attention; save "
        "it again with this one, or load it with that one"
    )


def _each_name_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def weights_file(folder: Path) -> Path:
    """The safetensors file of the folder.

    Raises:
        AdapterError: if there is none; if there is a pickle instead, the message says so.
    """
    path = folder / WEIGHTS
    if path.is_file():
        return path
    if (folder / PICKLE).exists():
        raise AdapterError(f"{folder / PICKLE} is a pickle, which may run code: expected {WEIGHTS}")
    raise AdapterError(f"{folder} has no {WEIGHTS}: expected the folder of a saved adapter")


def check_weights(path: Path, expected: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]) -> None:
    """Compare a safetensors file with the names and shapes that a model needs: the header first, then the values.

    Args:
        path: of the file.
        expected: shapes of the tensors that must be there, by name.
        optional: shapes of those that may be there.

    Raises:
        AdapterError: if the file is damaged, a name is missing or not expected, a shape or dtype is another, or a value
            cannot belong to a state.
    """
    try:
        with safe_open(path, framework="pt") as file:
            headers = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
            check_tensor_names(str(path), set(headers) - (set(optional) - set(expected)), set(expected))
            for name, header in headers.items():
                shape, dtype = tuple(header.get_shape()), header.get_dtype()
                if dtype not in FLOATING:
                    raise AdapterError(f"{path}: {name} has the dtype {dtype}, expected one of {', '.join(FLOATING)}")
                check_shape(str(path), name, shape, expected.get(name) or optional[name])
            for name in headers:
                check_values(str(path), name, file.get_tensor(name))
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is damaged: {shown(str(error))}") from None


def check_state_dict(
    tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]]
) -> None:
    """The same for tensors that have been read already."""
    check_tensor_names("the adapter", set(tensors) - (set(optional) - set(expected)), set(expected))
    for name, tensor in tensors.items():
        check_shape("the adapter", name, tuple(tensor.shape), expected.get(name) or optional[name])
        check_values("the adapter", name, tensor)


def check_tensor_names(source: str, found: set[str], expected: set[str]) -> None:
    if missing := sorted(expected - found):
        raise AdapterError(
            f"{source}: {missing[0]} is missing ({len(missing)} of {len(expected)} tensors are): the adapter was made "
            "for another model or configuration"
        )
    if foreign := sorted(found - expected):
        raise AdapterError(
            f"{source}: {shown(foreign[0])} belongs to no adapter of this model ({len(foreign)} such tensors): the "
            "adapter was made for another model or configuration"
        )


def check_shape(source: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise AdapterError(
            f"{source}: {name} is {list(found)} in the adapter file, the model needs {list(expected)}: the adapter was "
            "made for another model or configuration"
        )


def check_values(source: str, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        return
    if not tensor.is_floating_point():
        raise AdapterError(f"{source}: {name} has the dtype {tensor.dtype}, expected a floating one")
    if not torch.isfinite(tensor).all():
        raise AdapterError(f"{source}: {name} holds NaN or infinite values in the adapter file")
    if name.endswith(".log_k") and tensor.numel() and tensor.max() > MAX_LOG_K:
        raise AdapterError(
            f"{source}: {name} holds {tensor.max().item():.3g}, at most {MAX_LOG_K:.0f} is expected of a logarithm"
        )
