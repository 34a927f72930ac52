"""The training loop and its objectives."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from training_problem import blobs, mixed_net, never, perturb, recipe, run, same

from mohs.attacks import FGSM, PGD
from mohs.defenses.training import (
    SGD,
    Adam,
    Constant,
    Context,
    Cosine,
    Last,
    Mixture,
    Natural,
    Progress,
    Saddle,
    Steps,
    Watch,
    train,
)
from mohs.defenses.training import loop as training_loop
from mohs.errors import DataError, ModelError, RecordError, UsageError
from mohs.models import read_weights


def test_learns_and_writes_weights_and_curve(tmp_path: Path) -> None:
    trained = run(tmp_path, epochs=5)
    lines = [json.loads(line) for line in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert lines == trained.curve
    assert [row["epoch"] for row in lines] == [1, 2, 3, 4, 5]
    assert lines[-1]["loss"] < lines[0]["loss"] / 2
    assert lines[-1]["clean"] == 1.0
    assert lines[-1]["watched"] == 10
    again = recipe().build_net()
    again.load_state_dict(read_weights(trained.weights))
    assert same(again, trained.model)
    assert not trained.model.training


def test_same_seed_same_bytes_whatever_the_global_generators_say(tmp_path: Path) -> None:
    def go(out: str, seed: int, noise: int) -> nn.Module:
        torch.manual_seed(noise)
        return run(tmp_path, Saddle(PGD(steps=2)), threat="linf:0.05", seed=seed, out=out).model

    first = go("a", 1, 11)
    assert same(first, go("b", 1, 22))
    assert not same(first, go("c", 2, 11))


def test_dropout_draws_from_the_recipes_seed(tmp_path: Path) -> None:
    torch.manual_seed(5)
    a = run(tmp_path, model=mixed_net(), out="a").model
    torch.manual_seed(6)
    assert same(a, run(tmp_path, model=mixed_net(), out="b").model)
    assert not same(a, run(tmp_path, model=mixed_net(), seed=9, out="c").model)


def test_global_generators_are_left_as_they_were(tmp_path: Path) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    run(tmp_path, Saddle(PGD(steps=2)), model=mixed_net(), threat="linf:0.05", watch=Watch(FGSM(), PGD(steps=2)))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (np.random.get_state()[1].tolist(), random.getstate())  # noqa: NPY002


def test_attacks_see_eval_mode_and_leave_modes_statistics_and_gradients(tmp_path: Path) -> None:
    net = mixed_net()
    net[3].eval()
    was = [m.training for m in net.modules()]
    seen = []

    def spying(attack: Any, model: nn.Module, x: Tensor, y: Tensor, threat: Any, **rest: Any) -> Tensor:
        before = [b.clone() for b in model.buffers()]
        points = perturb(attack, model, x, y, threat, **rest)
        seen.append(
            (
                any(m.training for m in model.modules()),
                all(torch.equal(a, b) for a, b in zip(before, model.buffers())),
                all(p.grad is None for p in model.parameters()),
            )
        )
        return points

    trained = run(tmp_path, Saddle(PGD(steps=2)), how=spying, model=net, threat="linf:0.05", epochs=1)
    assert set(seen) == {(False, True, True)}
    assert [m.training for m in net.modules()] == was
    assert trained.model is net
    assert float(net[1].running_mean.abs().sum()) > 0  # the loss itself was taken in training mode


def test_modes_come_back_after_an_error(tmp_path: Path) -> None:
    net = mixed_net().eval()
    with pytest.raises(AssertionError, match="no attack"):
        run(tmp_path, Saddle(FGSM()), how=never, model=net, threat="linf:0.1")
    assert not any(m.training for m in net.modules())


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    net = mixed_net()
    net[0].requires_grad_(False)
    before = net[0].weight.clone()
    run(tmp_path, model=net)
    assert torch.equal(before, net[0].weight)
    net.requires_grad_(False)
    with pytest.raises(UsageError, match="nothing to train"):
        run(tmp_path, model=net, out="other")


def test_the_radius_warms_up_linearly(tmp_path: Path) -> None:
    radii: list[float] = []

    def noting(attack: Any, model: nn.Module, x: Tensor, y: Tensor, threat: Any, **rest: Any) -> Tensor:
        radii.append(float(rest["eps"][0]))
        points = perturb(attack, model, x, y, threat, **rest)
        assert float((points - x).abs().max()) <= radii[-1] + 1e-6
        return points

    run(tmp_path, Saddle(PGD(steps=2)), how=noting, threat="linf:0.2", warmup=2, epochs=3)  # 5 steps per epoch
    assert radii == pytest.approx([0.2 * k / 10 for k in range(10)] + [0.2] * 5)


def test_every_step_attacks_with_fresh_randomness(tmp_path: Path) -> None:
    seeds = []

    def noting(*args: Any, **rest: Any) -> Tensor:
        seeds.append(rest["seed"])
        return perturb(*args, **rest)

    run(tmp_path, Saddle(PGD(steps=1)), how=noting, threat="linf:0.1")
    assert len(set(seeds)) == len(seeds) == 10


def test_the_learning_rate_follows_the_schedule(tmp_path: Path) -> None:
    curve = run(tmp_path, optimiser=SGD(lr=0.5), schedule=Steps(at=(0.5,), by=0.1), epochs=4).curve
    assert [row["lr"] for row in curve] == pytest.approx([0.5, 0.5, 0.05, 0.05])


@given(st.integers(1, 70), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_an_epochs_batches_hold_every_example_once(n: int, batch: int, seed: int, epoch: int) -> None:
    probe = object.__new__(training_loop._Run)
    probe.recipe, probe.x = recipe(batch=batch, seed=seed), torch.zeros(n, 1)
    batches = probe._batches(epoch)
    assert torch.cat(batches).sort().values.tolist() == list(range(n))
    assert all(len(b) <= batch + 1 for b in batches)
    assert [b.tolist() for b in batches] == [b.tolist() for b in probe._batches(epoch)]
    if batch > 1 and n > 1:
        assert all(len(b) > 1 for b in batches)


@given(st.floats(0, 1, exclude_max=True), st.floats(0, 0.99))
def test_schedules_stay_between_zero_and_one(done: float, rise: float) -> None:
    for schedule in (Constant(), Cosine(rise), Steps()):
        assert 0 <= schedule.factor(done) <= 1


def test_progress_tells_every_step(tmp_path: Path) -> None:
    told: list[Progress] = []
    run(tmp_path, progress=told.append)
    assert [(p.epoch, p.step) for p in told] == [(e, s) for e in (1, 2) for s in range(1, 6)]
    assert [p.row is not None for p in told] == [False, False, False, False, True] * 2


# --- what goes wrong -----------------------------------------------------------------------------------------------


class Poisoned(Natural):
    """Natural training whose loss is nan from the eighth step on."""

    calls = 0

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context | None = None) -> Tensor:
        Poisoned.calls += 1
        return super().loss(model, x, y, context) * (float("nan") if Poisoned.calls > 7 else 1.0)


def test_a_nan_loss_stops_and_the_last_good_checkpoint_is_kept(tmp_path: Path) -> None:
    Poisoned.calls = 0
    with pytest.raises(ModelError, match=r"nan in step 3 of epoch 2.*last good state is kept.*learning rate"):
        run(tmp_path, Poisoned(), epochs=3)
    good = run(tmp_path, epochs=1, out="good")
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "run" / "checkpoint.safetensors")
    assert torch.equal(kept["model/1.weight"], good.model[1].weight)


class Cusp(Natural):
    """A finite loss whose gradient is nan."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, context: Context | None = None) -> Tensor:
        return super().loss(model, x, y, context) + sum((p * 0).abs().sum().sqrt() for p in model.parameters())


def test_weights_that_explode_never_reach_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"weights became nan.*No checkpoint"):
        run(tmp_path, Cusp(), epochs=1, batch=80)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    for other in ({"batch": 8}, {"seed": 4}, {"data": blobs(seed=1)}):
        with pytest.raises(RecordError, match="another run"):
            run(tmp_path, **other)
    fresh = run(tmp_path, seed=4, resume=False)
    assert same(fresh.model, run(tmp_path, seed=4, out="other").model)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    path = tmp_path / "run" / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecordError, match="resume=False"):
        run(tmp_path)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    told: list[Progress] = []
    again = run(tmp_path, progress=told.append)
    assert not told
    assert same(first.model, again.model)
    assert again.curve == first.curve


def test_impossible_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds out 90 examples, but blobs has 90"):
        run(tmp_path, holdout=90)
    with pytest.raises(UsageError, match="checkpoint_every"):
        train(recipe(), perturb=perturb, out=tmp_path, data=blobs(), checkpoint_every=0)
    with pytest.raises(UsageError, match="device 'cuda:77'"):
        train(recipe(), perturb=perturb, out=tmp_path, data=blobs(), device="cuda:77")
    with pytest.raises(DataError, match="no data set 'blobs'"):
        train(recipe(), perturb=perturb, out=tmp_path)
    with pytest.raises(UsageError, match=r"linf:0\.1"):
        recipe(Saddle(FGSM()))
    with pytest.raises(UsageError, match=r"linf:0\.1"):
        recipe(Saddle(FGSM()), threat="linf:inf")
    for wrong in ({"epochs": 0}, {"batch": 2.5}, {"warmup": 9}, {"holdout": -1}, {"seed": "x"}, {"objective": 3}):
        with pytest.raises(UsageError):
            recipe(**wrong)
    with pytest.raises(UsageError, match="Allowed: small_cnn"):
        run(tmp_path, net="resnet")
    with pytest.raises(UsageError, match="options"):
        run(tmp_path, net_options={"depth": 3})
    for make in (lambda: SGD(lr=-1), lambda: SGD(momentum=1), lambda: Adam(beta1=1), lambda: Steps(at=(2,))):
        with pytest.raises(UsageError):
            make()


# --- the early warning ---------------------------------------------------------------------------------------------


def curve(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"epoch": k + 1, "one_step": a, "many_steps": b, "watched": 100} for k, (a, b) in enumerate(pairs)]


def test_the_watch_warns_of_catastrophic_overfitting() -> None:
    watch = Watch(FGSM(), PGD(steps=10))
    fell = Watch(FGSM(), PGD(steps=10), gap=1.0).judge(curve((0.5, 0.45), (0.6, 0.5), (0.65, 0.35)))
    assert fell is not None
    assert fell.epoch == 3
    assert "in epoch 2 they were 60.0% and 50.0%" in fell.saw
    assert watch.judge(curve((0.3, 0.2), (0.9, 0.0))) is not None
    assert "100.0% under FGSM" in str(watch.judge(curve((1.0, 0.1))))


def test_the_watch_is_silent_on_honest_curves() -> None:
    watch = Watch(FGSM(), PGD(steps=10))
    assert watch.judge([]) is None
    assert watch.judge([{"epoch": 1, "loss": 1.0}]) is None
    assert watch.judge(curve((0.5, 0.45), (0.6, 0.5), (0.62, 0.55))) is None
    assert watch.judge(curve((0.6, 0.5), (0.45, 0.35))) is None  # both fall: a bad epoch, not masking


def test_a_planted_case_is_reported_in_result_and_progress(tmp_path: Path) -> None:
    def masked(attack: Any, model: nn.Module, x: Tensor, y: Tensor, threat: Any, **rest: Any) -> Tensor:
        return x if isinstance(attack, FGSM | Last) else 1 - x  # one step does nothing, many steps everything

    told: list[Progress] = []
    watch = Watch(FGSM(), PGD(steps=5))
    trained = run(tmp_path, Mixture(FGSM()), how=masked, threat="linf:0.2", epochs=4, watch=watch, progress=told.append)
    assert trained.warnings
    assert trained.warnings[-1].epoch == 4
    assert [p.warning for p in told if p.warning] == trained.warnings
    healthy = run(tmp_path, Saddle(PGD(steps=5)), threat="linf:0.05", epochs=4, watch=watch, out="healthy")
    assert not healthy.warnings
    assert healthy.curve[-1]["many_steps"] > 0.5
    assert (
        run(tmp_path, Mixture(FGSM()), how=masked, threat="linf:0.2", epochs=4, watch=watch).warnings
        == trained.warnings
    )
