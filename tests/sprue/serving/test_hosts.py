"""A service answers under its own names alone."""

import socket

import pytest

from sprue.serving.hosts import AllowedHosts


@pytest.mark.parametrize(
    ("host", "others", "allowed", "refused"),
    [
        ("127.0.0.1", [], ["127.0.0.1:8000", "LOCALHOST", "localhost.:80", "[::1]:8000"], ["10.0.0.7", "plant", ""]),
        ("10.0.0.7", ["line1.plant"], ["10.0.0.7", "Line1.Plant:8000", "localhost"], ["10.0.0.8", "xline1.plant"]),
        ("0.0.0.0", [], ["10.0.0.7:8000", "[fe80::1]:80", socket.gethostname()], ["evil.example", "10.0.0.7.example"]),
        ("::", ["line1.plant"], ["10.0.0.7", "line1.plant"], ["line1.plant.evil.example"]),
    ],
)
def test_which_names_are_the_services(host: str, others: list[str], allowed: list[str], refused: list[str]) -> None:
    hosts = AllowedHosts.of(host, others)
    assert all(hosts.allow(header) for header in allowed)
    assert not any(hosts.allow(header) for header in refused)
