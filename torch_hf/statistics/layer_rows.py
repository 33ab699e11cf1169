"""A layer's inputs and gradients as rows of matrices; a convolution's rows are patches."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from torch_hf.capture.capture import Layer

#: Of a convolution's inputs so many patches of each case are looked at, evenly spread.
PATCHES = 16


def input_rows(layer: Layer, bias: bool) -> Tensor:
    """Inputs as rows (R, I); with a bias there is a column of ones at the end."""
    x = layer.input.detach()
    rows = x.reshape(-1, x.shape[-1]) if layer.geometry is None else _patches(x, layer)
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1) if bias else rows


def output_rows(layer: Layer, delta: Tensor) -> Tensor:
    """Gradients at the outputs as rows (R, O)."""
    if layer.geometry is not None:  # channels stand before positions
        delta = delta.flatten(2).transpose(1, 2)
    return delta.reshape(-1, delta.shape[-1])


def _patches(x: Tensor, layer: Layer) -> Tensor:
    """Patches of shape (R, channels times window), of images (N, C, H, W) or lines (N, C, L)."""
    assert layer.geometry is not None
    stride, padding, dilation = layer.geometry
    window = layer.weight.shape[2:]
    if x.ndim == 3:
        x, window = x[:, :, None], torch.Size([1, *window])
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    x = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    starts = [
        torch.arange(0, x.shape[2 + i] - dilation[i] * (window[i] - 1), stride[i], device=x.device)
        for i in range(2)
    ]
    places = torch.cartesian_prod(*starts)
    if len(places) > PATCHES:
        spread = torch.arange(PATCHES, device=x.device) * len(places) + len(places) // 2
        places = places[spread // PATCHES]
    steps = [dilation[i] * torch.arange(window[i], device=x.device) for i in range(2)]
    down = places[:, 0, None, None] + steps[0][:, None]
    across = places[:, 1, None, None] + steps[1]
    return x[:, :, down, across].transpose(1, 2).flatten(2).flatten(0, 1)
