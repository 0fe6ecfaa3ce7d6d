"""Writes the README's table of options from the settings' own definitions.

python eval/option_table.py        rewrites the table; a test says when it is stale
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cap_llm.cli.command_line import make_parser  # noqa: E402

START, END = "<!-- options -->\n", "<!-- end of options -->"


def option_table() -> str:
    """All options as a Markdown table."""
    lines = ["| option | default | meaning |", "| --- | --- | --- |"]
    for action in make_parser()._actions:
        option = action.option_strings[0].removeprefix("--") if action.option_strings else ""
        section = action.metavar == "CONFIG" or "Path to a configuration file" in str(action.help)
        if (
            not option
            or option in ("help", "-h", "config", "print_config", "dry-run", "quiet")
            or section
        ):
            continue
        default = {None: "", "": "", True: "true", False: "false"}.get(_key(action.default))
        default = str(action.default) if default is None else default
        meaning = " ".join(str(action.help).replace("%%", "%").split()).replace("|", "\\|")
        lines.append(f"| `{option}` | {default.replace(chr(39), '')} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_table(readme: str) -> str:
    """The README's text with the table between its two marks made anew."""
    before, rest = readme.split(START)
    return before + START + option_table() + END + rest.split(END)[1]


def _key(value):
    return value if isinstance(value, str | bool | None) else object()


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
