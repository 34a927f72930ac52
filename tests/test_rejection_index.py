"""The index of the rejection: one that the model lacks is refused in words, and stand-ins without it are attacked without it."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from core_models import Linear, inputs, relu_net
from torch import Tensor, nn

import mohs
from mohs.attacks import PGD, Square
from mohs.defenses import Defense
from mohs.errors import ModelError, UsageError
from mohs.evaluation import confirm
from mohs.evaluation.checks import _aimed, _answers
from mohs.evaluation.checks._review import Review, fools
from mohs.evaluation.checks._seen import Seen
from mohs.threat import Threat


class Rejecting(nn.Module):
    """A net and a last logit that never wins."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        logits = self.net(x)
        return torch.cat([logits, logits.detach().amin(1, keepdim=True) - 1], 1)


@pytest.mark.parametrize("attack", [PGD(steps=3), Square(steps=3)])
def test_a_rejection_that_the_model_lacks_is_refused_in_words(attack: Any) -> None:
    net, x = Linear(6, 3), inputs(4, 6)
    with pytest.raises(ModelError, match=r"logit 3, counted from 0; the model answers with 3 logits"):
        mohs.attack(attack, net, x, net(x).argmax(1), "linf:0.1", reject=3)


@pytest.mark.parametrize("right", [True, False])
def test_a_stand_in_without_the_rejection_is_attacked_without_it(right: bool) -> None:
    net, x = relu_net((1, 4, 4)), inputs(24, 1, 4, 4, seed=5)
    y = net(x).argmax(1)
    run = SimpleNamespace(
        guide=net if right else relu_net((1, 4, 4), seed=8), model=Rejecting(net), x=x, y=y, seed=0, batch=24,
        threat=mohs.Threat.parse("linf:0.1"), settings=SimpleNamespace(reject=4),
        average=lambda index: 1,
    )  # fmt: skip
    review = Review.__new__(Review)
    record = SimpleNamespace(n=24, correct=np.ones(24, bool))
    vars(review).update(run=run, threat=run.threat, record=record, passes=0, spent=10**6, best=-np.ones(24))
    vars(review).update(closed="", strongest=(0, PGD(steps=10)), thorough=False, upto=1)
    seen = _aimed.stand_in(review)
    assert "points that fool" in seen.saw, seen
    assert seen.severity == ("ok" if right else "warn")


@pytest.mark.parametrize(("new", "of", "severity"), [(0, 8, "ok"), (1, 8, "info"), (2, 3, "warn"), (2, 8, "warn")])
def test_answers_alone_are_held_against_the_threshold_of_all_lesser_attacks(new: int, of: int, severity: str) -> None:
    x, success = inputs(of, 6), torch.arange(of) < new
    loud = {"masking": Seen("warn", "")}
    record = SimpleNamespace(
        n=of, correct=np.ones(of, bool), examples=SimpleNamespace(clean_label=np.arange(of) % 2)
    )  # fmt: skip
    run = SimpleNamespace(
        x=x,
        y=torch.arange(of) % 2,
        classes=2,
        run=SimpleNamespace(header=SimpleNamespace(checks=())),
        threat=Threat.parse("linf:0.1"),
        settings=SimpleNamespace(reject=None),
    )
    review: Any = SimpleNamespace(
        closed="", threat=mohs.Threat.parse("linf:0.1"), sighted=[0], attacks=[0], seen=loud, record=record, run=run,
        won=lambda attacks: np.zeros(of, bool), near=lambda count, among: torch.arange(of),
        tried=lambda attack, rows, **settings: SimpleNamespace(success=success),
    )  # fmt: skip
    assert _answers.answers_only(review).severity == severity
    review.closed = "a reason"
    assert _answers.answers_only(review).saw == "not tested: a reason"


class Wary(nn.Module):
    """Answers 1 and is wrong; rejects, by its last logit, what is brighter than one half."""

    def forward(self, x: Tensor) -> Tensor:
        shade = x.flatten(1).mean(1)
        return torch.stack([torch.zeros_like(shade), torch.ones_like(shade), 4 * shade - 1], 1)


@dataclass(frozen=True)
class Bright(Defense):
    """The same as a defense, which declares it."""

    rejects: ClassVar[bool] = True


def ways(model: nn.Module, x: Tensor, reject: int | None) -> list[list[bool]]:
    y, random = torch.zeros(len(x), dtype=torch.int64), mohs.Threat(mohs.Linf(0.1), draws=3)
    return [
        confirm(model, x, y, "linf:0.1", reject=reject).tolist(),
        confirm(model, x, y, random, reject=reject).tolist(),
        fools(model, x, y, 0, 0, reject).tolist(),
        fools(model, x, y, 3, 0, reject).tolist(),
    ]


def test_what_is_rejected_is_not_confirmed_however_its_logit_is_named() -> None:
    x = torch.tensor([0.2, 0.8, 0.3]).view(3, 1).expand(3, 6)
    assert ways(Wary(), x, None) == [[True, True, True]] * 4
    assert (
        ways(Bright()(Wary()).eval(), x, None) == ways(Wary(), x, 2) == ways(Wary(), x, -1) == [[True, False, True]] * 4
    )


@pytest.mark.parametrize(
    ("reject", "said"),
    [
        (3, "got 3 of a model with 3"),
        (-4, "got -4 of a model with 3"),
        (1, "must be the last logit, 2"),
        (-3, "got -3"),
    ],
)
@pytest.mark.parametrize("draws", [0, 3])
def test_a_confirmation_refuses_an_index_as_an_evaluation_does(reject: int, said: str, draws: int) -> None:
    x, y = torch.full((3, 6), 0.2), torch.zeros(3, dtype=torch.int64)
    threat = mohs.Threat(mohs.Linf(0.1), draws=draws)
    asked: list[Any] = [
        lambda: confirm(Wary(), x, y, threat, reject=reject),
        lambda: fools(Wary(), x, y, draws, 0, reject),
        lambda: mohs.evaluate(Wary(), (x, y + 1), threat, plan="quick", reject=reject),
    ]
    words = set()
    for ask in asked:
        with pytest.raises(UsageError, match=said) as error:
            ask()
        words.add(str(error.value))
    assert len(words) == 1, words
