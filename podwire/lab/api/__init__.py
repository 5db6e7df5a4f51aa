"""The lab's built-in Kubernetes API server: enough of the API for Podwire's daemons and for a kubectl, and no more.

    HTTP ──▶ server ──▶ store ──▶ log ──▶ watch ──▶ HTTP, or the lab's own scheduler and kubelet in the same process
              │           │
        paths, table   admission, patch, selectors, kinds            (pure: objects in, objects out)

Objects are plain dicts as JSON decodes them. Nothing is written to disk: a lab's state lives as long as its process.
There is no authentication, no quota, no conversion between versions, and admission checks only what would otherwise
fail later and further from its cause.
"""
