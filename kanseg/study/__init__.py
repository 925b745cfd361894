"""What KAN layers allow: looking at their functions, formulas for them, training few numbers, moving to other bases."""

from kanseg.study.peft import adapt, merge
from kanseg.study.refit import refit
from kanseg.study.symbolic import Formula, formulas
from kanseg.study.visualize import kan_convolutions, learned_functions, plot_learned_functions

__all__ = [
    "Formula",
    "adapt",
    "formulas",
    "kan_convolutions",
    "learned_functions",
    "merge",
    "plot_learned_functions",
    "refit",
]
