"""A closure as a function of the parameters: loss, gradient, graph, safe values at trial points."""
