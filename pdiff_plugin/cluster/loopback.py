"""A Ray that this machine has for itself: whoever reaches its ports may run code, so nothing outside reaches them."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray._private import ray_constants

# Loopback's name on Linux and on macOS. Gloo and NCCL look for an interface by themselves unless told.
_NAMES = {"lo", "lo0"}


@contextmanager
def on_loopback() -> Iterator[None]:
    """What starts inside listens on the loopback interface alone; Ray 2.59 and later ask who comes there for a token.

    Ray listens on all interfaces unless a node's address is 127.0.0.1, for which it puts another one of the machine
    even where it is asked for that; except where it makes no clusters of several machines, as on Windows and macOS.
    """
    variables = {ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR: "0"}
    for name in _NAMES & {name for _, name in socket.if_nameindex()}:
        variables |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    before = {name: os.environ.get(name) for name in variables}
    could_join = ray_constants.ENABLE_RAY_CLUSTER
    os.environ.update(variables)  # for the processes that Ray starts
    ray_constants.ENABLE_RAY_CLUSTER = False  # for this one, which has read them
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = could_join
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def is_loopback(node: dict[str, Any]) -> bool:
    """Whether a node of Ray can be reached from its own machine only."""
    return ipaddress.ip_address(node["NodeManagerAddress"]).is_loopback
