"""What `python -m build` makes: its contents, and that the README's first snippet runs where only that is installed."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

from .tiny import save_model

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
FOLDERS = ("src", "tests", "research", "examples")  # those that must stay out are there to be left out

# The embedded model of the README is a tiny one here, whose folder comes as an argument.
BEFORE = """
import sys
from ntk_attention.cli import models

load = models.load_model

def load_tiny(name, **options):
    assert name == "smollm2-135m"
    model, tokenizer = load(sys.argv[1], **options)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return model, tokenizer

models.load_model = load_tiny
"""
AFTER = """
import torch
import ntk_attention
from peft import PeftModel

assert ntk_attention.__file__.startswith(sys.prefix), ntk_attention.__file__
model = PeftModel.from_pretrained(load_tiny("smollm2-135m")[0], "runs/sums")
inputs = torch.tensor([encode(12, 17)["input_ids"]])
with torch.no_grad():
    adapted = model(inputs).logits
    with model.disable_adapter():
        frozen = model(inputs).logits
assert not torch.allclose(adapted, frozen), "the adapter that was saved does nothing"
"""


def run(*command, **options):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel and the source archive; from a copy, so that nothing is left in the repository."""
    copy = tmp_path_factory.mktemp("source")
    for name in FILES:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    run(sys.executable, "-m", "build", "--no-isolation", copy)
    (wheel,), (source,) = (copy / "dist").glob("*.whl"), (copy / "dist").glob("*.tar.gz")
    return wheel, source


def modules():
    return {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src/ntk_attention").rglob("*.py")}


def test_the_wheel_holds_the_library_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = message_from_bytes(wheel.read(metadata))
    inside = {name for name in names if ".dist-info/" not in name}
    assert inside == modules() | {"ntk_attention/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    needed = {re.split(r"[><=]", line)[0] for line in about.get_all("Requires-Dist") if "extra ==" not in line}
    assert needed == {"torch", "transformers", "peft", "accelerate", "safetensors"}
    assert {"cli", "demo", "test"} <= set(about.get_all("Provides-Extra"))


def test_the_source_archive_holds_what_a_build_needs(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    assert {f"src/{name}" for name in modules()} | {"src/ntk_attention/py.typed", *FILES} <= names
    assert not any(name.startswith(("tests", "research", "results")) for name in names)


def test_the_first_snippet_of_the_readme(built, tmp_path):
    """As printed, in an environment that has the wheel and, from the present one, what it depends on."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv/bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[0])
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    # Paths of a .pth file are searched last; .pth files there (of an editable install of this library) are not read.
    present = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (Path(site) / "present.pth").write_text("".join(f"{path}\n" for path in present))
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert snippet is not None, "README.md has no Python snippet"
    script = tmp_path / "snippet.py"
    script.write_text(BEFORE + snippet[1] + AFTER)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    run(python, "-W", "ignore", script, save_model(tmp_path / "model"), cwd=tmp_path, env=environment)
    assert (tmp_path / "runs/sums/adapter_model.safetensors").is_file()
    assert "finetune" in run(tmp_path / "venv/bin/ntk-attention", "--help", cwd=tmp_path, env=environment)
