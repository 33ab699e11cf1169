"""``python -m torch_hf``, as it is typed: what it prints, and the exit code."""

import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

from torch_hf import __version__
from torch_hf.__main__ import main
from torch_hf.tracking import CSVLogger

FACTORIES = """
import torch
from torch import nn

good = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
x, y = torch.randn(5, 3), torch.randint(0, 2, (5,))


def model():
    return good, x

def closure():
    return lambda: nn.functional.cross_entropy(good(x), y), good.parameters()

def closure_and_module():
    return lambda: nn.functional.cross_entropy(good(x), y), good

def bag():
    return nn.EmbeddingBag(10, 4), torch.tensor([[1, 2, 3]])

def sparse():
    return nn.Embedding(10, 4, sparse=True), torch.tensor([1, 2])

def noisy():
    draw = torch.Generator()
    def run():
        return nn.functional.cross_entropy(good(torch.randn(5, 3, generator=draw)), y)
    return run, good.parameters()

def no_split():
    return lambda: good(x).abs().sum().sqrt(), good.parameters()

def wrong_shape():
    return good, torch.randn(5, 7)

def module_alone():
    return good

def two_modules():
    return good, good

def nothing():
    pass

def fails():
    raise KeyError("weights.pt")

def needs(argument):
    pass

class Tasks:
    closure = staticmethod(closure)

number = 3
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with modules of factories, as the working directory."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "broken.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("factories", None)


@pytest.mark.parametrize("name", ["model", "closure", "closure_and_module", "bag", "Tasks.closure"])
def test_a_step_that_would_go_well(name, here, capsys):
    assert main(["diagnose", f"factories:{name}"]) == 0
    shown = capsys.readouterr()
    assert "A step would go well" in shown.out
    assert ("finite_differences" in shown.out) == (name == "bag")
    assert shown.err == ""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sparse", "sparse"),
        ("noisy", "not deterministic"),
        ("no_split", "return loss, outputs"),
        ("wrong_shape", "mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_a_step_that_would_fail(name, said, here, capsys):
    assert main(["diagnose", f"factories:{name}"]) == 1
    shown = capsys.readouterr()
    assert said in shown.out
    # the traceback is shown where the fault is in the user's own lines
    assert ("Traceback" in shown.err) == (name == "wrong_shape")


def test_the_page_shows_what_is_printed(here, capsys):
    page = (ROOT / "docs" / "api" / "command_line.md").read_text("utf-8")
    (here / "train.py").write_text(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1])
    shown = re.search(r"```\w*\n\$ python -m torch_hf (.*?)\n(.*?)```", page, re.DOTALL)
    assert main(shown[1].split()) == 0
    assert capsys.readouterr().out == shown[2]
    sys.modules.pop("train")


def test_the_hessian(here, capsys):
    assert main(["diagnose", "factories:no_split", "--curvature", "hessian"]) == 0
    assert "A step would go well" in capsys.readouterr().out


WRONG = [
    ("factories", "write MODULE:FACTORY"),
    (":model", "write MODULE:FACTORY"),
    ("factories.py:model", "write the module's name, factories:model"),
    ("./some/factories.py:model", "write the module's name, some.factories:model"),
    ("nowhere:model", "There is no module 'nowhere'"),
    ("broken:model", "'broken' cannot be imported; the error is above"),
    ("factories:modle", "'factories' has no 'modle'. It has model, closure"),
    ("factories:number", "factories:number is a int, not a function"),
    ("factories:module_alone", "returned a Sequential"),
    ("factories:two_modules", "returned a tuple (Sequential, Sequential)"),
    ("factories:nothing", "returned None"),
    ("factories:fails", "factories:fails() raised the error above"),
    ("factories:needs", "It is called without arguments"),
]


@pytest.mark.parametrize(("target", "said"), WRONG, ids=lambda value: value)
def test_a_target_that_cannot_be_looked_at(target, said, here, capsys):
    assert main(["diagnose", target]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.out == ""
    if "returned" in said or "not a function" in said:
        assert "(closure, params)" in shown.err  # the contract


@pytest.fixture
def run_csv(tmp_path):
    with CSVLogger(tmp_path / "run.csv") as logger:
        for step in range(1, 4):
            logger.log({"step": step, "loss": 1 / step}, test_squared_error=2 / step)
    return tmp_path / "run.csv"


def test_plot_beside_the_file(run_csv, capsys):
    assert main(["plot", str(run_csv)]) == 0
    picture = run_csv.with_suffix(".png")
    assert capsys.readouterr().out == f"{picture}\n"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_plot_where_it_is_asked_for(run_csv):
    picture = run_csv.parent / "new" / "picture.svg"
    assert main(["plot", str(run_csv), "-o", str(picture), "--title", "A run"]) == 0
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert "A run" in picture.read_text(encoding="utf-8") or "<path" in picture.read_text()


@pytest.mark.parametrize(
    ("text", "options", "said"),
    [
        (None, [], "There is no file"),
        ("", [], "must be a CSV file written by CSVLogger, got an empty file"),
        ("step,loss\n", [], "got no rows"),
        ("a,b\n1,2\n", [], "must have a column that plot_training draws"),
        ("step,loss\n1,2\n", ["--score", "bleu"], "no column train_bleu or test_bleu"),
        ("step,loss\n1,2\n", ["-o", "picture.doc"], "doc"),
        ("\x89PNG\x00\xff", [], "run.csv"),
    ],
)
def test_a_file_that_cannot_be_drawn(text, options, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / "run.csv").write_text(text, encoding="latin-1")
    assert main(["plot", "run.csv", *options]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.startswith("torch_hf plot: ")
    assert shown.out == ""


def test_plot_without_matplotlib(run_csv, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert main(["plot", str(run_csv)]) == 2
    assert "pip install" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "diagnose"),
        (["diagnose", "--help"], 0, "(closure, params)"),
        (["plot", "--help"], 0, "exit codes"),
        (["--version"], 0, __version__),
        ([], 2, "required: COMMAND"),
        (["plot"], 2, "required: RUN.CSV"),
        (["train"], 2, "invalid choice: 'train'"),
    ],
)
def test_help_and_usage(arguments, code, said, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == code
    shown = capsys.readouterr()
    assert said in shown.out + shown.err


def test_as_it_is_typed(here):
    done = subprocess.run(
        [sys.executable, "-m", "torch_hf", "diagnose", "factories:noisy"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 1
    assert "not deterministic" in done.stdout
    assert done.stderr == ""
