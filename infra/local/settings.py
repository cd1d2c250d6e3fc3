"""Where the stack keeps its files, and which addresses its services have."""

import hashlib
import ipaddress
import json
import os
import shutil
import socket
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

LOOPBACK = "127.0.0.1"
ROOT = Path(__file__).parents[2]
PACKAGES = {"postgres": "postgresql", "nginx": "nginx-light", "prometheus": "prometheus"}
"""Programs that pip can't install, and Debian's packages that have them."""

PORTS = (
    ("postgres", "mlflow", "scoring", "prometheus", "grafana"),
    ("s3_master", "s3_master_grpc", "s3_volume", "s3_volume_grpc", "s3_filer", "s3_filer_grpc", "s3", "s3_grpc"),
    ("ray", "ray_dashboard", "ray_client", "ray_dashboard_metrics"),
    *(tuple(f"{node}_{of}" for of in ("agent", "agent_grpc", "runtime_env", "metrics", "manager", "objects"))
      for node in ("head", "worker1", "worker2")),
)  # fmt: skip
"""Services in groups of ten ports, from the base on."""


class StackError(Exception):
    """Why the stack can't run, in a line."""


@dataclass(frozen=True)
class Settings:
    """The settings of the stack.

    Attributes:
        folder: Of all its files.
        host: The address that the proxy listens on; everything else listens on the loopback alone.
        port: The proxy's.
        base: The first of the other services' ports.
    """

    folder: Path
    host: str = LOOPBACK
    port: int = 8443
    base: int = 21_000

    @classmethod
    def read(cls, folder: Path) -> "Settings":
        """Those of the last start.

        Raises:
            StackError: If there was none.
        """
        try:
            return cls(folder, **json.loads((folder / "settings.json").read_text()))
        except FileNotFoundError as error:
            raise StackError(f"there is no stack in {folder}; start one with `make up`") from error

    def write(self) -> None:
        """Keeps them for the other commands."""
        kept = {name: value for name, value in asdict(self).items() if name != "folder"}
        (self.folder / "settings.json").write_text(json.dumps(kept))

    @property
    def ports(self) -> dict[str, int]:
        """The port of each service but the proxy."""
        return {name: self.base + 10 * ten + one for ten, group in enumerate(PORTS) for one, name in enumerate(group)}

    def address(self, service: str) -> str:
        """Where a service listens."""
        return f"{LOOPBACK}:{self.ports[service]}"

    @property
    def names(self) -> list[str]:
        """Names and addresses of the proxy, those of its certificate."""
        own = [] if self.is_open else [self.host]
        if not is_loopback(self.host):
            own.append(socket.gethostname())
        return list(dict.fromkeys(["localhost", LOOPBACK, *own]))

    @property
    def url(self) -> str:
        """The one address of everything."""
        if is_loopback(self.host):
            return f"https://localhost:{self.port}"
        return f"https://{socket.gethostname()}:{self.port}" if self.is_open else f"https://{self.listen}"

    @property
    def is_open(self) -> bool:
        """Whether the proxy listens on all addresses of the machine."""
        return self.host in ("0.0.0.0", "::")

    @property
    def listen(self) -> str:
        """Where the proxy listens."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def sockets(self) -> Path:
        """A folder for sockets, whose paths may not be long: private, and named by the stack's folder."""
        digest = hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]
        return Path(tempfile.gettempdir()) / f"sprue-{digest}"

    def make_folders(self) -> None:
        """Makes those that the services need; others can't look in, but a root's Postgres and proxy can pass.

        Raises:
            StackError: If the folder of the sockets belongs to somebody else.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        passable = 0o711 if os.geteuid() == 0 else 0o700
        self.folder.chmod(passable)
        for name in ("log", "tls", "s3", "prometheus"):
            (self.folder / name).mkdir(mode=0o700, exist_ok=True)
        for name in ("conf", "work"):  # of the proxy's logins and of bodies on their way
            (self.folder / name).mkdir(exist_ok=True)
            (self.folder / name).chmod(passable)
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        if self.sockets.is_symlink() or self.sockets.stat().st_uid != os.geteuid():
            raise StackError(f"{self.sockets} belongs to another user")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def program(name: str) -> str:
    """The path of a program; Debian keeps Postgres' out of the way.

    Raises:
        StackError: If it is not installed.
    """
    found = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: int(path.parts[4]))
    path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin:/sbin")
    if path is None and not found:
        raise StackError(f"{name} is not installed")
    return path or str(found[-1])


def require_programs() -> None:
    """Looks for all programs at once.

    Raises:
        StackError: If some are missing; it names the packages.
    """
    missing = []
    for name, package in PACKAGES.items():
        try:
            program(name)
        except StackError:
            missing.append(package)
    if missing:
        raise StackError(f"programs are missing; on Debian: apt-get install {' '.join(missing)}")


def require_free_ports(settings: Settings) -> None:
    """Looks whether somebody listens already where the stack is to listen.

    Raises:
        StackError: If so.
    """
    taken = []
    for host, port in [(settings.host, settings.port), *((LOOPBACK, port) for port in settings.ports.values())]:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
            except OSError:
                taken.append(f"{host}:{port}")
    if taken:
        raise StackError(f"others listen on {', '.join(taken)}; choose ports with PORT= (the proxy's) and BASE=")
