"""The rows of a layer's inputs: patches of a convolution."""

import pytest
import torch
from torch import nn

from torch_hf.capture.capture import Capture, Layer
from torch_hf.statistics.layer_rows import PATCHES, input_rows

pytestmark = pytest.mark.usefixtures("seeded")


class TestPatches:
    @pytest.mark.parametrize(
        "make, shape",
        [
            (lambda: nn.Conv2d(2, 3, 3), (2, 2, 5, 6)),
            (lambda: nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 2)), (2, 2, 3, 5)),
            (lambda: nn.Conv2d(1, 2, 2, dilation=2, bias=False), (3, 1, 5, 5)),
            (lambda: nn.Conv1d(2, 3, 3, stride=2, padding=1), (2, 2, 9)),
        ],
    )
    def test_rows_times_weights_are_the_outputs(self, make, shape):
        convolution = make().double()
        x = torch.randn(shape, dtype=torch.float64)
        capture = Capture(list(convolution.parameters()), layers=True)
        record = capture.run(lambda: convolution(x))
        (layer,) = record.layers
        biased = convolution.bias is not None
        rows = input_rows(layer, biased)
        matrix = convolution.weight.flatten(1)
        if biased:
            matrix = torch.cat([matrix, convolution.bias[:, None]], dim=1)
        outputs = record.returned.flatten(2).transpose(1, 2).flatten(0, 1)
        assert len(outputs) <= PATCHES * shape[0]
        torch.testing.assert_close(rows @ matrix.T, outputs, rtol=1e-12, atol=1e-13)

    def test_of_many_patches_some_are_looked_at(self):
        convolution = nn.Conv2d(1, 1, 1, bias=False)
        x = torch.arange(64.0).view(1, 1, 8, 8)
        layer = Layer(x, convolution(x), convolution.weight, None, ([1, 1], [0, 0], [1, 1]))
        rows = input_rows(layer, False)
        assert rows.view(-1).tolist() == [2.0 + 4 * k for k in range(PATCHES)]
