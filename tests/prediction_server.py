"""A real prediction server on this machine, in a thread, for the tests of served models."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mohs.errors import ModelError
from mohs.models import _transport

Reply = tuple[int, dict[str, str], bytes]


@dataclass
class Asked:
    """One request as it came: over which connection, and what."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any
    connection: int

    @property
    def rows(self) -> int:
        return len(self.body["instances"]) if "instances" in self.body else self.body["inputs"][0]["shape"][0]


@dataclass
class Server:
    """Answers as ``reply`` says, one call per request, and remembers what was asked."""

    port: int
    reply: Callable[[Asked], Reply | None]
    asked: list[Asked] = field(default_factory=list)

    @property
    def v1(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1/models/net:predict"

    @property
    def v2(self) -> str:
        return f"http://127.0.0.1:{self.port}/v2/models/net/infer"

    @property
    def posts(self) -> list[Asked]:
        return [a for a in self.asked if a.method == "POST"]


@contextmanager
def serving(reply: Callable[[Asked], Reply | None]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # keeps connections open
        wbufsize = -1  # one packet per answer

        def _do(self) -> None:
            length = int(self.headers.get("content-length", 0))
            body = json.loads(self.rfile.read(length)) if length else None
            fields = {k.lower(): v for k, v in self.headers.items()}
            asked = Asked(self.command, self.path, fields, body, self.client_address[1])
            server.asked.append(asked)
            found = server.reply(asked)
            if found is None:  # hang up without a word
                self.close_connection = True
                return
            status, headers, content = found
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = _do  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Silence."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(http.server_port, reply)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


def ok(content: object, **headers: str) -> Reply:
    return 200, {"Content-Type": "application/json"} | headers, json.dumps(content).encode()


def inputs_of(asked: Asked) -> Tensor:
    if "instances" in asked.body:
        return torch.tensor(asked.body["instances"], dtype=torch.float32)
    tensor = asked.body["inputs"][0]
    return torch.tensor(tensor["data"], dtype=torch.float32).reshape(tensor["shape"])


def answering(net: nn.Module, answers: str = "logits", metadata: object | None = None) -> Callable[[Asked], Reply]:
    """A reply that asks a net, in the protocol of the request."""

    def reply(asked: Asked) -> Reply:
        if asked.method == "GET":
            return (404, {}, b"") if metadata is None else ok(metadata)
        with torch.no_grad():
            z = net(inputs_of(asked))
        z = {"logits": z, "probabilities": z.softmax(1), "labels": z.argmax(1)}[answers]
        if "instances" in asked.body:
            return ok({"predictions": z.tolist()})
        kind = "INT64" if answers == "labels" else "FP32"
        return ok({"outputs": [{"name": "y", "shape": list(z.shape), "datatype": kind, "data": z.flatten().tolist()}]})

    return reply


def net(inputs: int = 3, classes: int = 4) -> nn.Module:
    """A small net, always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, classes)).eval()


Serve = Callable[[Callable[[Asked], Reply | None]], Server]
SECRET = "Bearer s3cr3t-t0ken"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts servers that end with the test; pauses between tries are short, and no token lies about."""
    monkeypatch.setattr(_transport, "PAUSE", 0.001)
    monkeypatch.delenv(_transport.AUTHORIZATION, raising=False)
    with ExitStack() as opened:
        yield lambda reply: opened.enter_context(serving(reply))


X = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))


def always(content: bytes, status: int = 200, **headers: str) -> Callable[[Asked], Reply]:
    named = {k.replace("_", "-"): v for k, v in headers.items()}
    return lambda asked: (404, {}, b"") if asked.method == "GET" else (status, named, content)


def refusal(model: nn.Module, x: Tensor = X) -> str:
    with pytest.raises(ModelError) as caught:
        model(x)
    return str(caught.value)
