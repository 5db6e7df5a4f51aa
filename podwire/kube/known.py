"""What the consumer has been told: the resourceVersion of each key, and nothing more of the object.

It is there for the difference that a list makes to what is known, after the thread of a watch was lost:

    begin ──▶ listed(key, version) …  True: new or changed, tell it ──▶ finish: keys that the list did not have are gone

A list that is begun again forgets which keys it has seen, not what was told. Resource versions of one kind are numbers
that grow (Kubernetes guarantees it since 1.35, and etcd's revisions always did); one that goes back means that the
store was restored or replaced. Then equal versions may stand for different objects, and `forget` has all told anew.

The cost: two strings of which the key is shared with the consumer's own, about 200 bytes an object.
"""

from __future__ import annotations

from podwire.kube.kinds import Key


class Known:
    """Keys and versions of one kind. `version` is where a watch carries on; empty: nowhere, a list is needed.
    `reached` is the newest that there ever was."""

    def __init__(self) -> None:
        self.version = ""
        self.reached = ""
        self._versions: dict[Key, str] = {}
        self._listing: set[Key] | None = None

    def __len__(self) -> int:
        return len(self._versions)

    def __contains__(self, key: object) -> bool:
        return key in self._versions

    @property
    def listing(self) -> bool:
        """True between `begin` and `finish`."""
        return self._listing is not None

    def begin(self) -> None:
        """A list begins, or begins again."""
        self._listing = set()

    def written(self, key: Key, version: str) -> bool:
        """The key is there in this version. Whether that is news."""
        if self._listing is not None:
            self._listing.add(key)
        if version and self._versions.get(key) == version:
            return False
        self._versions[key] = version
        return True

    def broken(self, key: Key) -> None:
        """The key is there and cannot be understood: what was told of it stays, and any next version is news. So is
        its end, lest it be reported for ever."""
        if self._listing is not None:
            self._listing.add(key)
        self._versions[key] = ""

    def gone(self, key: Key) -> bool:
        """The key is not there any more. Whether that is news."""
        if self._listing is not None:
            self._listing.discard(key)
        return self._versions.pop(key, None) is not None

    def finish(self, version: str) -> tuple[Key, ...]:
        """The list is complete, as of `version`: the keys that were known and are not in it."""
        assert self._listing is not None, "begin comes first"
        vanished = tuple(key for key in self._versions if key not in self._listing)
        for key in vanished:
            del self._versions[key]
        self._listing = None
        self.advance(version)
        return vanished

    def advance(self, version: str) -> None:
        """Everything up to `version` is known."""
        self.version = self.reached = version

    def goes_back(self, version: str) -> bool:
        """Whether `version` is before the newest that ever was reached: another history."""
        return is_before(version, self.reached)

    def forget(self) -> None:
        """Every object is news again, whatever its version; what vanished is still found at `finish`."""
        self._versions = dict.fromkeys(self._versions, "")
        self.version = self.reached = ""


def is_before(version: str, other: str) -> bool:
    """Whether a resourceVersion is older than another; False when they are no numbers and cannot be compared."""
    return version.isascii() and version.isdigit() and other.isascii() and other.isdigit() and int(version) < int(other)
