"""A local stack of the benchmark's own, on a disk of its own, whose clients reach the object store through a proxy."""

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "infra/local"))

import stack  # noqa: E402
from settings import LOOPBACK, Settings  # noqa: E402

DISK_MIB = 3000
PROXY_PORT = 71
"""Of `S3Proxy`, from the stack's first port on; the last of them is that of the stack's proxy, 70."""

NGINX = """
worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log error;
events {{ worker_connections 512; }}
http {{
  access_log off; client_max_body_size 0; proxy_request_buffering off; proxy_buffering off; proxy_http_version 1.1;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  limit_req_zone $server_name zone=slow:1m rate=4r/s;
  split_clients $request_id $refused {{ {refused} * 0; }}
  server {{
    listen 127.0.0.1:{listen};
    error_page 418 = @busy;
    location / {{
      {slow}
      if ($refused) {{ return 418; }}
      proxy_pass http://127.0.0.1:{store}; proxy_set_header Host $http_host; proxy_read_timeout 300s;
    }}
    location @busy {{
      default_type application/xml;
      return 503 "<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your rate</Message></Error>";
    }}
  }}
}}
"""


@dataclass
class S3Proxy:
    """nginx between the stack and its object store, which refuses or slows requests on demand."""

    folder: Path
    listen: int
    store: int

    @property
    def pid(self) -> int | None:
        """Of its first process, if it runs."""
        file = self.folder / "nginx.pid"
        found = int(file.read_text()) if file.exists() else 0
        return found if found and Path(f"/proc/{found}").exists() else None

    def configure(self, refused: str = "", slow: bool = False) -> None:
        """Takes effect with the next request.

        Args:
            refused: Part of the requests that get status 503, such as ``50%``; none if empty.
            slow: Whether requests go through one every quarter of a second, at 100 kB/s.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        words = "limit_req zone=slow burst=1000; limit_rate 100k;" if slow else ""
        text = NGINX.format(
            folder=self.folder,
            listen=self.listen,
            store=self.store,
            slow=words,
            refused=f"{refused} 1;" if refused else "",
        )
        (self.folder / "nginx.conf").write_text(text)
        if self.pid:
            os.kill(self.pid, signal.SIGHUP)  # it reads the file again
        else:
            command = ["nginx", "-c", f"{self.folder}/nginx.conf", "-e", f"{self.folder}/error.log"]
            subprocess.run(command, check=True)

    def stop(self) -> None:
        """Ends it."""
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)


def address(settings: Settings, service: str) -> str:
    """Where a service listens, as its clients see it: the object store is behind `S3Proxy`."""
    port = settings.base + PROXY_PORT if service == "s3" else settings.ports[service]
    return f"{LOOPBACK}:{port}"


Settings.address = address  # type: ignore[method-assign]


class Plant:
    """The stack, up, on a disk of `DISK_MIB`.

    Attributes:
        folder: Of all its files, where the disk is mounted.
        client: The variables of its ``client.env``.
    """

    def __init__(self, folder: Path, base: int) -> None:
        """Starts nothing; lets this process's children, the stack's services among them, find this checkout's code."""
        self.folder, self.base, self.client = folder, base, dict[str, str]()
        self.settings = Settings(folder, port=base + 70, base=base)
        self.s3 = S3Proxy(Path(f"{folder}-s3"), base + PROXY_PORT, self.settings.ports["s3"])
        self.cache = f"{folder}-cache"
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        os.environ |= {"PATH": path, "PYTHONPATH": f"{ROOT}/platform:{ROOT}/models", "SPRUE_COMMIT": "0" * 40,
                       "SPRUE_CACHE": self.cache, "OMP_NUM_THREADS": "1"}  # fmt: skip

    def up(self) -> None:
        """Makes the disk and starts everything.

        Raises:
            StackError: If the stack does not start.
        """
        self.folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        if not self.folder.is_mount():
            disk = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m,mode=711", "none", str(self.folder)]
            subprocess.run(disk, check=True)
        self.s3.configure()
        try:
            stack.up(self.settings)
        except BaseException:
            self.s3.stop()
            raise
        lines = (self.folder / "client.env").read_text().splitlines()
        self.client = dict(line.removeprefix("export ").replace("'", "").split("=", 1) for line in lines)

    def down(self) -> None:
        """Ends everything, and deletes it."""
        stack.down(self.settings)
        self.s3.stop()
        subprocess.run(["umount", "--lazy", str(self.folder)], check=False)
        for folder in (self.folder, self.cache, self.s3.folder):
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def url(self) -> str:
        """The stack's address."""
        return self.settings.url

    @property
    def sockets(self) -> Path:
        """Where Ray's logs are."""
        return self.settings.sockets

    def wait_until_well(self, patience_s: float) -> tuple[float | None, str]:
        """Waits until ``status`` says that all is well: seconds, None if it never is; and what it says then."""
        started = time.monotonic()
        while True:
            with contextlib.redirect_stdout(io.StringIO()) as said:
                well = stack.status(self.settings)
            taken = time.monotonic() - started
            if well:
                return taken, ""
            if taken > patience_s:
                lines = [" ".join(line.split()) for line in said.getvalue().splitlines()[1:]]
                return None, "; ".join(line for line in lines if "NOT WELL" in line or " running " not in line)
            time.sleep(1)

    def shell(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command as a user of this machine does who has read client.env."""
        return subprocess.run(
            command, cwd=ROOT, env=os.environ | self.client, capture_output=True, text=True, timeout=600
        )

    def secret(self, name: str) -> str:
        """A password of the stack."""
        return str(json.loads((self.folder / "secrets.json").read_text())[name])

    def tree(self) -> list[psutil.Process]:
        """All processes of the supervisor's."""
        supervisor = psutil.Process(int((self.folder / "supervisord.pid").read_text()))
        return supervisor.children(recursive=True)

    def main(self, service: str) -> psutil.Process | None:
        """The process that supervisord has started for a service, if it runs."""
        found = self.supervisorctl("pid", service).strip()
        return psutil.Process(int(found)) if found.isdecimal() and int(found) else None

    def supervisorctl(self, *words: str) -> str:
        """Asks the supervisor."""
        command = ["supervisorctl", "-c", str(self.folder / "conf/supervisord.conf"), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout

    def find(self, title: str, under: str | None = None) -> list[psutil.Process]:
        """Processes with these words in their command line, of one service or of all."""
        root = self.main(under) if under else None
        among = self.tree() if under is None else root.children(recursive=True) if root else []
        found = []
        for process in among:
            try:
                if title in shlex.join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue
        return found
