"""What the benchmarks share: the two tasks, interleaved timing, one table, one JSON file."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from machine import processor, version
from torch import Tensor, nn

RESULTS = Path(__file__).parent / "results"
#: Where figures go that are not to replace the record.
ASIDE = Path("runs") / "bench"
#: Longest line of a JSON file, where its entries can be divided.
LINE = 400
WIDTHS = (784, 1000, 500, 250, 30, 250, 500, 1000, 784)
PEERS = {"curvlinops": "curvlinops-for-pytorch", "backpack": "backpack-for-pytorch"}


@dataclass
class Task:
    """A network, its loss and one batch of synthetic data."""

    name: str
    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor

    @property
    def params(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @property
    def numel(self) -> int:
        return sum(p.numel() for p in self.params)

    def closure(self) -> Tensor:
        """As ``torch.optim.LBFGS`` takes it."""
        self.model.zero_grad()
        loss = self.loss(self.model(self.x), self.y)
        loss.backward()
        return loss


def autoencoder(batch: int, device: torch.device) -> Task:
    """The MNIST autoencoder of Hinton & Salakhutdinov (2006), sigmoid around a linear code.

    Its inputs are synthetic, so that nothing need be fetched: 28x28 images of three soft dots each,
    in [0, 1]. Weights are Martens' sparse ones (2010): 15 from N(0, 1) into each unit.
    """
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        layer = nn.Linear(inputs, outputs)
        chosen = torch.rand(outputs, inputs).topk(15, dim=1).indices
        with torch.no_grad():
            layer.weight.zero_().scatter_(1, chosen, torch.randn(outputs, 15))
            layer.bias.zero_()
        layers += [layer] if outputs == min(WIDTHS) else [layer, nn.Sigmoid()]
    model, x = nn.Sequential(*layers[:-1]).to(device), dots(batch).to(device)
    return Task("MNIST autoencoder", model, nn.BCEWithLogitsLoss(), x, x)


def dots(images: int) -> Tensor:
    """Images ``(N, 784)`` of three Gaussian dots, their places and widths random."""
    places = 4 + 20 * torch.rand(images, 3, 2, 1)
    widths = 1 + 2 * torch.rand(images, 3, 1)
    lines = torch.arange(28.0)
    pixels = torch.stack(torch.meshgrid(lines, lines, indexing="ij")).view(2, -1)
    squares = sum((pixels[i] - places[:, :, i]).square() for i in range(2))
    return torch.exp(-0.5 * squares / widths.square()).amax(dim=1)


def cnn(batch: int, device: torch.device) -> Task:
    """Three convolutions for images of 3x32x32, as a CIFAR classifier begins; the data is noise."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
    return Task("CNN", model.to(device), nn.CrossEntropyLoss(), x.to(device), y.to(device))


def make_parser(doc: str, *, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--device", type=torch.device, default=torch.device("cpu"), help="cpu, cuda, cuda:1, ...")
    add("--threads", type=int, default=2, help="of the host")
    add("--rounds", type=int, default=rounds, help="timings of each contender")
    add_record(parser)
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    return args


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    contenders: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device, warm_up: int = 3
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; a round runs all of them once.

    So whatever else the machine does hits all alike, and ratios hold within a round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(warm_up + rounds):
        for name, run in contenders.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def compared(seconds: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Of each contender: median and least time, and both as multiples of ``base``'s.

    ``ratio`` is the median of the ratios within rounds, ``ratio_min`` that of the least times.
    """
    reference = seconds[base]
    return {
        name: {
            "median_ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times),
            "ratio": statistics.median(t / b for t, b in zip(times, reference, strict=True)),
            "ratio_min": min(times) / min(reference),
        }
        for name, times in seconds.items()
    }


def environment(device: torch.device, threads: int) -> dict[str, Any]:
    """What the numbers depend on besides the code."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_hf": version("torch_hf"),
        **{name: version(package) for name, package in PEERS.items()},
    }


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One table, the first column to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    print(f"\n{title}\n")
    for row in [header, ["-" * width for width in widths], *rows]:
        cells = [c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))]  # noqa: B905
        print("  ".join(cells).rstrip())


def add_record(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--record", action="store_true", help=f"replace the record; else figures go to {ASIDE}"
    )


def results_folder(record: bool) -> Path:
    """The record's folder, or the one beside it; it exists."""
    folder = RESULTS if record else ASIDE
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_json(
    name: str, device: torch.device, content: Mapping[str, Any], record: bool = False
) -> None:
    path = results_folder(record) / f"{name}-{device.type}.json"
    path.write_text(laid_out(content) + "\n")
    print(f"\nwritten to {path if not record else f'benchmarks/results/{path.name}'}")


def laid_out(value: Any, indent: int = 0) -> str:
    """JSON with a row a line where it fits, floats of six digits."""
    text = json.dumps(rounded(value))
    if not isinstance(value, (dict, list)) or len(text) + indent <= LINE:
        return text
    pad = " " * (indent + 1)
    if isinstance(value, dict):
        items = [f"{json.dumps(key)}: {laid_out(v, indent + 1)}" for key, v in value.items()]
    else:
        items = [laid_out(v, indent + 1) for v in value]
    brackets = "{}" if isinstance(value, dict) else "[]"
    inside = f",\n{pad}".join(items)
    return f"{brackets[0]}\n{pad}{inside}\n{' ' * indent}{brackets[1]}"


def rounded(value: Any) -> Any:
    """The same with floats of six digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
