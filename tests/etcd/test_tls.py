"""The session over TLS, with a client certificate that etcd demands."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from podwire.etcd import EtcdOptions, EtcdSession, EtcdUnavailable
from podwire.lab.etcd import EtcdServer

Run = Callable[[Coroutine[Any, Any, Any]], Any]


def openssl(folder: Path, *words: str) -> None:
    subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """A folder with ca.pem, and one certificate (pod.pem, pod.key) for 127.0.0.1 that serves both ends."""
    for tool, package in (("openssl", "openssl"), ("etcd", "etcd-server")):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed (Debian: apt install {package})")
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(tmp_path, "req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca", "-days", "2")
    openssl(tmp_path, "req", *key, "-keyout", "pod.key", "-out", "pod.csr", "-subj", "/CN=pod")
    (tmp_path / "san").write_text("subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth,clientAuth\n")
    signer = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san", "-days", "2")
    openssl(tmp_path, "x509", "-req", "-in", "pod.csr", *signer, "-out", "pod.pem")
    return tmp_path


def test_etcd_that_demands_a_certificate_talks_to_who_has_one(certificates: Path, run: Run) -> None:
    ca, cert, key = (str(certificates / name) for name in ("ca.pem", "pod.pem", "pod.key"))
    options = ("--cert-file", cert, "--key-file", key, "--client-cert-auth", "--trusted-ca-file", ca)

    async def story(endpoint: str) -> None:
        async with EtcdSession(EtcdOptions(endpoints=(endpoint,), ca=ca, cert=cert, key=key)) as etcd:
            await etcd.put("/a", b"1")
        for others in (EtcdOptions(endpoints=(endpoint,), ca=ca), EtcdOptions(endpoints=(endpoint,))):
            async with EtcdSession(others) as etcd:
                with pytest.raises(EtcdUnavailable):
                    await etcd.get("/a")

    with EtcdServer(certificates, tls=True, options=options, dies_with_parent=True) as server:
        run(story(server.endpoint))
