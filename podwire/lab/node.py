"""A node: its mount namespace, what Podwire installs on it, and its daemon.

The mount namespace belongs to a holder, a `sleep` that does nothing else. In it, what libcni, containerd and Podwire
keep at fixed paths are the node's own folders; /sys shows the node's own devices; everything else is the machine's,
as it is. It is a slave: a namespace made later under /run/netns shows up in it, and no mount of it gets out.

The holder is the one thing that a node needs to be entered; the daemon comes and goes.
"""

from __future__ import annotations

import ipaddress
import shlex
import signal
import sys
from pathlib import Path

import yaml

from podwire import install as installation
from podwire.errors import PodwireError
from podwire.lab import certificates, names, process
from podwire.lab.process import Process
from podwire.lab.state import LabState, NodeState

METRICS_PORT = 9817
PYTHON = (sys.executable,)
_DEBIAN_PLUGINS = Path("/usr/lib/cni")
_HOLDER_SECONDS = 60
_END_SECONDS = 60
_READY_SECONDS = 120  # a daemon needs two; a machine that stalls makes it many

# /sys is per network namespace from when it is mounted; the control groups below it are the machine's and stay.
# br_netfilter starts with its global hooks on in a new namespace: a test that leaves them on does not see whether
# the bridge's own are set.
_HOLDER = """\
set -e
mkdir -p {scratch}
mount --rbind /sys/fs/cgroup {scratch}
mount -t sysfs sysfs /sys
mount --rbind {scratch} /sys/fs/cgroup
umount -l {scratch}
rmdir {scratch}
{binds}
for hook in /proc/sys/net/bridge/bridge-nf-call-iptables /proc/sys/net/bridge/bridge-nf-call-ip6tables; do
  test ! -e $hook || echo 0 > $hook
done
touch {ready}
exec sleep infinity
"""


def holder_role(node: str) -> str:
    """The role of the process that holds the node's mount namespace."""
    return f"holder-{node}"


def daemon_role(node: str) -> str:
    """The role of the node's daemon."""
    return f"ipamd-{node}"


def start_holder(state: LabState, node: NodeState) -> None:
    """Starts the node's holder; `wait_holder` says when the node can be entered."""
    files = state.files
    for folder in names.NODE_FOLDERS:
        files.node_path(node.name, folder).mkdir(parents=True)
    binds = "\n".join(
        f"mkdir -p {folder}; mount --bind {shlex.quote(str(files.node_path(node.name, folder)))} {folder}"
        for folder in names.NODE_FOLDERS
    )
    own = files.node_folder(node.name)
    script = _HOLDER.format(scratch=own / "cgroup", binds=binds, ready=own / "ready")
    enter = ["nsenter", f"--net={state.netns(node.name)}", "unshare", "--mount", "--propagation", "slave"]
    process.start(files, holder_role(node.name), [*enter, "sh", "-c", script])


def wait_holder(state: LabState, node: NodeState) -> None:
    """Waits until the node can be entered. Raises PodwireError with the holder's log when it cannot be."""
    files = state.files
    ready = files.node_folder(node.name) / "ready"
    role = holder_role(node.name)

    def is_ready() -> bool:
        if ready.exists():
            return True
        holder = process.recorded(files, role)
        if holder is None or not holder.alive:
            raise PodwireError(f"the mount namespace of {node.name} was not made:{process.last_lines(files.log(role))}")
        return False

    process.wait_for(is_ready, _HOLDER_SECONDS, f"the mount namespace of {node.name}")


def enter_command(state: LabState, node: str, netns: Path | None = None) -> list[str]:
    """The words before a command that runs on the node, or on it in another network namespace (a pod's)."""
    holder = process.recorded(state.files, holder_role(node))
    if holder is None or not holder.alive:
        raise PodwireError(f"node {node} of lab {state.name} is down: its namespace's holder does not run")
    return ["nsenter", f"--net={netns or state.netns(node)}", f"--mount=/proc/{holder.pid}/ns/mnt", "--"]


# --- the daemon -------------------------------------------------------------------------------------------------


def daemon_config(state: LabState, node: NodeState) -> dict[str, object]:
    """The daemon's configuration. Paths are the machine's, so that they are the same from every mount namespace."""
    files = state.files
    papers = certificates.client(certificates.node_folder(state, node)) if state.etcd_tls else {}
    return {
        "node": node.name,
        "nodeAddresses": list(node.addresses),
        "etcd": {"endpoints": list(state.etcd_endpoints)} | papers,
        "pools": [{"cidr": cidr, "blockSize": block_size(cidr)} for cidr in state.pod_cidrs],
        "backend": {"type": state.backend},
        "runDir": str(files.node_path(node.name, "/run/podwire")),
        "stateDir": str(files.node_path(node.name, "/var/lib/podwire")),
        "httpListen": f"{'[::]' if ':' in node.addresses[0] else '0.0.0.0'}:{METRICS_PORT}",
        "networkPolicy": state.proxy != "none",
    }


def block_size(pod_cidr: str) -> int:
    """The prefix length of the nodes' blocks: 24 or 64, or less of a pool that has no room for several such."""
    pool = ipaddress.ip_network(pod_cidr)
    return max({4: 24, 6: 64}[pool.version], min(pool.prefixlen + 4, pool.max_prefixlen - 3))


def install(state: LabState, node: NodeState) -> None:
    """Lays the node's CNI executable, network configuration and daemon configuration down."""
    files = state.files
    cni_bin_dir = files.node_path(node.name, "/opt/cni/bin")
    config = files.node_path(node.name, "/etc/podwire") / "ipamd.yaml"
    if state.etcd_tls:
        certificates.give(state, node)
    config.write_text(yaml.safe_dump(daemon_config(state, node), sort_keys=False))
    loopback = _DEBIAN_PLUGINS / "loopback"
    if loopback.exists():  # containerd asks for it by name
        (cni_bin_dir / "loopback").symlink_to(loopback)
    installation.install(
        cni_bin_dir=cni_bin_dir,
        cni_conf_dir=files.node_path(node.name, "/etc/cni/net.d"),
        socket=files.ipamd_socket(node.name),
        queue_dir=files.node_path(node.name, "/var/lib/podwire") / "del-queue",
    )


def start_daemon(state: LabState, node: str) -> Process:
    """Starts the node's daemon; whether it is ready is asked of its socket. Raises PodwireError when it runs."""
    running = process.recorded(state.files, daemon_role(node))
    if running is not None and running.alive:
        raise PodwireError(f"the daemon of {node} runs already, as process {running.pid}")
    config = state.files.node_path(node, "/etc/podwire") / "ipamd.yaml"
    command = [*PYTHON, "-m", "ipam_daemon.main", "--config", str(config)]
    return process.start(state.files, daemon_role(node), [*enter_command(state, node), *command])


def stop_daemon(state: LabState, node: str, seconds: float = _END_SECONDS) -> None:
    """Ends the node's daemon as an upgrade does, by SIGTERM, and waits. Raises PodwireError when it does not go."""
    _end_daemon(state, node, signal.SIGTERM, seconds)


def kill_daemon(state: LabState, node: str, seconds: float = _END_SECONDS) -> None:
    """Ends the node's daemon as a crash does, by SIGKILL, and waits."""
    _end_daemon(state, node, signal.SIGKILL, seconds)


def _end_daemon(state: LabState, node: str, with_signal: int, seconds: float) -> None:
    running = process.recorded(state.files, daemon_role(node))
    if running is None:
        return
    running.kill(with_signal)
    if not running.wait_gone(seconds):
        raise PodwireError(f"the daemon of {node} (process {running.pid}) is still there after {seconds:.0f} s")


def wait_daemon(state: LabState, node: str, seconds: float = _READY_SECONDS) -> None:
    """Waits until the node's daemon says that an ADD can succeed. Raises PodwireError with its reasons and its log."""
    from podwire.lab.agent import daemon_status

    files = state.files
    role = daemon_role(node)
    reasons = "it does not answer"

    def is_ready() -> bool:
        nonlocal reasons
        running = process.recorded(files, role)
        if running is None or not running.alive:
            raise PodwireError(f"the daemon of {node} has ended:{process.last_lines(files.log(role))}")
        status = daemon_status(files.ipamd_socket(node))
        if status is None:
            return False
        reasons = ", ".join(status.reasons) or "it gives no reason"
        return status.ready

    try:
        process.wait_for(is_ready, seconds, f"the daemon of {node}")
    except PodwireError as error:
        raise PodwireError(f"{error} ({reasons}):{process.last_lines(files.log(role))}") from error
