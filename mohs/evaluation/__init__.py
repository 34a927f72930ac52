"""Evaluation: checks, plans, claims and verdicts, the engine that ties attacks and certificates to a record, and replay."""

from mohs.evaluation.checks import check
from mohs.evaluation.claims import (
    Accuracy,
    Certified,
    Claim,
    Detection,
    Median,
    Stability,
    decided,
    judge,
    verdict,
)
from mohs.evaluation.confirmation import confirm
from mohs.evaluation.distance import Distances, minimum_norm
from mohs.evaluation.engine import evaluate
from mohs.evaluation.evidence import Counts, Detections, Evidence, Scores, Sizes
from mohs.evaluation.exam import Exam, exam
from mohs.evaluation.plans import Plan, PlanStep, available_plans, load_plan
from mohs.evaluation.replay import Replayed, replay
from mohs.evaluation.robustness import rho_adv, smallest_radius
from mohs.evaluation.roc import ROC
from mohs.evaluation.seal import Seal

__all__ = [
    "Accuracy",
    "Certified",
    "Claim",
    "Counts",
    "Detection",
    "Detections",
    "Distances",
    "Evidence",
    "Exam",
    "Median",
    "Plan",
    "PlanStep",
    "ROC",
    "Replayed",
    "Scores",
    "Seal",
    "Sizes",
    "Stability",
    "available_plans",
    "check",
    "confirm",
    "decided",
    "evaluate",
    "exam",
    "judge",
    "load_plan",
    "minimum_norm",
    "replay",
    "rho_adv",
    "smallest_radius",
    "verdict",
]
