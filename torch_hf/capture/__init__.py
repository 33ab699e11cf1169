"""Watching a closure run: its operations and loss functions, with ``backward()`` held back."""
