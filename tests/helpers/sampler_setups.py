"""Random setups of a growing sampler."""

from hypothesis import strategies as st


@st.composite
def setups(draw, max_ranks=4):
    ranks = draw(st.integers(1, max_ranks))
    n = draw(st.integers(ranks, 40))
    batch_size = draw(st.integers(ranks, n))
    options = {
        "growth": draw(st.sampled_from([1, 1.2, 1.5, 2.0])),
        "max_batch_size": draw(st.none() | st.integers(batch_size, n + 5)),
        "grow_every": draw(st.sampled_from(["epoch", "step"])),
        "shuffle": draw(st.booleans()),
        "drop_last": draw(st.booleans()),
        "seed": draw(st.integers(0, 5)),
    }
    return n, batch_size, ranks, options
