"""`podwire-ipamd`: puts the daemon's parts together and runs them until SIGTERM.

Start: settings ─▶ lock ─▶ journal ─▶ addresses of the boot before ─▶ restore ─▶ replay queued DELs ─▶ socket ─▶ join,
converge, reap, reconcile.
The socket opens before the cluster is joined: an ADD gets "try again later" with the reason, which says more than a
refused connection, and DELs are done.

Stop (SIGTERM, SIGINT): no new calls, those in flight are finished, the name is given back to etcd. The kernel's state
stays as it is, and so pods keep talking.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sqlite3
import sys
from collections.abc import Sequence
from pathlib import Path

import podwire
from ipam_daemon import health, settings
from ipam_daemon.agent import Agent
from ipam_daemon.attachments import Attachments
from ipam_daemon.delqueue import DelQueue
from ipam_daemon.held import HeldFile, HeldKeeper
from ipam_daemon.identity import boot_id, node_id, take_lock
from ipam_daemon.inspection import Inspection
from ipam_daemon.journal import Journal
from ipam_daemon.metrics import Metrics
from ipam_daemon.netlink import NetlinkThread
from ipam_daemon.reconcile import Reconciler
from ipam_daemon.registry import EtcdRegistry
from ipam_daemon.server import AgentService, CniService, make_server
from ipam_daemon.settings import Settings
from ipam_daemon.status import Status
from ipam_daemon.wires import Wires
from podwire import logs
from podwire.errors import PodwireError
from podwire.etcd.session import EtcdSession

_GRACE = 60.0  # seconds for calls in flight at SIGTERM

log = logging.getLogger("ipam_daemon.main")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the daemon. Returns 0 after SIGTERM, 1 when it could not start or could not go on, 2 for wrong usage."""
    parser = argparse.ArgumentParser(prog="podwire-ipamd", description="The Podwire daemon of one node.")
    parser.add_argument("--config", type=Path, default=Path("/etc/podwire/ipamd.yaml"), help="default: %(default)s")
    parser.add_argument("--node", default="", help="this node's name; default: the configuration's, or the host name")
    parser.add_argument("--version", action="version", version=f"podwire-ipamd {podwire.__version__}")
    arguments = parser.parse_args(argv)
    try:
        chosen = settings.read(arguments.config, arguments.node)
        logs.configure(chosen.log_level)
        asyncio.run(_run(chosen))
    except (PodwireError, OSError, sqlite3.Error, BaseExceptionGroup) as error:
        for each in _leaves(error):
            if not isinstance(each, PodwireError | OSError | sqlite3.Error):
                raise
            print(f"podwire-ipamd: {each}", file=sys.stderr)
        return 1
    return 0


async def _run(chosen: Settings) -> None:
    run_dir, state_dir = Path(chosen.run_dir), Path(chosen.state_dir)
    for directory in (run_dir, state_dir, chosen.queue_dir):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    take_lock(run_dir)
    boot = boot_id()
    async with contextlib.AsyncExitStack() as stack:
        metrics = Metrics()
        journal = Journal(run_dir / "journal.db", boot)
        stack.callback(journal.close)
        thread = NetlinkThread()
        stack.push_async_callback(thread.close)
        wires = Wires(thread)
        attachments = Attachments(
            journal=journal, wires=wires, thread=thread, metrics=metrics, cooldown=chosen.cooldown
        )
        session = EtcdSession(chosen.etcd, observer=metrics)
        stack.push_async_callback(session.close)
        registry = EtcdRegistry(session)
        agent = Agent(
            settings=chosen,
            node_id=node_id(state_dir),
            registry=registry,
            journal=journal,
            attachments=attachments,
            thread=thread,
            wires=wires,
            metrics=metrics,
        )
        keeper = HeldKeeper(HeldFile(state_dir / "held.json"), journal, attachments, chosen.cooldown)
        keeper.recall()
        await agent.restore()
        queue = DelQueue(chosen.queue_dir, attachments, metrics, boot)
        await queue.replay()
        reconciler = Reconciler(journal, attachments, metrics)
        status = Status(chosen, agent, attachments, session, journal, metrics, queue)
        inspection = Inspection(
            agent=agent,
            attachments=attachments,
            journal=journal,
            thread=thread,
            wires=wires,
            session=session,
            reconciler=reconciler,
            queue=queue,
            metrics=metrics,
        )
        service = CniService(attachments, metrics, agent.not_ready)
        server = make_server(chosen.socket_path, service, AgentService(status.message, journal, inspection.run))
        await server.start()
        if chosen.http_listen:
            app = health.make_app(agent.not_ready, status.refresh_metrics, metrics)
            runner = await health.serve(app, chosen.http_listen)
            stack.push_async_callback(runner.cleanup)
        stopped = _stop_event()
        try:
            async with asyncio.TaskGroup() as tasks:
                work = [
                    tasks.create_task(agent.follow_registry()),
                    tasks.create_task(agent.hold_name()),
                    tasks.create_task(agent.hold_blocks()),
                    tasks.create_task(agent.converge_forever()),
                    tasks.create_task(agent.keeper.run_forever()),
                    tasks.create_task(attachments.reap_forever()),
                    tasks.create_task(queue.replay_forever()),
                    tasks.create_task(keeper.keep_forever()),
                    tasks.create_task(reconciler.run_forever(chosen.reconcile_interval)),
                ]
                log.info("started", extra={"fields": {"node": chosen.node, "socket": str(chosen.socket_path)}})
                await stopped.wait()
                for task in work:
                    task.cancel()
        finally:
            await server.stop(_GRACE)
            await service.drain()
            with contextlib.suppress(OSError):
                await keeper.write()
            with contextlib.suppress(PodwireError):
                await registry.leave()
    log.info("stopped")


def _stop_event() -> asyncio.Event:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    return stopped


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for each in error.exceptions for leaf in _leaves(each)]


if __name__ == "__main__":
    sys.exit(main())
