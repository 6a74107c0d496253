"""Sphinx settings. The pages that are computed are written before the build starts."""

from __future__ import annotations

import inspect
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import generate

import gossamer

generate.site()

project = "Gossamer"
copyright = "the Gossamer authors"
version = release = gossamer.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "Gossamer"
html_static_path = ["_static"] if (Path(__file__).parent / "_static").is_dir() else []
html_show_sphinx = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_use_ivar = True
# In docstrings single backticks are code, as in Markdown.
default_role = "literal"


def _arguments(obj: Any) -> set[str]:
    """Names that a docstring of `obj` may describe: parameters or fields."""
    names = set(getattr(obj, "__annotations__", {}) or {})
    with suppress(TypeError, ValueError):
        names |= set(inspect.signature(obj).parameters)
    return names


_SECTION = re.compile(r"(Args|Attributes|Raises|Returns|Yields|Note|Example):$")
_LITERAL = re.compile(r"``.+?``|`[^`]+`")


def _escape(line: str) -> str:
    """A vertical bar is a norm or an absolute value, never a substitution; two stars before a name are an argument."""
    kept = iter(_LITERAL.findall(line))
    plain = [part.replace("|", "\\|").replace("**_", "\\*\\*\\_") for part in _LITERAL.split(line)]
    return plain[0] + "".join(next(kept) + part for part in plain[1:])


def docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Bring the house's docstrings, which read like Markdown, to what napoleon and reStructuredText take.

    Indented blocks are code. Paragraphs of ``name: what it is`` lines about parameters become an `Args` section.
    """
    known = _arguments(obj)
    head = re.compile(r"(\w+(?:, \w+)*): ")
    result: list[str] = []
    described = titled = code = example = False
    blank = True  # whether the line before is empty
    for line in lines:
        indented = line.startswith("    ")
        if not line.strip():
            described = example = False
        elif not indented:
            titled, code = bool(_SECTION.match(line)), False
            example = example or line.startswith(">>>")
            match = head.match(line)
            starts = match is not None and set(match[1].split(", ")) <= known
            if starts and blank:
                result.append("Args:")
                described = True
            elif described and not starts:
                result.append("")
                described = False
        elif blank and not titled and not code:
            result += ["::", ""]
            code = True
        if not (code and indented) and not example:
            line = _escape(line)
        result.append(f"    {line}" if described else line)
        blank = not line.strip()
    if what in ("attribute", "data") and result:  # napoleon would take what precedes a colon for a type
        result[0] = re.sub(r":\s", " – ", result[0])
    lines[:] = result


def setup(app: Any) -> None:
    """Hook in, ahead of napoleon."""
    app.connect("autodoc-process-docstring", docstring, priority=400)
