"""The options of a command in a file: read in place of the command line, and written beside the run that had them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from .run_folder import move

NOT_SAVED = ("output", "config", "resume", "overwrite")  # of this call, not of the run


def with_file(context: typer.Context, path: Path | None) -> dict[str, Any]:
    """The values of all options: of the command line where it gives them, else of the file, else the defaults.

    Raises:
        ValueError: if the file cannot be read, or has a name or a value that the command does not take.
    """
    values = dict(context.params)
    if path is None:
        return values
    known = {parameter.name: parameter for parameter in context.command.params if parameter.name not in NOT_SAVED}
    for name, value in read_options(path).items():
        parameter = known.get(name)
        if parameter is None:
            near = difflib.get_close_matches(name, [str(option) for option in known], n=1)
            meant = f"did you mean {near[0]}?" if near else f"expected some of {', '.join(map(str, known))}"
            raise ValueError(f"{path}: unknown option {name!r}: {meant}")
        source = context.get_parameter_source(name)
        if value is not None and source is not None and source.name.startswith("DEFAULT"):
            values[name] = converted(value, name, parameter, context, path)
    return values


def converted(value: Any, name: str, parameter: Any, context: typer.Context, path: Path) -> Any:
    """A value as the command line would have it."""
    if isinstance(value, list | dict):
        raise ValueError(f"{path}: {name} must be one value, got {value}")
    try:
        return parameter.process_value(context, value)
    except Exception as error:  # whichever kind of click's errors
        raise ValueError(f"{path}: {name} cannot be {value!r}: {getattr(error, 'message', error)}") from None


def read_options(path: Path) -> dict[str, Any]:
    """Names, with underscores, and values of a YAML or JSON file."""
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is neither YAML nor JSON: {' '.join(str(error).split())}") from None
    if not isinstance(options, dict):
        raise ValueError(f"{path}: expected names of options with values, got {type(options).__name__}")
    return {str(name).replace("-", "_"): value for name, value in options.items()}


def save_options(path: Path, options: Mapping[str, Any], head: str) -> None:
    """Write options that are not None as YAML, whole or not at all."""
    partial = path.with_name(f"{path.name}.partial")
    given = {name: value for name, value in options.items() if value is not None}
    partial.write_text(f"# {head}\n{yaml.safe_dump(given, sort_keys=False, allow_unicode=True)}", encoding="utf-8")
    move(partial, path)
