"""Threats: the short form and JSON say the same, the order is an order, and unrealistic adversaries are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from mohs import L0, L1, L2, Access, Knowledge, Linf, Lp, Threat
from mohs.errors import MohsError, ThreatError

radius = st.one_of(
    st.integers(0, 255).map(lambda k: k / 255),
    st.floats(0, 1e6),
    st.just(math.inf),
    st.sampled_from([0.3, 1e-9, 8 / 255]),
)
regions = st.one_of(
    st.builds(Linf, radius), st.builds(L2, radius), st.builds(L1, radius),
    st.builds(Lp, st.floats(1, 1e30, exclude_min=True).filter(lambda p: p != 2), radius),
    st.builds(L0, st.one_of(st.integers(0, 10**6).map(float), st.just(math.inf)), features=st.booleans()),
)  # fmt: skip
edge = st.floats(-1e6, 1e6)
boxes = st.one_of(
    st.just((0.0, 1.0)), st.just((-math.inf, math.inf)), st.just((0.0, 255.0)), st.just((-2.1179039478, 2.64)),
    st.tuples(edge, edge).filter(lambda b: b[0] < b[1]),
)  # fmt: skip
knowledge = st.builds(
    Knowledge,
    weights=st.booleans(),
    training_data=st.booleans(),
    randomness=st.sampled_from(["distribution", "values"]),
)
threats = st.builds(
    Threat, regions, boxes, st.sampled_from(Access), st.one_of(st.none(), st.integers(1, 10**6)), knowledge,
    st.integers(0, 50),
)  # fmt: skip
# few enough values that comparable pairs occur
small = st.builds(
    Threat, st.builds(Linf, st.sampled_from([0.1, 0.2])) | st.builds(L2, st.sampled_from([0.1, 0.2])),
    st.sampled_from([(0.0, 1.0), (0.0, 2.0)]), st.sampled_from([Access.LABEL, Access.GRADIENT]),
    st.sampled_from([None, 5, 9]), knowledge, st.sampled_from([0, 20]),
)  # fmt: skip


@given(threats)
def test_json_round_trip(threat: Threat) -> None:
    text = json.dumps(threat.to_dict(), allow_nan=False)
    assert Threat.from_dict(json.loads(text)) == threat


@given(regions, boxes)
def test_short_form_round_trip(region: Linf, box: tuple[float, float]) -> None:
    threat = Threat(region, box)
    assert Threat.parse(str(threat)) == threat


@pytest.mark.parametrize(
    ("text", "region", "box"),
    [
        ("linf:8/255", Linf(8 / 255), (0, 1)),
        (" LINF : 8/255 ", Linf(8 / 255), (0, 1)),
        ("l2:0.5", L2(0.5), (0, 1)),
        ("l2.0:0.5", L2(0.5), (0, 1)),
        ("l1:10", L1(10), (0, 1)),
        ("l1.5:0.3", Lp(1.5, 0.3), (0, 1)),
        ("l0:20", L0(20), (0, 1)),
        ("l0-features:20", L0(20, features=True), (0, 1)),
        ("l2:inf", L2(math.inf), (0, 1)),
        ("linf:8 in [0, 255]", Linf(8), (0, 255)),
        ("l2:1 in [-inf, inf]", L2(1), (-math.inf, math.inf)),
    ],
)
def test_parse(text: str, region: Linf, box: tuple[float, float]) -> None:
    assert Threat.parse(text) == Threat(region, box)


def test_str_reads_well() -> None:
    assert str(Threat(Linf(8 / 255))) == "linf:8/255"
    assert str(Threat(L2(0.5))) == "l2:0.5"
    assert str(Threat(Linf(8), (0, 255))) == "linf:8 in [0, 255]"
    assert str(Threat(L2(math.inf))) == "l2:inf"
    threat = Threat(Linf(0.1), queries=3)
    assert Threat.parse(threat) is threat
    assert threat.with_eps(0.2).region == Linf(0.2)
    assert threat.with_eps(0.2).queries == 3
    assert Threat(L1(math.inf)).minimum
    assert not threat.minimum


@pytest.mark.parametrize(
    "text",
    ["", "linf", "linf:", "linf:-0.1", "linf:nan", "linf:8/0", "l0:2.5", "l0.5:1", "l-1:1", "lfoo:1", "linf:0.1 in [1, 0]",
     "linf:0.1 in [0]", "linf:0.1 in [nan, 1]", "linf:0.1 extra", "linf:1e", "l1.0:1:2", "8/255"],
)  # fmt: skip
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ThreatError) as caught:
        Threat.parse(text)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, MohsError | ValueError)


@pytest.mark.parametrize("text", ["foo", "l2", "linf:eight"])
def test_the_message_shows_the_forms(text: str) -> None:
    with pytest.raises(ThreatError, match=r"linf:8/255.*l0:20") as caught:
        Threat.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (lambda: Knowledge(architecture=False), "architecture"),
        (lambda: Knowledge(training_algorithm=False), "training algorithm"),
        (lambda: Knowledge(randomness="unknown"), "distribution"),
        (lambda: Threat(Linf(0.1), queries=0), "query limit"),
        (lambda: Threat(Linf(0.1), draws=-1), "draws"),
        (lambda: Threat("linf:0.1"), "region"),  # type: ignore[arg-type]
        (lambda: Threat(Linf(0.1), box=(1.0, 1.0)), "box"),
        (lambda: Threat(Linf(0.1), box=(math.nan, 1.0)), "box"),
    ],
)
def test_unrealistic_adversaries_are_refused(what: Callable[[], object], words: str) -> None:
    with pytest.raises(ThreatError, match=words):
        what()


@given(threats)
def test_order_is_reflexive(a: Threat) -> None:
    assert a <= a
    assert a >= a


@given(small, small)
def test_order_is_antisymmetric(a: Threat, b: Threat) -> None:
    if a <= b and b <= a:
        assert a == b


@given(small, small, small)
def test_order_is_transitive(a: Threat, b: Threat, c: Threat) -> None:
    if a <= b and b <= c:
        assert a <= c


@given(threats)
def test_each_concession_makes_the_adversary_stronger(a: Threat) -> None:
    assume(not math.isinf(a.region.eps))
    wider = (a.box[0] - 1, a.box[1] + 1)
    stronger = [
        a.with_eps(a.region.eps + 1),
        replace(a, access=Access.GRADIENT),
        replace(a, queries=None),
        replace(a, knowledge=Knowledge(randomness="values")),
        replace(a, box=wider),
    ]
    for b in stronger:
        assert a <= b
        assert b == a or not b <= a


def test_different_norms_and_scorings_do_not_compare() -> None:
    a = Threat(Linf(0.1))
    for b in (Threat(L2(100.0)), Threat(L0(1000)), replace(a, draws=20)):
        assert not a <= b
        assert not b <= a
    assert not Threat(L0(1)) <= Threat(L0(5, features=True))
    assert not Threat(Lp(1.5, 1.0)) <= Threat(Lp(3.0, 5.0))


def test_access_is_ordered() -> None:
    assert Access.NONE < Access.LABEL < Access.SCORE < Access.LOGIT < Access.GRADIENT
