"""Adversarial and virtual adversarial training of text beside their formulas, on nets that are linear after the embedding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sentence_nets import LinearWords, grammar, some_ids, text_net
from torch import Tensor, nn
from torch.nn import functional as F
from training_formulas import room
from training_problem import never, perturb

import mohs
from mohs.attacks import FGSM, PGD, REGISTRY
from mohs.defenses.training import (
    AWP,
    TRADES,
    VAT,
    Adam,
    Context,
    FineTune,
    Free,
    Mixture,
    Natural,
    OnEmbeddings,
    Recipe,
    Saddle,
)
from mohs.defenses.training._quiet import evaluating
from mohs.defenses.training.files import recipe_from_table
from mohs.errors import ModelError, UsageError
from mohs.evaluation.training import train
from mohs.models import NormalisedEmbedding, SentenceCNN, TextClassifier

EPS = 0.7
THREAT = f"l2:{EPS} in [-inf, inf]"


def linear_net() -> TextClassifier:
    net = text_net()
    net.classifier = LinearWords(5, 5)
    return net


def batch() -> tuple[Tensor, Tensor]:
    ids = some_ids().double()
    return ids, torch.arange(len(ids)) % 3


def context() -> Context:
    here = room(THREAT)

    def points(attack: Any, x: Tensor, y: Tensor, *, of: Any = None, radii: Any = None) -> Tensor:
        assert not x.requires_grad
        with evaluating(of):
            return perturb(attack, of, x, y, here.threat, eps=here.radii(x), seed=0, batch=len(x))

    return Context(points, EPS, 0.0, here)


def agrees(objective: Any, expected: Tensor, net: nn.Module) -> None:
    """Are value and gradients those of a loss built by hand on the same net?"""
    ids, y = batch()
    wanted = torch.autograd.grad(expected, list(net.parameters()))
    loss = OnEmbeddings(objective).loss(net, ids, y, context())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for found, true in zip(torch.autograd.grad(loss, list(net.parameters())), wanted, strict=True):
        assert torch.allclose(found, true, atol=1e-9)
        assert bool(true.any())


def slopes(net: TextClassifier, cotangent: Tensor) -> Tensor:
    """W^T c of a linear classifier, zero at padding and in the number that marks it, [N, T, D + 1]."""
    ids, _ = batch()
    g = torch.einsum("nk,ktd->ntd", cotangent, net.classifier.weight.detach())
    return F.pad(g * (ids != 0).unsqueeze(2), (0, 1))


def unit(g: Tensor) -> Tensor:
    return g / g.flatten(1).norm(dim=1)[:, None, None]


def test_adversarial_training_is_the_mixture_with_fgsm() -> None:
    net, (ids, y) = linear_net(), batch()
    e = net.embedding(ids)
    p = net(ids).detach().softmax(1)
    r = EPS * unit(slopes(net, p - F.one_hot(y, 3)))  # the gradient of -log p(y | e)
    assert not r[ids == 0].any()
    clean, bent = (F.cross_entropy(net.classifier(at), y) for at in (e, e + r))
    assert bent > clean
    agrees(Mixture(FGSM()), (clean + bent) / 2, net)


def test_the_loss_at_the_point_reaches_the_words() -> None:
    net, (ids, y) = linear_net(), batch()
    e = net.embedding(ids)
    p = net(ids).detach().softmax(1)
    r = EPS * unit(slopes(net, p - F.one_hot(y, 3)))
    agrees(Saddle(FGSM()), F.cross_entropy(net.classifier(e + r), y), net)


def test_virtual_adversarial_training_takes_one_step_of_the_power_method() -> None:
    net, (ids, y) = linear_net(), batch()
    e = net.embedding(ids)
    p = net(ids).detach().softmax(1)
    d = room(THREAT).normal(e.detach()) * (ids != 0).unsqueeze(2)
    jd = torch.einsum("ktd,ntd->nk", net.classifier.weight.detach(), d[..., :-1])
    hd = slopes(
        net, p * jd - p * (p * jd).sum(1, keepdim=True)
    )  # the Fisher matrix of softmax, between W and its transpose
    r = EPS * unit(hd)
    points = VAT(xi=1e-6).points(net.classifier, e.detach(), room(THREAT))
    assert torch.allclose(points - e.detach(), r, atol=1e-4)
    # at the very points it found, value and gradients are the formula's
    found = points - e.detach()
    q = net.classifier(net.embedding(ids) + found).log_softmax(1)
    agrees(VAT(alpha=2.0, xi=1e-6), F.cross_entropy(net(ids), y) + 2.0 * (p * (p.log() - q)).sum(1).mean(), net)


def test_rows_without_a_label_count_in_the_divergence_alone() -> None:
    net, (ids, y) = text_net(), batch()
    none = torch.tensor([False, True, True, False, True, False])
    marked = torch.where(none, 3, y)
    apart = OnEmbeddings(VAT()).loss(net, ids, y, context()) - F.cross_entropy(net(ids), y)
    partly = OnEmbeddings(VAT(unlabelled=3)).loss(net, ids, marked, context())
    assert partly.item() == pytest.approx((F.cross_entropy(net(ids)[~none], y[~none]) + apart).item(), rel=1e-9)
    whole = OnEmbeddings(VAT(unlabelled=3)).loss(net, ids, torch.full_like(y, 3), context())
    assert whole.item() == pytest.approx(apart.item(), rel=1e-9)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(whole, list(net.parameters())))
    assert VAT(alpha=0, unlabelled=3).loss(nn.Flatten(), net(ids), torch.full_like(y, 3), context()).item() == 0
    with pytest.raises(UsageError, match="unlabelled of VAT"):
        VAT(unlabelled=-1)


class Counted(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.looks = net, 0

    def forward(self, x: Tensor) -> Tensor:
        self.looks += 1
        found: Tensor = self.net(x)
        return found


@pytest.mark.parametrize("objective", [Natural(), Mixture(FGSM()), VAT(), TRADES(steps=2)])
def test_the_embedding_is_looked_at_once_so_that_its_dropout_is_the_same(objective: Any) -> None:
    net, (ids, y) = text_net(), batch()
    net.embedding.dropout.p = 0.5
    net.embedding = Counted(net.embedding)
    OnEmbeddings(objective).loss(net.train(), ids, y, context())
    assert net.embedding.looks == 1
    assert net.classifier.training


def test_points_are_held_over_two_looks_at_a_batch() -> None:
    net, (ids, y) = text_net(), batch()
    kept: list[Tensor] = []

    def once(make: Any) -> Tensor:
        if not kept:
            kept.append(make())
        return kept[0]

    first = OnEmbeddings(VAT()).loss(net, ids, y, replace(context(), once=once))
    second = OnEmbeddings(VAT()).loss(net, ids, y, replace(context(), once=once))
    assert first.item() == second.item()
    assert not kept[0].requires_grad


@pytest.mark.parametrize("objective", [Free(), AWP(TRADES()), FineTune(PGD()), Natural, "vat"])
def test_what_is_more_than_a_loss_is_refused(objective: Any) -> None:
    with pytest.raises(UsageError, match="OnEmbeddings"):
        OnEmbeddings(objective)


def test_a_net_of_one_part_is_refused() -> None:
    ids, y = batch()
    with pytest.raises(ModelError, match="parts 'embedding' and 'classifier'; got Sequential"):
        OnEmbeddings(Natural()).loss(nn.Sequential(nn.Linear(5, 3)), ids, y, Context(never, 0.1, 0.0))


def test_recipes_name_it() -> None:
    table = {
        "name": "t", "data": "d", "net": "n", "epochs": 1, "threat": THREAT,
        "objective": {"name": "on_embeddings", "objective": {"name": "vat", "unlabelled": 2}},
    }  # fmt: skip
    assert recipe_from_table(table, REGISTRY, "here").objective == OnEmbeddings(VAT(unlabelled=2))
    with pytest.raises(UsageError, match="does not serve the threat l0"):
        Recipe("t", "d", "n", OnEmbeddings(VAT()), epochs=1, threat="l0:3")


@pytest.mark.parametrize("objective", [Mixture(FGSM()), VAT(alpha=2.0)])
def test_training_flattens_the_answers_around_sentences_and_repeats(objective: Any, tmp_path: Path) -> None:
    data, vocabulary = grammar(tmp_path)

    def trained(which: Any, out: str) -> TextClassifier:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = TextClassifier(NormalisedEmbedding(vocabulary.counts, 6), SentenceCNN(6, 8))
        recipe = Recipe(
            "t", "t", "t", OnEmbeddings(which), epochs=4, threat="l2:2 in [-inf, inf]", batch=16, holdout=0, optimiser=Adam(lr=0.02)
        )  # fmt: skip
        train(recipe, out=tmp_path / out, data=data, model=net, device="cpu", watch=None)
        return net.eval()

    plain, flat, again = trained(Natural(), "a"), trained(objective, "b"), trained(objective, "c")
    assert all(torch.equal(a, b) for a, b in zip(flat.state_dict().values(), again.state_dict().values(), strict=True))

    def right(net: TextClassifier) -> tuple[float, float]:
        e = net.embedding(data.x).detach()
        bent = mohs.attack(PGD(steps=10), net.classifier, e, data.y, "l2:3 in [-inf, inf]").x
        clean, robust = (float((net.classifier(at).argmax(1) == data.y).double().mean()) for at in (e, bent))
        return clean, robust

    assert right(flat)[0] > 0.95
    assert right(flat)[1] > right(plain)[1] + 0.05
