"""What the node's proxy says about itself over HTTP, for the subcommands that show it: policies in effect or not.

The proxy counts how often it has brought the kernel to what the cluster says (`podwire_policy_generations_total`);
what the API had said before the last of them is in effect. It starts from 0 with the proxy. Rules outlive the proxy:
while it is away, policies are enforced as they last were, and changes are not.
"""

from __future__ import annotations

import argparse
import http.client
import json

import msgspec

METRICS, HEALTH = "127.0.0.1:10249", "127.0.0.1:10256"
_SECONDS = 2.0
_GENERATION, _FAILURES = "podwire_policy_generations_total", "podwire_policy_sync_failures_total"


class ProxyState(msgspec.Struct, frozen=True, kw_only=True):
    """`problem` is why nothing, or nothing good, is known; `updated` when the kernel was last brought up to date.

    `generation` is None where the proxy does not say.
    """

    answers: bool
    healthy: bool = False
    problem: str = ""
    mode: str = ""
    updated: str = ""
    generation: int | None = None
    failures: int = 0

    @property
    def policies(self) -> str:
        """Whether policies are in effect, in words."""
        if not self.answers:
            return "no change of a policy comes into effect; what an earlier proxy has left in the kernel stands"
        if not self.generation:
            return "policies are not in effect: networkPolicy is off, or the cluster's were not read yet"
        lag = "" if self.healthy else ", and a later change may not be"
        failed = f"; {self.failures} runs have failed" if self.failures else ""
        return f"policy generation {self.generation} is in effect{lag}{failed}"


def add_proxy(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the proxy answers."""
    for flag, default, what in (("--proxy-metrics", METRICS, "metrics"), ("--proxy-health", HEALTH, "health")):
        parser.add_argument(
            flag, default=default, metavar="ADDRESS:PORT", help=f"where the proxy serves its {what} (%(default)s)"
        )


def ask_proxy(metrics: str = METRICS, health: str = HEALTH) -> ProxyState:
    """What it says now. Never raises: a proxy that is away is an answer."""
    try:
        _, numbers = _get(metrics, "/metrics")
        _, mode = _get(metrics, "/proxyMode")
    except (OSError, http.client.HTTPException) as error:
        return ProxyState(answers=False, problem=f"no proxy answers on {metrics}: {error}")
    said = _numbers(numbers)
    generation = said.get(_GENERATION)
    state = ProxyState(
        answers=True,
        mode=mode,
        generation=None if generation is None else int(generation),
        failures=int(said.get(_FAILURES, 0)),
    )
    try:
        code, body = _get(health, "/healthz")
        told = json.loads(body)
        reason, updated = str(told.get("reason") or ""), str(told.get("lastUpdated") or "")
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        return msgspec.structs.replace(state, problem=f"its health page on {health} does not answer: {error}")
    return msgspec.structs.replace(state, healthy=code == http.HTTPStatus.OK, problem=reason, updated=updated)


def _get(place: str, path: str) -> tuple[int, str]:
    host, _, port = place.rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=_SECONDS)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace")
    finally:
        connection.close()


def _numbers(text: str) -> dict[str, float]:
    """The samples without labels of the exposition format."""
    found: dict[str, float] = {}
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        if name in (_GENERATION, _FAILURES):
            found[name] = float(value)
    return found
