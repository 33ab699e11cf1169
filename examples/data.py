"""The examples' data sets, each whole in memory, so that a step's time is the optimizer's own."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

Batch = tuple[Tensor, Tensor]

CIFAR10_CLASSES = [
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
]


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of examples whose data have to be fetched."""
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data")
    parser.add_argument("--download", action="store_true", help="fetch the data if missing")


def load_digits(args: argparse.Namespace) -> tuple[Batch, Batch]:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, a fifth of them for the test."""
    from sklearn import datasets, model_selection

    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target, dtype=torch.long)
    train, test = model_selection.train_test_split(
        range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0
    )
    device = args.device
    return _to(device, images[train], labels[train]), _to(device, images[test], labels[test])


def load_mnist(args: argparse.Namespace) -> tuple[Batch, Batch]:
    """MNIST from torchvision's files: pixels in [0, 1] of shape (cases, 1, 28, 28), and labels."""
    import torchvision

    def part(train: bool) -> Batch:
        data = torchvision.datasets.MNIST(args.data_root, train, download=args.download)
        return _to(args.device, data.data[:, None].float() / 255, data.targets)

    return _load("MNIST", "MNIST/raw", part, args)


def load_cifar10(args: argparse.Namespace) -> tuple[Batch, Batch]:
    """CIFAR-10: pixels in [0, 1] of shape (cases, 3, 32, 32), and labels.

    Read from a folder of images (``train/CLASS/*`` and ``test/CLASS/*``) if ``--data-root`` or the
    ``cifar10`` in it is one, else from torchvision's files.
    """
    for root in (args.data_root, args.data_root / "cifar10"):
        if (root / "train").is_dir() and (root / "test").is_dir():
            return _image_folder(root / "train", args), _image_folder(root / "test", args)

    import torchvision

    def part(train: bool) -> Batch:
        data = torchvision.datasets.CIFAR10(args.data_root, train, download=args.download)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).float() / 255
        return _to(args.device, images, torch.tensor(data.targets))

    return _load("CIFAR-10", "cifar-10-batches-py", part, args)


def standardise(train: Batch, test: Batch) -> tuple[Batch, Batch]:
    """Shift and scale each channel to mean 0 and variance 1 over the training set."""
    variance, mean = torch.var_mean(train[0], dim=(0, 2, 3), keepdim=True)
    scale = variance.sqrt().clamp_min(1e-6)
    return ((train[0] - mean) / scale, train[1]), ((test[0] - mean) / scale, test[1])


def _load(
    name: str, folder: str, part: Callable[[bool], Batch], args: argparse.Namespace
) -> tuple[Batch, Batch]:
    try:
        return part(True), part(False)
    except (RuntimeError, OSError) as error:
        if args.download:
            reason = str(error).partition("\n")[0].rstrip(":")
            _fail(f"{name} could not be fetched into {args.data_root} ({reason}).")
        _fail(
            f"{name} is not in {args.data_root / folder}: type `python {sys.argv[0]} --download` "
            "to fetch it, or give --data-root a folder that has it."
        )


def _image_folder(folder: Path, args: argparse.Namespace) -> Batch:
    import torchvision
    from torchvision.transforms.functional import pil_to_tensor

    try:
        images = torchvision.datasets.ImageFolder(str(folder))
    except FileNotFoundError as error:  # no folders in it, or none with images
        _fail(f"{folder} is not a folder of images by class: {error}")
    if images.classes != CIFAR10_CLASSES:
        _fail(f"{folder} has the classes {images.classes}; expected {CIFAR10_CLASSES}.")
    pixels = [pil_to_tensor(images.loader(path).resize((32, 32))) for path, _ in images.samples]
    return _to(args.device, torch.stack(pixels).float() / 255, torch.tensor(images.targets))


def _to(device: str, inputs: Tensor, targets: Tensor) -> Batch:
    return inputs.to(device), targets.to(device)


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)
