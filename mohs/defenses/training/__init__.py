"""Training recipes: one objective per file over one loop.

Nothing here knows how to run an attack: objectives hold attacks as values, and the loop receives the function that runs
them. ``mohs.evaluation.training`` puts the two together.
"""

from __future__ import annotations

from mohs.defenses.training.loop import Progress, Trained, train
from mohs.defenses.training.mixture import Mixture
from mohs.defenses.training.natural import Natural
from mohs.defenses.training.objective import Context, Objective, Perturb
from mohs.defenses.training.recipe import Recipe
from mohs.defenses.training.saddle import Saddle
from mohs.defenses.training.schedules import SGD, Adam, Constant, Cosine, Steps
from mohs.defenses.training.watch import EarlyWarning, Watch

__all__ = [
    "Adam", "Constant", "Context", "Cosine", "EarlyWarning", "Mixture", "Natural", "Objective", "Perturb", "Progress",
    "Recipe", "SGD", "Saddle", "Steps", "Trained", "Watch", "train",
]  # fmt: skip
