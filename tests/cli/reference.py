"""docs/reference/cli.md out of the command line itself, in typer's own words.

python -m tests.cli.reference      # writes it anew
"""

import re
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from ntk_attention.cli.main import app

PAGE = Path(__file__).parents[2] / "docs/reference/cli.md"
HEAD = """\
# The command line

<!-- python -m tests.cli.reference -->

`pip install 'ntk-attention[cli]'` brings it. `ntk-attention --install-completion` completes commands in your shell. An
option of `finetune` may stand in a file instead ([how](../how-to/data.md#options-in-a-file)).
"""


def page() -> str:
    command = typer.main.get_command(app)
    context = command.context_class(command, info_name="ntk-attention")
    text = get_docs_for_click(obj=command, ctx=context, name="ntk-attention").replace("][", "]\\[")  # no link
    # Names and texts in turns, of which the first are those of the whole program.
    found = re.split(r"^#+ `ntk-attention ?(\w*)`$", text, flags=re.MULTILINE)
    commands = zip(found[3::2], found[4::2], strict=True)
    return "\n".join([HEAD, *(f"## {name}\n\n{said.strip()}\n" for name, said in commands)])


if __name__ == "__main__":
    PAGE.write_text(page())
