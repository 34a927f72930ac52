"""Black boxes: they answer, they give no gradient, and a wrong answer is named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from core_models import inputs, relu_net
from torch import nn

import mohs
from mohs import models
from mohs.errors import ModelError


def test_black_box_answers_and_has_no_gradient() -> None:
    box = models.BlackBox(lambda a: np.stack([a.sum(1), -a.sum(1)], 1))
    x = torch.ones(2, 3, requires_grad=True)
    logits = box(x)
    assert logits.tolist() == [[3, -3], [3, -3]]
    assert logits.dtype == torch.float32
    assert not logits.requires_grad
    assert models.BlackBox(lambda a: a.sum(1))(x).shape == (2,)


def test_black_box_cannot_change_its_input() -> None:
    def greedy(a: np.ndarray) -> np.ndarray:
        a += 1
        return a

    x = torch.zeros(1, 2)
    models.BlackBox(greedy)(x)
    assert x.tolist() == [[0, 0]]


def test_black_box_from_probabilities_and_labels() -> None:
    soft = models.BlackBox.from_probabilities(lambda a: np.array([[0.25, 0.75, 0.0]] * len(a)))
    logits = soft(torch.zeros(2, 1))
    assert torch.allclose(logits.softmax(1), torch.tensor([0.25, 0.75, 0.0]).expand(2, 3), atol=1e-6)
    assert bool(logits.isfinite().all())
    hard = models.BlackBox.from_labels(lambda a: (a[:, 0] > 0).astype(int) * 2, classes=3)
    assert hard(torch.tensor([[1.0], [-1.0]])).tolist() == [[0, 0, 1], [1, 0, 0]]


@pytest.mark.parametrize(
    ("box", "match"),
    [
        (models.BlackBox(lambda a: 1 / 0), "raised ZeroDivisionError"),
        (models.BlackBox(lambda a: a[:1]), "answered shape \\[1, 4\\] to a batch of 2"),
        (models.BlackBox(lambda a: a[None]), "allowed are"),
        (models.BlackBox(lambda a: "cat"), "raised ValueError"),
        (models.BlackBox.from_labels(lambda a: a, 3), "whole numbers of shape \\[2\\]"),
        (models.BlackBox.from_labels(lambda a: np.array([0, 3]), 3), "0 to 2"),
    ],
)
def test_black_box_refuses(box: nn.Module, match: str) -> None:
    with pytest.raises(ModelError, match=match):
        box(torch.zeros(2, 4))
    with pytest.raises(ModelError, match="needs a function"):
        models.BlackBox(3)  # type: ignore[arg-type]


def test_black_boxes_are_told_apart_by_name() -> None:
    a, b = (models.BlackBox(len, name=name) for name in "ab")
    assert models.weights_hash(a) != models.weights_hash(b)
    assert models.BlackBox(len).name == "len"


def counted(net: nn.Module) -> tuple[models.BlackBox, list[int]]:
    """The net as a black box, and the rows of each question it was asked."""
    asked: list[int] = []

    def answers(a: np.ndarray) -> np.ndarray:
        asked.append(len(a))
        with torch.no_grad():
            return net(torch.from_numpy(a)).numpy()

    return models.BlackBox(answers), asked


def test_settled_rows_are_not_asked_about() -> None:
    net, x = relu_net((6,)), inputs(21, 6)
    box, asked = counted(net)
    y = net(x).argmax(1)
    threat = mohs.Threat(mohs.Linf(0.1), access=mohs.Access.LOGIT)
    found = mohs.attack(mohs.attacks.Square(steps=60), box, x, y, threat, batch=8)
    assert 0 < int(found.success.sum()) < 21
    assert sum(asked) == int(found.forwards.sum())
    plain = mohs.attack(mohs.attacks.Square(steps=60), net, x, y, threat, batch=8)
    assert torch.equal(plain.success, found.success)
    assert torch.equal(plain.forwards, found.forwards)


def test_a_judge_asks_about_candidates_only() -> None:
    net, x = relu_net((6,)), inputs(16, 6)
    box, asked = counted(net)
    y = net(x).argmax(1)
    threat = mohs.Threat(mohs.Linf(0.1), access=mohs.Access.LABEL)
    found = mohs.attack(mohs.attacks.PGD(steps=10), box, x, y, threat, guide=net, batch=16)
    # PGD looks at the guide, which is free; the box is asked about what the guide nominates, and the last look
    assert bool(found.success.any())
    assert sum(asked) == int(found.queries.sum())
