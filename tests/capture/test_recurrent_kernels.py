"""cuDNN is left out around recurrent networks, by the one switch that every torch takes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.capture import capture
from torch_hf.capture.capture import differentiable_kernels


@pytest.mark.parametrize("before", [True, False])
def test_cudnn_is_off_for_recurrent_networks_alone(monkeypatch, before):
    def raises(**_):
        raise RuntimeError("mix of the legacy and new APIs to set the TF32 flags")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "flags", raises)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", before)
    with differentiable_kernels("linear"):
        assert torch.backends.cudnn.enabled is before
    with pytest.raises(KeyError), differentiable_kernels("lstm"):
        assert not torch.backends.cudnn.enabled
        raise KeyError
    assert torch.backends.cudnn.enabled is before


def run(monkeypatch, cudnn, **options):
    """The switch as the network's forward saw it, in each run of the closure, and the report."""
    seen = []
    torch.manual_seed(0)
    layer, head = nn.LSTM(2, 3, batch_first=True), nn.Linear(3, 1)
    x, y = torch.randn(12, 4, 2), torch.randn(12, 1)
    lstm = torch.lstm

    def forward(*args):
        seen.append(torch.backends.cudnn.enabled)
        return lstm(*args)

    forward.__name__ = "lstm"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "enabled", True)
    monkeypatch.setattr(capture, "by_cudnn", lambda _: cudnn)
    monkeypatch.setattr(capture, "RECURRENT", {"forward"})
    monkeypatch.setattr(capture, "WATCHED", capture.WATCHED | {"forward"})

    class Watched(torch.nn.Module):
        def forward(self, x):
            weights = list(layer.parameters())
            zeros = x.new_zeros(1, len(x), 3)
            hidden = torch.overrides.handle_torch_function(
                network, (x,), x, (zeros, zeros), weights
            )
            return head(hidden[0][:, -1])

    def network(x, state, weights):
        return forward(x, state, weights, True, 1, 0.0, True, False, True)

    network.__name__ = "forward"
    model = Watched()
    params = [*layer.parameters(), *head.parameters()]
    optimizer = HFOptimizer(params, **options)
    optimizer.step(lambda: F.mse_loss(model(x), y))
    return seen, optimizer.last_report


@pytest.mark.parametrize("cudnn", [True, False])
def test_products_alone_leave_cudnn_out(monkeypatch, cudnn):
    seen, report = run(monkeypatch, cudnn, solver="cg")
    assert report.new_loss < report.loss
    # the gradient's run, one for products where the first is of no use for them, trial points
    assert seen[:2] == ([True, False] if cudnn else [True, True])
    assert all(seen[2:])
    assert report.cg_iterations > 0
