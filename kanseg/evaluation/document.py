"""Documents: parts of Markdown, and one HTML file of it with the pictures inside, to be opened anywhere, offline."""

from __future__ import annotations

import base64
import itertools
import mimetypes
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ccc; padding-bottom: .2rem; }
table { border-collapse: collapse; } .wide { overflow-x: auto; margin: 1rem 0; }
th, td { border: 1px solid #ddd; padding: .25rem .6rem; text-align: left; vertical-align: top; }
th { background: #f3f3f3; } tr:nth-child(even) td { background: #fafafa; }
td { font-variant-numeric: tabular-nums; } img { max-width: 100%; height: auto; } code { background: #f3f3f3; }
nav ul { columns: 3; padding-left: 1.2rem; } img, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
@media print { body { max-width: none; margin: 0; } nav { display: none; } .wide { overflow: visible; }
  body { font-size: 12px; } td:last-child { overflow-wrap: anywhere; } }
"""


def table(heading: Sequence[Any], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown.

    >>> print(table(["case", "Dice"], [["a|b", 0.5]]))
    | case | Dice |
    | --- | --- |
    | a\\|b | 0.5 |
    """
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(_cell(value) for value in line)} |" for line in lines)


def _cell(value: Any) -> str:
    return " ".join(str(value).split()).replace("|", "\\|")


def as_html(markdown: str, folder: Path) -> str:
    """A page with a list of its sections; linked pictures, which lie in `folder`, become part of it.

    Raw HTML in the text is shown, not obeyed.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(markdown)
    sections: list[str] = []
    for token, after in itertools.pairwise(tokens):
        if token.type == "heading_open" and token.tag == "h2":
            token.attrSet("id", f"section-{len(sections) + 1}")
            sections.append(f'<li><a href="#section-{len(sections) + 1}">{_escaped(after.content)}</a></li>')
    for token in tokens:
        if token.type == "th_open":
            token.attrSet("scope", "col")
    for image in (child for token in tokens for child in token.children or () if child.type == "image"):
        image.attrSet("src", _embedded(folder / unquote(str(image.attrs["src"]))))
    title = next((t.content for t in tokens if t.type == "inline"), "")
    body = parser.renderer.render(tokens, parser.options, {})
    listed = f'<nav aria-label="Sections"><ul>{"".join(sections)}</ul></nav>\n' if sections else ""
    body = re.sub(r"(</h1>\n)", lambda found: found[1] + listed, body, count=1)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{_escaped(title)}</title>\n<style>{STYLE}</style>"
    main = f"<main>\n{body}</main>"
    return f'<!doctype html>\n<html lang="en">\n<head>{head}</head>\n<body>\n{main}\n</body>\n</html>\n'


def _escaped(text: str) -> str:
    from markdown_it.common.utils import escapeHtml

    return escapeHtml(text)


def _embedded(path: Path) -> str:
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
