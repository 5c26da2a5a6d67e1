"""The entry of the command line: says in one line what to install where the extra `cli` is missing."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

NEEDS = ("datasets", "filelock", "matplotlib", "rich", "trl", "typer")  # the extra `cli` of pyproject.toml


def main() -> None:
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        print(f"error: the command line needs {', '.join(missing)}: pip install 'ntk-attention[cli]'", file=sys.stderr)
        sys.exit(2)
    os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries, read when they are imported; ours say it all
    from .main import app

    app()


if __name__ == "__main__":
    main()
