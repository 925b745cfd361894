"""What KAN layers let one look at: their learned functions."""

from kanseg.study.visualize import kan_convolutions, learned_functions, plot_learned_functions

__all__ = ["kan_convolutions", "learned_functions", "plot_learned_functions"]
