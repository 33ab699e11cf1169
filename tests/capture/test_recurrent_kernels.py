"""cuDNN is left out around recurrent networks, by the one switch that every torch takes."""

import pytest
import torch

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
