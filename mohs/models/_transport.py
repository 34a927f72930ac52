"""Requests to a prediction server: patient where a server is busy, short where it is wrong, and silent about secrets."""

from __future__ import annotations

import io
import math
import re
import time
from collections.abc import Mapping
from http.client import HTTPResponse
from typing import Any
from urllib.parse import urlsplit

import mohs
from mohs.errors import ModelError

ANSWER_BYTES = 64 << 20
"""An answer longer than this is not read to its end."""
BUSY = (429, 502, 503, 504)
"""Statuses after which the same request may succeed later."""
PAUSE = 0.5
"""Seconds before the second try; each further pause is twice as long."""
PATIENCE = 60.0
"""Seconds a server may ask to wait before the next try (Retry-After)."""
CONNECTING = 10.0
"""Seconds to open a connection, where the timeout is no shorter."""
AUTHORIZATION = "MOHS_HTTP_AUTHORIZATION"
"""The environment variable from which the command line takes the header Authorization."""
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_OURS = ("content-type", "content-length", "transfer-encoding", "accept-encoding", "host")


class Transport:
    """One server, spoken to over connections that are kept open; certificates are verified, redirects are not followed.

    Args:
        headers: sent with every request. Their values are secrets: no message holds them.
        timeout: seconds from the end of a request to the end of its answer, headers included; connecting and sending
            have limits of their own.
        retries: further tries where no connection could be made or kept, or the server is busy.

    Raises:
        ModelError: urllib3 is not installed, or a header or number is none.
    """

    def __init__(self, headers: Mapping[str, str] | None, timeout: float, retries: int) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < math.inf:
            raise ModelError(f"timeout must be a finite number of seconds above 0; got {timeout!r}.")
        if type(retries) is not int or retries < 0:
            raise ModelError(f"retries must be a whole number >= 0; got {retries!r}.")
        self.timeout, self.retries = float(timeout), retries
        self._headers = _checked(headers or {})
        self._secrets = _secrets(self._headers.values())
        self._urllib3 = _urllib3()
        # no Accept-Encoding, so that no few bytes can grow to a gigabyte here
        fixed = {"user-agent": f"mohs/{mohs.__version__}", "accept": "application/json"}
        self._headers = fixed | self._headers
        self._pool = self._urllib3.PoolManager(num_pools=2, maxsize=1, retries=False)
        self._pool.pool_classes_by_scheme = _punctual(self._urllib3)

    def ask(self, method: str, url: str, body: bytes | None = None, *, without: tuple[int, ...] = ()) -> bytes | None:
        """The body of the answer of status 200; None for one of the statuses ``without``.

        Raises:
            ModelError: no connection, no answer in time, too long an answer, or another status.
        """
        pause = PAUSE
        for tries in range(1, self.retries + 2):
            wait, last = pause, tries > self.retries
            try:
                status, reason, fields, content = self._once(method, url, body)
            except ModelError:
                raise
            except Exception as error:
                self._judge(error, method, url, tries, last)
            else:
                if status == 200:
                    return content
                if status in without:
                    return None
                asked = self._asked_to_wait(fields)
                if status not in BUSY or last or asked > PATIENCE:
                    raise ModelError(self._refused(method, url, status, reason, fields, content, tries))
                wait = asked or pause
            time.sleep(wait)
            pause *= 2
        raise AssertionError("the last try answers or raises")

    def shown(self, text: str | bytes, most: int = 200) -> str:
        """A text of the server as messages may hold it: short, in one line, nothing invisible, no secrets."""
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        for secret in self._secrets:  # before any cut, which might leave the head of one
            text = text.replace(secret, "***")
        text = " ".join(text[: 1 << 16].split())
        short = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
        return short + ("..." if len(text) > most else "")

    def _once(self, method: str, url: str, body: bytes | None) -> tuple[int, str, Mapping[str, str], bytes]:
        headers = self._headers if body is None else self._headers | {"content-type": "application/json"}
        response: Any = self._pool.request(
            method, url, body=body, headers=headers, redirect=False, preload_content=False, decode_content=False,
            timeout=self._urllib3.Timeout(connect=min(CONNECTING, self.timeout), read=self.timeout),
        )  # fmt: skip
        whole = False
        try:
            parts, size = [], 0
            while part := response.read1(1 << 16):
                parts.append(part)
                size += len(part)
                if size > ANSWER_BYTES:
                    raise ModelError(
                        f"{method} {url} answered with more than the {ANSWER_BYTES:,} bytes allowed. Is it a prediction "
                        "server, and does it send nothing but one row of numbers per input?"
                    )
            coding = response.headers.get("content-encoding", "identity").lower()
            if coding != "identity":
                raise ModelError(
                    f"{method} {url} answered in the encoding {self.shown(coding, 40)!r}, which was not asked for; allowed "
                    "is plain JSON. Switch the compression of the server or its proxy off."
                )
            whole = True
            fields = {str(k).lower(): str(v) for k, v in response.headers.items()}
            return response.status, str(response.reason or ""), fields, b"".join(parts)
        finally:
            # a connection with unread bytes on it cannot be used again
            response.release_conn() if whole else response.close()

    def _asked_to_wait(self, fields: Mapping[str, str]) -> float:
        """Seconds of the header Retry-After, a number or a date; 0 where there is none."""
        if "retry-after" not in fields:
            return 0.0
        try:
            return float(self._urllib3.Retry().parse_retry_after(fields["retry-after"]))
        except (self._urllib3.exceptions.HTTPError, ValueError, OverflowError):
            return 0.0

    def _judge(self, error: Exception, method: str, url: str, tries: int, last: bool) -> None:
        """Let a broken connection be tried again; raise what another try would not mend."""
        kinds = self._urllib3.exceptions
        said = self.shown(str(error) or type(error).__name__)
        times = "" if tries == 1 else f" after {tries} tries"
        if isinstance(error, kinds.SSLError):
            raise ModelError(
                f"{method} {url}: no secure connection ({said}). Is it an http:// address? Certificates are always verified; "
                "for an authority of your own point the environment variable SSL_CERT_FILE to its certificate."
            ) from None
        if isinstance(error, kinds.ReadTimeoutError | TimeoutError) and not isinstance(
            error, kinds.ConnectTimeoutError
        ):
            # it may be at work on what it was asked, and would be paid for it twice
            raise ModelError(
                f"{method} {url}: no whole answer within {self.timeout:g} s ({said}). A slow server needs a longer timeout, "
                "or fewer inputs per request: mohs.models.Served(url, timeout=..., rows=...)."
            ) from None
        if isinstance(error, ValueError) or not isinstance(error, kinds.HTTPError | OSError):
            raise ModelError(f"{method} {url} cannot be asked ({said}). Check the URL.") from None
        if last:
            raise ModelError(
                f"{method} {url}: no connection{times} ({said}). Check host and port, and that the server is running."
            ) from None

    def _refused(
        self, method: str, url: str, status: int, reason: str, fields: Mapping[str, str], content: bytes, tries: int
    ) -> str:
        said = f": {self.shown(content)}" if content.strip() else ""
        times = "" if tries == 1 else f" after {tries} tries"
        told = f"{method} {url} answered {status} {self.shown(reason, 40)}".rstrip() + times
        if 300 <= status < 400:
            place = self.shown(plain_url(fields.get("location", "nowhere")))
            return (
                f"{told}, a redirect to {place}. Redirects are not followed, as inputs and credentials were meant for the "
                "host that was named. Give that URL if you trust it."
            )
        advice = {
            400: "Check that its model takes inputs of this shape and type, and so many at once: mohs.models.Served(url, "
            "rows=...) sends fewer.",
            401: f"It asks who you are: set the environment variable {AUTHORIZATION}, or give headers to mohs.models.Served. "
            "(mohs replay sends it only to a URL that --model gives.)",
            403: f"It knows you or not, but lets you not: check {AUTHORIZATION} or the headers given.",
            404: "Check the name and version of the model in the URL, and whether it is loaded.",
            413: "The request is too long for it: mohs.models.Served(url, rows=...) sends fewer inputs at once.",
        }
        usual = "Its log may say more. Check that its model takes inputs of this shape and type."
        if status in BUSY:
            usual = "It is busy or still loading; try again later."
            if (asked := self._asked_to_wait(fields)) > PATIENCE:
                usual = f"It asks to wait {asked:,.0f} s, more than the {PATIENCE:g} s that are waited; try again then."
        return f"{told}{said}. Allowed is 200 with JSON. {advice.get(status, usual)}"


def plain_url(url: str) -> str:
    """A URL without user, password, query and fragment, for messages.

    >>> plain_url("https://me:secret@host/v1/models/net:predict?key=secret")
    'https://host/v1/models/net:predict'
    """
    head, slashes, rest = re.split(r"[?#]", url, maxsplit=1)[0].rpartition("://")
    return head + slashes + rest.rpartition("@")[2]


def check_url(url: str) -> str:
    """The URL, if it is one that can be written into a record: http(s), a host, and nothing that may be a secret."""
    if not isinstance(url, str):
        raise ModelError(f"A served model is named by the URL of its predictions; got a {type(url).__name__}.")
    shown = plain_url(url)
    if "@" in url or "?" in url or "#" in url:
        raise ModelError(
            f"{shown!r} came with a user, a password, a query or a fragment. The URL is written into records, so it may hold "
            f"no secrets: give them as headers of mohs.models.Served, or in the environment variable {AUTHORIZATION}."
        )
    try:
        parts = urlsplit(url)
        valid = parts.scheme.lower() in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        valid = False
    if not valid or re.search(r"[\s\x00-\x1f\x7f]", url) or not url.isprintable():
        raise ModelError(f"{shown!r} is no URL that can be asked; allowed are http:// and https://, a host and a path.")
    return url


def _checked(headers: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name):
            raise ModelError(f"{name!r} is no name of a header; allowed are letters, digits and hyphens.")
        if name.lower() in _OURS:
            raise ModelError(f"The header {name} belongs to the request itself and cannot be given; leave it out.")
        good = isinstance(value, str) and value.strip() and value.isprintable()
        if not good or not value.isascii():
            raise ModelError(
                f"The value of the header {name} must be printable ASCII text in one line (it is not shown here, as it may "
                "be a secret). Is there a line break at its end?"
            )
        found[name.lower()] = value.strip()
    return found


def _secrets(values: Any) -> list[str]:
    """What must not be shown: whole values, and their words, as of 'Bearer TOKEN'; longest first."""
    words = {part for value in values for part in (value, *value.split()) if len(part) >= 4}
    return sorted(words, key=len, reverse=True)


class _Until(io.RawIOBase):
    """What a socket receives until its timeout has passed once, counted from now and over all reads."""

    def __init__(self, sock: Any) -> None:
        super().__init__()
        self._sock, self._raw, self._timeout = sock, sock.makefile("rb", buffering=0), sock.gettimeout()
        self._end = time.monotonic() + self._timeout

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, into: Any) -> Any:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the answer began, but did not end in time")
        self._sock.settimeout(left)
        try:
            return self._raw.readinto(into)
        finally:
            self._sock.settimeout(self._timeout)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _Punctual(HTTPResponse):
    """An answer that comes in time as a whole: else a line or a byte a second would go on for ever."""

    def __init__(self, sock: Any, *args: Any, **settings: Any) -> None:
        super().__init__(_Until(sock), *args, **settings)  # type: ignore[arg-type]  # it asks for makefile alone


def _punctual(urllib3: Any) -> dict[str, Any]:
    """The pools of urllib3 by scheme, but with ``_Punctual`` answers."""
    made = {}
    for scheme, pool in (("http", urllib3.HTTPConnectionPool), ("https", urllib3.HTTPSConnectionPool)):
        connection = type("Connection", (pool.ConnectionCls,), {"response_class": _Punctual})
        made[scheme] = type(pool.__name__, (pool,), {"ConnectionCls": connection})
    return made


def _urllib3() -> Any:
    try:
        import urllib3
    except ImportError as error:
        raise ModelError(
            'A served model needs urllib3, which is not installed. Run: pip install "mohs[http]"'
        ) from error
    return urllib3
