"""Checkpoints that a kill at any moment leaves whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch


def save_atomically(obj: Any, path: str | os.PathLike[str]) -> None:
    """``torch.save`` that leaves the old file or the new one, never a part.

    The object goes into a file beside ``path``, to the disk, and is then renamed, which POSIX and
    Windows do at once. Only one process may write the same path at a time.

    Args:
        obj: What ``torch.save`` takes, such as a dict of state dicts.
        path: The file; its folder must exist.

    Raises:
        OSError: The folder does not exist, or the disk is full; the old file is as it was.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import torch
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint.pt"
        >>> save_atomically({"step": 3}, path)
        >>> torch.load(path, weights_only=True)
        {'step': 3}
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
