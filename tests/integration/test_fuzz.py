"""Random cases of a step: no risen loss, no trace of an exception, no raw error.

``python tests/helpers/fuzz.py --cases 5000`` runs as many as you like.
"""

import fuzz
import pytest


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 300, 20))
def test_random_cases_keep_every_promise(first):
    found = {seed: fuzz.check(seed) for seed in range(first, first + 20)}
    assert {seed: findings for seed, findings in found.items() if findings} == {}
