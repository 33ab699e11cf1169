"""Train the deep MNIST autoencoder of Hinton & Salakhutdinov (2006), from random weights.

python examples/autoencoder.py --download --seconds 180

784-1000-500-250-30 and back, sigmoid units around a linear code. Reported is the squared error
summed over pixels, its mean over cases, as in the literature (Martens 2010; Sutskever et al. 2013);
minimised is the cross-entropy of the pixels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from common import Task, make_parser, parse, run
from data import Batch, add_data_arguments, load_mnist
from torch import Tensor, nn

WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
CODE = 30


def make_model() -> nn.Module:
    """The network; its last layer gives logits, whose sigmoids are the pixels."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layers += [sparse_linear(inputs, outputs), nn.Sigmoid()]
        if outputs == CODE:
            layers.pop()
    return nn.Sequential(*layers[:-1])


def sparse_linear(inputs: int, outputs: int, connections: int = 15) -> nn.Linear:
    """Martens' sparse initialisation: each unit has 15 incoming weights from N(0, 1), no bias.

    So a unit's total input does not depend on the width of the layer below, and sigmoids are
    neither saturated nor all alike: deep sigmoid networks train without pretraining.
    """
    layer = nn.Linear(inputs, outputs)
    chosen = torch.rand(outputs, inputs).topk(connections, dim=1).indices
    with torch.no_grad():
        layer.weight.zero_().scatter_(1, chosen, torch.randn(outputs, connections))
        layer.bias.zero_()
    return layer


def loss(logits: Tensor, pixels: Tensor) -> Tensor:
    """Cross-entropy summed over pixels, mean over cases (as pixels times the mean over both)."""
    return pixels.shape[1] * F.binary_cross_entropy_with_logits(logits, pixels)


def squared_error(logits: Tensor, pixels: Tensor) -> Tensor:
    """Squared error of each case, summed over pixels."""
    return (logits.sigmoid() - pixels).square().sum(dim=1)


def images_twice(batch: Batch) -> Batch:
    """An autoencoder's targets are its inputs."""
    pixels = batch[0].flatten(1)
    return pixels, pixels


def main() -> None:
    """Train, and leave the table on screen, the plot and the CSV file in runs/autoencoder."""
    parser = make_parser(__doc__.splitlines()[0], name="autoencoder", epochs=20)
    add_data_arguments(parser)
    parser.add_argument("--split-size", type=int, default=1000, help="cases in memory at once")
    args = parse(parser)
    train, test = map(images_twice, load_mnist(args))
    task = Task(
        title="MNIST autoencoder",
        model=make_model().to(args.device),
        train=train,
        test=test,
        batch_sizes={"hf": 256, "adam": 500, "sgd": 500, "lbfgs": 5000},
        loss=loss,
        score=squared_error,
        score_name="squared_error",
        score_train=True,
        # Gradients on samples that grow to all the data; curvature, where most of the work is, on
        # the first quarter of each.
        curvature_fraction=0.25,
        split_size=args.split_size,
        weight_decay=2e-5,  # Martens (2010)
    )
    run(task, args)


if __name__ == "__main__":
    main()
