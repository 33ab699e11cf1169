"""Classify frames of spoken digits with a sigmoid network, as speech recognisers once did.

git clone https://github.com/Jakobovski/free-spoken-digit-dataset data/free-spoken-digit-dataset
python examples/spoken_digits.py

Frames of 25 ms every 10 ms, as log-mel energies beside four neighbours on either side, against the
digit and the third of the word that they lie in: 30 classes, as the states of ten word models.
Two of the six speakers are held out. Hessian-free optimization with implicit preconditioning and
growing samples was made for such networks (arXiv 1309.1508).
"""

from __future__ import annotations

import argparse
import math
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common import Task, make_parser, parse, run
from torch import Tensor, nn

RATE, BANDS, CONTEXT, PARTS = 8000, 24, 4, 3
HELD_OUT = ("nicolas", "theo")


def recordings(root: Path) -> Iterator[tuple[Tensor, int, str]]:
    """Samples in [-1, 1], digit and speaker: from one fsdd.npz, or from the data set's folder.

    The file holds ``samples`` (int16, end to end), ``offsets``, ``digit`` and ``speaker``.
    """
    if (root / "fsdd.npz").is_file():
        with np.load(root / "fsdd.npz") as file:
            samples = torch.from_numpy(file["samples"].astype(np.float32)) / 2**15
            offsets, digits, speakers = file["offsets"], file["digit"], file["speaker"]
        for i, (digit, speaker) in enumerate(zip(digits.tolist(), speakers.tolist(), strict=True)):
            yield samples[offsets[i] : offsets[i + 1]], digit, speaker
        return
    for path in sorted(root.glob("free-spoken-digit-dataset/recordings/*.wav")):
        digit, speaker, _ = path.stem.split("_")
        with wave.open(str(path)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        yield torch.from_numpy(samples.astype(np.float32)) / 2**15, int(digit), speaker


def mel_bank(bins: int = 129, low: float = 60.0) -> Tensor:
    """Triangular filters (bands, bins), equally wide on the mel scale up to half the rate."""
    ends = [1127 * math.log1p(f / 700) for f in (low, RATE / 2)]
    centres = 700 * torch.expm1(torch.linspace(*ends, BANDS + 2) / 1127)
    frequencies = torch.linspace(0, RATE / 2, bins)
    rising = (frequencies - centres[:-2, None]) / (centres[1:-1] - centres[:-2])[:, None]
    falling = (centres[2:, None] - frequencies) / (centres[2:] - centres[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0)


def frames_of(samples: Tensor, bank: Tensor) -> Tensor:
    """Log-mel energies of each frame and its neighbours, (frames, (2 CONTEXT + 1) BANDS)."""
    spectrum = torch.stft(
        samples,
        n_fft=256,
        hop_length=RATE // 100,
        win_length=RATE // 40,
        window=torch.hann_window(RATE // 40),
        return_complex=True,
    )
    energies = (bank @ spectrum.abs().square() + 1e-6).log().T
    energies = energies - energies.mean(dim=0)  # what microphone and voice add to every frame
    places = torch.arange(len(energies))[:, None] + torch.arange(-CONTEXT, CONTEXT + 1)
    return energies[places.clamp(0, len(energies) - 1)].flatten(1)


def load(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[tuple[Tensor, Tensor]]:
    """Frames and classes of the training speakers, and of those held out."""
    parts: list[list[tuple[Tensor, Tensor]]] = [[], []]
    bank = mel_bank()
    for samples, digit, speaker in recordings(args.data_root):
        frames = frames_of(samples, bank)
        third = torch.arange(len(frames)) * PARTS // len(frames)
        parts[speaker in HELD_OUT].append((frames, PARTS * digit + third))
    if not all(parts):
        where = f"{args.data_root}/free-spoken-digit-dataset/recordings"
        parser.error(f"there are no recordings in {where}: see the first lines of this file")
    train, test = ([torch.cat(column) for column in zip(*p, strict=True)] for p in parts)
    deviation, mean = torch.std_mean(train[0], dim=0)
    return [((x - mean) / deviation, y) for x, y in (train, test)]


def main() -> None:
    """Train, and leave the table on screen, the plot and the CSV file in runs/spoken_digits."""
    parser = make_parser(__doc__.splitlines()[0], name="spoken_digits", epochs=8)
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder of the data")
    args = parse(parser)
    train, test = ([t.to(args.device) for t in part] for part in load(args, parser))
    inputs, width = train[0].shape[1], 128
    layers = (nn.Linear(inputs, width), nn.Sigmoid(), nn.Linear(width, width), nn.Sigmoid())
    task = Task(
        title=f"Spoken digits ({len(train[0]):,} frames)",
        model=nn.Sequential(*layers, nn.Linear(width, PARTS * 10)).to(args.device),
        train=tuple(train),
        test=tuple(test),
        batch_sizes={"hf": 256, "adam": 256, "sgd": 256, "lbfgs": 20_000},
        weight_decay=1e-5,
    )
    run(task, args)


if __name__ == "__main__":
    main()
