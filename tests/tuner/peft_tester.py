"""PEFT's own tests of its methods, `PeftCommonTester`, taken from the source distribution of the version installed.

A wheel lacks them. They are downloaded when the tests run, into the temporary folder of pytest, once for all workers.
"""

import importlib
import importlib.util
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from unittest import mock

import peft
import pytest
from filelock import FileLock

PACKAGE = "peft_own_tests"  # that its two files are imported under
FILES = ("testing_utils.py", "testing_common.py")


def load(temporary: Path) -> ModuleType:
    """PEFT's module of common tests.

    Args:
        temporary: a folder that all workers share.
    """
    folder = temporary / PACKAGE
    with FileLock(temporary / f"{PACKAGE}.lock"):
        if not (folder / "__init__.py").exists():
            fetch(temporary, folder)
    if PACKAGE not in sys.modules:
        pytest.register_assert_rewrite(PACKAGE)  # for messages that hold the values compared
        spec = importlib.util.spec_from_file_location(
            PACKAGE, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        sys.modules[PACKAGE] = importlib.util.module_from_spec(spec)
    with diffusers():
        return importlib.import_module(f"{PACKAGE}.testing_common")


def fetch(temporary: Path, folder: Path) -> None:
    """Download the source distribution with pip; of its files only the two that are needed are written."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary=peft", f"--dest={temporary}", f"peft=={peft.__version__}"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        last = (result.stderr.strip() or result.stdout.strip()).rpartition("\n")[2]
        message = f"the source distribution of peft {peft.__version__} could not be downloaded: {last}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    name = f"peft-{peft.__version__}"
    folder.mkdir(exist_ok=True)
    with tarfile.open(temporary / f"{name}.tar.gz") as archive:
        for file in FILES:
            member = archive.extractfile(f"{name}/tests/{file}")
            assert member is not None
            (folder / file).write_bytes(member.read())
    (folder / "__init__.py").touch()  # last: the files are whole


@contextmanager
def diffusers() -> Iterator[None]:
    """PEFT's file imports a class of diffusers, only to ask whether a model is one."""
    if importlib.util.find_spec("diffusers") is not None:
        yield
        return
    module = ModuleType("diffusers")
    module.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, diffusers=module):
        yield
