"""Addresses of both kinds: where their lines are, and what is none."""

from __future__ import annotations

import pytest

from manifold.kernel.effects import Plane
from manifold.kernel.errors import PeerError
from manifold.kernel.hyperbus import endpoints
from manifold.kernel.hyperbus.endpoints import Tcp, Where


@pytest.mark.parametrize(
    ("address", "control"),
    [
        ("tcp://10.77.0.1:7070/rpi4-01", Tcp("10.77.0.1", 7070)),
        ("ipc:///run/x/rpi4-01", "/run/x/rpi4-01.c"),
    ],
)
def test_an_address_has_its_two_lines_next_to_each_other(address: str, control: Where) -> None:
    assert endpoints.of(address, Plane.CONTROL, tcp=True) == control
    data = endpoints.of(address, Plane.DATA, tcp=True)
    assert data == (Tcp("10.77.0.1", 7071) if isinstance(control, Tcp) else control[:-1] + "a")


@pytest.mark.parametrize(
    "address",
    ["tcp://10.77.0.1:7070", "tcp://10.77.0.1:0/a", "tcp://10.77.0.1:65535/a", "tcp://a:1/a",
     "tcp://10.77.0.256:7070/a", "tcp://10.77.0.1:7070/a/b", "tcp://10.77.0.1:7070/", "tcp:",
     "tcp://10.77.0.1:7070/a\n", "tcp://\u0661.1.1.1:7070/a", "http://10.77.0.1:7070/a"],
)  # fmt: skip
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(PeerError, match="is not an address"):
        endpoints.of(address, Plane.CONTROL, tcp=True)


def test_tcp_is_refused_outside_a_network_of_our_own() -> None:
    with pytest.raises(PeerError, match="Until frames are sealed"):
        endpoints.of("tcp://127.0.0.1:7070/a", Plane.CONTROL, tcp=False)
