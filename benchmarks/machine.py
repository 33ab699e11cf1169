"""What figures depend on besides the code: the processor, versions of packages."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path


def version(package: str) -> str | None:
    """The version installed; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
