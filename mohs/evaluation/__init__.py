"""Evaluation: checks, plans, claims and verdicts, the engine that ties attacks and certificates to a record, and replay."""

from mohs.evaluation.checks import check
from mohs.evaluation.claims import Claim, verdict
from mohs.evaluation.distance import Distances, minimum_norm
from mohs.evaluation.engine import evaluate
from mohs.evaluation.plans import Plan, PlanStep, available_plans, load_plan
from mohs.evaluation.replay import Replayed, replay
from mohs.evaluation.robustness import rho_adv, smallest_radius

__all__ = [
    "Claim",
    "Distances",
    "Plan",
    "PlanStep",
    "Replayed",
    "available_plans",
    "check",
    "evaluate",
    "load_plan",
    "minimum_norm",
    "replay",
    "rho_adv",
    "smallest_radius",
    "verdict",
]
