"""Warnings at the line of the user's that led to them, however many wrappers lie between."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch

#: Whose frames are no user's.
_OURS = tuple(str(Path(str(m.__file__)).parent) + "/" for m in (torch, sys.modules[__package__]))


def warn_user(message: str, category: type[Warning]) -> None:
    """Warns where neither this package nor torch is at work."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
        level += 1
    warnings.warn(message, category, stacklevel=level + 1)


def _is_ours(filename: str) -> bool:
    return filename.replace("\\", "/").startswith(tuple(p.replace("\\", "/") for p in _OURS))
