"""Tasks on images: the two deep autoencoders, the MNIST and the CIFAR-10 classifier."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import autoencoder
import cifar10
import data
import mnist
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .task import Missing, RaceTask, Setting, Tensors, small_batches, supervised, wrong

CURVES_WIDTHS = (784, 400, 200, 100, 50, 25, 6, 25, 50, 100, 200, 400, 784)


def mnist_autoencoder(setting: Setting) -> RaceTask:
    """Hinton & Salakhutdinov (2006): 784-1000-500-250-30 and back, all 60,000 images."""
    train, test = map(autoencoder.images_twice, load(data.load_mnist, setting))
    return supervised(
        "autoencoder",
        "deep MNIST autoencoder",
        autoencoder.make_model,
        train,
        test,
        autoencoder.loss,
        {"error": autoencoder.squared_error},
        train_metric="train_error",
        test_metric="test_error",
        # the best published Nesterov momentum and HF (Sutskever et al. 2013) on a GPU's time
        targets=[("train_error", value) for value in (20.0, 10.0, 5.0, 3.0, 2.0, 0.73, 0.69)],
        batches=small_batches(setting),
        budget=180.0,
    )


def curves_autoencoder(setting: Setting) -> RaceTask:
    """Hinton & Salakhutdinov (2006): 784-400-200-100-50-25-6 and back."""
    images = curves(30_000).to(setting.device)
    train, test = images[:20_000], images[20_000:]
    return supervised(
        "curves",
        "Curves autoencoder",
        curves_model,
        (train, train),
        (test, test),
        autoencoder.loss,
        {"error": autoencoder.squared_error},
        train_metric="train_error",
        test_metric="test_error",
        targets=[("train_error", value) for value in (20.0, 10.0, 5.0, 2.0, 1.0, 0.5)],
        batches=small_batches(setting),
        budget=180.0,
    )


def curves_model() -> nn.Module:
    """Sigmoid units around a linear code, sparse random weights (Martens 2010)."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(CURVES_WIDTHS):
        layers += [autoencoder.sparse_linear(inputs, outputs, min(15, inputs)), nn.Sigmoid()]
        if outputs == min(CURVES_WIDTHS):
            layers.pop()
    return nn.Sequential(*layers[:-1])


def curves(images: int, seed: int = 0) -> Tensor:
    """Images ``(N, 784)`` in [0, 1], each a smooth curve with six degrees of freedom.

    As published: 28x28 pixels, a curve through three random points in two dimensions, so that six
    numbers describe an image. The original program is not public, so these are ours: points
    uniform in the inner 20x20 pixels, a natural cubic spline through them, a Gaussian pen of 0.6
    pixels. What is darker than half of one of 256 grey levels is black: the pen's far tails would
    be subnormal numbers, with which a CPU takes twelve times as long. Errors compare within this
    data set, not with published ones on the original.
    """
    generator = torch.Generator().manual_seed(seed)
    points = 4 + 20 * torch.rand(images, 3, 2, generator=generator)
    path = spline(points, torch.linspace(0, 1, 40))
    lines = torch.arange(28.0) + 0.5
    # the pen's mark is a product of two factors, one an axis: the image is a maximum over the path
    marks = torch.exp(-0.5 * ((lines - path[..., None]) / 0.6).square())
    parts = [
        (part[:, :, 1, :, None] * part[:, :, 0, None, :]).amax(dim=1) for part in marks.split(500)
    ]
    pixels = torch.cat(parts).flatten(1)
    return pixels.where(pixels >= 1 / 512, 0.0)


def spline(points: Tensor, times: Tensor) -> Tensor:
    """The natural cubic spline through three points ``(N, 3, 2)`` at times 0, 1/2 and 1."""
    first, middle, last = (points[:, None, i] for i in range(3))
    bend = 6 * (first - 2 * middle + last)  # its second derivative at 1/2; zero at the ends
    t = times[None, :, None]
    tent = 0.5 - (t - 0.5).abs()
    there, back = 2 * t * (middle - first), 2 * (1 - t) * (middle - last)
    return torch.where(t < 0.5, first + there, last + back) + bend * (tent**3 / 3 - tent / 12)


def mnist_classifier(setting: Setting, cases: int | None = None) -> RaceTask:
    """The example's CNN, in minibatches; on the first cases alone if so many are given."""
    train, test = data.standardise(*load(data.load_mnist, setting))
    train = (train[0][:cases], train[1][:cases])
    part = "" if cases is None else f", {cases:,} images"
    return supervised(
        "mnist" if cases is None else "mnist10k",
        f"MNIST classifier (CNN, 54,314 parameters{part})",
        mnist.make_model,
        train,
        test,
        F.cross_entropy,
        {"error": wrong},
        test_metric="test_error",
        targets=[("test_error", value) for value in (0.05, 0.03, 0.02, 0.015, 0.01)],
        batches=small_batches(setting),
        peer_batch=512 if setting.large else 128,
        budget=120.0,
    )


def cifar10_classifier(setting: Setting) -> RaceTask:
    """The example's CNN; on a part of CIFAR-10 where only a part is at hand (the title says)."""
    train, test = data.standardise(*load(data.load_cifar10, setting))
    part = "" if len(train[0]) == 50_000 else f", a part of {len(train[0]):,} images"
    return supervised(
        "cifar10",
        f"CIFAR-10 classifier (CNN{part})",
        cifar10.make_model,
        train,
        test,
        F.cross_entropy,
        {"error": wrong},
        test_metric="test_error",
        targets=[("train_loss", value) for value in (1.5, 1.2, 1.0, 0.5, 0.2, 0.05)],
        batches=replace(small_batches(setting), batch_size=512 if setting.large else 128),
        peer_batch=512 if setting.large else 128,
        lbfgs_batch=2_000,
        budget=120.0,
    )


def load(
    loader: Callable[[Namespace], tuple[Tensors, Tensors]], setting: Setting
) -> tuple[Tensors, Tensors]:
    """What an example's loader loads, on the setting's device."""
    arguments = Namespace(
        data_root=setting.data_root, device=setting.device, download=setting.download
    )
    try:
        return loader(arguments)
    except SystemExit as error:  # the examples end there, a race goes on without
        message = f"no data in {setting.data_root}: see --data-root"
        raise Missing(message) from error
