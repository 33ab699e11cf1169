import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small tensors on several threads wait for each other wherever cores are shared."""
    torch.set_num_threads(1)
