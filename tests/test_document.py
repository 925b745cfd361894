"""A document is one file: its tables, its pictures inside, and nothing that a name in the data could smuggle in."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

import pytest

from kanseg.evaluation.document import as_html, table

VOID = ("meta", "img", "br", "hr")
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """Its elements with their attributes and texts; every element is closed in its turn."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag in VOID or self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def test_pictures_are_inside_and_nothing_is_fetched(tmp_path: Path) -> None:
    (tmp_path / "a picture.png").write_bytes(PIXEL)
    page = Page(as_html("# Title\n\n![A point](./a%20picture.png)\n", tmp_path))
    (image,) = page.all("img")
    assert image["alt"] == "A point"
    assert base64.b64decode(str(image["src"]).removeprefix("data:image/png;base64,")) == PIXEL
    assert not page.all("script")
    assert not page.all("link")
    assert ("title", "Title") in page.texts


def test_sections_are_listed_and_tables_are_tables(tmp_path: Path) -> None:
    text = (
        "# Title\n\n## First & last\n\n"
        + table(["case", "Dice"], [["a|b", 0.5], ["c\nd", 1]])
        + "\n\n## Second\n"
    )
    page = Page(as_html(text, tmp_path))
    links = [str(link["href"]) for link in page.all("a")]
    assert links == [f"#{heading['id']}" for heading in page.all("h2")]
    assert [data for tag, data in page.texts if tag == "td"] == ["a|b", "0.5", "c d", "1"]
    assert [data for tag, data in page.texts if tag == "a"] == ["First & last", "Second"]


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "a_b*c*"])
def test_names_from_the_data_are_shown_and_not_obeyed(tmp_path: Path, name: str) -> None:
    page = Page(as_html(f"# {name}\n\n## {name}\n\n{table(['case'], [[name]])}\n", tmp_path))
    assert not page.all("script")
    assert not page.all("img")
    assert name.replace("*", "") in "".join(data for _, data in page.texts)
