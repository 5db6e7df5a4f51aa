"""nft's listings, read back: as nft 1.0.6 prints them."""

from __future__ import annotations

from pathlib import Path

from kube_proxy_lite.render.nftables_listing import TableListing, parse_table

LISTING = Path(__file__).parent.parent / "golden" / "nft-listing.txt"


def test_a_table() -> None:
    listing = parse_table(LISTING.read_text())
    assert listing.sets == {
        "cluster_ips": {"10.96.0.1": "", "10.96.0.2": "", "10.96.0.3": ""},
        "pods": {"10.244.0.0/16": ""},
        "services": {
            "10.96.0.1 . 6 . 80": "goto lb_tcp_3",
            "10.96.0.2 . 6 . 80": "drop",
            "10.96.0.3 . 17 . 53": "goto refuse",
        },
        "affinity": {
            "10.0.0.9 . 10.96.0.1 . 6 . 80": "10.244.1.3 . 8080",
            "10.0.0.8 . 10.96.0.1 . 6 . 80": "10.244.1.4 . 8080",
        },
        "learners": {},
    }
    assert listing.chains == {
        "prerouting": ("ip daddr . meta l4proto . th dport vmap @services", "goto unknown"),
        "unknown": (),
        "shape": ('counter packets 0 bytes 0 comment "sets=12 rules=34"',),
    }
    assert listing.hooks == {"prerouting": "type nat hook prerouting priority dstnat; policy accept;"}
    assert listing.mark == "sets=12 rules=34"


def test_an_empty_table_has_no_mark() -> None:
    assert parse_table("table ip podwire_proxy {\n}\n") == TableListing()
    assert TableListing().mark == ""
