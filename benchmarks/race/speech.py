"""Speech: frames of spoken digits, classified by a sigmoid network as in the paper's tasks."""

from __future__ import annotations

import math
from itertools import pairwise

import autoencoder
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .task import Missing, RaceTask, Setting, small_batches, supervised, wrong

RATE = 8_000
BANDS = 24
CONTEXT = 4  # frames on either side
PARTS = 3  # of a recording: the states of a word model
HELD_OUT = ("theo", "nicolas")


def speech(setting: Setting) -> RaceTask:
    """Log-mel frames in their context against digit and third of the recording: 30 classes.

    From the Free Spoken Digit Dataset as one ``fsdd.npz`` (``samples`` end to end, ``offsets``,
    ``digit``, ``speaker``). Two of its six speakers are the test set.
    """
    path = setting.data_root / "fsdd.npz"
    if not path.is_file():
        raise Missing(f"no {path}: see --data-root")
    with np.load(path) as file:
        samples = torch.from_numpy(file["samples"].astype(np.float32)) / 2**15
        offsets, digits, speakers = file["offsets"], file["digit"], file["speaker"]
    frames, labels, tested = [], [], []
    bank = mel_bank()
    for i, digit in enumerate(digits.tolist()):
        log_mel = features(samples[offsets[i] : offsets[i + 1]], bank)
        third = torch.arange(len(log_mel)) * PARTS // len(log_mel)
        frames.append(with_context(log_mel))
        labels.append(PARTS * digit + third)
        tested.append(torch.full((len(log_mel),), speakers[i] in HELD_OUT))
    x, y, held = torch.cat(frames), torch.cat(labels), torch.cat(tested)
    deviation, mean = torch.std_mean(x[~held], dim=0)
    x = (x - mean) / deviation
    # the part of the training set that curves are measured on should not be one speaker's
    order = torch.randperm(int((~held).sum()), generator=torch.Generator().manual_seed(0))
    train = tuple(tensor[~held][order].to(setting.device) for tensor in (x, y))
    test = tuple(tensor[held].to(setting.device) for tensor in (x, y))
    width, layers = (1024, 6) if setting.large else (256, 4)
    return supervised(
        "speech",
        f"speech frames, {layers} x {width} sigmoid",
        lambda: make_model(x.shape[1], width, layers, PARTS * 10),
        train,
        test,
        F.cross_entropy,
        {"error": wrong},
        test_metric="test_error",
        targets=[("train_loss", value) for value in (2.0, 1.5, 1.2, 1.0, 0.8)],
        batches=small_batches(setting),
        budget=120.0,
    )


def make_model(inputs: int, width: int, layers: int, classes: int) -> nn.Module:
    """Sigmoid layers with sparse random weights, so that no pretraining is needed."""
    widths = [inputs, *[width] * layers]
    hidden: list[nn.Module] = []
    for below, above in pairwise(widths):
        hidden += [autoencoder.sparse_linear(below, above), nn.Sigmoid()]
    return nn.Sequential(*hidden, autoencoder.sparse_linear(width, classes))


def features(samples: Tensor, bank: Tensor, floor: float = 1e-6) -> Tensor:
    """Log-mel energies ``(frames, bands)`` of 25 ms every 10 ms, less their mean in time.

    That mean is what microphone and voice add to every frame of a recording.
    """
    size, hop = RATE // 40, RATE // 100
    window = torch.hann_window(size)
    spectrum = torch.stft(
        samples, n_fft=256, hop_length=hop, win_length=size, window=window, return_complex=True
    )
    energies = (bank @ spectrum.abs().square() + floor).log().T
    return energies - energies.mean(dim=0)


def mel_bank(bins: int = 129, bands: int = BANDS, low: float = 60.0) -> Tensor:
    """Triangular filters ``(bands, bins)``, equally wide on the mel scale up to half the rate."""
    ends = [1127 * math.log1p(f / 700) for f in (low, RATE / 2)]
    centres = 700 * torch.expm1(torch.linspace(*ends, bands + 2) / 1127)
    frequencies = torch.linspace(0, RATE / 2, bins)
    rising = (frequencies - centres[:-2, None]) / (centres[1:-1] - centres[:-2])[:, None]
    falling = (centres[2:, None] - frequencies) / (centres[2:] - centres[1:-1])[:, None]
    return torch.minimum(rising, falling).clamp_min(0)


def with_context(frames: Tensor) -> Tensor:
    """Each frame beside its neighbours ``(frames, (2 CONTEXT + 1) bands)``; the ends repeat."""
    places = torch.arange(len(frames))[:, None] + torch.arange(-CONTEXT, CONTEXT + 1)
    return frames[places.clamp(0, len(frames) - 1)].flatten(1)
