from pathlib import Path

import pytest
import torch

HELPERS = sorted(path.stem for path in (Path(__file__).parent / "helpers").glob("*.py"))
pytest.register_assert_rewrite(*HELPERS)
#: Scripts that a launcher starts, and that train when they are imported.
collect_ignore = ["helpers/launched"]


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", f"error:::({'|'.join(HELPERS)})$")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors on several threads wait for each other wherever cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture
def seeded():
    """Torch's generator at seed 0, and as it was afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
