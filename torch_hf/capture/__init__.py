"""Watching a closure run: which operations and loss functions it calls, ``backward()`` held back."""
