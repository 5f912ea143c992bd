"""Real servers for tests: started on a free port of loopback, killed, stopped, gone on."""

import http.client
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

START_S = 30.0
MOTO = "import sys; from moto.server import main; main(['-H', '127.0.0.1', '-p', sys.argv[1]])"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Server:
    """One process that listens on a port; the same port again after `start`. A context manager."""

    def __init__(self, command: Callable[[int], list[str]], port: int | None = None) -> None:
        self.port = port or free_port()
        self._command = command
        try:
            self.start()
        except BaseException:
            self.kill()
            raise

    def start(self) -> None:
        self.process = subprocess.Popen(
            self._command(self.port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        end = time.monotonic() + START_S
        while True:
            with suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            assert self.process.poll() is None and time.monotonic() < end, "it did not start"
            time.sleep(0.01)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def pause(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


class Redis(Server):
    """A Redis or Valkey server without persistence; `arguments` go to its command line."""

    def __init__(self, program: str, *arguments: str, port: int | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        fixed = ["--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        fixed += ["--dir", self.folder.name, *arguments]
        super().__init__(lambda port: [program, "--port", str(port), *fixed], port)

    def client(self, **options):
        """A plain client of the package `valkey`."""
        import valkey

        return valkey.Valkey(port=self.port, socket_timeout=30, **options)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.folder.cleanup()


class Moto(Server):
    """moto's S3, with the bucket "blocks"."""

    def __init__(self) -> None:
        super().__init__(lambda port: [sys.executable, "-c", MOTO, str(port)])
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        super().start()
        assert self.request("PUT", "/blocks")[0] == 200

    def store(self, prefix: str):
        """A plain store of the package `obstore`."""
        from obstore.store import S3Store

        return S3Store(
            "blocks",
            prefix=prefix,
            endpoint=self.endpoint,
            region="us-east-1",
            access_key_id="id",
            secret_access_key="key",
            client_options={"allow_http": True},
        )

    def request(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def cluster(program: str, nodes: int, folder: Path) -> list[Redis]:
    """Start nodes of one cluster, the hash slots shared out among them; wait until they agree."""
    started = []
    for number in range(nodes):
        name = str(folder / f"nodes-{number}.conf")
        bus = str(free_port())
        arguments = ["--cluster-enabled", "yes", "--cluster-config-file", name]
        started.append(Redis(program, *arguments, "--cluster-port", bus))
    clients = [node.client() for node in started]
    try:
        step = 16384 // nodes
        for number, client in enumerate(clients):
            last = 16383 if number == nodes - 1 else (number + 1) * step - 1
            client.execute_command("CLUSTER", "ADDSLOTSRANGE", number * step, last)
            client.execute_command("CONFIG", "SET", "cluster-require-full-coverage", "no")
        for node, client in zip(started, clients, strict=True):
            bus = client.config_get("cluster-port")["cluster-port"]
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        end = time.monotonic() + START_S
        while any(client.cluster("INFO")["cluster_state"] != "ok" for client in clients):
            assert time.monotonic() < end, "the nodes do not agree"
            time.sleep(0.02)
    finally:
        for client in clients:
            client.close()
    return started
