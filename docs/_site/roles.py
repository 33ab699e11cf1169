"""What the site reads differently in docstrings: roles become links, examples become code.

Docstrings say ``:class:`~torch_hf.HFOptimizer```, and head doctests with ``Example:``, which griffe
would take for the title of an admonition; it knows ``Examples:``.
"""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)\.?([\w.]+)`")


EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


def linked(match: re.Match[str]) -> str:
    """A role as a cross-reference where the whole path is given, else as code."""
    tilde, path = match.groups()
    shown = path.rpartition(".")[2] if tilde else path
    return f"[`{shown}`][{path}]" if path.startswith("torch_hf.") else f"`{shown}`"


class Roles(griffe.Extension):
    """Rewrites the docstrings of every object."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Called for each object that is collected."""
        if obj.docstring is not None:
            text = ROLE.sub(linked, obj.docstring.value)
            obj.docstring.value = EXAMPLE.sub("Examples:", text)
