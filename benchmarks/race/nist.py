"""The nonlinear regressions of NIST's Statistical Reference Datasets, with certified values.

27 problems of 2 to 9 parameters, each with two starting points; in the public domain, from
https://www.itl.nist.gov/div898/strd/nls/nls_main.shtml. A fit's score is the number of correct
digits of its worst parameter and the calls of the closure until there are six.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Digits that the certified values are given to.
CERTIFIED_DIGITS = 11.0


def _exponential_rise(b: Tensor, x: Tensor) -> Tensor:
    return b[0] * (1 - torch.exp(-b[1] * x))


def _chwirut(b: Tensor, x: Tensor) -> Tensor:
    return torch.exp(-b[0] * x) / (b[1] + b[2] * x)


def _gauss(b: Tensor, x: Tensor) -> Tensor:
    peaks = (b[i] * torch.exp(-((x - b[i + 1]) ** 2) / b[i + 2] ** 2) for i in (2, 5))
    return b[0] * torch.exp(-b[1] * x) + sum(peaks)


def _lanczos(b: Tensor, x: Tensor) -> Tensor:
    return torch.stack([b[i] * torch.exp(-b[i + 1] * x) for i in (0, 2, 4)]).sum(0)


def _cubic_ratio(b: Tensor, x: Tensor) -> Tensor:
    above = b[0] + b[1] * x + b[2] * x**2 + b[3] * x**3
    return above / (1 + b[4] * x + b[5] * x**2 + b[6] * x**3)


def _enso(b: Tensor, x: Tensor) -> Tensor:
    def wave(cosine: Tensor, sine: Tensor, period: Tensor | float) -> Tensor:
        angle = 2 * math.pi * x / period
        return cosine * torch.cos(angle) + sine * torch.sin(angle)

    return b[0] + wave(b[1], b[2], 12.0) + wave(b[4], b[5], b[3]) + wave(b[7], b[8], b[6])


MODELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Bennett5": lambda b, x: b[0] * (b[1] + x) ** (-1 / b[2]),
    "BoxBOD": _exponential_rise,
    "Chwirut1": _chwirut,
    "Chwirut2": _chwirut,
    "DanWood": lambda b, x: b[0] * x ** b[1],
    "ENSO": _enso,
    "Eckerle4": lambda b, x: (b[0] / b[1]) * torch.exp(-0.5 * ((x - b[2]) / b[1]) ** 2),
    "Gauss1": _gauss,
    "Gauss2": _gauss,
    "Gauss3": _gauss,
    "Hahn1": _cubic_ratio,
    "Kirby2": lambda b, x: (b[0] + b[1] * x + b[2] * x**2) / (1 + b[3] * x + b[4] * x**2),
    "Lanczos1": _lanczos,
    "Lanczos2": _lanczos,
    "Lanczos3": _lanczos,
    "MGH09": lambda b, x: b[0] * (x**2 + x * b[1]) / (x**2 + x * b[2] + b[3]),
    "MGH10": lambda b, x: b[0] * torch.exp(b[1] / (x + b[2])),
    "MGH17": lambda b, x: b[0] + b[1] * torch.exp(-x * b[3]) + b[2] * torch.exp(-x * b[4]),
    "Misra1a": _exponential_rise,
    "Misra1b": lambda b, x: b[0] * (1 - (1 + b[1] * x / 2) ** -2),
    "Misra1c": lambda b, x: b[0] * (1 - (1 + 2 * b[1] * x) ** -0.5),
    "Misra1d": lambda b, x: b[0] * b[1] * x / (1 + b[1] * x),
    "Nelson": lambda b, x: b[0] - b[1] * x[:, 0] * torch.exp(-b[2] * x[:, 1]),
    "Rat42": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)),
    "Rat43": lambda b, x: b[0] / (1 + torch.exp(b[1] - b[2] * x)) ** (1 / b[3]),
    "Roszman1": lambda b, x: b[0] - b[1] * x - torch.atan(b[2] / (x - b[3])) / math.pi,
    "Thurber": _cubic_ratio,
}


@dataclass(frozen=True)
class Regression:
    """One problem of the collection.

    Attributes:
        name: As NIST calls it.
        model: Parameters ``(P,)`` and predictors ``(N,)``, or ``(N, 2)``, to responses ``(N,)``.
        x, y: Predictors and responses, float64; Nelson's responses are logarithms already.
        starts: The two starting points ``(P,)``, the far one first.
        certified: The least squares estimate ``(P,)``, to eleven digits.
        residual_sum: The certified sum of squared residuals.
    """

    name: str
    model: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    starts: tuple[Tensor, Tensor]
    certified: Tensor
    residual_sum: float

    def digits(self, b: Tensor) -> float:
        """Correct digits of the worst parameter, from 0 to the 11 that are certified."""
        error = float(((b - self.certified) / self.certified).abs().max())
        if not error < 1.0:
            return 0.0
        return CERTIFIED_DIGITS if error == 0 else min(-math.log10(error), CERTIFIED_DIGITS)


def load(path: Path) -> Regression:
    """Reads one of NIST's ``.dat`` files.

    Raises:
        ValueError: The file's name is none of the problems'.
    """
    if path.stem not in MODELS:
        raise ValueError(
            f"The file's name must be one of NIST's nonlinear regressions, got {path.name}. "
            f"Do not rename them: {', '.join(MODELS)}."
        )
    lines = path.read_text().splitlines()
    rows = [re.match(r"\s*b\d+ =\s+(.*)", line) for line in lines]
    table = torch.tensor(
        [[float(value) for value in row[1].split()] for row in rows if row],
        dtype=torch.float64,
    )
    (total,) = (line.split()[-1] for line in lines if line.startswith("Residual Sum of Squares"))
    data = torch.tensor(
        [[float(value) for value in line.split()] for line in lines[60:] if line.strip()],
        dtype=torch.float64,
    )
    y, x = data[:, 0], data[:, 1:].squeeze(1)
    return Regression(
        path.stem,
        MODELS[path.stem],
        x,
        y.log() if path.stem == "Nelson" else y,
        (table[:, 0], table[:, 1]),
        table[:, 2],
        float(total),
    )


def load_all(folder: Path) -> list[Regression]:
    """All 27 problems from a folder of NIST's files, by name.

    Raises:
        FileNotFoundError: One of them is missing.
    """
    return [load(folder / f"{name}.dat") for name in MODELS]
