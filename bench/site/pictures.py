"""Figures for small screens: an extension of Python-Markdown, named in `mkdocs.yml`.

A figure that is drawn a second time, in one column (`NAME.narrow.svg` beside `NAME.svg`), is shown by a `<picture>`
that takes the narrow one where the window is narrow. Documents name the wide one, as Markdown does anywhere.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree.ElementTree import Element, SubElement

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
NARROW_WINDOW = "(max-width: 45rem)"  # as in docs/stylesheets/site.css
_AFTER_ALL = -10  # of the builder's own steps, which check where pictures are


class Pictures(Extension):
    """Gives figures their narrow drawing."""

    def extendMarkdown(self, md: Markdown) -> None:
        """Put the step behind all others."""
        md.treeprocessors.register(_Step(md), "pictures", _AFTER_ALL)


class _Step(Treeprocessor):
    def run(self, root: Element) -> None:
        for parent in root.iter():
            for place, image in enumerate(parent):
                # The walk comes to new ones, too.
                if image.tag == "img" and parent.tag != "picture" and (narrow := narrow_of(image.get("src", ""))):
                    parent[place] = _picture(image, narrow)


def makeExtension(**options: object) -> Pictures:
    """How Python-Markdown asks a module for its extension."""
    return Pictures(**options)


def narrow_of(address: str) -> str | None:
    """Where the narrow drawing of a figure is, seen from the same page; None if it has none."""
    wide = Path(address)
    narrow = wide.with_suffix(".narrow.svg")
    return str(narrow) if wide.suffix == ".svg" and (FIGURES / narrow.name).is_file() else None


def _picture(image: Element, narrow: str) -> Element:
    picture = Element("picture")
    picture.tail, image.tail = image.tail, None  # the text behind an element is a part of it
    SubElement(picture, "source", media=NARROW_WINDOW, srcset=narrow)
    picture.append(image)
    return picture
