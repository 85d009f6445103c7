"""The ranks' collectives, and where they meet."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch.multiprocessing
from comm_ranks import VALUES, rank_main

from vitgraft.configs.errors import TrainingError
from vitgraft.trainer import comm
from vitgraft.trainer.rendezvous import listen


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_values_of_any_size_reach_who_needs_them_and_none_is_unpickled(tmp_path: Path) -> None:
    torch.multiprocessing.start_processes(rank_main, (3, free_port(), str(tmp_path)), nprocs=3, start_method="spawn")  # type: ignore[no-untyped-call]
    seen = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    assert [ranks["gather"] for ranks in seen] == [VALUES] * 3
    assert [ranks["gather_to_first"] for ranks in seen] == [VALUES, None, None]
    assert [ranks["from_first"] for ranks in seen] == [VALUES[1]] * 3


def test_without_a_group_a_value_stays_what_it_is() -> None:
    value = {"a": (1, 2)}
    assert comm.gather(value) == comm.gather_to_first(value) == [value]
    assert comm.from_first(value) is value


def test_no_collective_of_objects_is_called() -> None:
    """torch's are pickles, and run what is in them."""
    package, objects = Path(comm.__file__).parents[1], re.compile(r"(gather|broadcast|scatter|send|recv)_object")
    folders = ("configs", "data_shards", "launch", "models", "trainer")
    sources = [path for folder in folders for path in (package / folder).rglob("*.py")]
    assert len(sources) > 100
    assert [path for path in sources if objects.search(path.read_text())] == []


@pytest.mark.parametrize(
    ("address", "several_hosts", "bound"),
    [
        ("127.0.0.1", False, "127.0.0.1"),
        # Given as such it is meant, though nobody else will come.
        ("127.0.0.1", True, "127.0.0.1"),
        ("::1", False, "::1"),
        ("localhost", False, "127.0.0.1"),
        # A host's own name often means its loopback in /etc/hosts, where others do not find it.
        ("localhost", True, "::"),
        # Of no host here: behind a router, say.
        ("192.0.2.1", True, "::"),
    ],
)
def test_the_store_listens_where_the_others_look_for_it(
    address: str, several_hosts: bool, bound: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def of_ipv4(host: str, *arguments: Any, **options: Any) -> Any:
        return resolve("127.0.0.1" if host == "localhost" else host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", of_ipv4)
    with listen(address, free_port(), several_hosts=several_hosts) as listener:
        assert listener.getsockname()[0] in (bound, "0.0.0.0" if bound == "::" else bound)


def test_a_port_that_was_taken_meanwhile_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            TrainingError, match=rf"cannot listen at 127\.0\.0\.1:{port}: .*in use.*launch\.port"
        ) as error:
            listen("127.0.0.1", port, several_hosts=False)
    assert error.value.cause == "lost_peers"
