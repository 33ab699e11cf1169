"""Which part of a loss is convex in the network's outputs, and its Hessian there."""
