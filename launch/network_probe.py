"""One host's side of measuring the network: listening, connecting, sending, and an all-reduce with the others."""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import socket
import struct
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

_SIOCGIFADDR = 0x8915
_BLOCK = bytes(1 << 20)
_MAX_SENT = 256 << 20
_REDUCED = 1 << 20


def login_address(environment: Mapping[str, str]) -> str | None:
    """Return the address of this host in this ssh login; ``None``: there is none, or it is the loopback."""
    login = environment.get("SSH_CONNECTION", "").split()
    return login[2] if len(login) == 4 and not _is_loopback(login[2]) else None


def own_address(environment: Mapping[str, str]) -> str | None:
    """Return the address at which others reach this host: that of this login, else that of the default route;
    ``None``: neither."""
    if (address := login_address(environment)) is not None:
        return address
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing; an address kept for documentation (RFC 5737)
        return str(probe.getsockname()[0])
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def interface_of(address: str) -> str | None:
    """Return the network interface with this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


class NetworkProbe:
    """Listener that counts received bytes, and client of other hosts' listeners."""

    def __init__(self) -> None:
        self._listener: socket.socket | None = None

    def listen(self, port: int = 0) -> dict[str, Any]:
        """Open the listener; returns its ``port`` (0: any free one).

        Raises:
            OSError: the port is in use.
        """
        self.close()
        self._listener = _server(port)
        threading.Thread(target=_serve, args=(self._listener,), daemon=True).start()
        return {"port": self._listener.getsockname()[1]}

    def close(self) -> dict[str, Any]:
        """Close the listener."""
        if self._listener is not None:
            # Closing alone does not wake a thread that waits in accept().
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        return {}

    def free_port(self) -> dict[str, Any]:
        """Return a free port."""
        with _server(0) as probe:
            return {"port": probe.getsockname()[1]}

    def reach(self, peers: dict[str, tuple[str, int]], timeout: float) -> dict[str, Any]:
        """Connect to every peer's listener; ``failed``: why, by the peers that could not be reached."""

        def attempt(peer: tuple[str, int]) -> str | None:
            try:
                socket.create_connection(peer, timeout=timeout).close()
            except OSError as error:
                return error.strerror or str(error)
            return None

        with ThreadPoolExecutor(max_workers=max(1, min(64, len(peers)))) as pool:
            results = dict(zip(peers, pool.map(lambda peer: attempt((peer[0], peer[1])), peers.values()), strict=True))
        return {"failed": {name: reason for name, reason in results.items() if reason is not None}}

    def send(self, address: str, port: int, seconds: float) -> dict[str, Any]:
        """Send to a listener for so long (at most 256 MiB); returns ``bytes_per_second`` that arrived."""
        with socket.create_connection((address, port), timeout=20) as connection:
            # What lies in a large buffer at the end would have to be waited for on a slow network.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
            start, sent = time.monotonic(), 0
            while time.monotonic() - start < seconds and sent < _MAX_SENT:
                sent += connection.send(_BLOCK)
            connection.shutdown(socket.SHUT_WR)
            arrived = struct.unpack("!q", connection.recv(8, socket.MSG_WAITALL))[0]
            return {"bytes_per_second": arrived / (time.monotonic() - start)}

    def all_reduce(self, rank: int, world: int, leader: str, port: int, own: str, timeout: float) -> dict[str, Any]:
        """Add up 4 MiB over all hosts by gloo, as the trainer's ranks would meet; returns the ``seconds`` it took.

        Raises:
            RuntimeError, OSError, TrainingError: they did not come together within ``timeout`` seconds, the port is
                taken, or the sum is wrong.
        """
        from datetime import timedelta

        import torch
        import torch.distributed as dist

        from vitgraft.trainer.rendezvous import open_store

        interface = interface_of(own)
        if interface is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        patience = timedelta(seconds=timeout)
        store = open_store((leader, port), rank, world, patience, several_hosts=True)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=patience)
        try:
            took = []
            for _ in range(3):
                values = torch.full((_REDUCED,), float(rank + 1))
                dist.barrier()
                start = time.monotonic()
                dist.all_reduce(values)
                took.append(time.monotonic() - start)
                if not bool((values == world * (world + 1) / 2).all()):
                    raise RuntimeError("the sum over the hosts is wrong")
            dist.barrier()
        finally:
            dist.destroy_process_group()
        return {"seconds": min(took), "interface": os.environ.get("GLOO_SOCKET_IFNAME")}


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _serve(listener: socket.socket) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return  # closed
        threading.Thread(target=_count, args=(connection,), daemon=True).start()


def _count(connection: socket.socket) -> None:
    total = 0
    with connection, contextlib.suppress(OSError):
        connection.settimeout(30)
        while block := connection.recv(1 << 20):
            total += len(block)
        connection.sendall(struct.pack("!q", total))
