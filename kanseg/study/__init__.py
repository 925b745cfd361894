"""What KAN layers allow: looking at their functions, formulas for them, training few numbers, moving to other bases,
doing without functions that say little.
"""

from kanseg.study.peft import adapt, merge
from kanseg.study.prune import Simplified, prune, pruned_share, simplify, strengths
from kanseg.study.refit import refit
from kanseg.study.symbolic import Formula, formulas
from kanseg.study.visualize import kan_convolutions, learned_functions, plot_learned_functions

__all__ = [
    "Formula",
    "Simplified",
    "adapt",
    "formulas",
    "kan_convolutions",
    "learned_functions",
    "merge",
    "plot_learned_functions",
    "prune",
    "pruned_share",
    "refit",
    "simplify",
    "strengths",
]
