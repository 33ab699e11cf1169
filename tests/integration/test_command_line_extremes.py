"""``python -m torch_hf`` on code that ends the program, and on fields of any length."""

import csv
import sys

import pytest

from torch_hf.__main__ import main
from torch_hf.tracking import CSVLogger, read_csv, read_texts

ENDING = """
import sys
from torch import nn

layer = nn.Linear(2, 1)

def zero():
    sys.exit(0)

def silent():
    sys.exit()

def text():
    raise SystemExit("no data here")

def closure():
    return lambda: sys.exit(0), layer.parameters()
"""


@pytest.mark.parametrize("name", ["zero", "silent", "text", "closure"])
def test_a_factory_that_ends_the_program_is_an_error(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "ending.py").write_text(ENDING)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert main(["diagnose", f"ending:{name}"]) == 2
    finally:
        sys.modules.pop("ending", None)
    shown = capsys.readouterr()
    assert f"ending:{name}() " in shown.err
    assert "called sys.exit(" in shown.err and "so there was nothing to look at" in shown.err
    assert shown.out == ""


def test_a_script_that_ends_the_program_is_an_error(tmp_path, monkeypatch, capsys):
    (tmp_path / "script_that_ends.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["diagnose", "script_that_ends:probe"]) == 2
    assert "'script_that_ends' called sys.exit(0)" in capsys.readouterr().err


LONG = "x" * 200_000


def test_fields_of_any_length_are_read_and_drawn(tmp_path, capsys):
    path, limit = tmp_path / "run.csv", csv.field_size_limit()
    with CSVLogger(path) as logger:
        logger.log({"step": 1, "loss": 2.0, "note": LONG})
        logger.log({"step": 2, "loss": 1.0, "note": LONG, "late": 1})  # rewrites the file
    with CSVLogger(path, append=True) as logger:
        logger.log({"step": 3, "loss": 0.5})
    assert read_csv(path)["loss"] == [2.0, 1.0, 0.5]
    assert read_texts(path, "note") == [LONG, LONG, ""]
    pytest.importorskip("matplotlib")
    assert main(["plot", str(path)]) == 0
    assert csv.field_size_limit() == limit


def test_a_long_header_is_read(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text(f"step,{LONG}\n1,2\n")
    assert read_csv(path)[LONG] == [2.0]
    with CSVLogger(path, append=True) as logger:
        logger.log({"step": 2, LONG: 3})
    assert read_csv(path)[LONG] == [2.0, 3.0]
