"""Served models that are busy, gone, slow or unreachable."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch
from cli_problem import in_order
from prediction_server import SECRET, Asked, Reply, Serve, X, always, answering, net, ok, refusal, serve

from mohs.models import Served

__all__ = ["serve"]


# ---- trouble on the way ----------------------------------------------------------------------------------


def busy(
    times: int, status: int, then: Callable[[Asked], Reply | None], **headers: str
) -> Callable[[Asked], Reply | None]:
    left = [times]

    def reply(asked: Asked) -> Reply | None:
        left[0] -= 1
        return then(asked) if left[0] < 0 else (status, {k.replace("_", "-"): v for k, v in headers.items()}, b"busy")

    return reply


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_server_is_asked_again(serve: Serve, status: int) -> None:
    server = serve(busy(2, status, answering(net())))
    assert torch.equal(Served(server.v1, answers="logits")(X), net()(X))
    assert len(server.asked) == 3


def test_a_server_says_how_long_to_wait(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    Served(serve(busy(2, 503, answering(net()), Retry_After="7")).v1, answers="logits")(X)
    assert slept == [7, 7]
    said = refusal(Served(serve(busy(1, 503, answering(net()), Retry_After="7200")).v1, answers="logits"))
    assert in_order(said, "answered 503", "asks to wait 7,200 s", "try again then")
    slept.clear()
    Served(serve(busy(2, 503, answering(net()), Retry_After="soon")).v1, answers="logits")(X)
    assert len(slept) == 2


def test_patience_ends(serve: Serve) -> None:
    server = serve(always(b"loading", 503))
    said = refusal(Served(server.v1, retries=2))
    assert in_order(said, "answered 503", "after 3 tries", ": loading", "Allowed is 200", "try again later")
    assert len(server.posts) == 3


def test_a_connection_that_breaks_is_made_again(serve: Serve) -> None:
    answer, calls = answering(net()), []

    def reply(asked: Asked) -> Reply | None:
        calls.append(asked)
        return None if len(calls) in (1, 3) else answer(asked)

    served = Served(serve(reply).v1, answers="logits")
    assert torch.equal(served(X), net()(X))
    assert torch.equal(served(X), net()(X))
    assert len(calls) == 4


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1/models/net:predict"
    assert in_order(refusal(Served(url, retries=1)), url, "no connection after 2 tries", "Check host and port")


def test_no_secure_connection(serve: Serve) -> None:
    server = serve(answering(net()))
    said = refusal(Served(server.v1.replace("http:", "https:"), headers={"Authorization": SECRET}))
    assert in_order(said, "https://127", "no secure connection", "an http:// address?", "always verified")
    assert not server.asked


def test_time_runs_out(serve: Serve) -> None:
    def late(_: Asked) -> Reply:
        time.sleep(0.4)
        return ok({})

    server = serve(late)
    said = refusal(Served(server.v1, timeout=0.1))
    assert in_order(said, "no whole answer within 0.1 s", "longer timeout")
    assert len(server.asked) == 1  # whoever is at work is not asked twice


HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("first", "drop"),
    [
        (HEAD + b"Content-Length: 1000\r\n\r\n", b" "),  # the body by bytes
        (HEAD, b"X-More: 1\r\n"),  # headers by lines
        (HEAD + b"X-More: ", b"1"),  # one header by bytes
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
)
def test_an_answer_that_trickles(first: bytes, drop: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(first)
                try:
                    for _ in range(60):
                        connection.sendall(drop)
                        time.sleep(0.02)
                except OSError:
                    pass

        thread = threading.Thread(target=drip)
        thread.start()
        began = time.monotonic()
        said = refusal(Served(f"http://127.0.0.1:{server.getsockname()[1]}/v1/models/net:predict", timeout=0.2))
        assert time.monotonic() - began < 0.8
        assert "no whole answer within 0.2 s" in said
        thread.join()
