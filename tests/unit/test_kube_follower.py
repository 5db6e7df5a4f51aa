"""Lists and watches into batches, without a server: bytes in any pieces, hostile ones among them, and the same end."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from podwire.kube.decode import Broken, Gone, Reader
from podwire.kube.errors import Expired, Garbled, NotStreamed
from podwire.kube.follower import Follower
from podwire.kube.kinds import KINDS, SERVICES, Wanted, one_node, pods_of_node, proxied_endpoint_slices
from podwire.kube.known import Known
from podwire.kube.lines import LineSplitter
from podwire.kube.objects import Service
from tests.unit.kube_fixtures import Mirror, event, listing, mark, service, status

ALL = Wanted(kind=SERVICES)
WEB = ("default", "web")


def follower(*items: dict[str, Any], version: int = 10) -> tuple[Follower[Service], Mirror[Service]]:
    """A follower that has had one list, and the mirror of what it said."""
    one, mirror = Follower(ALL), Mirror[Service]()
    one.begin()
    batch, token = one.page(json.dumps(listing(version, *items)).encode())
    assert batch is not None
    assert token == ""
    mirror.take(batch)
    one.watch()
    return one, mirror


def feed(one: Follower[Service], mirror: Mirror[Service], *lines: bytes) -> None:
    batch = one.feed(b"".join(lines))
    if batch is not None:
        mirror.take(batch)


# --- lines ------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30).map(lambda line: line.replace(b"\n", b""))), st.data())
def test_lines_are_the_same_however_they_arrive(lines: list[bytes], data: st.DataObject) -> None:
    whole = b"".join(line + b"\n" for line in lines)
    splitter, found = LineSplitter(), []
    while whole:
        size = data.draw(st.integers(1, len(whole)))
        found += splitter.feed(whole[:size])
        whole = whole[size:]
    assert found == [line for line in lines if line]


def test_a_line_without_end_is_given_up() -> None:
    splitter = LineSplitter(longest=10)
    assert splitter.feed(b"0123456789\n0123456789") == [b"0123456789"]
    with pytest.raises(Garbled, match="more than 10 bytes"):
        splitter.feed(b"a")


# --- one object -------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[Any, Any, str]] = {
    "a port that is text": (service("web", 1, ports=[{"port": "80"}]), WEB, "Expected `int`, got `str`"),
    "ports that are no list": (service("web", 1, ports={"port": 80}), WEB, "Expected `array | null`, got `object`"),
    "labels that are numbers": (
        {"metadata": {"name": "web", "namespace": "default", "resourceVersion": "1", "labels": {"a": 1}}},
        WEB, "labels",
    ),
    "a spec that is text": ({"metadata": {"name": "web", "namespace": "default"}, "spec": "x"}, WEB, "spec"),
    "a cluster-wide one, which has no namespace": ({"metadata": {"name": "a", "namespace": None}}, ("", "a"), "null"),
    "no name": ({"metadata": {"namespace": "default"}}, None, "name"),
    "a name that is a number": ({"metadata": {"name": 1}}, None, "name"),
    "no metadata": ({"spec": {}}, None, "metadata"),
    "no object": ([], None, "Expected `object`"),
}  # fmt: skip


@pytest.mark.parametrize(("obj", "key", "words"), BROKEN.values(), ids=BROKEN)
def test_an_object_that_cannot_be_understood_says_its_name_if_it_can(obj: Any, key: Any, words: str) -> None:
    found = Reader(SERVICES).object(json.dumps(obj).encode())
    assert isinstance(found, Broken)
    assert found.key == key
    assert words in found.reason


def test_fields_that_nobody_uses_may_be_anything() -> None:
    odd = b'{"metadata":{"name":"web","namespace":"default"},"future":[{},null,1e400,{"a":{"a":-0}}],"status":{}}'
    found = Reader(SERVICES).object(odd)
    assert isinstance(found, Service)
    assert found.key == WEB


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_every_kind_can_do_with_a_name_alone(kind: Any) -> None:
    found = Reader(kind).object(b'{"metadata":{"name":"a"}}')
    assert isinstance(found, kind.model)
    assert msgspec.json.encode(found) == b'{"metadata":{"name":"a"}}'


def test_a_deletion_is_understood_by_its_metadata_alone() -> None:
    found = Reader(SERVICES).event(event("DELETED", service("web", 7, ports="none")))
    assert found == Gone(WEB, "7")


# --- a watch ----------------------------------------------------------------------------------------------------


def test_changes_of_one_burst_are_one_change_a_key() -> None:
    one, mirror = follower(service("a", 1), service("b", 2))
    feed(
        one, mirror,
        event("MODIFIED", service("a", 11, type="NodePort")), event("DELETED", service("b", 12)),
        event("MODIFIED", service("a", 13, type="LoadBalancer")), event("ADDED", service("c", 14)),
    )  # fmt: skip
    (batch,) = mirror.batches[1:]
    assert [obj.metadata.resource_version for obj in batch.upserts] == ["13", "14"]
    assert batch.deletes == (("default", "b"),)
    assert one.version == "14"


def test_half_a_line_is_nothing_and_is_forgotten_with_its_connection() -> None:
    one, mirror = follower(service("a", 1))
    line = event("ADDED", service("b", 11))
    feed(one, mirror, line[:-10])
    assert (mirror.names, one.version) == (["a"], "10")
    one.watch()
    feed(one, mirror, line)
    assert mirror.names == ["a", "b"]


def test_bookmarks_move_the_version_and_say_nothing() -> None:
    one, mirror = follower(service("a", 1))
    feed(one, mirror, mark(77))
    assert (one.version, len(mirror.batches)) == ("77", 1)


def test_what_comes_again_is_not_told_again() -> None:
    one, mirror = follower(service("a", 1))
    feed(one, mirror, event("ADDED", service("b", 11)))
    one.known.version = "10"
    one.known.reached = "10"  # as if the watch had to begin again from before
    feed(one, mirror, event("ADDED", service("b", 11)))
    assert len(mirror.batches) == 2


def test_one_broken_object_spoils_nothing_and_its_last_good_self_stays() -> None:
    one, mirror = follower(service("web", 1), service("b", 2))
    bad = service("web", 11, ports=[{"port": "x"}])
    feed(one, mirror, event("MODIFIED", bad), event("MODIFIED", service("b", 12)))
    assert [(skipped.key, "port" in skipped.reason) for skipped in mirror.skipped] == [(WEB, True)]
    assert {name: obj.metadata.resource_version for (_, name), obj in mirror.objects.items()} == {"web": "1", "b": "12"}
    one.begin()
    batch, _ = one.page(json.dumps(listing(20, bad, service("b", 12))).encode())
    assert batch is not None
    assert (batch.upserts, batch.deletes) == ((), ())
    feed(one, mirror, event("MODIFIED", service("web", 21)))
    assert mirror.objects[WEB].metadata.resource_version == "21"


def test_a_broken_object_that_was_never_good_ends_with_its_deletion() -> None:
    one, mirror = follower()
    feed(one, mirror, event("ADDED", service("web", 11, ports=1)))
    feed(one, mirror, event("DELETED", service("web", 12, ports=1)))
    assert mirror.batches[-1].deletes == (WEB,)


ENDED: dict[str, tuple[bytes, type[Exception]]] = {
    "410 in an event": (event("ERROR", status(410, "Expired")), Expired),
    "410 said by its reason alone": (event("ERROR", {"reason": "Gone"}), Expired),
    "another error": (event("ERROR", status(500, "InternalError")), Garbled),
    "a version that goes back": (event("MODIFIED", service("z", 5)), Expired),
    "a bookmark that goes back": (mark(5), Expired),
    "no JSON": (b'{"type":"ADDED","object":{"metadata"\n', Garbled),
    "no event": (b'{"kind":"Status"}\n', Garbled),
    "a list": (b"[1]\n", Garbled),
    "a deletion without a name": (event("DELETED", {"metadata": {}}), Garbled),
    "no UTF-8": (b'{"type":"DELETED","object":{"metadata":{"name":"\xff"}}}\n', Garbled),
    "nested a million deep": (b'{"type":"ADDED","object":' + b"[" * 1_000_000 + b"\n", Garbled),
}


@pytest.mark.parametrize(("line", "kind"), ENDED.values(), ids=ENDED)
def test_what_ends_a_watch_loses_nothing_that_came_before(line: bytes, kind: type[Exception]) -> None:
    one, mirror = follower(service("a", 1))
    feed(one, mirror, event("ADDED", service("b", 11)), line, event("ADDED", service("c", 12)))
    assert isinstance(one.failure, kind)
    assert mirror.names == ["a", "b"]


def test_an_event_of_a_type_to_come_is_passed_over() -> None:
    one, mirror = follower()
    feed(one, mirror, event("COMPACTED", {}), event("ADDED", service("a", 11)))
    assert (one.failure, mirror.names) == (None, ["a"])
    assert "COMPACTED" in mirror.skipped[0].reason


# --- lists ------------------------------------------------------------------------------------------------------


def test_a_list_after_an_outage_says_what_is_different_and_what_vanished() -> None:
    one, mirror = follower(service("same", 1), service("changed", 2), service("gone", 3))
    one.lose()
    one.begin()
    batch, token = one.page(json.dumps(listing(50, service("same", 1), token="t")).encode())
    assert (batch, token) == (None, "t")
    batch, token = one.page(json.dumps(listing(50, service("changed", 40), service("new", 41))).encode())
    assert batch is not None
    assert sorted(obj.metadata.name for obj in batch.upserts) == ["changed", "new"]
    assert batch.deletes == (("default", "gone"),)
    assert (batch.synced, one.version) == (True, "50")
    mirror.take(batch)


def test_nothing_is_deleted_by_half_a_list() -> None:
    one, mirror = follower(service("a", 1), service("b", 2))
    one.lose()
    one.begin()
    one.page(json.dumps(listing(50, service("a", 1), token="t")).encode())
    one.begin()
    batch, _ = one.page(json.dumps(listing(51, service("b", 2), service("a", 1))).encode())
    assert batch is not None
    mirror.take(batch)
    assert mirror.names == ["a", "b"]


def test_a_streamed_list_is_complete_with_its_mark_and_goes_on_as_a_watch() -> None:
    one, mirror = follower(service("a", 1), service("gone", 2))
    one.lose()
    one.begin()
    feed(one, mirror, event("ADDED", service("new", 30)), event("ADDED", service("a", 1)))
    assert (one.version, mirror.names) == ("", ["a", "gone", "new"])
    feed(one, mirror, event("DELETED", service("new", 51)), mark(51, ends_list=True), event("ADDED", service("b", 52)))
    assert (one.version, mirror.names) == ("52", ["a", "b"])


def test_an_empty_streamed_list_is_told() -> None:
    one, mirror = Follower(ALL), Mirror[Service]()
    one.begin()
    feed(one, mirror, mark(5, ends_list=True))
    assert mirror.synced


def test_a_bookmark_before_the_mark_shows_a_server_that_streams_no_lists() -> None:
    one = Follower(ALL)
    one.begin()
    one.feed(mark(5))
    assert isinstance(one.failure, NotStreamed)


def test_a_restored_store_is_told_anew_though_its_versions_are_the_same() -> None:
    one, mirror = follower(service("a", 9), service("b", 8), version=10)
    one.lose()
    one.begin()
    other = json.dumps(listing(9, service("a", 9, type="NodePort"))).encode()
    with pytest.raises(Expired, match="went back from 10 to 9"):
        one.page(other)
    one.begin()
    batch, _ = one.page(other)
    assert batch is not None
    mirror.take(batch)
    assert {name: obj.spec.type for (_, name), obj in mirror.objects.items()} == {"a": "NodePort"}


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[]", b'{"metadata":{},"items":[]}', b'{"metadata":{"resourceVersion":"1"},"items":[{]}'],
)  # fmt: skip
def test_a_body_that_is_no_list_is_not_an_empty_one(body: bytes) -> None:
    one, _ = follower(service("a", 1))
    one.begin()
    with pytest.raises(Garbled):
        one.page(body)


def test_null_items_are_none() -> None:
    one = Follower(ALL)
    one.begin()
    batch, _ = one.page(b'{"metadata":{"resourceVersion":"1"},"items":null}')
    assert batch is not None
    assert (batch.upserts, batch.synced) == ((), True)


# --- all of it at once ------------------------------------------------------------------------------------------


class Server:
    """A history: what is there, and the events that led there."""

    def __init__(self) -> None:
        self.version = 100
        self.objects: dict[str, int] = {}
        self.log: list[tuple[int, bytes]] = []

    def write(self, name: str) -> None:
        self.version += 1
        kind = "MODIFIED" if name in self.objects else "ADDED"
        self.objects[name] = self.version
        self.log.append((self.version, event(kind, service(name, self.version))))

    def delete(self, name: str) -> None:
        if name in self.objects:
            self.version += 1
            del self.objects[name]
            self.log.append((self.version, event("DELETED", service(name, self.version))))


NAMES = st.sampled_from(["a", "b", "c", "d"])
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["write", "delete", "break"]), NAMES),
        st.tuples(st.sampled_from(["list", "stream", "read", "cut", "lose"]), st.just("")),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(STEPS, st.data())
def test_whatever_happens_the_mirror_ends_as_the_server(steps: list[tuple[str, str]], data: st.DataObject) -> None:
    server, one, mirror = Server(), Follower(ALL), Mirror[Service]()

    def connection() -> bytes:
        """What a watch from where the follower is would send."""
        return b"".join(line for version, line in server.log if version > int(one.version))

    def listed(*, streamed: bool) -> None:
        one.begin()
        items = [service(name, version) for name, version in server.objects.items()]
        if streamed:
            shuffled = data.draw(st.permutations(items))
            lines = b"".join(event("ADDED", item) for item in shuffled)
            feed(one, mirror, lines, mark(server.version, ends_list=True))
            return
        half = len(items) // 2
        for part, token in ((items[:half], "t"), (items[half:], "")):
            batch, _ = one.page(json.dumps(listing(server.version, *part, token=token)).encode())
            if batch is not None:
                mirror.take(batch)

    for step, name in [*steps, ("list", "") if data.draw(st.booleans()) else ("stream", ""), ("read", "")]:
        if step == "write":
            server.write(name)
        elif step == "delete":
            server.delete(name)
        elif step in ("list", "stream"):
            listed(streamed=step == "stream")
        elif step == "lose":
            one.lose()
        elif one.version and step in ("read", "cut", "break"):
            one.watch()
            sent = connection()
            if step == "cut":
                sent = sent[: data.draw(st.integers(0, len(sent)))]
            if step == "break":
                bad = service(name, server.version, ports=1)
                sent += event("MODIFIED", bad) if name in server.objects else b""
            feed(one, mirror, sent)
            if step == "break" and name in server.objects:
                server.write(name)
    assert {name: obj.metadata.resource_version for (_, name), obj in mirror.objects.items()} == {
        name: str(version) for name, version in server.objects.items()
    }
    assert len(one.known) == len(server.objects)


# --- what is asked for ------------------------------------------------------------------------------------------


def test_selections_are_the_same_for_a_server_and_for_objects() -> None:
    assert proxied_endpoint_slices().query() == {
        "labelSelector": "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless"
    }
    assert one_node("n1").query() == {"fieldSelector": "metadata.name=n1"}
    assert pods_of_node("n1").query() == {"fieldSelector": "spec.nodeName=n1"}
    pod = Reader(pods_of_node("n1").kind).object(b'{"metadata":{"name":"p"},"spec":{"nodeName":"n1"}}')
    assert not isinstance(pod, Broken)
    assert [pods_of_node(name).selects(pod) for name in ("n1", "n2")] == [True, False]
    with pytest.raises(ValueError, match=r"'spec\.x' cannot be selected by"):
        Wanted(kind=SERVICES, fields=(("spec.x", "1"),))


def test_paths_are_the_apis() -> None:
    assert [kind.path for kind in KINDS] == [
        "/api/v1/services", "/apis/discovery.k8s.io/v1/endpointslices", "/api/v1/nodes", "/api/v1/pods",
        "/api/v1/namespaces", "/apis/networking.k8s.io/v1/networkpolicies", "/apis/networking.k8s.io/v1/servicecidrs",
    ]  # fmt: skip


def test_versions_that_are_no_numbers_are_not_compared() -> None:
    known = Known()
    known.advance("b")
    assert not known.goes_back("a")
    known.advance("10")
    assert (known.goes_back("9"), known.goes_back("10"), known.goes_back("")) == (True, False, False)
