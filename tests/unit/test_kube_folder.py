"""Manifests on disk as a source: the same batches as from an API, and what is broken spoils nothing else."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from podwire.kube.folder import ManifestSource
from podwire.kube.kinds import ENDPOINT_SLICES, NODES, SERVICES, Wanted, one_node, proxied_services
from podwire.kube.objects import Service
from tests.unit.kube_fixtures import Mirror, eventually, mirrored, run

ALL = Wanted(kind=SERVICES)
QUICK = 0.02


def service(name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def write(path: Path, *objects: Any, text: str = "") -> None:
    """Replaces a file in one step, as editors and ConfigMaps do."""
    content = text or (json.dumps(objects[0]) if path.suffix == ".json" else yaml.safe_dump_all(objects))
    new = path.with_name(f".{path.name}.new")
    new.write_text(content)
    new.rename(path)


Story = Callable[[Path, Mirror[Service], ManifestSource], Any]


def told(folder: Path, story: Story, *paths: Path) -> None:
    async def whole() -> None:
        source = ManifestSource(paths or (folder,), interval=QUICK)
        async with mirrored(source, ALL) as mirror:
            await story(folder, mirror, source)

    run(whole)


def test_a_folder_s_life(tmp_path: Path) -> None:
    async def story(folder: Path, mirror: Mirror[Service], source: ManifestSource) -> None:
        await mirror.until(lambda: mirror.synced)
        assert mirror.names == ["a", "b", "c"]
        write(folder / "1.yaml", service("a", clusterIP="10.96.0.9"), service("d"))
        await mirror.until(lambda: mirror.names == ["a", "c", "d"])
        assert mirror.objects["default", "a"].spec.cluster_ip == "10.96.0.9"
        told = [obj.metadata.name for batch in mirror.batches[1:] for obj in batch.upserts]
        assert "c" not in told
        (folder / "2.json").unlink()
        await mirror.until(lambda: mirror.names == ["a", "d"])
        assert source.problems == {}

    write(
        tmp_path / "1.yaml",
        service("a"),
        service("b"),
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}},
    )
    write(tmp_path / "2.json", {"apiVersion": "v1", "kind": "List", "items": [service("c")]})
    (tmp_path / "notes.txt").write_text("no manifest")
    (tmp_path / ".hidden.yaml").write_text("a: [")
    (tmp_path / "folder.yaml").mkdir()
    told(tmp_path, story)


def test_an_empty_folder_is_complete(tmp_path: Path) -> None:
    async def story(_: Path, mirror: Mirror[Service], __: ManifestSource) -> None:
        await mirror.until(lambda: mirror.synced)
        assert mirror.objects == {}

    told(tmp_path, story)


BROKEN: dict[str, tuple[str, str, str]] = {
    "YAML that is none": ("1.yaml", "a: [", "1.yaml: document 1.*not YAML"),
    "JSON that is none": ("1.json", "{", "1.json: not JSON"),
    "no manifest": ("1.yaml", "a: b", "1.yaml: document 1: apiVersion is missing"),
    "no name": ("1.yaml", yaml.safe_dump({**service("x"), "metadata": {}}), "metadata.name is missing"),
    "one of wrong type": (
        "1.yaml", yaml.safe_dump(service("a", ports=[{"port": "x"}])), "Service default/a is left out: .*port",
    ),
    "no text": ("1.yaml", "\udcff", "not UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "text", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_named_and_its_last_good_self_stays(name: str, text: str, words: str, tmp_path: Path) -> None:
    async def story(folder: Path, mirror: Mirror[Service], source: ManifestSource) -> None:
        await mirror.until(lambda: mirror.synced)
        (folder / name).write_bytes(text.encode(errors="surrogateescape"))
        write(folder / "2.yaml", service("b"), service("c"))
        await eventually(lambda: any(re.search(words, one) for one in source.problems.get(str(folder / name), ())))
        await mirror.until(lambda: mirror.names == ["a", "b", "c"])
        write(folder / name, service("a2"))
        await mirror.until(lambda: mirror.names == ["a2", "b", "c"])
        await eventually(lambda: source.problems == {})

    write(tmp_path / name, service("a"))
    write(tmp_path / "2.yaml", service("b"))
    told(tmp_path, story)


def test_one_broken_object_is_left_out_and_the_rest_of_its_file_is_taken(tmp_path: Path) -> None:
    async def story(_: Path, mirror: Mirror[Service], source: ManifestSource) -> None:
        await mirror.until(lambda: mirror.synced)
        assert mirror.names == ["b"]
        assert [one.key for one in mirror.skipped] == [("default", "a")]
        assert "Service default/a is left out" in source.problems[str(tmp_path / "1.yaml")][0]

    write(tmp_path / "1.yaml", service("a", ports=1), service("b"))
    told(tmp_path, story)


def test_an_object_that_stands_twice_is_taken_from_the_first(tmp_path: Path) -> None:
    async def story(folder: Path, mirror: Mirror[Service], source: ManifestSource) -> None:
        await mirror.until(lambda: mirror.synced)
        assert mirror.objects["default", "a"].spec.type == "NodePort"
        assert f"stands in {folder / '1.yaml'}, too" in source.problems[str(folder / "2.yaml")][0]
        (folder / "1.yaml").unlink()
        await mirror.until(lambda: mirror.objects["default", "a"].spec.type == "LoadBalancer")
        assert source.problems == {}

    write(tmp_path / "1.yaml", service("a", type="NodePort"))
    write(tmp_path / "2.yaml", service("a", type="LoadBalancer"))
    told(tmp_path, story)


def test_a_folder_that_vanishes_takes_nothing_with_it(tmp_path: Path) -> None:
    async def story(_: Path, mirror: Mirror[Service], source: ManifestSource) -> None:
        await eventually(lambda: str(folder) in source.problems)
        assert not mirror.batches
        folder.mkdir()
        write(folder / "1.yaml", service("a"))
        await mirror.until(lambda: mirror.names == ["a", "b"])
        folder.rename(tmp_path / "away")
        await eventually(lambda: "cannot be read" in source.problems.get(str(folder), ("",))[0])
        write(single, service("b"), service("c"))
        await mirror.until(lambda: mirror.names == ["a", "b", "c"])
        (tmp_path / "away").rename(folder)
        await eventually(lambda: source.problems == {})
        assert mirror.names == ["a", "b", "c"]

    folder, single = tmp_path / "mounted", tmp_path / "single.yaml"
    write(single, service("b"))
    told(tmp_path, story, folder, single)


def test_a_change_within_one_time_stamp_is_seen(tmp_path: Path) -> None:
    async def story(folder: Path, mirror: Mirror[Service], __: ManifestSource) -> None:
        await mirror.until(lambda: mirror.names == ["a"])
        path = folder / "1.yaml"
        stamp = path.stat().st_mtime_ns
        with path.open("r+") as file:  # in place, of the same size, and with the same stamp
            file.write(path.read_text().replace("name: a", "name: b"))
        os.utime(path, ns=(stamp, stamp))
        await mirror.until(lambda: mirror.names == ["b"])

    write(tmp_path / "1.yaml", service("a"))
    now = time.time_ns()
    os.utime(tmp_path / "1.yaml", ns=(now + 10**10, now + 10**10))  # the clock of another machine: ahead of ours
    told(tmp_path, story)


def test_a_config_map_s_links_are_followed(tmp_path: Path) -> None:
    async def story(folder: Path, mirror: Mirror[Service], __: ManifestSource) -> None:
        await mirror.until(lambda: mirror.names == ["a"])
        (folder / "..2").mkdir()
        write(folder / "..2" / "1.yaml", service("b"))
        (folder / "..tmp").symlink_to("..2")
        (folder / "..tmp").rename(folder / "..data")
        shutil.rmtree(folder / "..1")
        await mirror.until(lambda: mirror.names == ["b"])

    (tmp_path / "..1").mkdir()
    write(tmp_path / "..1" / "1.yaml", service("a"))
    (tmp_path / "..data").symlink_to("..1")
    (tmp_path / "1.yaml").symlink_to("..data/1.yaml")
    told(tmp_path, story)


def test_kinds_and_selections_are_the_api_s(tmp_path: Path) -> None:
    other = service("other")
    other["metadata"]["labels"] = {"service.kubernetes.io/service-proxy-name": "x"}
    placed = service("placed")
    placed["metadata"]["namespace"] = "shop"
    nodes = [{"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}} for name in ("n1", "n2")]
    piece = {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "a-1", "labels": {"kubernetes.io/service-name": "a"}},
    }  # fmt: skip
    write(tmp_path / "1.yaml", service("a"), other, placed, *nodes, piece)

    async def story() -> None:
        source = ManifestSource([tmp_path], interval=QUICK)
        async with (
            mirrored(source, proxied_services()) as services,
            mirrored(source, Wanted(kind=NODES)) as everyone,
            mirrored(source, one_node("n2")) as own,
            mirrored(source, Wanted(kind=ENDPOINT_SLICES)) as slices,
        ):
            for mirror in (services, everyone, own, slices):
                await mirror.until(lambda mirror=mirror: mirror.synced)  # type: ignore[misc]
            assert set(services.objects) == {("default", "a"), ("shop", "placed")}
            assert set(everyone.objects) == {("", "n1"), ("", "n2")}
            assert set(own.objects) == {("", "n2")}
            assert [one.service for one in slices.objects.values()] == [("default", "a")]

    run(story)


def test_many_come_in_pieces_of_which_the_last_completes_them(tmp_path: Path) -> None:
    async def story(_: Path, mirror: Mirror[Service], __: ManifestSource) -> None:
        await mirror.until(lambda: mirror.synced)
        assert [(len(batch.upserts), batch.synced) for batch in mirror.batches] == [
            (500, False),
            (500, False),
            (7, True),
        ]

    write(tmp_path / "1.json", {"apiVersion": "v1", "kind": "List", "items": [service(f"s{n}") for n in range(1007)]})
    told(tmp_path, story)
