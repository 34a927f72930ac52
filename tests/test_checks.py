"""The checks of the doctor: healthy models trip none, and no check leaves a trace; what cannot be checked is refused."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from checked_models import Cut, Wrapped, conv, found, images, linear, norm, severities
from torch import Tensor, nn

import mohs
from mohs.data import Dataset
from mohs.errors import DataError, ModelError, UsageError
from mohs.evaluation.checks import CHECKS, check
from mohs.threat import Threat

HEALTHY = {
    "linear": linear,
    "conv": conv,
    "batch norm and dropout in eval mode": norm,
    "log-softmax": lambda: Wrapped(after=lambda z: z.log_softmax(1)),
    "float64": lambda: linear().double(),
}


class TestHealthy:
    @pytest.mark.parametrize("name", HEALTHY)
    def test_every_check_is_ok(self, name: str) -> None:
        model = HEALTHY[name]()
        x = images().double() if name == "float64" else images()
        with torch.no_grad():
            y = model(x).argmax(1)
        findings = found(model, x=x, y=y)
        assert severities(findings) == {}
        assert list(findings) == list(CHECKS)

    @pytest.mark.parametrize("batch", [1, 7, 64, 128])
    def test_at_any_physical_batch(self, batch: int) -> None:
        assert severities(found(conv(), batch=batch)) == {}

    @pytest.mark.parametrize("n", [1, 2, 9, 65, 300])
    def test_at_any_number_of_examples(self, n: int) -> None:
        assert severities(found(conv(), x=images(n))) == {}

    def test_a_model_that_takes_one_batch_size_only(self) -> None:
        def fixed(x: Tensor) -> Tensor:
            if len(x) != 16:
                raise ValueError("16, please")
            return x

        assert severities(found(Wrapped(before=fixed), y=torch.zeros(96).long(), batch=16)) == {
            "clean-accuracy": "warn"
        }

    def test_a_data_set_and_the_public_verb(self) -> None:
        x = images()
        findings = mohs.check(conv(), Dataset(x, conv()(x).argmax(1)), Threat.parse("l2:0.5"))
        assert all(f.severity == "ok" and f.saw for f in findings)

    def test_a_single_logit_is_no_probability(self) -> None:
        for shape in (-1, (-1, 1)):
            model = Wrapped(after=lambda z, shape=shape: (z[:, 0] * 3).reshape(shape))
            assert severities(found(model)) == {"few-classes": "info"}


class TestNoTraces:
    def test_model_data_and_generators_are_as_before(self) -> None:
        model = norm().train()
        model[3].eval()
        model.register_buffer("extra", None)
        x = images()
        y = torch.zeros(96).long()
        model(x)[0].sum().backward()
        modes = [m.training for m in model.modules()]
        state = {k: v.clone() for k, v in model.state_dict().items()}
        grads = [p.grad.clone() for p in model.parameters()]
        asked = [p.requires_grad for p in model.parameters()]
        hooks = [len(m._forward_hooks) for m in model.modules()]
        x_before, y_before = x.clone(), y.clone()
        torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        check(model, (x, y), "linf:0.1")
        assert [m.training for m in model.modules()] == modes
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))
        assert [p.requires_grad for p in model.parameters()] == asked
        assert [len(m._forward_hooks) for m in model.modules()] == hooks
        assert torch.equal(x, x_before)
        assert torch.equal(y, y_before)
        assert not x.requires_grad
        assert torch.equal(torch.get_rng_state(), torch_state)
        assert np.array_equal(np.random.get_state()[1], numpy_state[1])  # noqa: NPY002
        assert random.getstate() == python_state

    def test_restored_after_a_model_that_raises_and_reseeds(self) -> None:
        model = norm().train()
        before = {k: v.clone() for k, v in model.state_dict().items()}

        def broken(z: Tensor) -> Tensor:
            torch.manual_seed(5)
            np.random.seed(5)  # noqa: NPY002
            if torch.is_grad_enabled():
                raise RuntimeError("no gradients here")
            return z

        outer = Wrapped(after=broken, net=model)
        outer.train()
        python, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
        with pytest.raises(ModelError, match="no gradients here"):
            check(outer, (images(), torch.zeros(96).long()), "linf:0.1")
        assert all(m.training for m in outer.modules())
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert np.array_equal(np.random.get_state()[1], python)  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), torch_state)

    def test_hooks_and_parameters_are_restored_when_the_graph_is_broken(self) -> None:
        model = Cut()
        found(model)
        assert all(p.requires_grad for p in model.parameters())
        assert all(not m._forward_hooks for m in model.modules())

    def test_the_same_seed_finds_the_same(self) -> None:
        model, x = Wrapped(after=lambda z: z + torch.randn_like(z)), images(300)
        y = torch.zeros(300).long()
        first = check(model, (x, y), "linf:0.1", seed=3)
        torch.manual_seed(99)
        assert check(model, (x, y), "linf:0.1", seed=3) == first

    def test_the_stated_cost(self) -> None:
        rows = []

        def count(x: Tensor) -> Tensor:
            rows.append(len(x))
            return x

        x = images(300)
        check(Wrapped(before=count), (x, torch.zeros(300).long()), "linf:0.1")
        # 1 base, 5 for randomness, 2 for coupling, 1 in double precision, 1 with a graph, 1 step along it; 8 alone, 1 watched; 2
        # of four for seeds; 1 of 16 for the slopes of two logits; the rest of 256
        assert sorted(rows) == [1] * 9 + [4] * 2 + [16] + [64] * 11 + [192]

    def test_a_random_model_costs_less_than_20_forwards_per_example(self) -> None:
        rows = []

        def count(x: Tensor) -> Tensor:
            rows.append(len(x))
            return x + 0.01 * torch.randn_like(x)

        x = images(300)
        check(Wrapped(before=count), (x, torch.zeros(300).long()), "linf:0.1")
        # 1 base, 5 for randomness, 1 with a graph; 19 more graphs and 8 pairs before and after the step, of 16 rows
        # each; 1 for the slopes of two logits; 2 of 2 to name the layer, 1 watched
        assert sorted(rows) == [1] + [2] * 2 + [16] * 36 + [64] * 7 + [192]
        assert sum(rows) < 20 * 64


class TestRefusals:
    def test_a_model_that_raises(self) -> None:
        with pytest.raises(ModelError, match="raised RuntimeError") as caught:
            check(nn.Linear(3, 5).eval(), (images(), torch.zeros(96).long()), "linf:0.1")
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize(
        "after", [lambda z: z.argmax(1), lambda z: z.view(-1, 5, 1), lambda z: (z, z), lambda z: z[:5]]
    )
    def test_a_model_that_gives_no_logits(self, after: Callable[[Tensor], Tensor]) -> None:
        with pytest.raises(ModelError):
            check(Wrapped(after=after), (images(), torch.zeros(96).long()), "linf:0.1")

    def test_labels_beyond_the_classes_name_the_rows_of_the_data(self) -> None:
        y = torch.zeros(96).long()
        y[[5, 90]] = 7
        with pytest.raises(DataError, match="rows 5 and 90"):
            check(linear(), (images(), y), "linf:0.1")

    @pytest.mark.parametrize(
        ("x", "y", "error"),
        [
            (torch.zeros(4, 3, dtype=torch.uint8), torch.zeros(4).long(), "floating-point"),
            (torch.zeros(0, 3), torch.zeros(0).long(), "N >= 1"),
            (torch.tensor([[0.0], [float("nan")]]), torch.zeros(2).long(), "row 1"),
            (torch.zeros(4, 3), torch.zeros(3).long(), "int64"),
            (torch.zeros(4, 3), torch.tensor([0, -1, 0, 0]), "row 1"),
        ],
    )
    def test_unusable_data(self, x: Tensor, y: Tensor, error: str) -> None:
        with pytest.raises(DataError, match=error):
            check(linear(), (x, y), "linf:0.1")

    def test_other_arguments(self) -> None:
        data = (images(), torch.zeros(96).long())
        with pytest.raises(UsageError, match=r"0\.935"):
            check(linear(), data, "linf:0.1", stated_accuracy=93.5)
        with pytest.raises(UsageError, match="batch"):
            check(linear(), data, "linf:0.1", batch=0)
        with pytest.raises(ModelError, match="BlackBox"):
            check(lambda x: x, data, "linf:0.1")  # type: ignore[arg-type]

    def test_every_finding_explains_itself(self) -> None:
        planted = [
            Wrapped(after=lambda z: (z * 1000).softmax(1)), Cut(), norm().train(), norm(track=False), linear(2),
            Wrapped(after=lambda z: z + torch.randn_like(z)), Wrapped(before=torch.round),
            Wrapped(after=lambda z: z * 1000),
        ]  # fmt: skip
        for model in planted:
            for finding in found(
                model, "linf:8", x=images() * 2, y=torch.ones(96).long(), stated_accuracy=0.99
            ).values():
                assert finding.saw
                if finding.severity in ("warn", "block"):
                    assert finding.means.endswith(".")
                    assert finding.remedy.endswith(".")
