"""What the strength benchmarks rest on: exact optima, equal passes, stages told apart, a net that folds to itself."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch import Tensor, nn

import mohs
from benchmarks import __main__ as command
from benchmarks import autoattack, exact, minimum, nets, peers, reference, walls
from benchmarks.measure import Counted
from benchmarks.robust import RobustSubject
from benchmarks.subjects import Options
from mohs.attacks import DDN, PGD, DeepFool

NORMS = ("linf", "l2", "l1", "l0")


def subject(rows: int = 12) -> RobustSubject:
    data = mohs.data.load("bundled:fashion-mnist", n=rows)
    return RobustSubject("net", mohs.models.load("bundled:fashion-natural"), data.x, data.y, 0.1)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_hyperplane_agrees_with_a_linear_program(norm: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    a, x = draw.normal(size=6), draw.random(6)
    most = (np.abs(a) * np.where(a > 0, 1 - x, x)).sum()
    gap = float(draw.random() * most)
    if norm == "l1":  # d = up - down
        program = linprog(
            np.ones(12),
            A_ub=-np.concatenate([a, -a])[None],
            b_ub=[-gap],
            bounds=[*((0, 1 - v) for v in x), *((0, v) for v in x)],
        )
    else:
        eye, ones = np.eye(6), np.ones((6, 1))
        rows = np.vstack([np.append(-a, 0.0)[None], np.hstack([eye, -ones]), np.hstack([-eye, -ones])])
        program = linprog(
            [0.0] * 6 + [1.0], A_ub=rows, b_ub=[-gap] + [0.0] * 12, bounds=[*((-v, 1 - v) for v in x), (0, None)]
        )
    assert exact.hyperplane(a, gap, x, exact.UNIT, norm) == pytest.approx(program.fun, rel=1e-6)
    assert exact.hyperplane(a, 1.001 * most, x, exact.UNIT, norm) == math.inf


@pytest.mark.parametrize("box", [exact.UNIT, exact.OPEN])
def test_hyperplane_in_l2_is_the_nearest_point(box: tuple[float, float]) -> None:
    a, x = np.array([1.0, -2.0, 0.5, 0.0]), np.array([0.2, 0.3, 0.9, 0.5])
    size = exact.hyperplane(a, 1.2, x, box, "l2")
    if box == exact.OPEN:
        assert size == pytest.approx(1.2 / np.linalg.norm(a))
    else:
        rows = np.vstack([a[None], np.eye(4), -np.eye(4)])
        assert size == pytest.approx(exact.least_distance(rows, np.concatenate([[1.2], -x, x - 1])))


def test_few_features_reach_what_l0_says() -> None:
    a, x = np.array([3.0, -1.0, 0.5, 2.0]), np.full(4, 0.5)
    assert [exact.hyperplane(a, gap, x, exact.UNIT, "l0") for gap in (1.5, 1.6, 2.5, 2.9, 3.2)] == [1, 2, 2, 3, 4]


def test_sizes_of_small_nets_are_in_the_order_of_norms_and_no_attack_is_below() -> None:
    solved = exact.relu()
    few = slice(0, 1)
    best = {}
    for norm in NORMS:
        solve = exact._by_regions if norm == "l2" else exact._by_program
        best[norm] = np.array(
            [
                min(solve(solved.net, row, int(y), k, norm) for k in range(exact.RELU_CLASSES) if k != int(y))
                for row, y in zip(solved.x[few].numpy(), solved.y[few], strict=True)
            ]
        )
    assert (best["linf"] <= best["l2"] + 1e-6).all()
    assert (best["l2"] <= best["l1"] + 1e-6).all()
    assert (best["l2"] <= best["linf"] * math.sqrt(exact.RELU_FEATURES) + 1e-6).all()
    assert (best["l0"] >= 1).all()
    for norm in ("linf", "l2", "l1"):
        found = mohs.attack(DeepFool(), solved.net, solved.x[few], solved.y[few], f"{norm}:inf").size.numpy()
        assert (found >= best[norm] * (1 - 1e-6)).all()
        assert (found <= 3 * best[norm]).all()


def test_solver_keeps_its_remarks_to_itself(capfd: pytest.CaptureFixture[str]) -> None:
    solved = exact.relu()
    exact._by_program(solved.net, solved.x[0].numpy(), int(solved.y[0]), (int(solved.y[0]) + 1) % 3, "linf")
    assert capfd.readouterr().out == ""


def test_steps_are_those_of_all_phases() -> None:
    import dataclasses

    @dataclasses.dataclass(frozen=True)
    class Search:
        inner: int = 10

    @dataclasses.dataclass(frozen=True)
    class Whole:
        steps: int = 50

    assert minimum.with_steps(Whole, 7).steps == 7
    assert minimum.with_steps(Search, 7) == Search()  # no field of that name: as it is
    assert minimum.with_steps(DeepFool, 9).steps == 9


@pytest.mark.parametrize("cost", [1, 4, 20])
def test_budget_of_passes_is_met_whatever_a_step_costs(cost: int) -> None:
    given = subject()

    def attack(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        with torch.no_grad():
            for _ in range(steps * cost):
                model(x)
        return x

    found = minimum.measured(attack, given, 2.0, minimum.fitting(attack, given, 100, patience=60), patience=60)
    assert 80 <= found.passes <= 105
    assert found.steps * cost == found.passes or cost == 1
    assert found.median == math.inf or len(given.x) > 12


def test_sizes_trust_nobody() -> None:
    given = subject().correct()
    noise, far = given.x.clone(), given.x.clone()
    far[:, 0, 0, 0] = 1.5  # outside of the box
    assert minimum.sizes(given, noise, 2.0).isinf().all()
    assert minimum.sizes(given, far, 2.0).isinf().all()
    broken = mohs.attack(DeepFool(), given.net, given.x, given.y, "l2:inf")
    assert torch.allclose(minimum.sizes(given, broken.x, 2.0).float(), broken.size)


def test_ours_serve_the_norm_they_are_asked_for() -> None:
    assert "mohs DeepFool" in minimum.ours("l2")
    assert "mohs DeepFool" not in minimum.ours("l0")
    assert not any("PGD" in name for name in minimum.ours("linf", ("PGD",)))  # it needs a radius


def test_walls_pair_an_attack_with_every_peer_that_has_it() -> None:
    pairs = {(mine, peer) for mine, (peer, _) in walls.pairs("l2", Options(attacks=("DDN", "TrustRegion")))}
    assert pairs <= {("DDN", "adv-lib DDN"), ("DDN", "foolbox DDN"), ("TrustRegion", "adv-lib TR")}
    assert len(pairs) == sum(peers.missing(name) is None for name in ("adv-lib", "foolbox", "adv-lib"))


def test_walls_time_both_sides_of_the_same_problem() -> None:
    given = subject().correct()

    def peer(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> Tensor:
        return mohs.attack(DDN(steps=steps), model, x, y, "l2:inf", seed=0).x

    cells = walls.compared(given, "l2", "DDN", peer, Options(passes=20, repeats=2))
    assert cells[0] == "1.000"
    ours, theirs = str(cells[-2]).split(" / ")
    assert ours == theirs


def test_stages_are_told_apart() -> None:
    counted = Counted(nn.Linear(3, 2).eval())
    watch = autoattack.Watch(counted)
    for stage, rows in (("checks", 2), ("1/2 first", 3), ("1/2 first", 1), ("2/2 second", 5), ("radii", 7)):
        watch(stage, 0, 1, 0)
        with torch.no_grad():
            counted(torch.zeros(rows, 3))
        watch(stage, 1, 1, 0)
    assert [(s.name, s.passes) for s in watch.attacks] == [("1/2 first", 4), ("2/2 second", 5)]


def test_autoattack_runs_each_component_on_whoever_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given, seen = subject(), []

    def component(breaks: int) -> reference.Perturb:
        def perturb(x: Tensor, y: Tensor) -> Tensor:
            seen.append(len(x))
            points = x.clone()
            points[:breaks] = 1 - points[:breaks]  # a negative is another class
            return points

        return perturb

    monkeypatch.setattr(reference, "_components", lambda net, eps: ("fake", {"a": component(3), "b": component(1)}))
    cache = reference.Cache(tmp_path / "aa.pt")
    found = cache.get(given)
    assert seen[0] == int(found.clean.sum())
    assert seen[1] == int(found.survived["a"].sum()) < seen[0]
    assert (found.survived["b"] <= found.survived["a"]).all()
    again = reference.Cache(tmp_path / "aa.pt").get(given)
    assert len(seen) == 2  # nothing ran again
    assert torch.equal(again.robust, found.robust)
    assert again.passes == found.passes


def test_folded_net_is_the_trained_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = nets.residual(batch_norm=True).train()
        for _ in range(3):
            trained(torch.rand(8, 3, 32, 32))
        x = torch.rand(4, 3, 32, 32)
    trained.eval()
    plain = nets.folded(trained)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert torch.allclose(plain(x), trained(x), atol=1e-4)
    assert sum(p.numel() for p in plain.parameters()) < 300_000


def test_page_of_the_strength_sections_without_peers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    facts = tmp_path / "facts.json"
    asked = ["minimum", "exact", "peer_bugs", "--peers", "", "--rows", "6", "--norm", "l2", "--attacks", "DeepFool"]
    assert command.main([*asked, "--subjects", "fashion-natural", "--passes", "20", "--json", str(facts)]) == 0
    page = capsys.readouterr().out
    assert "| mohs DeepFool |" in page
    assert "| linear, no box | l2 | DeepFool |" in page
    assert '"minimum"' in facts.read_text()


def test_a_subject_that_is_not_there_is_left_out_with_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks import robust

    monkeypatch.setattr(robust, "SHARED", tmp_path)
    monkeypatch.setattr(robust, "MNIST", tmp_path)
    found, absent = robust.available(("fashion-pgd", "mnist-fast-pgd", "cifar10-residual"), 4)
    assert [s.name for s in found] == ["fashion-pgd"]
    assert [line.split(" ")[0] for line in absent] == ["mnist-fast-pgd", "cifar10-residual"]


def test_every_peer_of_the_tables_has_a_name_that_the_command_knows() -> None:
    from benchmarks.minimum_peers import MINIMUM

    assert {library for norm in MINIMUM.values() for library in norm} <= set(peers.LIBRARIES)
    assert set(MINIMUM) == set(NORMS)


def test_kept_colour_net_is_robust_and_the_one_of_its_recipe(shared: Path) -> None:
    data = nets.cifar10_images(shared / "cifar10_jpeg" / "cifar10_jpeg75.npz", rows=128)
    net = nets.cifar10_residual()
    with torch.no_grad():
        right = net(data.x).argmax(1) == data.y
    left = right & ~mohs.attack(PGD(steps=10), net, data.x, data.y, "linf:8/255").success
    assert float(right.double().mean()) > 0.5
    assert float(left.double().mean()) > 0.25
    assert (nets.HERE / "cifar10-residual.safetensors").stat().st_size < 1_200_000
