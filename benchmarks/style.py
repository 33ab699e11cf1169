"""How plots of the benchmarks look: ours in one colour, the others in colours of their own."""

from __future__ import annotations

OURS = "#d1495b"
OTHERS = ("#00798c", "#edae49", "#30638e", "#66a182", "#8d6a9f", "#7f7f7f", "#b08968", "#003d5b")
#: Line styles of our variants: the default is solid.
VARIANTS = ("-", "--", ":", "-.")
