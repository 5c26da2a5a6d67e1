"""The command line without its extra: one line that says what to install. The library itself does without."""

import subprocess
import sys
import tomllib
from pathlib import Path

from ntk_attention.cli.__main__ import NEEDS

# filelock last: transformers brings it and imports it itself
WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(("matplotlib", "rich", "typer")))
import ntk_attention, ntk_attention.convert
sys.modules["filelock"] = None
sys.argv[1:] = ["info", "somewhere"]
from ntk_attention.cli.__main__ import main
main()
"""


def test_without_the_extra():
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT], capture_output=True, text=True)
    message = "error: the command line needs filelock, matplotlib, rich, typer: pip install 'ntk-attention[cli]'\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", message)


def test_the_extra_is_what_is_asked_for():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert tuple(requirement.split(">=")[0] for requirement in project["optional-dependencies"]["cli"]) == NEEDS
    assert project["scripts"] == {"ntk-attention": "ntk_attention.cli.__main__:main"}
