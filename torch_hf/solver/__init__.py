"""From the quadratic to a move: conjugate gradients, trust region, line search."""
