"""Runs the examples as a user does, each a process of its own."""

from __future__ import annotations

import os
import runpy
import struct
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch
from paths import ROOT
from processes import CONTEXT

from torch_hf.tracking import read_csv

#: Seconds that an example may take before a test gives up.
LIMIT = 600


def run_example(name, *arguments, cwd):
    """Run ``examples/<name>.py`` in ``cwd``, where its results then lie in ``runs/<name>``.

    The process is forked from a server that has imported torch: that saves seconds an example.
    """
    command = [str(ROOT / "examples" / f"{name}.py"), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = CONTEXT.Process(target=_run, args=(command, str(cwd), out, err))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            process.join()
            pytest.fail(f"{name} was still running after {LIMIT} s")
        return CompletedProcess(command, process.exitcode, out.read_text(), err.read_text())


def _run(command, cwd, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    sys.argv = command
    sys.path[:0] = [os.path.dirname(command[0]), str(ROOT)]
    runpy.run_path(command[0], run_name="__main__")


def drawn(folder, name):
    """Whether a picture lies there."""
    return (folder / name).read_bytes().startswith(b"\x89PNG")


def three_steps(name, *arguments, cwd, picture="training.png"):
    """Run an example for so long: the process, and the columns of its CSV file."""
    done = run_example(name, "--max-steps", 3, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    folder = cwd / "runs" / name
    columns = read_csv(folder / "training.csv")
    assert columns["step"] == [1, 2, 3]
    assert drawn(folder, picture)
    return done, columns


def falls(columns):
    """Whether no step of a run left a higher loss on its data."""
    return all(new <= old for old, new in zip(columns["loss"], columns["new_loss"], strict=True))


def write_idx(path, array):
    """The format of MNIST's files: unsigned bytes, dimensions big-endian."""
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    path.write_bytes(header + array.to(torch.uint8).numpy().tobytes())
