"""The kubeconfig with which kubectl, or anything that reads one, finds a lab's API server."""

from __future__ import annotations

import yaml


def kubeconfig(server_url: str, context: str) -> str:
    """YAML text. `context` also names the cluster and the user, who needs no credentials."""
    return yaml.safe_dump(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": context, "cluster": {"server": server_url}}],
            "users": [{"name": context, "user": {}}],
            "contexts": [{"name": context, "context": {"cluster": context, "user": context, "namespace": "default"}}],
            "current-context": context,
        },
        sort_keys=False,
    )
