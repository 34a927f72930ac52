"""Served models in evaluations, records and commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cli_problem import DATA, Shop, in_order, shop
from prediction_server import SECRET, Serve, answering, net, serve

import mohs
from mohs import cli, models
from mohs.cli import served
from mohs.errors import ModelError, MohsError
from mohs.models import Served, _transport
from mohs.records import Record

__all__ = ["serve", "shop"]


def test_served_models_are_told_apart() -> None:
    a = Served("http://a/v1/models/net:predict")
    assert isinstance(models.load("HTTP://a/v1/models/net:predict"), Served)
    others = [
        Served("http://b/v1/models/net:predict"),
        Served("http://a/v1/models/net:predict", answers="logits"),
        Served("http://a/v1/models/net:predict", output="b"),
    ]
    assert len({models.weights_hash(m) for m in (a, *others)}) == 4
    same = Served("http://a/v1/models/net:predict", headers={"Authorization": SECRET}, rows=3)
    assert models.weights_hash(same) == models.weights_hash(a)
    for wrong in ({"weights": "w.pt"}, {"arch": "linear"}):
        with pytest.raises(ModelError, match="brings its own"):
            models.load("http://a/v1/models/net:predict", **wrong)  # type: ignore[arg-type]


def test_an_error_of_the_server_is_no_error_of_the_data(serve: Serve) -> None:
    served = Served(serve(lambda asked: (404, {}, b"no")).v1)
    with pytest.raises(MohsError) as caught:
        mohs.evaluate(served, (torch.rand(5, 3), torch.zeros(5, dtype=torch.int64)), mohs.Threat(mohs.Linf(0.1)))
    assert str(caught.value).startswith("POST http://")


def test_a_black_box_under_a_gradient_threat_is_blocked_with_the_way_out() -> None:
    box = models.BlackBox(lambda a: np.eye(4, dtype=np.float32)[: len(a)])
    found = {f.id: f for f in mohs.check(box, (torch.rand(4, 3), torch.arange(4)), "linf:0.1")}
    assert found["no-gradient"].severity == "block"
    assert "access=Access.SCORE" in found["no-gradient"].remedy
    assert "detach" not in found["no-gradient"].remedy


PLAN = '[[attack]]\nuse = "Square"\nwith = { steps = 5 }\n'


@pytest.mark.parametrize(("form", "answers"), [("v1", "probabilities"), ("v2", "logits")])
def test_run_and_replay_from_the_command_line(
    shop: Shop, serve: Serve, monkeypatch: pytest.MonkeyPatch, form: str, answers: str
) -> None:
    monkeypatch.setenv(_transport.AUTHORIZATION, SECRET)
    shop.plan.write_text(PLAN)
    local = models.load("linear", weights=shop.weights)
    server = serve(answering(local, answers))
    url = getattr(server, form)
    given = [] if answers == "probabilities" else ["--answers", answers]
    how = shop.how(access="score", threat="linf:0.1", control=0)
    code, out, err = shop.do("run", url, DATA, *given, "--n", "12", *how, "--claim", "accuracy >= 0.99")
    assert code == 10, err
    assert in_order(out, "note The model was asked over the network", "unknown", "REFUTED")
    assert {a.headers.get("authorization") for a in server.asked} == {SECRET}
    record = Record.load(shop.out)
    assert record.header.subject.spec == " ".join([url, *given])
    assert any("weights are unknown" in text for text in record.header.limits)
    for path in shop.out.rglob("*"):
        assert b"s3cr3t" not in path.read_bytes()
    assert "unknown; of the name" in (shop.out / "report.html").read_text()
    direct = mohs.evaluate(
        local, mohs.data.load(DATA, n=12), mohs.Threat(mohs.Linf(0.1), access=mohs.threat.Access.SCORE), plan=shop.plan,
        control=0, batch=8,
    )  # fmt: skip
    assert record.survived.tolist() == direct.survived.tolist()
    server.asked.clear()
    code, out, _ = shop.do("replay", shop.out)
    assert code == 0
    assert "confirmed under linf:0.1 on the black box of the recorded name" in out
    # a record may come from anybody, and so may the URL in it
    assert server.asked
    assert not any("authorization" in a.headers for a in server.asked)
    assert shop.do("replay", shop.out, "--model", url, *given)[0] == 0
    assert server.asked[-1].headers["authorization"] == SECRET


def test_a_run_goes_on_after_the_server_was_away(shop: Shop, serve: Serve) -> None:
    shop.plan.write_text(PLAN)
    answer = answering(models.load("linear", weights=shop.weights), "probabilities")
    server = serve(lambda asked: answer(asked) if len(server.asked) < 60 else (500, {}, b"out of memory"))
    command = ["run", server.v1, DATA, "--n", "40", *shop.how(access="score", threat="linf:0.1", control=0)]
    whole = [str(shop.folder / "whole") if part == str(shop.out) else part for part in command]
    code, _, err = shop.do(*command)
    assert code == 2
    assert in_order(err, "answered 500", "out of memory", "is kept in", "goes on from there")
    assert shop.out.exists()
    server.reply = answer
    assert shop.do(*command)[0] == 0
    resumed = Record.load(shop.out)
    assert shop.do(*whole)[0] == 0
    whole_record = Record.load(shop.folder / "whole")
    assert resumed.attacks == whole_record.attacks == [0]
    for attack in resumed.attacks:
        rows, others = (np.array([*r.results(attack).as_rows()]) for r in (resumed, whole_record))
        np.testing.assert_array_equal(rows, others)  # to which nan is nan
    assert resumed.digest() == whole_record.digest()


def test_labels_from_the_command_line(shop: Shop, serve: Serve) -> None:
    server = serve(answering(models.load("linear", weights=shop.weights), "labels"))
    labels = ["--answers", "labels", "--classes", "10"]
    code, out, err = shop.do(
        "check", server.v1, DATA, *labels, "--n", "12", "--threat", "linf:0.1", "--access", "label"
    )
    assert code == 0, err
    assert "warn" not in out


def test_recorded_options_are_defaults_of_their_own() -> None:
    url = "http://h/v1/models/net:predict"
    labels = served.spec(url, "labels", 10)
    assert served.recorded(labels, None, None) == (url, "labels", 10)
    assert served.recorded(labels, None, 12) == (url, "labels", 12)
    assert served.recorded(labels, "labels", None) == (url, "labels", 10)
    assert served.recorded(labels, "logits", None) == (url, "logits", None)
    assert served.recorded(served.spec(url, "logits", None), None, None) == (url, "logits", None)
    assert served.recorded(url, None, None) == (url, None, None)


@pytest.mark.parametrize("classes", ["\u00b2", "\u0663", "-1", "1.5", "", "9" * 5000])
def test_classes_of_a_stranger_that_are_no_number(classes: str) -> None:
    assert served.parse(f"http://h/v1/models/net:predict --answers labels --classes {classes}")[2] is None


def test_what_the_command_line_refuses(shop: Shop, serve: Serve) -> None:
    server = serve(answering(net(784, 10)))
    shop.plan.write_text(PLAN)
    bare = shop.how()
    assert in_order(shop.refused("run", server.v1, DATA, *bare), "no gradients", "--access score", "logit", "label")
    score = [*bare, "--access", "score"]
    labels = ["--answers", "labels", "--classes", "10"]
    assert "allowed is label" in shop.refused("run", server.v1, DATA, *score, *labels)
    assert "brings its own weights" in shop.refused("run", server.v1, DATA, *score, "--weights", shop.weights)
    assert "is no URL" in shop.refused("run", "linear", DATA, *bare, "--answers", "logits")
    assert "classes >= 2" in shop.refused(
        "check", server.v1, DATA, "--threat", "linf:0.1", "--access", "label", *labels[:2]
    )
    assert not server.asked
    assert in_order(shop.refused("run", server.v1, DATA, *score, "--n", "8"), "no probabilities", "--answers")


@pytest.mark.parametrize(
    ("plan", "access", "threat", "why"),
    [
        ("standard", "label", "l1:3", "needs access"),
        ("short.toml", "label", "linf:0.1", "Square needs access SCORE; the threat grants LABEL"),
        ("quick", "logit", "l0:3", "needs access GRADIENT"),
        ("standard", "score", "l0:3", "needs access GRADIENT"),
        ("standard", "score", "l1.5:3", "needs access GRADIENT"),
        ("linf.toml", "score", "l2:3", "meant for other regions"),
    ],
)
def test_a_run_that_would_try_nothing_is_refused(
    shop: Shop, serve: Serve, plan: str, access: str, threat: str, why: str
) -> None:
    shop.plan.write_text(PLAN)
    (shop.folder / "linf.toml").write_text(f'{PLAN}only = ["linf"]\n')
    server = serve(answering(net(784, 10)))
    said = shop.refused("run", server.v1, DATA, *shop.how(plan=plan, access=access, threat=threat))
    assert in_order(said, "No attack of the plan", why, "Square", "--access score", "mohs check")
    assert not server.asked


def test_a_certificate_of_a_served_model_is_refused(shop: Shop, serve: Serve) -> None:
    server = serve(answering(net(784, 10)))
    shop.plan.write_text(PLAN)
    known = server.v1.replace("//", "//me:hush@")
    for url in (server.v1, known, "http://host/anything"):
        said = shop.refused("certify", url, "npz:nowhere.npz", "--threat", "linf:0.1")
        assert in_order(said, "reads the layers", "package.module:factory")
        assert "hush" not in said
    said = shop.refused("run", server.v1, DATA, *shop.how(access="score"), "--certify", "ibp")
    assert "reads the layers" in said
    assert not server.asked
    assert "URL" not in shop.do("certify", "--help")[1]


def test_a_served_model_is_listed_and_helped(shop: Shop) -> None:
    code, out, _ = shop.do("list", "models")
    assert code == 0
    assert "models/NAME:predict" in out
    assert "v2/models/NAME/infer" in out
    assert "URL" in shop.do("run", "--help")[1]
    assert cli.run(["replay", str(Path("nowhere"))]) == 2
