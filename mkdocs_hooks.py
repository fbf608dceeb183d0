"""What `mkdocs build` takes from elsewhere than docs/: README, the tutorial, the commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HOME, TUTORIAL, COMMANDS = "index.md", "tutorial.md", "reference/cli.md"
HELP = "hf_reasoncache_cli/help"
_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:)([^)#]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the text of a page."""
    if page.file.src_uri == HOME:
        return home(Path("README.md").read_text("utf-8"))
    if page.file.src_uri == TUTORIAL:
        return notebook(json.loads(Path("examples/tutorial.ipynb").read_text("utf-8")))
    if page.file.src_uri == COMMANDS:
        return markdown.replace("<!-- commands -->", commands())
    return markdown


def home(readme: str) -> str:
    """Turn links of README into those of the site; files that are no page become plain text."""

    def link(found: re.Match[str]) -> str:
        mark, text, target, anchor = found.groups()
        if target.startswith("docs/"):
            return f"{mark}[{text}]({target.removeprefix('docs/')}{anchor or ''})"
        return text if text == target else f"{text} (`{target}`)"

    return _LINK.sub(link, readme)


def notebook(book: dict[str, Any]) -> str:
    """Return the cells of a notebook, and what they printed."""
    parts = []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```{'sh' if source.startswith('!') else 'python'}\n{source}\n```")
        printed = [each for each in cell["outputs"] if each.get("name") == "stdout"]
        text = without_bars("".join("".join(each["text"]) for each in printed))
        if text:
            parts.append(f"```text\n{text}\n```")
        pictures = [each["data"] for each in cell["outputs"] if "data" in each]
        parts += [
            f"![](data:image/png;base64,{data['image/png'].strip()})"
            for data in pictures
            if "image/png" in data
        ]
    return "\n\n".join(parts)


def without_bars(text: str) -> str:
    """Drop progress bars from what a terminal was given."""
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return "\n".join(line for line in lines if "%|" not in line).strip("\n")


def commands() -> str:
    """Return what every command prints for `-h`."""
    texts = {path.stem: path.read_text("utf-8") for path in Path(HELP).glob("*.txt")}
    names = [name for name in re.findall(r"^  (\w+)  ", texts.pop("hf-reasoncache"), re.MULTILINE)]
    return "\n".join(f"## {name}\n\n```text\n{texts[name]}```\n" for name in names)
