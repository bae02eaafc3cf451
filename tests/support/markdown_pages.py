"""Markdown pages of the repository: their code blocks, code spans, headings and links."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Folders that a run, a build or an installation makes; hidden ones besides.
_MADE = {"runs", "build", "dist"}

_FENCE = re.compile(r"^ *(```+)([^\n]*)\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)
_SPAN = re.compile(r"(?<!`)`([^`\n]+(?:\n[^`\n]+)?)`(?!`)")
_LINK = re.compile(r"\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced code block: its language, text, and the number of its first line."""

    language: str
    text: str
    line: int

    @property
    def file(self) -> str:
        """The path in the comment that a Python sample begins with, if it does."""
        found = re.match(r"# ([\w/]+\.py)\n", self.text) if self.language == "python" else None
        return found[1] if found else ""


class Page:
    """One Markdown file.

    Parameters
    ----------
    path
        Of the file.
    text
        Its content; default: read from the file.
    """

    def __init__(self, path: Path, text: str | None = None) -> None:
        self.path = path
        self.text = path.read_text() if text is None else text
        self.name = str(path.relative_to(ROOT))

    @cached_property
    def blocks(self) -> list[Block]:
        """Its fenced code blocks."""
        return [
            Block(match[2].strip(), match[3], self.text.count("\n", 0, match.start(3)) + 1)
            for match in _FENCE.finditer(self.text)
        ]

    @cached_property
    def sample_files(self) -> set[str]:
        """Files of which a sample is a part, which its first line names in a comment."""
        return {block.file for block in self.blocks} - {""}

    @cached_property
    def prose(self) -> str:
        """The text without fenced blocks, of which empty lines remain."""
        return _FENCE.sub(lambda match: "\n" * match[0].count("\n"), self.text)

    @cached_property
    def spans(self) -> list[str]:
        """The code between single backticks."""
        return [" ".join(span.split()) for span in _SPAN.findall(self.prose)]

    @cached_property
    def links(self) -> list[str]:
        """Targets of links and images, except those of other sites."""
        targets = _LINK.findall(_SPAN.sub("code", self.prose))
        return [target for target in targets if not re.match(r"[a-z]+:", target)]

    @cached_property
    def anchors(self) -> set[str]:
        """Names of its headings, by the rule of GitHub."""
        seen: Counter[str] = Counter()
        found = set()
        for heading in _HEADING.findall(self.prose):
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
            anchor = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
            found.add(f"{anchor}-{seen[anchor]}" if seen[anchor] else anchor)
            seen[anchor] += 1
        return found

    def resolve(self, link: str) -> tuple[Path, str]:
        """The file and the anchor of a link of this page."""
        file, _, anchor = link.partition("#")
        return (self.path.parent / file).resolve() if file else self.path, anchor


def pages() -> list[Page]:
    """Every Markdown page of the repository."""
    return [Page(path) for path in sorted(_files(ROOT)) if path.suffix == ".md"]


def _files(root: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _MADE and name[0] != "."]
        yield from (Path(folder, name) for name in names)
