"""The notebooks run from top to bottom, and come to what they say."""

import json

import pytest
import torch
from paths import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def run(path):
    """The names of a notebook when all its cells have run."""
    names = {"__name__": "page"}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _drawn_nowhere(monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    pyplot.close("all")


def test_the_notebooks_are_found_and_have_no_outputs():
    assert [path.stem for path in NOTEBOOKS] == ["digits", "heat"]
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        assert not any(cell.get("outputs") for cell in cells), path


def test_digits():
    pytest.importorskip("sklearn")
    names = run(NOTEBOOKS[0])
    assert names["scores"][-1] > 0.95


def test_heat():
    names = run(NOTEBOOKS[1])
    assert abs(names["c"].item() - names["TRUE"]) < 0.01
