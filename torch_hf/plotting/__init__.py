"""Plots of a training run, and of several runs side by side."""

from torch_hf.plotting.draw import plot_comparison, plot_training

__all__ = ["plot_comparison", "plot_training"]
