"""Served models: asked over real connections, in both protocols, believed only where they answer as they should."""

from __future__ import annotations

import json
import logging
import re
import sys
from typing import Any, Literal

import numpy as np
import pytest
import torch
from cli_problem import in_order
from prediction_server import SECRET, Asked, Reply, Serve, X, always, answering, net, ok, refusal, serve
from torch import nn

import mohs
from mohs import models
from mohs.errors import ModelError
from mohs.models import Served, _transport

__all__ = ["serve"]


# ---- answers ---------------------------------------------------------------------------------------------


def test_answers_are_those_of_the_net_bit_for_bit(serve: Serve) -> None:
    direct, server = net(), serve(answering(net()))
    for url in (server.v1, server.v2):
        served = Served(url, answers="logits")
        x = X.clone().requires_grad_(True)
        logits = served(x)
        assert torch.equal(logits, direct(X))
        assert not logits.requires_grad
        assert not served.training


def test_inputs_arrive_bit_for_bit(serve: Serve) -> None:
    seen = []

    def reply(asked: Asked) -> Reply:
        data = asked.body["instances"] if "instances" in asked.body else asked.body["inputs"][0]["data"]
        seen.append(np.array(data, dtype=np.float32).reshape(-1))
        return ok({"predictions": [[0, 1]]}) if "instances" in asked.body else answering(net(7))(asked)

    server = serve(lambda asked: (404, {}, b"") if asked.method == "GET" else reply(asked))
    x = torch.tensor([[0.1, 1 / 3, 1e-45, -0.0, 3.4e38, 16777217.0, 8 / 255]])
    for url in (server.v1, server.v2):
        Served(url, answers="logits")(x)
    for row in seen:
        assert row.tobytes() == x.numpy().tobytes()


@pytest.mark.parametrize("form", ["v1", "v2"])
def test_probabilities_and_labels(serve: Serve, form: str) -> None:
    direct = net()(X)
    soft = Served(getattr(serve(answering(net(), "probabilities")), form))
    assert torch.allclose(soft(X), direct.log_softmax(1), atol=1e-5)
    hard = Served(getattr(serve(answering(net(), "labels")), form), answers="labels", classes=4)
    assert torch.equal(hard(X), nn.functional.one_hot(direct.argmax(1), 4).float())


def test_the_probability_of_one_class_alone(serve: Serve) -> None:
    for content in ([0.25, 0.5], [[0.25], [0.5]]):
        server = serve(always(json.dumps({"predictions": content}).encode()))
        assert torch.allclose(Served(server.v1)(X[:2]), torch.tensor([1 / 3, 1.0]).log(), atol=1e-6)
    assert torch.allclose(
        models.BlackBox.from_probabilities(lambda a: np.array([[0.25]]))(X[:1]), torch.tensor([1 / 3]).log()
    )


def test_numbers_that_are_not_finite_are_the_error_of_their_row(serve: Serve) -> None:
    server = serve(always(b'{"predictions": [[1, 2], [NaN, 1], [Infinity, 0], [null, 2], [1e999, 0]]}'))
    logits = Served(server.v1, answers="logits")(X)
    assert logits.isnan().all(1).tolist() == [False, True, True, True, True]
    assert logits[0].tolist() == [1, 2]
    out = mohs.attack(
        mohs.attacks.Square(steps=2), Served(server.v1, answers="logits"), X, torch.ones(5, dtype=torch.int64),
        mohs.Threat(mohs.Linf(0.1), access=mohs.threat.Access.LOGIT), batch=5,
    )  # fmt: skip
    assert out.error.any()


# ---- what is sent ----------------------------------------------------------------------------------------


def test_padding_is_sent_once_and_answered_for_each_copy(serve: Serve) -> None:
    server = serve(answering(net()))
    padded = X[torch.arange(12).clamp_max(4)]
    logits = Served(server.v1, answers="logits")(padded)
    assert [a.rows for a in server.posts] == [5]
    assert torch.equal(logits, net()(X)[torch.arange(12).clamp_max(4)])
    Served(server.v1, answers="logits")(X[:1].expand(9, 3))
    assert server.posts[-1].rows == 1
    # copies elsewhere are no padding, and -0.0 is no copy of 0.0
    Served(server.v1, answers="logits")(torch.stack([X[0], X[0], X[1]]))
    assert server.posts[-1].rows == 3
    Served(server.v1, answers="logits")(torch.tensor([[0.0, 0, 0], [-0.0, 0, 0]]))
    assert server.posts[-1].rows == 2


def test_few_rows_a_request_and_one_connection(serve: Serve) -> None:
    server = serve(answering(net()))
    served = Served(server.v2, answers="logits", rows=2)
    assert torch.allclose(served(X), net()(X), atol=1e-6)
    served(X)
    assert [a.rows for a in server.posts] == [2, 2, 1, 2, 2, 1]
    assert [a.method for a in server.asked].count("GET") == 1
    assert len({a.connection for a in server.asked}) == 1
    large = Served(serve(answering(net(20_000))).v1, answers="logits")
    assert large(torch.zeros(3, 20_000)).shape == (3, 4)


def test_large_inputs_go_in_small_requests(serve: Serve) -> None:
    server = serve(answering(net(20_000)))
    Served(server.v1, answers="logits")(torch.rand(3, 20_000))
    assert [a.rows for a in server.posts] == [1, 1, 1]


def metadata(shape: list[int], name: str = "pixels", datatype: object = "FP32", more: int = 0) -> dict[str, object]:
    tensor = {"name": name, "datatype": datatype, "shape": shape}
    return {
        "name": "net",
        "platform": "none",
        "inputs": [tensor, *({"name": f"m{i}"} for i in range(more))],
        "outputs": [],
    }


@pytest.mark.parametrize(
    ("declared", "sent"),
    [([-1, 3], [5, 3]), ([-1, 1, 3, 1], [5, 1, 3, 1]), ([-1, -1], [5, 3]), ([1, 3], [1, 3]), ([2, 3], [2, 3])],
)
def test_the_server_names_its_input(serve: Serve, declared: list[int], sent: list[int]) -> None:
    server = serve(answering(net(), metadata=metadata(declared)))
    assert torch.allclose(Served(server.v2, answers="logits")(X), net()(X), atol=1e-6)
    (tensor,) = server.posts[0].body["inputs"]
    assert (tensor["name"], tensor["shape"], tensor["datatype"]) == ("pixels", sent, "FP32")


@pytest.mark.parametrize(
    "told", [{}, {"inputs": None}, {"inputs": []}, {"inputs": [3]}, {"inputs": [{"name": None}]}, {"error": "what?"}]
)
def test_metadata_that_say_nothing(serve: Serve, told: object) -> None:
    server = serve(answering(net(), metadata=told))
    assert torch.allclose(Served(server.v2, answers="logits")(X), net()(X), atol=1e-6)
    assert server.posts[0].body["inputs"][0]["name"] == "input-0"


def test_metadata_with_strangers_among_the_inputs(serve: Serve) -> None:
    server = serve(answering(net(), metadata={"inputs": [3, None, {"name": 5}, {"name": "pixels"}]}))
    Served(server.v2, answers="logits")(X)
    assert server.posts[0].body["inputs"][0]["name"] == "pixels"


def test_without_metadata_the_usual_name(serve: Serve) -> None:
    server = serve(answering(net()))
    Served(server.v2, answers="logits")(X)
    assert server.asked[0].path == "/v2/models/net"
    assert server.posts[0].body["inputs"][0]["name"] == "input-0"
    Served(server.v2, answers="logits", input="mine")(X)
    assert server.posts[-1].body["inputs"][0]["name"] == "mine"
    Served(server.v1.replace("net:", "net/versions/3:"), answers="logits")(X)
    assert server.posts[-1].path == "/v1/models/net/versions/3:predict"


@pytest.mark.parametrize(
    ("told", "match"),
    [
        (metadata([-1, 3], datatype="UINT8"), "takes UINT8.*FP32 or FP64"),
        (metadata([-1, 3], more=2), "takes 3 inputs .'pixels', 'm0', 'm1'.*Exactly one"),
        (metadata([-1, 4]), "takes inputs of shape \\[4\\], got \\[3\\]"),
        (metadata([10**12, 3]), "takes 1000000000000 inputs at once.*1 to 1024"),
        (metadata([1025, 3]), "takes 1025 inputs"),
        (metadata([0, 3]), "takes 0 inputs"),
        (metadata([-2, 3]), "takes -2 inputs"),
        (metadata([-1, 10**4000]), "takes inputs of shape \\[1000"),
        (metadata([-1, 3], datatype=[]), "inputs of an unknown type"),
        ([1, 2], 'no list "inputs"'),
        ({"inputs": 3}, 'no list "inputs"'),
    ],
)
def test_metadata_that_do_not_fit(serve: Serve, told: object, match: str) -> None:
    server = serve(answering(net(), metadata=told))
    said = refusal(Served(server.v2, answers="logits"))
    assert re.search(match, said)
    assert len(said) < 1000
    assert not server.posts


def test_one_of_several_outputs(serve: Serve) -> None:
    def tensor(name: str, value: float) -> dict[str, object]:
        return {"name": name, "shape": [1, 2], "datatype": "FP32", "data": [[value, 0]]}

    def reply(asked: Asked) -> Reply:
        if asked.method == "GET":
            return 404, {}, b""
        if "instances" in asked.body:
            return ok({"predictions": [{"a": [1, 0], "b": [2, 0]}]})
        return ok({"outputs": [tensor("a", 1), tensor("b", 2)]})

    server = serve(reply)
    for url in (server.v1, server.v2):
        assert Served(url, answers="logits", output="b")(X[:1]).tolist() == [[2, 0]]
        assert in_order(refusal(Served(url, answers="logits"), X[:1]), "2 outputs ('a', 'b')", 'Served(url, output="')
        assert "none is 'c'" in refusal(Served(url, answers="logits", output="c"), X[:1])
    assert server.posts[3].body["outputs"] == [{"name": "b"}]


# ---- answers that are none -------------------------------------------------------------------------------

ONE = b'"shape": [5, 2], "datatype": "FP32", "data": '
BAD: list[tuple[str, bytes, str]] = [
    ("v1", b"", "answer was empty"),
    ("v1", b"<html>\n<body>Welcome\x1b[31m</body>", r"web page came.*Welcome\\x1b.31m"),
    ("v1", b"\xff\xfe", "no JSON"),
    ("v1", b'{"predictions": [1, 2', "no JSON"),
    ("v1", b'{"predictions": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    ("v1", b'{"predictions": [' + b"9" * 5000 + b"]}", "no JSON"),
    ("v1", b'{"predictions": [' + b"9" * 400 + b",1,1,1,1]}", "beyond all"),
    ("v1", b'{"error": "no such signature"}', "server reports an error: no such signature"),
    ("v1", b"[1, 2]", 'no list "predictions"'),
    ("v1", b'{"predictions": {"a": 1}}', 'no list "predictions"'),
    ("v1", b'{"predictions": [[1, 2]]}', "1 predictions came for 5 inputs"),
    ("v1", b'{"predictions": [[1,2],[1,2],[1],[1,2],[1,2,3]]}', "differ in length.*rows 2 and 4"),
    ("v1", b'{"predictions": [[],[],[],[],[]]}', "empty"),
    ("v1", b'{"predictions": [[1,2],[1,2],7,[1,2],[1,2]]}', "differ in length.*row 2"),
    ("v1", b'{"predictions": [[1,"2"],[1,2],[1,2],[1,2],[1,2]]}', "texts where numbers"),
    ("v1", b'{"predictions": [[1,true],[1,2],[1,2],[1,2],[1,2]]}', "true or false where numbers"),
    ("v1", b'{"predictions": [true,1,1,1,1]}', "true or false where numbers"),
    ("v1", b'{"predictions": [[[1]],[[1]],[[1]],[[1]],[[1]]]}', "lists where numbers"),
    ("v1", b'{"predictions": [{"a":1},{"a":1},{"b":1},{"a":1},{"a":1}]}', "not every prediction"),
    ("v2", b"{}", 'no list "outputs"'),
    ("v2", b'{"outputs": []}', "holds no tensors"),
    ("v2", b'{"outputs": [3]}', "holds no tensors"),
    ("v2", b'{"outputs": [{"shape": [5], "datatype": "BYTES", "data": ["a"]}]}', "BYTES.*no numbers"),
    ("v2", b'{"outputs": [{"shape": [5], "datatype": [], "data": [1]}]}', "of no type, and holds no numbers"),
    ("v2", b'{"outputs": [{"shape": [5], "datatype": "FP32"}]}', 'no "data"'),
    ("v2", b'{"outputs": [{"shape": "5", "datatype": "FP32", "data": []}]}', "no shape"),
    ("v2", b'{"outputs": [{"shape": [true], "datatype": "FP32", "data": []}]}', "no shape"),
    ("v2", b'{"outputs": [{"shape": [4, 2], "datatype": "FP32", "data": [1]}]}', "shape \\[4, 2\\] for 5 inputs"),
    ("v2", b'{"outputs": [{"shape": [5, 0], "datatype": "FP32", "data": []}]}', "shape \\[5, 0\\]"),
    ("v2", b'{"outputs": [{"shape": [5, 2, 2], "datatype": "FP32", "data": []}]}', "shape \\[5, 2, 2\\]"),
    ("v2", b'{"outputs": [{' + ONE + b"[1, 2, 3]}]}", "3 numbers came for shape \\[5, 2\\]"),
    ("v2", b'{"outputs": [{' + ONE + b"[[1, 2], 3]}]}", "unevenly"),
    ("v2", b'{"outputs": [{' + ONE + b'["a"]}]}', "1 numbers came"),
    ("v2", b'{"outputs": [{"shape": [99999999999, 2], "datatype": "FP32", "data": []}]}', "for 5 inputs"),
]


@pytest.mark.parametrize(("form", "content", "match"), BAD)
def test_answers_that_are_none(serve: Serve, form: str, content: bytes, match: str) -> None:
    server = serve(always(content))
    url = getattr(server, form)
    said = refusal(Served(url, answers="logits"))
    assert re.search(match, said)
    assert in_order(said, url, "was asked about 5 inputs", "Allowed is {")
    assert len(said) < 1000
    assert said.isprintable()


@pytest.mark.parametrize(
    ("answers", "content", "match"),
    [
        (
            "probabilities",
            [[2.0, -1.0]] * 5,
            "no probabilities in rows 0, 1, 2, 3 and 4.*from -1 to 2, sum 1.*answers=.*--answers",
        ),
        ("probabilities", [[0.9, 0.9]] * 5, "sum 1.8"),
        ("probabilities", [3, 1, 0, 1, 2], "no probabilities in rows 0 and 4"),
        ("labels", [[0.5, 0.5]] * 5, "rows of 2 numbers came where labels.*--answers"),
        ("labels", [0, 1, 2.5, 1, 0], "no label in row 2 .*2.5.*from 0 to 2"),
        ("labels", [0, 3, -1, 1, None], "no label in rows 1, 2 and 4"),
    ],
)
def test_answers_of_another_kind(
    serve: Serve, answers: Literal["probabilities", "labels"], content: object, match: str
) -> None:
    server = serve(always(json.dumps({"predictions": content}).encode()))
    served = Served(server.v1, answers=answers, classes=3 if answers == "labels" else None)
    assert re.search(match, refusal(served))


def test_another_model_is_noticed_by_its_classes(serve: Serve) -> None:
    widths = iter([4, 4, 5])
    served = Served(serve(lambda asked: answering(net(3, next(widths)))(asked)).v1, answers="logits")
    served(X)
    served(X)
    assert in_order(refusal(served), "rows of 5 numbers came, and 4 before", "replaced?")


@pytest.mark.parametrize(
    ("status", "match"),
    [
        (400, "400 Bad Request.*shape and type.*so many at once.*rows="),
        (404, "404 Not Found.*name and version"),
        (500, "500.*went wrong.*Its log"),
        (401, "401.*MOHS_HTTP_AUTHORIZATION"),
        (413, "413.*rows="),
        (204, "204"),
    ],
)
def test_other_statuses(serve: Serve, status: int, match: str) -> None:
    server = serve(always(b"" if status == 204 else b"went\r\nwrong", status))
    said = refusal(Served(server.v1))
    assert re.search(match, said)
    assert status == 204 or "went wrong" in said
    assert len(server.asked) == 1


def test_answers_that_are_too_long_or_packed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_transport, "ANSWER_BYTES", 1000)
    assert "more than the 1,000 bytes allowed" in refusal(Served(serve(always(b" " * 2000)).v1))
    assert "encoding 'gzip'" in refusal(Served(serve(always(b"abc", Content_Encoding="gzip")).v1))
    cut = refusal(Served(serve(always(b'{"predictions"', Content_Length="500", Connection="close")).v1, retries=0))
    assert "no connection" in cut or "no whole answer" in cut


# ---- what may be asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://host/predict", "ends in none of the forms.*:predict.*infer.*BlackBox"),
        ("http://host/v1/models/net:classify", "none of the forms"),
        ("http://host/models/net/infer", "none of the forms"),
        ("ftp://host/v1/models/net:predict", "no URL"),
        ("http:///v1/models/net:predict", "no URL"),
        ("http://host:99999/v1/models/net:predict", "no URL"),
        ("http://host/v1/models/a b:predict", "no URL"),
        ("http://host/v1/models/net:predict?key=hush", "no secrets"),
        ("http://me:hush@host/v1/models/net:predict", "no secrets"),
        ("http://me:hu/sh@host/v1/models/net:predict", "no secrets"),
        (3, "got a int"),
    ],
)
def test_urls_that_are_refused(url: str, match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        Served(url)
    assert "hush" not in str(caught.value)
    assert "hu/" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"answers": "scores"}, "allowed are probabilities, logits, labels"),
        ({"answers": "labels"}, "give classes >= 2"),
        ({"classes": 3}, "needed for labels only"),
        ({"rows": 0}, "rows must be"),
        ({"timeout": float("inf")}, "timeout must be a finite"),
        ({"timeout": True}, "timeout must be a finite"),
        ({"retries": -1}, "retries must be"),
        ({"headers": {"bad name": "hush"}}, "no name of a header"),
        ({"headers": {"Authorization": "hush\n"}}, "printable ASCII text in one line"),
        ({"headers": {"Host": "hush"}}, "belongs to the request"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ModelError, match=match) as caught:
        Served("http://host/v1/models/net:predict", **settings)
    assert "hush" not in str(caught.value)


def test_inputs_that_json_cannot_hold(serve: Serve) -> None:
    server = serve(answering(net()))
    assert "must be finite" in refusal(Served(server.v1), torch.full((1, 3), torch.nan))
    assert Served(server.v1)(X[:0]).shape == (0, 1)
    assert not server.asked


def test_without_urllib3(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "urllib3", None)
    with pytest.raises(ModelError, match=r'pip install "mohs\[http\]"'):
        models.load("http://host/v1/models/net:predict")


# ---- secrets ---------------------------------------------------------------------------------------------


def test_redirects_are_not_followed(serve: Serve) -> None:
    other = serve(answering(net()))
    for status in (301, 302, 307, 308):
        target = f"http://me:hush@127.0.0.1:{other.port}/v1/models/net:predict?key=hush"
        server = serve(always(b"", status, Location=target))
        said = refusal(Served(server.v1, headers={"Authorization": SECRET}))
        assert in_order(said, str(status), "a redirect to", str(other.port), "not followed")
        assert "hush" not in said
    assert not other.asked


def test_no_message_shows_a_secret(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    echo = SECRET.encode()
    replies = [
        always(b"you sent " + echo, 500),
        always(b"you sent " + echo.split()[1], 503),
        always(b"you sent " + echo),
        always(b'{"error": "you sent ' + echo + b'"}'),
        always(b"", 302, Location="http://elsewhere/" + SECRET.split()[1]),
        lambda asked: None,
    ]
    for reply in replies:
        served = Served(serve(reply).v1, headers={"Authorization": SECRET}, retries=1)
        assert "s3cr3t" not in refusal(served)
        for shown in (repr(served), served.name, str(served.state_dict())):
            assert "s3cr3t" not in shown
    assert "s3cr3t" not in caplog.text


def long(before: int) -> bytes:
    return b"x" * before + SECRET.encode()


CUT = [
    ("v1", long(190), 500),  # where messages end
    ("v1", b" " * 65_525 + SECRET.encode(), 500),  # where texts are too long to be looked at
    ("v1", b'{"error": "' + long(185) + b'"}', 200),
    ("v2", b'{"outputs": [{"shape": [5], "datatype": "' + long(5) + b'", "data": []}]}', 200),
    ("v2", b'{"inputs": [{"name": "a", "datatype": "' + long(5) + b'"}]}', 0),
]


@pytest.mark.parametrize(("form", "content", "status"), CUT)
def test_no_message_shows_the_head_of_a_secret(serve: Serve, form: str, content: bytes, status: int) -> None:
    server = serve(always(content, status) if status else lambda asked: (200, {}, content))
    said = refusal(Served(getattr(server, form), headers={"Authorization": SECRET}))
    assert "Bea" not in said
    assert "s3c" not in said


def test_headers_are_sent(serve: Serve) -> None:
    server = serve(answering(net()))
    Served(server.v2, answers="logits", headers={"Authorization": SECRET})(X)
    assert [a.headers["authorization"] for a in server.asked] == [SECRET] * 2
    assert server.asked[0].headers["user-agent"].startswith("mohs/")
