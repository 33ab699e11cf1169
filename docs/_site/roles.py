"""Docstrings say ``:class:`~torch_hf.HFOptimizer```; the site makes links of it."""

from __future__ import annotations

import re

import griffe

ROLE = re.compile(r":(?:class|func|meth|mod|attr):`(~?)\.?([\w.]+)`")


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
            obj.docstring.value = ROLE.sub(linked, obj.docstring.value)
