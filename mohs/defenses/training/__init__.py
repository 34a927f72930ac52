"""Training recipes: one objective per file over one loop.

Nothing here knows how to run an attack: objectives hold attacks as values, and the loop receives the function that runs
them. ``mohs.evaluation.training`` puts the two together.
"""

from __future__ import annotations

from mohs.defenses.training.awp import AWP
from mohs.defenses.training.cascade import Cascade
from mohs.defenses.training.deep_contractive import DeepContractive
from mohs.defenses.training.distillation import Distillation
from mohs.defenses.training.ensemble import Ensemble
from mohs.defenses.training.fast import Fast
from mohs.defenses.training.finetune import FineTune
from mohs.defenses.training.free import Free
from mohs.defenses.training.gaussian_augmentation import GaussianAugmentation
from mohs.defenses.training.gradalign import GradAlign
from mohs.defenses.training.loop import Progress, Trained, train
from mohs.defenses.training.mart import MART
from mohs.defenses.training.mixture import Mixture
from mohs.defenses.training.natural import Natural
from mohs.defenses.training.nfgsm import NFGSM
from mohs.defenses.training.objective import Context, Last, Objective, Perturb, Points
from mohs.defenses.training.on_embeddings import OnEmbeddings
from mohs.defenses.training.pretrained import Pretrained
from mohs.defenses.training.recipe import Recipe
from mohs.defenses.training.room import Room
from mohs.defenses.training.saddle import Saddle
from mohs.defenses.training.schedules import SGD, Adam, Constant, Cosine, Steps
from mohs.defenses.training.trades import TRADES
from mohs.defenses.training.turn import Turn
from mohs.defenses.training.unified_embedding import UnifiedEmbedding
from mohs.defenses.training.vat import VAT
from mohs.defenses.training.watch import EarlyWarning, Watch

__all__ = [
    "AWP", "Adam", "Cascade", "Constant", "Context", "Cosine", "DeepContractive", "Distillation", "EarlyWarning",
    "Ensemble", "Fast", "FineTune", "Free", "GaussianAugmentation", "GradAlign", "Last", "MART", "Mixture", "NFGSM", "Natural",
    "Objective", "OnEmbeddings", "Perturb", "Points", "Pretrained", "Progress", "Recipe", "Room", "SGD", "Saddle", "Steps", "TRADES",
    "Trained", "Turn", "UnifiedEmbedding", "VAT", "Watch", "train",
]  # fmt: skip
