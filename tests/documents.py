"""What the documents say, taken apart: fenced blocks, shell commands, code spans, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?:tinyonn|tests|jobs|configs|docs|requirements|benchmarks)/[\w./-]*\w")


@dataclass(frozen=True)
class Block:
    """A fenced block, or a command of one."""

    page: str
    text: str

    def __str__(self) -> str:
        """Name of a test case."""
        return f"{self.page}: {self.text.strip().splitlines()[0][:70]}"


def blocks(language: str) -> list[Block]:
    """All fenced blocks of a language."""
    return [
        Block(page.relative_to(ROOT).as_posix(), text)
        for page in PAGES
        for kind, text in FENCE.findall(page.read_text("utf-8"))
        if kind == language
    ]


def commands() -> list[Block]:
    """All shell commands: of ``sh`` blocks, and of code spans that begin with ``tinyonn`` or ``make``."""
    found = []
    for block in blocks("sh"):
        for line in re.sub(r"\\\n\s*", "", block.text).splitlines():
            found += [Block(block.page, part) for part in line.split("&&") if words(part)]
    spans = [span for span in code_spans() if re.match(r"(tinyonn [a-z]|make [a-z]|ray [a-z])", span.text)]
    return found + spans


def words(command: str) -> list[str]:
    """A command's words, without comment and redirection."""
    return shlex.split(command.split(" > ")[0], comments=True)


def prose(page: Path) -> str:
    """A page without its fenced blocks and comments."""
    return re.sub(r"<!--.*?-->", "", FENCE.sub("", page.read_text("utf-8")), flags=re.DOTALL)


def code_spans() -> list[Block]:
    """All inline code."""
    return [
        Block(page.relative_to(ROOT).as_posix(), " ".join(span.split()))
        for page in PAGES
        for span in re.findall(r"`([^`]+)`", prose(page))
    ]


def links() -> list[tuple[Path, str]]:
    """All links that do not lead to the network: page and target."""
    return [
        (page, target)
        for page in PAGES
        for target in re.findall(r"\]\(([^)]+)\)", prose(page))
        if not target.startswith(("http://", "https://"))
    ]


def mentioned_paths() -> list[Block]:
    """All paths of the project's files, in prose, code and commands; patterns and examples are left out."""
    found = []
    for page in PAGES:
        for match in PATH.finditer(re.sub(r"https?://\S+", "", page.read_text("utf-8"))):
            before = page.read_text("utf-8")
            if match.start() and before[match.start() - 1] in "/\\":
                continue
            found.append(Block(page.relative_to(ROOT).as_posix(), match.group()))
    return found
