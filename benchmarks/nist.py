"""NIST's 27 nonlinear regressions from two starts each: a table of digits and closure calls.

TORCH_HF_DATA=data python benchmarks/nist.py
python benchmarks/nist.py --data-root data --optimizers hf lm hf:preconditioner=none
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# As in race.py: the examples' `common` is not the benchmarks'.
sys.path[:1] = [str(ROOT), str(ROOT / "examples")]

from benchmarks.race.nist_fits import main  # noqa: E402

if __name__ == "__main__":
    main()
