"""Race this optimizer against what a user would pick instead: see docs/benchmarks.md.

python benchmarks/race.py --tasks regression poisson
python benchmarks/race.py --tasks autoencoder --optimizers hf adam muon --data-root data
python benchmarks/race.py --report
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The tasks are built from the examples, whose `common` is not the benchmarks'.
sys.path[:1] = [str(ROOT), str(ROOT / "examples")]

from benchmarks.race.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
