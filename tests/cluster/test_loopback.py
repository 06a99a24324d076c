"""A Ray that is started for one command is this machine's alone."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import sys
from pathlib import Path

import pytest

from pdiff_plugin import DiffusionConfig, FitConfig
from pdiff_plugin.cluster import connection
from pdiff_plugin.cluster.loopback import on_loopback

_spec = importlib.util.spec_from_file_location("processes", Path(__file__).with_name("processes.py"))
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)

LONG = FitConfig(diffusion=DiffusionConfig(width=16, num_blocks=1, max_steps=100_000, patience=100_000))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/net")
def test_no_port_of_a_fit_on_several_workers_is_open_to_other_machines(make_store, tmp_path):
    driver = processes.FitProcess(make_store().path, tmp_path / "fit", LONG.to_json(), num_workers=2)
    seen = set()

    def is_under_way() -> bool:
        seen.update(processes.listening({driver.process.pid, *processes.descendants(driver.process.pid)}))
        return any(report[1] == "diffusion" and report[2] > 500 for report in driver.reports)

    try:
        driver.wait_until(is_under_way, "step 500 of the diffusion")
    finally:
        driver.kill()

    assert len(seen) > 5, "Ray's own ports, at least"
    assert {address for address, _ in seen if not ipaddress.ip_address(address).is_loopback} == set()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/net")
def test_a_port_that_is_open_to_other_machines_would_be_seen():
    for host in ("0.0.0.0", "127.0.0.1"):
        with socket.create_server((host, 0)) as server:
            assert (host, server.getsockname()[1]) in processes.listening([os.getpid()])


def test_what_keeps_ray_to_this_machine_ends_with_it(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.setattr(
        connection.ray._private.worker, "_global_node", None
    )  # other tests' Ray would answer for itself
    before = dict(os.environ)

    with on_loopback():
        assert os.environ["GLOO_SOCKET_IFNAME"] != "eth7"
        assert connection.ray.util.get_node_ip_address() == "127.0.0.1"

    assert dict(os.environ) == before


def test_a_ray_that_is_open_to_other_machines_is_told(monkeypatch, caplog):
    nodes = {"a": {"NodeManagerAddress": "127.0.0.1"}, "b": {"NodeManagerAddress": "192.0.2.2"}}
    monkeypatch.setattr(connection, "alive_nodes", lambda: nodes)

    connection._tell_what_is_open()

    (told,) = caplog.messages
    assert "listens at 192.0.2.2, where other machines may reach it and run code" in told


def test_of_what_a_node_reports_the_first_line_is_told_and_once(caplog, capsys):
    module = connection.ray._private.worker
    lost = {"lines": ["Raylet is terminated. Last 20 lines:\n" + "    worker_pool.cc:564\n" * 20], "pid": "raylet"}
    printing = module.print_to_stdstream

    with connection._short_messages():
        for _ in range(2):
            module.print_to_stdstream({**lost, "is_err": False}, ignore_prefix=False)

    assert caplog.messages == ["Ray says: Raylet is terminated. Last 20 lines:"]
    assert capsys.readouterr().out == ""
    assert module.print_to_stdstream is printing
