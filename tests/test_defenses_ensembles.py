"""Several models as one answer, and the thermometer code with a net that is trained on it."""

from __future__ import annotations

import pytest
import torch
from defended_nets import fashion, net
from torch import Tensor, nn

import mohs
from mohs import defenses
from mohs.attacks import PGD
from mohs.defenses import declared
from mohs.errors import ModelError
from mohs.problem import Goal


class Says(nn.Module):
    """Answers with the same logits whatever the input is."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits.expand(len(x), -1) + 0 * x.flatten(1)[:, :1]


X = torch.zeros(2, 4)


class TestMeans:
    def test_values(self) -> None:
        a, b = Says(1.0, 3.0, 0.0), Says(2.0, -1.0, 0.0)
        assert defenses.MeanLogits()(a, b)(X)[0].tolist() == [1.5, 1.0, 0.0]
        p = torch.stack([a(X).softmax(1), b(X).softmax(1)]).mean(0)
        assert torch.allclose(defenses.MeanProbabilities()(a, b)(X), p.log(), atol=1e-6)

    def test_sure_members_keep_a_gradient(self) -> None:
        x = torch.tensor([[200.0, 0.0]], requires_grad=True)
        z = defenses.MeanProbabilities()(nn.Identity(), nn.Identity())(x)
        assert torch.allclose(torch.autograd.grad(z[0, 1] - z[0, 0], x)[0], torch.tensor([[-1.0, 1.0]]))

    def test_one_logit_is_two_classes(self) -> None:
        model = defenses.MeanLogits()(nn.Linear(4, 1), nn.Linear(4, 1))
        assert model(X).shape == (2, 2)

    def test_different_classes_are_refused(self) -> None:
        with pytest.raises(ModelError, match=r"must have the same classes; these have \[3, 2\]"):
            defenses.MeanLogits()(Says(1.0, 2.0, 3.0), Says(1.0, 2.0))(X)

    def test_training_anywhere_is_training(self) -> None:
        assert defenses.MeanLogits()(nn.Linear(2, 2).eval(), nn.Linear(2, 2)).training
        assert not defenses.MeanLogits()(nn.Linear(2, 2).eval(), nn.Linear(2, 2).eval()).training

    @pytest.mark.parametrize("defense", [defenses.MeanLogits(), defenses.MeanProbabilities()])
    def test_weak_members_make_no_strong_ensemble(self, defense: defenses.Defense) -> None:
        x, y = fashion(32)
        model = defense(net(), defenses.GaussianBlur(1.0)(net()))
        assert declared(model).guide is None
        assert mohs.attack(PGD(steps=20), model, x, y, "linf:0.1").success.float().mean() > 0.9


class TestVote:
    def test_most_votes_win_and_sureness_decides_between_equals(self) -> None:
        a, b, c = Says(0.0, 9.0, 0.0), Says(1.0, 0.0, 0.0), Says(0.3, 0.0, 0.2)
        assert defenses.MajorityVote()(a, b, c)(X).argmax(1).tolist() == [0, 0]
        assert defenses.MajorityVote()(a, b)(X).argmax(1).tolist() == [1, 1]
        z = defenses.MajorityVote()(a, b, c)(X)[0]
        p = torch.stack([m(X)[0].softmax(0) for m in (a, b, c)]).mean(0)
        assert torch.allclose(z, torch.tensor([2 / 3, 1 / 3, 0.0]) + p / 6)

    def test_no_confidence_outweighs_a_vote(self) -> None:
        sure, unsure = Says(0.0, 50.0), Says(1e-3, 0.0)
        assert defenses.MajorityVote()(sure, unsure, unsure)(X).argmax(1).tolist() == [0, 0]

    def test_it_hides_its_gradient_and_breaks_with_that_of_the_mean(self) -> None:
        x, y = fashion(32)
        model = defenses.MajorityVote()(net(), defenses.GaussianBlur(1.0)(net()), defenses.BitDepth(4)(net()))
        with pytest.raises(ModelError, match="gives no input gradient"):
            mohs.attack(PGD(steps=2), model, x, y, "linf:0.1")
        out = mohs.attack(PGD(steps=20), model, x, y, "linf:0.1", guide=declared(model).guide)
        assert out.success.float().mean() > 0.9
        assert bool((model(out.x[out.success]).argmax(1) != y[out.success]).all())


class TestRejection:
    def test_it_answers_exactly_what_all_answer(self) -> None:
        generator = torch.Generator().manual_seed(0)
        z = torch.randn(3, 500, 4, generator=generator) * 0.5 + 1.5 * torch.randn(500, 4, generator=generator)

        class Row(nn.Module):
            def __init__(self, i: int) -> None:
                super().__init__()
                self.i = i

            def forward(self, x: Tensor) -> Tensor:
                return z[self.i]

        said = defenses.RejectDisagreement()(Row(0), Row(1), Row(2))(torch.zeros(500, 1)).argmax(1)
        each = z.argmax(2)
        agreed = (each == each[0]).all(0)
        assert torch.equal(said, torch.where(agreed, each[0], 4))
        assert 100 < int(agreed.sum()) < 400

    def test_it_is_declared_and_the_goal_counts_no_rejection_as_a_break(self) -> None:
        model = defenses.RejectDisagreement()(Says(2.0, 1.0), Says(1.0, 2.0))
        assert declared(model).rejects
        z, label = model(X), torch.zeros(2, dtype=torch.int64)
        assert bool((Goal.leave(label, reject=2).margin(z) <= 0).all())
        assert bool((Goal.leave(label).margin(z) > 0).all())

    def test_climbing_the_margin_beyond_the_rejection_fools_all_members(self) -> None:
        x, y = fashion(32)
        members = (net(), defenses.GaussianBlur(0.7)(net()))
        model = defenses.RejectDisagreement()(*members)
        goal, point = Goal.leave(y, reject=10), x.clone()
        for _ in range(20):
            point = point.detach().requires_grad_()
            up, down = goal.contest(model(point).detach())
            z = model(point)
            gain = (z.gather(1, up[:, None]) - z.gather(1, down[:, None])).sum()
            (g,) = torch.autograd.grad(gain, point)
            point = (x + (point.detach() + 0.015 * g.sign() - x).clamp(-0.1, 0.1)).clamp(0, 1)
        with torch.no_grad():
            both = torch.stack([m(point).argmax(1) for m in members])
        fooled = (both[0] == both[1]) & (both[0] != y)
        assert fooled.float().mean() > 0.85


class TestThermometer:
    def test_the_code(self) -> None:
        x = torch.tensor([[[0.0, 0.24, 0.25, 0.99, 1.0]], [[0.5, 0.49, 0.75, 0.1, 0.3]]])
        code = defenses.Thermometer(4).transform(x)
        assert code.shape == (2, 4, 5)
        assert code.sum(1).tolist() == [[1, 1, 2, 4, 4], [3, 2, 4, 1, 2]]
        assert bool((code[:, :-1] >= code[:, 1:]).all())  # filled from below, without gaps

    def test_channels_stay_together(self) -> None:
        x = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
        code = defenses.Thermometer(8).transform(x)
        for c in range(3):
            assert torch.equal(code[:, 8 * c : 8 * c + 8], defenses.Thermometer(8).transform(x[:, c : c + 1]))

    def test_the_ramp_follows_the_code(self) -> None:
        defense = defenses.Thermometer(16)
        x = torch.linspace(0, 0.9999, 4001).view(1, 1, -1).double()
        code, ramp = defense.transform(x), defense.stand_in(x)
        assert bool(((ramp >= 0.5) == (code == 1)).all())
        assert bool((ramp[:, :, 500:-500].diff(dim=2).sum(1) > 0).all())  # neither up nor down is it ever flat
        published = ((x * 256 - 16 * (torch.arange(16).view(1, -1, 1) - 1)) / 16).clamp(0, 2) / 2
        assert torch.allclose(ramp, published)

    def test_a_net_trained_on_it_breaks_through_the_ramp(self) -> None:
        defense = defenses.Thermometer(16)
        x, y = fashion(512)
        torch.manual_seed(0)
        inner = mohs.models.nets.small_cnn(channels=16)
        model = defense(inner)
        optimizer = torch.optim.Adam(inner.parameters(), 2e-3)
        for epoch in range(10):
            for rows in torch.randperm(512, generator=torch.Generator().manual_seed(epoch)).split(64):
                loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval().requires_grad_(False)
        with torch.no_grad():
            assert (model(x).argmax(1) == y).float().mean() > 0.8
        with pytest.raises(ModelError, match="gives no input gradient"):  # a comparison has none
            mohs.attack(PGD(steps=2), model, x[:4], y[:4], "linf:0.1")
        x, y = x[:32], y[:32]
        noise = 0.15 * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) - 1).sign()
        assert (model((x + noise).clamp(0, 1)).argmax(1) == y).float().mean() > 0.6
        out = mohs.attack(PGD(steps=20), model, x, y, "linf:0.15", guide=declared(model).guide)
        assert out.success.float().mean() > 0.85
