"""What KAN layers allow: looking at their functions, training few of their numbers, moving them to other bases."""

from kanseg.study.peft import adapt, merge
from kanseg.study.refit import refit
from kanseg.study.visualize import kan_convolutions, learned_functions, plot_learned_functions

__all__ = ["adapt", "kan_convolutions", "learned_functions", "merge", "plot_learned_functions", "refit"]
