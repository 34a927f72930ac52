"""Plans are data: the built-in ones build, and everything wrong in a file is refused with what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
from core_models import inputs, relu_net

import mohs
from mohs import objectives
from mohs.attacks import APGD, FAB, PGD, REGISTRY, Square
from mohs.errors import UsageError
from mohs.evaluation.plans import ALL_CLASSES, Plan, PlanStep, available_plans, load_plan
from mohs.threat import Access, Threat


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return path


NAMES = ["autoattack", "quick", "standard", "thorough"]
ABOUT_AUTOATTACK = [  # version 'standard' of the official code: 100 iterations each, nine target classes, 5,000 queries
    (APGD(steps=100, objective=objectives.cross_entropy), 1, 0),
    (APGD(steps=100, objective=objectives.dlr), 1, 9),
    (FAB(steps=100), 1, 9),
    (Square(steps=5000), 1, 0),
]


class TestBuiltIn:
    def test_names(self) -> None:
        assert available_plans() == NAMES

    @pytest.mark.parametrize("name", NAMES)
    def test_every_step_builds_and_says_what_it_is(self, name: str) -> None:
        plan = load_plan(name)
        assert plan.name == name
        assert plan.description
        labels = [step.label for step in plan.steps]
        assert len(set(labels)) == len(labels)
        for step in plan.steps:
            assert type(step.build()) is REGISTRY[step.name]

    def test_autoattack_is_what_it_says(self) -> None:
        plan = load_plan("autoattack")
        for norm in ("linf:0.1", "l2:1"):
            steps = [step for step in plan.steps if not step.elsewhere(Threat.parse(norm))]
            assert [(step.build(), step.restarts, step.aims) for step in steps] == ABOUT_AUTOATTACK
        assert all(step.share == 1 and step.start == "own" for step in plan.steps)

    def test_later_stages_of_the_others_never_take_more_of_the_survivors(self) -> None:
        for name in ("quick", "standard"):
            shares = [step.share for step in load_plan(name).steps if usual(step)]
            assert shares == sorted(shares, reverse=True)
            assert shares[0] == 1

    def test_passes_on_a_survivor(self) -> None:
        """What a row that never breaks costs on average, in passes: a thirtieth of AutoAttack's 10,600, and a hundredth."""
        for name, limit in (("quick", 106), ("standard", 353), ("thorough", 10_600)):
            cost = 0.0
            for step in load_plan(name).steps:
                if not usual(step):
                    continue
                passes = 1 if step.name == "Square" else 2
                cost += step.share * step.restarts * max(step.aims, 1) * (passes * step.build().steps + 1)
            assert cost < limit, name

    @pytest.mark.parametrize(
        "threat", ["linf:8/255", "l2:0.5", "l1:10", "l1.5:2", "l0:5", "l0-features:5", "patch:5", "words:2"]
    )
    @pytest.mark.parametrize("name", ["quick", "standard", "thorough"])
    def test_every_region_is_served(self, name: str, threat: str) -> None:
        plan = load_plan(name)
        where = Threat.parse(threat)
        served = [step.name for step in plan.steps if step.build_for(where) is not None]
        assert ("SPGD" in served) == threat.startswith("l0")
        assert ("LaVAN" in served) == threat.startswith("patch")
        assert ("HotFlip" in served) == threat.startswith("words")
        assert ("APGD" in served) != threat.startswith(("l0", "patch", "words"))
        assert plan.skipped(where) == [], "what is meant for another region is passed over without a word"


def usual(step: PlanStep) -> bool:
    """Does it run on norms, with gradients?"""
    return not ({"l0", "patch", "words"} & set(step.only) or step.access)


class TestAccess:
    @pytest.mark.parametrize("name", ["quick", "standard", "thorough"])
    def test_labels_alone_are_enough(self, name: str) -> None:
        threat = Threat(mohs.Linf(0.1), access=Access.LABEL)
        assert [s.name for s in load_plan(name).steps if s.build_for(threat) is not None] == ["HopSkipJump"]
        for more in (Access.SCORE, Access.GRADIENT):
            steps = [s for s in load_plan(name).steps if s.name == "HopSkipJump"]
            assert all(s.elsewhere(Threat(mohs.Linf(0.1), access=more)) for s in steps)

    def test_no_other_level(self) -> None:
        with pytest.raises(UsageError, match="access must be one of label, score, logit, gradient; got 'all'"):
            PlanStep.make("PGD", {"steps": 5}, access="all")

    def test_an_evaluation_from_labels(self) -> None:
        net, data = mohs.models.load("bundled:fashion-natural"), mohs.data.load("bundled:fashion-mnist", n=8)
        plan = Plan("labels", (PlanStep.make("HopSkipJump", {"steps": 150, "votes": 10}, access="label"),))
        record = mohs.evaluate(net, data, Threat(mohs.Linf(0.3), access=Access.LABEL), plan=plan, control=0)
        assert record.robust_accuracy < record.clean_accuracy


class TestRefusal:
    def test_the_reason_is_stated(self) -> None:
        step = PlanStep.make("DeepFool")
        for norm in ("l0", "l0-features"):
            assert "does not serve l0" in (step.refusal(Threat.parse(f"{norm}:5")) or "")
        assert step.refusal(Threat.parse("l2:1")) is None

    def test_what_is_meant_for_models_that_reject_runs_on_these_alone(self) -> None:
        net, data = relu_net((1, 4, 4)), inputs(6, 1, 4, 4)
        plan = Plan(
            "both", (PlanStep.make("PGD", {"steps": 2}), PlanStep.make("OrthogonalPGD", {"steps": 2}, rejects=True))
        )
        labels = net(data).argmax(1)
        for reject, names in ((None, ["PGD"]), (3, ["PGD", "OrthogonalPGD"])):
            keep = labels < 3
            record = mohs.evaluate(
                net, (data[keep], labels[keep]), "linf:0.01", plan=plan, control=0, adaptive="off", reject=reject
            )
            assert [step.name for step in record.header.plan.steps] == names
            assert {step.name for step in load_plan("standard").steps if step.rejects} == {
                "OrthogonalPGD",
                "WeightedPGD",
                "LogitMatching",
            }
        with pytest.raises(UsageError, match="rejects must be true or false; got 'yes'"):
            PlanStep.make("PGD", {"steps": 5}, rejects="yes")

    def test_access(self) -> None:
        threat = Threat(mohs.Linf(0.1), access=Access.LABEL)
        assert "needs access GRADIENT" in (PlanStep.make("PGD").refusal(threat) or "")
        assert PlanStep.make("PGD").build_for(threat) is None

    def test_infinite_radius(self) -> None:
        threat = Threat.parse("l2:inf")
        assert "finite radius" in (PlanStep.make("PGD").refusal(threat) or "")
        assert PlanStep.make("DeepFool").refusal(threat) is None


class TestRepr:
    def test_is_complete_and_deterministic(self) -> None:
        assert repr(load_plan("standard")) == repr(load_plan("standard"))
        text = repr(load_plan("quick"))
        for part in (
            "'steps', 25",
            "'random_start', True",
            "'objective', 'probability_margin'",
            "restarts=1",
            "aims=0",
            "share=0.25",
        ):
            assert part in text

    def test_does_not_depend_on_the_order_in_the_file_or_on_remarks(self, tmp_path: Path) -> None:
        one = load_plan(
            write(tmp_path, '[[attack]]\nuse = "PGD"\nwith = { steps = 3, objective = "margin" }\nnote = "a"')
        )
        two = load_plan(
            write(tmp_path, 'description = "b"\n[[attack]]\nwith = { objective = "margin", steps = 3 }\nuse = "PGD"')
        )
        assert repr(one) == repr(two)

    def test_every_change_of_configuration_shows(self) -> None:
        base = {"steps": 3}
        steps = [
            PlanStep.make("PGD", base),
            PlanStep.make("PGD", {"steps": 4}),
            PlanStep.make("PGD", base, restarts=2),
            PlanStep.make("PGD", base, aims=1),
            PlanStep.make("PGD", base, aims="all"),
            PlanStep.make("BIM", base),
            PlanStep.make("PGD", base | {"step_size": 0.1}),
            PlanStep.make("PGD", base | {"objective": "margin"}),
        ]
        assert len({repr(Plan("p", (s,))) for s in steps}) == len(steps)
        assert len({s.label for s in steps}) == len(steps) - 1  # the step size is too long for a label

    def test_defaults_written_out_make_no_difference(self) -> None:
        assert PlanStep.make("PGD", {"steps": 40}) == PlanStep.make("PGD")


class TestFile:
    def test_all_keys(self, tmp_path: Path) -> None:
        plan = load_plan(
            write(
                tmp_path,
                """
                name = "own"
                description = "two  words"
                [[attack]]
                use = "PGD"
                with = { steps = 100, step_size = 1, objective = "margin", random_start = false }
                restarts = 5
                aims = "all"
                skip = { l0 = "too slow there" }
                note = "why"
                """,
            )
        )
        (step,) = plan.steps
        assert (plan.name, plan.description) == ("own", "two words")
        assert step.build() == PGD(steps=100, step_size=1.0, objective=objectives.margin, random_start=False)
        assert (step.restarts, step.aims, step.note) == (5, ALL_CLASSES, "why")
        assert step.refusal(Threat.parse("l0:3")) == "PGD does not serve l0: too slow there"

    def test_the_name_defaults_to_the_file(self, tmp_path: Path) -> None:
        assert load_plan(str(write(tmp_path, '[[attack]]\nuse = "FGSM"'))).name == "mine"

    def test_a_plan_passes_through(self) -> None:
        plan = load_plan("quick")
        assert load_plan(plan) is plan

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "no attack"),
            ("attack = 3", r"\[\[attack\]\] tables"),
            ("[[attack]]", "names no attack.*DeepFool.*FGSM.*PGD"),
            ('[[attack]]\nuse = "Nope"', "no attack 'Nope'.*DeepFool.*FGSM.*PGD"),
            (
                '[[attack]]\nuse = "PGD"\nwith = { stepz = 3 }',
                "PGD has no 'stepz'.*steps, step_size, random_start, objective",
            ),
            ('[[attack]]\nuse = "PGD"\nsteps = 3', "an attack has no 'steps'.*use, with, restarts"),
            ('color = 1\n[[attack]]\nuse = "PGD"', "a plan has no 'color'.*name, description, attack"),
            ('name = 1\n[[attack]]\nuse = "PGD"', "name must be a text"),
            ('[[attack]]\nuse = "PGD"\nwith = { steps = "3" }', "steps must be of type int; got '3'"),
            ('[[attack]]\nuse = "PGD"\nwith = { steps = 3.0 }', "steps must be of type int"),
            ('[[attack]]\nuse = "PGD"\nwith = { steps = true }', "steps must be of type int"),
            ('[[attack]]\nuse = "PGD"\nwith = { step_size = true }', "step_size must be of type float"),
            ('[[attack]]\nuse = "PGD"\nwith = { random_start = 1 }', "random_start must be of type bool"),
            (
                '[[attack]]\nuse = "PGD"\nwith = { objective = "hinge" }',
                "margin, dlr, probability_margin; got 'hinge'",
            ),
            ('[[attack]]\nuse = "PGD"\nwith = { objective = ["margin"] }', "one of cross_entropy, margin"),
            ('[[attack]]\nuse = "PGD"\nwith = { steps = 0 }', "PGD in a plan: PGD's steps must be a whole number >= 1"),
            ('[[attack]]\nuse = "DeepFool"\nwith = { overshoot = -1.0 }', "overshoot must be a finite number >= 0"),
            ('[[attack]]\nuse = "PGD"\nwith = 3', "with must be a table"),
            ('[[attack]]\nuse = "PGD"\nrestarts = 0', "restarts must be a whole number >= 1"),
            ('[[attack]]\nuse = "PGD"\naims = "most"', "aims must be a whole number >= 0 or 'all'"),
            ('[[attack]]\nuse = "PGD"\naims = -1', "aims must be a whole number >= 0"),
            ('[[attack]]\nuse = "PGD"\nskip = { l0 = 3 }', "skip maps a norm to the reason"),
            ('[[attack]]\nuse = "PGD"\n[[attack]]\nuse = "Nope"', "attack 2 of 2"),
            ("[[attack]]\nuse = = 3", "not valid TOML.*line 2"),
        ],
    )
    def test_refused_with_what_is_allowed(self, tmp_path: Path, text: str, message: str) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            load_plan(write(tmp_path, text))
        assert "mine.toml" in str(caught.value)

    @pytest.mark.parametrize("source", ["slow", "", "quick.tml", "../quick"])
    def test_unknown_plans(self, source: str) -> None:
        with pytest.raises(UsageError, match="Allowed: autoattack, quick, standard, thorough, or the path of a"):
            load_plan(source)

    def test_missing_and_unreadable_files(self, tmp_path: Path) -> None:
        with pytest.raises(UsageError, match=r"Cannot read the plan .*nowhere\.toml"):
            load_plan(tmp_path / "nowhere.toml")
        (tmp_path / "latin.toml").write_bytes(b'name = "\xe4"')
        with pytest.raises(UsageError, match="Cannot read the plan"):
            load_plan(tmp_path / "latin.toml")
