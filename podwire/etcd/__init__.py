"""etcd for Podwire: one session over several endpoints, on grpc.aio and the stubs of etcd-sdk-python.

session      EtcdSession: what is used
connection   endpoints, fail-over, deadlines, errors; line, tls and login are parts of it
history      whether the store is still the one that was known (pure)
watch lease  the two things that outlive a connection
records      items, events, the vocabulary of transactions (pure)
wire         protobuf, and the only import of `pyetcd`
"""

from podwire.backoff import Backoff, Clock, SystemClock
from podwire.etcd.connection import Observer
from podwire.etcd.errors import AuthFailed, Compacted, EtcdError, EtcdUnavailable, SessionClosed
from podwire.etcd.lease import Lease
from podwire.etcd.options import EtcdOptions
from podwire.etcd.session import EtcdSession

__all__ = [
    "AuthFailed",
    "Backoff",
    "Clock",
    "Compacted",
    "EtcdError",
    "EtcdOptions",
    "EtcdSession",
    "EtcdUnavailable",
    "Lease",
    "Observer",
    "SessionClosed",
    "SystemClock",
]
