"""The benchmarks' records: readable, and the figures of README and docs are theirs."""

import json
import subprocess
import sys

import pytest
from paths import ROOT

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import figures

    yield figures
    del sys.modules["figures"]


def test_pages_have_the_figures_of_the_records():
    done = subprocess.run(
        [sys.executable, "benchmarks/figures.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_stale_page_is_found_and_mended(figures):
    page = "before\n<!-- generated: swap -->\nold\n<!-- end -->\nafter\n"
    new = figures.filled(page)
    assert "old" not in new and "`torch.optim.LBFGS`" in new
    assert new.startswith("before\n") and new.endswith("after\n")
    assert figures.filled(new) == new


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "never"),
        (0.0, "0"),
        (1.96e-6, "2.0e-6"),
        (0.0123, "0.012"),
        (40.3, "40"),
        (230, "2.3e2"),
    ],
)
def test_numbers_have_two_digits(figures, value, shown):
    assert figures.number(value) == shown


def test_the_better_one_is_bold(figures):
    rows = [line.split(" | ") for line in figures.overview().splitlines()[2:]]
    for *_, ours, best in rows:
        assert ("**" in ours) != ("**" in best)
    assert any("**" in best for *_, best in rows)  # losses are shown, too


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_record_can_be_read(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") < 1000
    assert "sessions" in json.loads(text) or "environment" in json.loads(text)


def test_json_is_laid_out_a_row_a_line(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    from common import laid_out

    content = {"rows": [{"a": i, "b": 1 / 3, "c": "x" * 20} for i in range(30)], "none": None}
    text = laid_out(content)
    assert json.loads(text)["rows"][3] == {"a": 3, "b": 0.333333, "c": "x" * 20}
    assert text.count("\n") == 34
    for name in set(sys.modules) - before:
        if name in ("common", "machine"):
            del sys.modules[name]
