"""Every check of the doctor has models that must trip it, and healthy ones that must not."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mohs
from mohs.data import Dataset
from mohs.errors import DataError, ModelError, UsageError
from mohs.evaluation.checks import CHECKS, check
from mohs.records import Finding
from mohs.threat import Access, Threat

SIDE = 8


def images(n: int = 96, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


def linear(classes: int = 5) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, classes)))


def conv() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (SIDE - 2) ** 2, 5)))


def norm(track: bool = True) -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.BatchNorm2d(4, track_running_stats=track),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(4 * (SIDE - 2) ** 2, 5),
        )
    )


class Wrapped(nn.Module):
    """A healthy net with something done to its input or output."""

    def __init__(
        self,
        before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
        net: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.net = linear() if net is None else net
        self.before, self.after = before or (lambda v: v), after or (lambda v: v)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.net(self.before(x)))


class Functional(nn.Module):
    """Dropout that no layer shows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = linear()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.net(x), 0.5, self.training)


def found(
    model: nn.Module, threat: Threat | str = "linf:0.1", x: Tensor | None = None, y: Tensor | None = None,
    **settings: object,
) -> dict[str, Finding]:  # fmt: skip
    x = images() if x is None else x
    if y is None:
        was = [m.training for m in model.modules()]
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(1)
            answers = model.eval()(x.float())
        for m, training in zip(model.modules(), was):
            m.training = training
        y = answers.argmax(1) if answers.dim() == 2 and answers.shape[1] > 1 else (answers.flatten() > 0).long()
    return {f.id: f for f in check(model, (x, y), threat, **settings)}  # type: ignore[arg-type]


def severities(findings: dict[str, Finding]) -> dict[str, str]:
    return {k: f.severity for k, f in findings.items() if f.severity != "ok"}


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


class TestTrainingMode:
    def test_batch_norm_and_dropout(self) -> None:
        finding = found(norm().train())["training-mode"]
        assert finding.severity == "block"
        assert "1 (BatchNorm2d), 3 (Dropout)" in finding.saw

    def test_the_other_checks_speak_of_eval_mode(self) -> None:
        assert severities(found(norm().train())) == {"training-mode": "block"}

    def test_one_layer_only(self) -> None:
        model = norm()
        model[3].train()
        assert found(model)["training-mode"].severity == "block"

    def test_dropout_that_no_layer_shows(self) -> None:
        assert found(Functional().train())["training-mode"].severity == "block"

    def test_a_mode_that_changes_nothing_is_a_remark(self) -> None:
        assert severities(found(conv().train())) == {"training-mode": "info"}


class TestBatchCoupling:
    PLANTED = {
        "batch mean": lambda: Wrapped(after=lambda z: z - z.mean(0)),
        "batch mean of the input": lambda: Wrapped(before=lambda x: x - x.mean(0)),
        "statistics of the batch in eval mode": lambda: norm(track=False),
        "neighbour": lambda: Wrapped(after=lambda z: z + 0.1 * z.roll(1, 0)),
        "position in the batch": lambda: Wrapped(
            after=lambda z: z + 0.1 * torch.arange(len(z)).view(-1, 1) * torch.ones(5)
        ),
        "batch size": lambda: Wrapped(after=lambda z: z * (1 + 0.01 * len(z))),
    }

    @pytest.mark.parametrize("name", PLANTED)
    def test_planted(self, name: str) -> None:
        assert found(self.PLANTED[name]())["batch-coupling"].severity == "block"

    @pytest.mark.parametrize("name", ["batch mean", "neighbour", "statistics of the batch in eval mode"])
    def test_planted_at_a_fixed_batch(self, name: str) -> None:
        assert found(self.PLANTED[name](), batch=32)["batch-coupling"].severity == "block"

    def test_chance_is_not_mistaken_for_it(self) -> None:
        finding = found(Wrapped(after=lambda z: z + 0.1 * torch.randn_like(z)))["batch-coupling"]
        assert finding.severity == "info"
        assert "not tested" in finding.saw


class TestBox:
    @pytest.mark.parametrize(
        ("x", "threat", "severity", "remedy"),
        [
            (lambda: images() * 255, "linf:8/255", "block", "divide by 255"),
            (lambda: (images() * 255).round(), "linf:8/255", "block", "divide by 255"),
            (lambda: (images() - 0.5) / 0.29, "linf:8/255", "block", "look normalised"),
            (lambda: images() * 2 + 5, "linf:0.1", "block", "State the box"),
            (lambda: images(), "linf:8 in [0, 255]", "block", "linf:8/255"),
            (lambda: images() * 0.3, "linf:0.1", "warn", "scale"),
            (lambda: (images() - 0.5) / 0.29, "linf:0.1 in [-3, 3]", "warn", "normalised"),
            (lambda: (images() - 0.5) / 0.29, "linf:0.1 in [-inf, inf]", "info", "normalised"),
            (lambda: images() * 255, "linf:8 in [0, 255]", "ok", ""),
            (lambda: images() * 4, "linf:8 in [-inf, inf]", "ok", ""),
            (lambda: images() * 2 - 1, "linf:0.1 in [-1, 1]", "ok", ""),
        ],
    )
    def test_planted(self, x: Callable[[], Tensor], threat: str, severity: str, remedy: str) -> None:
        finding = found(linear(), threat, x=x())["input-box"]
        assert (finding.severity, remedy in finding.remedy) == (severity, True)

    def test_one_bad_input_of_many_is_seen(self) -> None:
        x = images(1000)
        x[777, 0, 3, 3] = 1.5
        assert found(linear(), x=x)["input-box"].saw.startswith("1 of 1000 inputs leave the box")


class TestRadius:
    @pytest.mark.parametrize(
        ("threat", "severity"),
        [
            ("linf:8", "warn"),
            ("linf:0.51", "warn"),
            ("l2:8", "warn"),
            ("linf:0", "warn"),
            ("linf:0.3", "ok"),
            ("l2:1", "ok"),
            ("l2:inf", "ok"),
            ("l0:3", "ok"),
            ("linf:8 in [0, 255]", "ok"),
        ],
    )
    def test_planted(self, threat: str, severity: str) -> None:
        x = images() * 255 if "255" in threat else images()
        assert found(linear(), threat, x=x)["radius"].severity == severity


class TestOutputType:
    def test_softmax(self) -> None:
        assert severities(found(Wrapped(after=lambda z: z.softmax(1)))) == {"output-type": "warn"}

    def test_saturated_softmax_says_so(self) -> None:
        findings = found(Wrapped(after=lambda z: (z * 1000).softmax(1)))
        assert "hold an exact 1" in findings["output-type"].saw
        assert findings["output-type"].severity == "warn"
        assert findings["zero-gradient"].severity in ("warn", "block")

    def test_sigmoid_of_a_single_logit(self) -> None:
        x = images()
        finding = found(Wrapped(after=lambda z: z[:, 0].sigmoid()), x=x, y=torch.arange(96) % 2)["output-type"]
        assert finding.severity == "warn"
        assert "sigmoid" in finding.means

    def test_rows_that_sum_to_one_but_leave_the_interval_are_logits(self) -> None:
        shifted = Wrapped(after=lambda z: 9 * (z - z.mean(1, keepdim=True)) + 0.2)
        assert found(shifted)["output-type"].severity == "ok"


class TestRandomness:
    def test_noise_that_flips_answers_blocks(self) -> None:
        finding = found(Wrapped(after=lambda z: z + torch.randn_like(z)))["randomness"]
        assert finding.severity == "block"
        assert "draws=20" in finding.remedy

    def test_noise_that_flips_none_warns(self) -> None:
        ones = torch.eye(5)[0] * 10
        assert found(Wrapped(after=lambda z: z + ones + 1e-3 * torch.randn_like(z)))["randomness"].severity == "warn"

    def test_it_is_a_remark_where_the_threat_scores_draws(self) -> None:
        threat = Threat(mohs.Linf(0.1), draws=20)
        assert found(Wrapped(before=lambda x: x + torch.randn_like(x)), threat)["randomness"].severity == "info"

    def test_noise_that_sleeps_on_clean_inputs(self) -> None:
        def sleeper(x: Tensor) -> Tensor:
            grey = (x * 255).round() / 255
            clean = (x == grey).flatten(1).all(1)
            return torch.where(clean.view(-1, 1, 1, 1), x, x + torch.randn_like(x))

        x = (images() * 255).round() / 255
        finding = found(Wrapped(before=sleeper), x=x)["randomness"]
        assert finding.severity == "block"
        assert "only inputs with noise show it" in finding.saw

    def test_numpy_and_python_chance(self) -> None:
        assert found(Wrapped(after=lambda z: z + float(np.random.rand())))["randomness"].severity != "ok"  # noqa: NPY002
        assert found(Wrapped(after=lambda z: z * (1 + random.random())))["randomness"].severity != "ok"

    def test_a_state_that_counts_calls(self) -> None:
        calls = []

        def grow(z: Tensor) -> Tensor:
            calls.append(1)
            return z * (1 + 0.1 * len(calls))

        assert found(Wrapped(after=grow))["randomness"].severity != "ok"


class Cut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Flatten(), nn.Linear(SIDE * SIDE, 5)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).detach())


class Rounding(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(np.round(x.detach().numpy() * 8) / 8)


class TestNoGradient:
    def test_detached_between_layers(self) -> None:
        findings = found(Cut())
        assert findings["no-gradient"].severity == "block"
        assert "before layer second" in findings["no-gradient"].saw
        assert "not tested" in findings["zero-gradient"].saw

    def test_a_layer_that_leaves_torch_is_named(self) -> None:
        findings = found(nn.Sequential(Rounding(), linear()).eval())
        assert "in layer 0" in findings["no-gradient"].saw

    def test_frozen_parameters(self) -> None:
        findings = found(Cut().requires_grad_(False))
        assert findings["no-gradient"].severity == "block"
        assert severities(found(conv().requires_grad_(False))) == {}

    def test_answers_cut_off_at_the_end(self) -> None:
        assert "after layer" in found(Wrapped(after=lambda z: z.detach()))["no-gradient"].saw

    def test_no_loss_where_the_threat_grants_no_gradient(self) -> None:
        threat = Threat(mohs.Linf(0.1), access=Access.LABEL)
        assert severities(found(Cut(), threat)) == {"no-gradient": "info", "zero-gradient": "info"}

    def test_at_a_fixed_batch(self) -> None:
        assert found(Cut(), batch=16)["no-gradient"].severity == "block"


class Needle(torch.autograd.Function):
    """Identity whose gradient is nan."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:  # type: ignore[override]
        return g * float("nan")


class TestZeroGradient:
    def test_rounded_input(self) -> None:
        finding = found(Wrapped(before=lambda x: (x * 8).round() / 8))["zero-gradient"]
        assert finding.severity == "block"
        assert "exactly zero for 100%" in finding.saw

    def test_some_rows(self) -> None:
        def half(x: Tensor) -> Tensor:
            dark = (x.flatten(1).mean(1) < 0.5).view(-1, 1, 1, 1)
            return torch.where(dark, x.round(), x)

        assert found(Wrapped(before=half))["zero-gradient"].severity == "warn"

    def test_nan(self) -> None:
        finding = found(Wrapped(before=Needle.apply))["zero-gradient"]
        assert finding.severity == "block"
        assert "nan or inf" in finding.saw

    def test_underflow_of_the_cross_entropy_is_told_from_a_true_zero(self) -> None:
        finding = found(Wrapped(after=lambda z: z * 1e5))["zero-gradient"]
        assert finding.severity == "info"
        assert "exactly zero for 0%" in finding.saw

    def test_low_access(self) -> None:
        threat = Threat(mohs.Linf(0.1), access=Access.SCORE)
        assert found(Wrapped(before=torch.round), threat)["zero-gradient"].severity == "info"


class TestSaturation:
    def test_logits_times_a_thousand(self) -> None:
        finding = found(Wrapped(after=lambda z: z * 1000))["saturated-logits"]
        assert finding.severity == "warn"

    def test_confident_but_sound(self) -> None:
        assert found(Wrapped(after=lambda z: z * 30))["saturated-logits"].severity == "ok"


class TestCleanAccuracy:
    def labels(self, right: float) -> tuple[Tensor, Tensor]:
        x = images(256)
        y = linear()(x).argmax(1)
        wrong = torch.arange(256) >= round(256 * right)
        return x, torch.where(wrong, (y + 1) % 5, y)

    @pytest.mark.parametrize(
        ("right", "stated", "severity"),
        [(1.0, 1.0, "ok"), (0.9, 0.9, "ok"), (0.9, 0.88, "ok"), (0.9, 0.945, "warn"), (0.8, 0.95, "block"),
         (1.0, 0.9, "block"), (0.1, None, "warn"), (0.5, None, "ok")],
    )  # fmt: skip
    def test_planted(self, right: float, stated: float | None, severity: str) -> None:
        x, y = self.labels(right)
        assert found(linear(), x=x, y=y, stated_accuracy=stated)["clean-accuracy"].severity == severity

    def test_few_examples_contradict_nothing(self) -> None:
        assert found(linear(), x=images(3), stated_accuracy=0.5)["clean-accuracy"].severity == "ok"


class TestFewClasses:
    @pytest.mark.parametrize(("classes", "severity"), [(2, "info"), (3, "info"), (4, "ok")])
    def test_planted(self, classes: int, severity: str) -> None:
        assert found(linear(classes))["few-classes"].severity == severity


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
        # 1 base, 5 for randomness, 2 for coupling, 1 with a graph; 8 alone; the rest of 256
        assert sorted(rows) == [1] * 8 + [64] * 9 + [192]


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
