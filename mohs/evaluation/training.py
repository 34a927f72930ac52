"""Training with Mohs's own attacks: objectives, which hold attacks as values, meet the scheduler that runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mohs import attacks
from mohs.attacks import FGSM, PGD, Attack, Square, Stop
from mohs.data import Dataset
from mohs.defenses import training
from mohs.defenses.training import Distillation, Natural, Pretrained, Progress, Recipe, Trained, Watch
from mohs.defenses.training.files import read_recipe
from mohs.defenses.training.objective import Last, against
from mohs.errors import UsageError
from mohs.target import classify
from mohs.threat import Threat

WATCH = Watch(one_step=FGSM(), many_steps=PGD(steps=10), search=Square(steps=50))
"""The early warnings' attacks."""


def perturb(
    attack: Attack | Last, model: nn.Module, x: Tensor, y: Tensor, threat: Threat, *, eps: Tensor, seed: int, batch: int
) -> Tensor:
    """The points an attack ends with when it spends its whole budget, [N, ...]."""
    one = attack.attack if isinstance(attack, Last) else attack
    stop = Stop.LAST if one is not attack and getattr(one, "last", False) else Stop.BUDGET
    return attacks.attack(one, model, x, y, threat, eps=eps, seed=seed, batch=batch, stop=stop).x


def load_recipe(source: str | Path) -> Recipe:
    """A recipe from ``FILE.toml``, ``FILE.py``, or the name of one in ``recipes`` here or beside the package.

    A Python recipe defines ``RECIPE`` and is run as a program, so load only those you trust; a TOML recipe is data.

    Raises:
        UsageError: There is no such recipe, or it is not one; the message lists what is allowed.
    """
    return read_recipe(source, attacks.REGISTRY)


def train(
    recipe: Recipe,
    *,
    out: str | Path,
    data: Dataset | None = None,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    resume: bool = True,
    checkpoint_every: int | None = None,
    watch: Watch | None = WATCH,
    progress: Callable[[Progress], None] | None = None,
) -> Trained:
    """Train as the recipe says, with Mohs's attacks, or go on where a call with the same ``out`` was interrupted.

    Args:
        recipe: what to do; see ``load_recipe`` and ``mohs.defenses.training.Recipe``.
        out, data, model, device, seed, resume, checkpoint_every, progress: see ``mohs.defenses.training.train``.
        watch: the early warnings of catastrophic overfitting and of masked gradients; they are for objectives that train
            against adversarial points.

    Returns:
        A ``Trained``: the model in eval mode, the path of its weights, the learning curve and warnings.
    """
    watch = watch if against(recipe.objective) is not None else None
    return training.train(
        recipe, perturb=perturb, out=out, data=data, model=model, device=device, seed=seed, resume=resume,
        checkpoint_every=checkpoint_every, watch=watch, progress=progress,
    )  # fmt: skip


class Distilled(NamedTuple):
    """What ``distil`` brought: the student is the defense."""

    teacher: Trained
    student: Trained


def distil(
    recipe: Recipe,
    *,
    out: str | Path,
    data: Dataset | None = None,
    model: nn.Module | None = None,
    device: str | torch.device | None = None,
    resume: bool = True,
    checkpoint_every: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Distilled:
    """Defensive distillation: train a teacher at a temperature, then a net of the same architecture on its answers.

    Both start from the same weights and see the data in the same order, as the recipe's seed says. An interrupted call
    goes on where it stopped. See ``mohs.defenses.training.Distillation`` for what it is worth.

    Args:
        recipe: the teacher's, with ``Natural(temperature=T)`` as its objective; the student's differs in the objective alone.
        out: directory; the two trainings lie in its folders ``teacher`` and ``student``.
        model: instead of the recipe's net: becomes the student, in place; the teacher is a copy.
        data, device, resume, checkpoint_every, progress: see ``mohs.defenses.training.train``.

    Returns:
        A ``Distilled``; ``student.model`` is used as it is, at temperature 1.

    Raises:
        UsageError: The recipe's objective is not ``Natural``.

    Cost: that of the recipe twice, and a forward more per example and epoch of the student.
    """
    if not isinstance(recipe.objective, Natural):
        raise UsageError(
            f"distil trains the teacher as the recipe says, naturally at a temperature; the objective of {recipe.name!r} is "
            f"{recipe.objective!r}. Give Natural(temperature=20)."
        )

    def trained(which: str, objective: Natural | Distillation, net: nn.Module | None) -> Trained:
        plan = replace(recipe, name=f"{recipe.name}-{which}", objective=objective)
        return train(
            plan, out=Path(out) / which, data=data, model=net, device=device, resume=resume,
            checkpoint_every=checkpoint_every, progress=progress,
        )  # fmt: skip

    teacher = trained("teacher", recipe.objective, copy.deepcopy(model))
    objective = Distillation(Pretrained(teacher.model), recipe.objective.temperature)
    return Distilled(teacher, trained("student", objective, model))


def measure(model: nn.Module, data: Dataset, threat: Threat | str, seed: int = 0) -> dict[str, float]:
    """The figures in a recipe's header: accuracy clean, under FGSM, and under PGD with 40 steps, 1 and 5 restarts.

    These are upper bounds of the robust accuracy, for comparing trainings; ``mohs.evaluate`` makes evidence of them.
    """
    x, y = data
    with torch.no_grad():
        right = torch.cat([classify(model, part).argmax(1) for part in x.split(1000)]) == y
    figures = {"clean": float(right.double().mean())}
    for name, attack, restarts in (("fgsm", FGSM(), 1), ("pgd_40x1", PGD(steps=40), 1), ("pgd_40x5", PGD(steps=40), 5)):
        out = attacks.attack(attack, model, x[right], y[right], threat, restarts=restarts, seed=seed)
        figures[name] = float((~out.success).sum()) / len(x)
    return {name: round(value, 4) for name, value in figures.items()}
