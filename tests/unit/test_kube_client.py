"""Requests to several endpoints, and what of each failure is said. Real sockets, real TLS, on loopback."""

from __future__ import annotations

import shutil
import socket
import ssl
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from podwire.kube.access import Access, Pem, User
from podwire.kube.answers import LONGEST_WAIT_S, seconds
from podwire.kube.client import Client, Timing
from podwire.kube.credentials import Credentials, Shown
from podwire.kube.errors import (
    ApiUnavailable,
    BadRequest,
    Expired,
    Forbidden,
    Garbled,
    NotFound,
    TooManyRequests,
    Unauthorized,
)
from podwire.kube.source import Silent
from tests.unit.kube_fixtures import Authority, Reply, Script, client, run, status

OK = Reply(b"{}")


class Attempts(Silent):
    """Remembers outcomes."""

    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def attempt(self, endpoint: str, outcome: str, seconds: float) -> None:  # noqa: ARG002
        self.outcomes.append(outcome)


@contextmanager
def nobody() -> Iterator[str]:
    """The URL of a port on which nobody listens, and which nobody else is given."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{holder.getsockname()[1]}"


# --- several endpoints ------------------------------------------------------------------------------------------

FAILING: dict[str, tuple[Reply | None, str]] = {
    "nobody listens": (None, "no connection"),
    "500": (Reply.of(status(500), 500), "500"),
    "502 with HTML": (Reply(b"<html>bad gateway", code=502), "502"),
    "504, since its memory is behind": (Reply.of(status(504, "Timeout", "Too large resource version"), 504), "504"),
    "no answer": (Reply(then="no answer"), "no answer"),
    "the connection is cut": (Reply(then="drop", code=200), "broken off"),
}


@pytest.mark.parametrize(("reply", "outcome"), FAILING.values(), ids=FAILING)
def test_the_next_endpoint_is_asked_and_stays_the_first(reply: Reply | None, outcome: str) -> None:
    async def story() -> None:
        bad, good, seen = Script(reply or OK), Script(OK), Attempts()
        async with AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(script.serving()) for script in (bad, good)]
            if reply is None:
                urls[0] = stack.enter_context(nobody())
            timing = Timing(answer=1.0) if outcome == "no answer" else None
            one = await stack.enter_async_context(client(*urls, observer=seen, timing=timing))
            if outcome == "broken off":  # an answer that has begun is not begun again behind the reader's back
                with pytest.raises(ApiUnavailable):
                    await one.get("/", {})
            assert await one.get("/", {}) == b"{}"
            assert await one.get("/", {}) == b"{}"
            assert outcome in seen.outcomes
            assert (len(bad.asked), len(good.asked)) == (0 if reply is None else 1, 2)
            assert (one.connected, one.last_error) == (True, "")

    run(story)


def test_when_no_endpoint_answers_each_is_named_with_its_reason() -> None:
    async def story() -> None:
        script = Script(Reply.of(status(503, message="etcd is away"), 503, headers={"Retry-After": "3"}))
        async with AsyncExitStack() as stack:
            first = stack.enter_context(nobody())
            url = await stack.enter_async_context(script.serving())
            one = await stack.enter_async_context(client(first, url))
            with pytest.raises(ApiUnavailable) as caught:
                await one.get("/x", {})
            assert f"{first}: Connect call failed" in str(caught.value)
            assert f"{url}/x answers 503: etcd is away" in str(caught.value)
            assert caught.value.retry_after == 3.0
            assert not one.connected

    run(story)


REFUSED: dict[str, tuple[Reply, type[Exception], str]] = {
    "400": (Reply.of(status(400, message="bad"), 400), BadRequest, "answers 400: bad"),
    "422": (Reply.of(status(422, "Invalid"), 422), BadRequest, "answers 422: Invalid"),
    "401": (Reply.of(status(401, "Unauthorized"), 401), Unauthorized, "answers 401: Unauthorized"),
    "403": (Reply.of(status(403, message="may not list"), 403), Forbidden, "answers 403: may not list"),
    "404 in plain text": (Reply(b"404 page\nnot found", code=404), NotFound, "answers 404: 404 page not found"),
    "410": (Reply.of(status(410, "Expired"), 410), Expired, "answers 410: Expired"),
    "429": (Reply.of(status(429), 429, headers={"Retry-After": "2"}), TooManyRequests, "answers 429"),
    "a body that is no Status": (Reply(b"[1]", code=403), Forbidden, r"answers 403: \[1\]"),
    "a body that is not UTF-8": (Reply(b"\xff\xfe", code=403), Forbidden, "answers 403"),
    "no body": (Reply(code=403), Forbidden, "answers 403$"),
}


@pytest.mark.parametrize(("reply", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_another_endpoint_is_not_asked_about_a_refusal(reply: Reply, kind: type[Exception], words: str) -> None:
    async def story() -> None:
        script, other = Script(reply), Script(OK)
        async with script.serving() as url, other.serving() as second, client(url, second) as one:
            with pytest.raises(kind, match=words):
                await one.get("/x", {})
            assert (len(script.asked), len(other.asked)) == (1, 0)

    run(story)


@pytest.mark.parametrize(
    ("text", "wait"), [("", 0), ("5", 5), (" 5 ", 5), ("-5", 0), ("1e3", 0), ("99999", LONGEST_WAIT_S), ("soon", 0)]
)
def test_what_a_server_may_ask_for(text: str, wait: float) -> None:
    assert seconds(text) == wait


def test_an_answer_that_is_too_large_is_given_up() -> None:
    async def story() -> None:
        async with Script(Reply(b"x" * 5000)).serving() as url, client(url) as one:
            with pytest.raises(Garbled, match="more than 1000 bytes"):
                await one.get("/", {}, most=1000)

    run(story)


def test_a_host_that_vanishes_without_a_word_is_asked_for_by_the_kernel() -> None:
    async def story() -> None:
        script = Script(Reply(b"x", then="hang"))
        async with script.serving() as url, client(url) as one, one.open("/", {}) as answer:
            assert await answer.read(1.0) == b"x"
            connection = answer._response.connection
            assert connection is not None
            assert connection.transport is not None
            own = connection.transport.get_extra_info("socket")
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000

    run(story)


def test_a_base_path_is_kept() -> None:
    async def story() -> None:
        script = Script(Reply.of(status(404), 404))
        async with script.serving() as url, client(f"{url}/k8s/clusters/c-1") as one:
            with pytest.raises(NotFound, match="/k8s/clusters/c-1/api/v1/services answers"):
                await one.get("/api/v1/services", {})

    run(story)


# --- TLS --------------------------------------------------------------------------------------------------------


class Keys:
    """The certificates of these tests."""

    def __init__(self, folder: Path) -> None:
        self.ours, self.theirs = Authority(folder, "ours"), Authority(folder, "theirs")
        self.server, self.node = self.ours.sign("server"), self.ours.sign("node")
        self.named = self.ours.sign("named", "DNS:kubernetes")
        self.stranger = self.theirs.sign("stranger")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    return Keys(tmp_path_factory.mktemp("keys"))


def served(keys: Keys, own: tuple[Path, Path]) -> ssl.SSLContext:
    """The context of a server that demands a certificate."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(keys.ours.ca))
    context.load_cert_chain(*own)
    context.verify_mode = ssl.CERT_REQUIRED
    return context


def owner(own: tuple[Path, Path], *, data: bool = False) -> User:
    cert, key = (Pem(data=path.read_bytes()) if data else Pem(path=str(path)) for path in own)
    return User(certificate=cert, key=key)


TLS: dict[str, tuple[str, dict[str, Any], str]] = {
    "a certificate in files": ("server", {}, ""),
    "a certificate as data": ("server", {"data": True}, ""),
    "a CA that did not sign the server": (
        "server",
        {"ca": "theirs"},
        "TLS: (unable to get|self-signed)",
    ),
    "and nobody asks": ("server", {"ca": "", "insecure": True}, ""),
    "a server of another name": ("named", {}, "not valid for '127.0.0.1'"),
    "whose name is told": ("named", {"server_name": "kubernetes"}, ""),
    "no certificate": ("server", {"own": ""}, "is our certificate missing|certificate required"),
    "a stranger's certificate": ("server", {"own": "stranger"}, "does the server not know its CA|unknown ca"),
    "a key of another certificate": ("server", {"own": "mixed"}, "key values mismatch"),
    "a CA that is no PEM": ("server", {"ca": "nonsense"}, "the CA cannot be used"),
}


@pytest.mark.parametrize(("server", "options", "words"), TLS.values(), ids=TLS)
def test_tls_connects_or_says_why_not(server: str, options: dict[str, Any], words: str, keys: Keys) -> None:
    data, ca_of, own_of = options.get("data", False), options.get("ca", "ours"), options.get("own", "node")
    cas = {"ours": keys.ours.ca, "theirs": keys.theirs.ca, "nonsense": keys.node[1]}
    ca = Pem() if not ca_of else Pem(data=cas[ca_of].read_bytes()) if data else Pem(path=str(cas[ca_of]))
    pairs = {"node": keys.node, "stranger": keys.stranger, "mixed": (keys.node[0], keys.server[1])}
    user = owner(pairs[own_of], data=data) if own_of else User()

    async def story() -> None:
        async with Script(OK).serving(served(keys, getattr(keys, server))) as url:
            access = Access(
                servers=(url,), origin="t", ca=ca, user=user,
                insecure=options.get("insecure", False), server_name=options.get("server_name", ""),
            )  # fmt: skip
            async with Client(access, timing=Timing(connect=60, answer=60)) as one:
                if not words:
                    assert await one.get("/", {}) == b"{}"
                    return
                with pytest.raises(Exception, match=words):
                    await one.get("/", {})

    run(story)


def test_a_certificate_that_is_replaced_is_shown_from_then_on(keys: Keys, tmp_path: Path) -> None:
    own = (tmp_path / "cert.pem", tmp_path / "key.pem")

    def put(pair: tuple[Path, Path]) -> None:
        for source, target in zip(pair, own, strict=True):
            shutil.copy(source, target)

    async def story() -> None:
        async with Script(OK).serving(served(keys, keys.server)) as url:
            access = Access(servers=(url,), origin="t", ca=Pem(path=str(keys.ours.ca)), user=owner(own))
            async with Client(access, timing=Timing(connect=60, answer=60)) as one:
                put(keys.stranger)
                with pytest.raises(ApiUnavailable):
                    await one.get("/", {})
                put(keys.node)
                assert await one.get("/", {}) == b"{}"
                own[1].write_text("half a key")  # being replaced: what was read before does
                assert await one.get("/", {}) == b"{}"

    run(story)


# --- who we are -------------------------------------------------------------------------------------------------


def test_a_token_file_is_read_again_when_it_changes(tmp_path: Path) -> None:
    async def story() -> None:
        token = tmp_path / "token"
        token.write_text("one\n")
        script = Script(OK)
        async with script.serving() as url, client(url, user=User(token="none", token_file=str(token))) as one:
            await one.get("/", {})
            swapped = tmp_path / "new"
            swapped.write_text("two\n")
            swapped.rename(token)
            await one.get("/", {})
        assert script.authorizations == ["Bearer one", "Bearer two"]

    run(story)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"", "empty"), (b"a\nb", "more than one word"), (b"\xff", "cannot be read")],
    ids=["missing", "empty", "two lines", "no text"],
)
def test_a_token_file_that_cannot_be_used_is_named(content: bytes | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)

    async def story() -> None:
        async with client("http://127.0.0.1:1", user=User(token_file=str(path))) as one:
            with pytest.raises(Exception, match=rf"{path}: .*{words}"):
                await one.get("/", {})

    run(story)


def test_a_password_is_shown_as_one() -> None:
    async def story() -> None:
        script = Script(OK)
        async with script.serving() as url, client(url, user=User(username="u", password="p")) as one:
            await one.get("/", {})
        assert script.authorizations == ["Basic dTpw"]

    run(story)


def test_a_refused_token_is_renewed_once(tmp_path: Path) -> None:
    async def story() -> None:
        token = tmp_path / "token"
        token.write_text("old")
        refusal = Reply.of(status(401), 401)
        script = Script(refusal, refusal, OK)
        user = User(token_file=str(token))
        async with script.serving() as url, client(url, user=user) as one:
            with pytest.raises(Unauthorized):
                await one.get("/", {})
            assert len(script.asked) == 2
            assert await one.get("/", {}) == b"{}"

    run(story)


def test_a_token_that_stands_in_the_file_is_not_tried_twice() -> None:
    async def story() -> None:
        script = Script(Reply.of(status(401), 401))
        async with script.serving() as url, client(url, user=User(token="old")) as one:
            with pytest.raises(Unauthorized):
                await one.get("/", {})
            assert len(script.asked) == 1

    run(story)


def test_credentials_that_many_requests_find_refused_are_renewed_once() -> None:
    async def story() -> None:
        credentials = Credentials(Access(servers=("http://x",), origin="t", user=User(token_file="/none")))
        context = ssl.create_default_context()
        old = Shown(headers={}, context=context, serial=0)
        assert [credentials.refused(old), credentials.refused(old)] == [True, True]
        assert not Credentials(Access(servers=("http://x",), origin="t")).refused(old)

    run(story)
