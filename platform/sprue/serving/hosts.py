"""Which addresses the service listens on, and under which names it answers.

A web page can point its own name to a loopback or plant address (DNS rebinding), and have a browser there send requests
to the service. Their ``Host`` is that name, so requests under names that are not the service's are refused.
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import ray
from ray._common.network_utils import build_address
from ray.serve._private import replica
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sprue.serving.errors import error_response

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
IDENTIFIERS = {"X-Request-Id": "invalid_request_id", "X-Station": "invalid_station"}
"""Headers that name a request and its station, and the error where they are not fit for a log or a table."""
IDENTIFIER = re.compile(r"[\w.:/+=@-]{1,128}", re.ASCII)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address to listen on.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen_on_node_address() -> None:
    """Has the replica that this process becomes listen on its node's address alone.

    Ray Serve binds a replica's own server, which takes pickles, to all addresses of the machine, also where the node is
    the loopback's. It offers no setting.
    """
    bind, address = replica.add_port_to_grpc_server, build_address(ray.util.get_node_ip_address(), 0)
    replica.add_port_to_grpc_server = lambda server, _: bind(server, address)


@dataclass(frozen=True)
class AllowedHosts:
    """Names under which the service answers.

    Attributes:
        names: In lower case, without ports.
        addresses: Whether it answers under every IP address: no name points there, and none can be made to.
    """

    names: frozenset[str]
    addresses: bool

    @classmethod
    def of(cls, host: str, others: Sequence[str] = ()) -> "AllowedHosts":
        """The loopback's names, the address to listen on, and others; for all addresses, those and the machine's name.

        >>> sorted(AllowedHosts.of("10.0.0.7", ["Line1.Plant:8000"]).names)
        ['10.0.0.7', '127.0.0.1', '::1', 'line1.plant', 'localhost']
        """
        everywhere = host in ("0.0.0.0", "::")
        own = socket.gethostname() if everywhere else host
        return cls(LOOPBACK | {_name(each) for each in (own, *others)}, everywhere)

    def allow(self, header: str) -> bool:
        """Whether a ``Host`` header is one of them.

        >>> hosts = AllowedHosts.of("127.0.0.1")
        >>> hosts.allow("localhost:8000"), hosts.allow("[::1]:8000"), hosts.allow("evil.example")
        (True, True, False)
        """
        name = _name(header)
        return name in self.names or (self.addresses and _is_address(name))


def _name(host: str) -> str:
    """A host's name or address in the form that is compared, without its port."""
    name = host.lower()
    if name.count(":") == 1 or name.startswith("["):
        name = re.sub(r":\d*$", "", name)
    name = name.strip("[]").removesuffix(".")
    return str(ipaddress.ip_address(name)) if _is_address(name) else name


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


class HeaderGuard:
    """Refuses requests under other names, and those whose identifiers are not fit for a log."""

    def __init__(self, app: ASGIApp, allowed: Callable[[], AllowedHosts]) -> None:
        """Wraps an application; the names are asked for at each request."""
        self._app, self._allowed = app, allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        answer = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        await (answer or self._app)(scope, receive, send)

    def _refusal(self, headers: Headers) -> Response | None:
        if not self._allowed().allow(headers.get("host", "")):
            message = "the service does not answer under this Host; `sprue serve --allowed-host NAME` makes it"
            return error_response(HTTPStatus.MISDIRECTED_REQUEST, "foreign_host", message)
        for name, code in IDENTIFIERS.items():
            if not all(IDENTIFIER.fullmatch(each) for each in headers.getlist(name)):
                message = f"{name} has more than 128 characters, or others than letters, digits and _.:/+=@-"
                return error_response(HTTPStatus.BAD_REQUEST, code, message)
        return None
