"""Defenses that change a copy of the net: what they do to it, and that the net as it was is found again."""

from __future__ import annotations

import copy

import pytest
import torch
from defended_nets import fashion, net
from torch import Tensor, nn

from mohs import defenses
from mohs.defenses import BitDepth, BoundedReLU, Defended, Defense, declared
from mohs.errors import ModelError, UsageError
from mohs.evaluation._inner import undefended
from mohs.models import weights_hash

CHANGES: list[Defense] = [
    BoundedReLU(1.0),
    defenses.KWinners(0.5),
    defenses.WeightPruning(0.5),
    defenses.Quantisation(4),
]


def of(model: nn.Module) -> Defended:
    assert isinstance(model, Defended)
    return model


@pytest.mark.parametrize("defense", CHANGES, ids=repr)
class TestEach:
    def test_the_net_itself_is_left_alone_and_is_the_undefended_one(self, defense: Defense) -> None:
        before, x = weights_hash(net()), fashion()[0]
        defended = of(defense(net()))
        assert defended.undefended is net()
        assert not torch.allclose(defended(x), net()(x), atol=1e-3)
        assert weights_hash(net()) == before
        assert not {id(p) for p in defended.parameters()} & {id(p) for p in net().parameters()}
        assert len(list(defended.parameters())) == len(list(net().parameters()))  # those of one net

    def test_an_evaluation_finds_it_behind_other_defenses(self, defense: Defense) -> None:
        x, y = fashion()
        model = defenses.Stack(BitDepth(6), defense)(net())
        found = undefended(model, x, y, believe=True)
        assert found is not None
        assert found[0] is net()
        assert found[1] == f"{BitDepth(6)!r}, {defense!r}"
        assert len(declared(model).defenses) == 2

    def test_modes_and_precision_go_along(self, defense: Defense) -> None:
        mine = copy.deepcopy(net())
        defended = of(defense(mine)).train().double()
        assert mine.training
        assert all(m.training for m in defended.modules())
        assert all(p.dtype == torch.float64 for p in mine.parameters())
        other = copy.deepcopy(defended)
        assert of(other).undefended is not mine
        assert not any(m.training for m in of(defense(copy.deepcopy(net()))).modules())

    def test_only_one_model_is_defended(self, defense: Defense) -> None:
        with pytest.raises(UsageError, match="defends one model; got 2"):
            defense(net(), net())


class TestBoundedReLU:
    def test_activations_stop_at_the_bound(self) -> None:
        a = torch.linspace(-3, 3, 13, dtype=torch.float64)
        assert torch.equal(BoundedReLU(1.5)(nn.ReLU())(a), torch.where(a < 0, 0.0, torch.where(a > 1.5, 1.5, a)))

    def test_a_relu_that_stands_in_two_places_is_replaced_in_both(self) -> None:
        relu = nn.ReLU()
        model = nn.Sequential(nn.Linear(3, 3), relu, nn.Sequential(relu, nn.Linear(3, 2)), relu)
        defended = BoundedReLU(0.5)(model)
        assert "ReLU()" not in str(defended)
        assert "ReLU()" in str(model)
        assert bool((defended(torch.full((1, 3), 100.0)) <= 0.5).all())

    def test_a_large_bound_changes_nothing(self) -> None:
        x = fashion()[0]
        assert torch.equal(BoundedReLU(1e6)(net())(x), net()(x))

    def test_going_back_an_honest_attacker_sees_a_relu(self) -> None:
        a = torch.tensor([-1.0, 0.5, 2.0])
        model = BoundedReLU(1.0)(nn.ReLU())

        def slope(m: nn.Module) -> list[float]:
            x = a.clone().requires_grad_()
            return torch.autograd.grad(m(x).sum(), x)[0].tolist()

        assert slope(model) == [0.0, 1.0, 0.0]
        assert slope(declared(model).guide or model) == [0.0, 1.0, 1.0]

    def test_it_can_be_trained_with(self) -> None:
        model = BoundedReLU(1.0)(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)))
        model(torch.rand(3, 2)).sum().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_a_net_without_relus_is_refused(self) -> None:
        class Calls(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return x.relu()

        with pytest.raises(ModelError, match=r"BoundedReLU replaces nn\.ReLU layers, and this model has none"):
            BoundedReLU()(Calls())
        with pytest.raises(UsageError, match="bound of BoundedReLU must be a number above 0; got 0"):
            BoundedReLU(0)
