"""The cache: fetched once, whole or not at all, within its bounds, whoever dies."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from http_folder import HttpFolder

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.schema.data import CacheConfig
from vitgraft.data_shards import cache as cache_module
from vitgraft.data_shards import remote
from vitgraft.data_shards.cache import FileCache, RemoteFile
from vitgraft.data_shards.remote import UnreachableError
from vitgraft.data_shards.sources import open_cache

SIZE = 10_000


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HttpFolder]:
    """Ten files of 10,000 bytes, each another."""
    folder = tmp_path / "served"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.tar").write_bytes(
            hashlib.sha256(bytes([number])).digest() * (SIZE // 32) + bytes(SIZE % 32)
        )
    with HttpFolder(folder) as running:
        yield running


def file_of(server: HttpFolder, number: int) -> RemoteFile:
    data = (server.folder / f"{number}.tar").read_bytes()
    return RemoteFile(f"{server.url}/{number}.tar", f"{number}.tar", len(data), hashlib.sha256(data).hexdigest())


def read(cache: FileCache, file: RemoteFile) -> bytes:
    with cache.opened(file) as descriptor:
        return os.pread(descriptor, file.bytes + 1, 0)


def held(cache: FileCache) -> int:
    return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_a_file_is_fetched_once_and_kept_by_its_hash(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    file = file_of(server, 3)
    for _ in range(3):
        assert read(pickle.loads(pickle.dumps(cache)), file) == (server.folder / "3.tar").read_bytes()
    assert server.requests == {"3.tar": 1}
    assert sorted(path.name for path in cache.folder.iterdir()) == [f"{file.sha256}.tar", "lock"]


def test_least_recently_used_files_go_first(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 3 * SIZE)
    for number in (0, 1, 2, 0, 3, 0, 4):
        read(cache, file_of(server, number))
        time.sleep(0.01)
        assert held(cache) <= 3 * SIZE
    there = {path.stem for path in cache.folder.glob("*.tar")}
    assert there == {file_of(server, number).sha256 for number in (0, 3, 4)}
    assert server.requests["0.tar"] == 1


def test_a_file_that_is_being_read_is_never_evicted(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 2 * SIZE)
    first = file_of(server, 0)
    with cache.opened(first) as descriptor:
        for number in range(1, 6):
            read(cache, file_of(server, number))
        assert (cache.folder / f"{first.sha256}.tar").exists()
        assert os.pread(descriptor, SIZE, 0) == (server.folder / "0.tar").read_bytes()
    read(cache, file_of(server, 6))
    read(cache, file_of(server, 7))
    assert not (cache.folder / f"{first.sha256}.tar").exists()


def test_no_room_while_all_is_being_read(server: HttpFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "WAIT_SECONDS", 0.3)
    cache = FileCache(tmp_path / "cache", SIZE)
    with (
        cache.opened(file_of(server, 0)),
        pytest.raises(UnreachableError, match=r"no room for 10000 bytes .* raise it"),
    ):
        read(cache, file_of(server, 1))
    assert read(cache, file_of(server, 1))
    with pytest.raises(ConfigError, match=r"10000 bytes, but data\.cache\.max_bytes is 9999; raise it"):
        read(FileCache(tmp_path / "small", SIZE - 1), file_of(server, 2))


FETCH = """
import sys, time
from pathlib import Path
from vitgraft.data_shards import remote
from vitgraft.data_shards.cache import FileCache, RemoteFile
import os
folder, most, start, *rows = sys.argv[1:]
cache = FileCache(Path(folder), int(most))
time.sleep(max(0.0, float(start) - time.time()))
for row in rows:
    url, size, digest = row.split(",")
    with cache.opened(RemoteFile(url, url[-5:], int(size), digest)) as descriptor:
        data = os.pread(descriptor, int(size) + 1, 0)
    import hashlib
    assert hashlib.sha256(data).hexdigest() == digest
    import fcntl
    held = {}
    # While nobody makes room, or the listing would mix before and after; a file renamed meanwhile is listed twice.
    with open(folder + "/lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in os.scandir(folder):
            try:
                held[entry.inode()] = entry.stat().st_size
            except FileNotFoundError:
                pass
    print(sum(held.values()), flush=True)
"""


def start(cache: FileCache, files: list[RemoteFile], at: float) -> subprocess.Popen[str]:
    rows = [f"{file.url},{file.bytes},{file.sha256}" for file in files]
    command = [sys.executable, "-c", FETCH, str(cache.folder), str(cache.max_bytes), str(at), *rows]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(processes: list[subprocess.Popen[str]]) -> list[int]:
    sizes = []
    for process in processes:
        out, problems = process.communicate(timeout=60)
        assert process.returncode == 0, problems
        sizes += [int(line) for line in out.split()]
    return sizes


@pytest.mark.slow
def test_many_processes_fetch_each_file_once(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 10 * SIZE)
    files = [file_of(server, number) for number in range(6)]
    server.faults["2.tar"] = ["500", "cut"]
    at = time.time() + 2
    # Each in another order, so that everybody waits for somebody.
    finish([start(cache, files[n:] + files[:n], at) for n in range(6)])
    assert {name: count for name, count in server.requests.items() if name != "2.tar"} == {
        f"{number}.tar": 1 for number in range(6) if number != 2
    }
    assert server.requests["2.tar"] == 3
    assert list(cache.folder.glob("*.part")) == []


@pytest.mark.slow
def test_many_processes_stay_within_the_bounds(server: HttpFolder, tmp_path: Path) -> None:
    """Four readers of ten files, room for three."""
    cache = FileCache(tmp_path / "cache", 3 * SIZE)
    files = [file_of(server, number) for number in range(10)]
    at = time.time() + 2
    sizes = finish([start(cache, files[2 * n :] + files[: 2 * n], at) for n in range(4)])
    assert len(sizes) == 40
    assert max(sizes) <= 3 * SIZE


@pytest.mark.slow
def test_who_is_killed_while_fetching_leaves_nothing_in_the_way(
    server: HttpFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 20.0)
    cache = FileCache(tmp_path / "cache", 2 * SIZE)
    file, other = file_of(server, 0), file_of(server, 1)
    server.faults["0.tar"] = ["stall"]
    server.faults["1.tar"] = ["stall"]
    processes = [start(cache, [item], 0) for item in (file, other)]
    deadline = time.monotonic() + 30
    while server.requests.total() < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert held(cache) == 2 * SIZE
    # Two are being fetched and take all the room: one more waits.
    waiting = threading.Thread(target=read, args=(cache, file_of(server, 2)))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.wait()
    waiting.join(20)
    assert not waiting.is_alive()
    assert read(cache, file) == (server.folder / "0.tar").read_bytes()
    assert server.requests["0.tar"] == 2
    assert read(cache, file_of(server, 3))
    assert list(cache.folder.glob("*.part")) == []


def test_a_copy_that_was_cut_is_fetched_again(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 4 * SIZE)
    file = file_of(server, 0)
    read(cache, file)
    os.truncate(cache.folder / f"{file.sha256}.tar", 5000)
    assert len(read(cache, file)) == SIZE
    assert server.requests["0.tar"] == 2


def test_a_copy_that_rotted_is_found_by_its_hash(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 4 * SIZE)
    file = file_of(server, 0)
    whole = read(cache, file)
    assert not cache.recheck(file)
    with (cache.folder / f"{file.sha256}.tar").open("r+b") as stream:
        stream.write(b"rot")
    assert cache.recheck(file)
    assert read(cache, file) == whole
    assert server.requests["0.tar"] == 2


@pytest.mark.parametrize("suffix", ["tar", "idx"])
def test_a_rotted_shard_is_read_after_it_was_fetched_again(
    packed: dict[str, Path], tmp_path: Path, suffix: str
) -> None:
    from vitgraft.data_shards.manifest import read_manifest
    from vitgraft.data_shards.stream import ShardReader

    cache = FileCache(tmp_path / "cache", 64 << 20)
    with HttpFolder(packed["video"]) as server:
        reader = ShardReader(server.url, read_manifest(server.url), cache)
        expected = reader.read(4)
        info = reader.manifest.shards[0]
        name, size = (info.sha256, info.bytes) if suffix == "tar" else (info.index_sha256, info.index_bytes)
        with (cache.folder / f"{name}.{suffix}").open("r+b") as stream:
            stream.write(bytes(size))
        # Another process, which has not read the index yet.
        assert pickle.loads(pickle.dumps(reader)).read(4) == expected
        assert server.requests[f"shard-000000.{suffix}"] == 2


def test_prefetch_does_not_wait_for_who_is_fetching(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 4 * SIZE)
    file = file_of(server, 0)
    cache.folder.mkdir()
    part = os.open(cache.folder / f"{file.sha256}.tar.part", os.O_RDWR | os.O_CREAT)
    fcntl.flock(part, fcntl.LOCK_EX)
    cache.prefetch(file)
    assert server.requests == {}
    os.close(part)
    cache.prefetch(file)
    cache.prefetch(file)
    assert server.requests == {"0.tar": 1}
    read(cache, file)
    assert server.requests == {"0.tar": 1}


def test_a_full_disk_is_one_line(server: HttpFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FileCache(tmp_path / "cache", 4 * SIZE)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(remote.os, "write", full)
        with pytest.raises(UnreachableError, match=r"cache: disk full; free some space, set data\.cache"):
            read(cache, file_of(server, 0))
    assert list(cache.folder.glob("*.part")) == []
    assert server.requests["0.tar"] == 1
    read(cache, file_of(server, 0))


def test_a_folder_that_cannot_be_made(server: HttpFolder, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnreachableError, match=r"file/cache: Not a directory; set data\.cache\.folder"):
        read(FileCache(tmp_path / "file" / "cache", SIZE), file_of(server, 0))


@pytest.mark.parametrize("name", ["{}.tar.part", "{}.tar.bad", "{}.tar", "lock"])
@pytest.mark.parametrize("planted", ["link", "dangling", "fifo"])
def test_what_is_planted_in_the_folder_is_neither_followed_nor_waited_for(
    server: HttpFolder, tmp_path: Path, name: str, planted: str
) -> None:
    cache = FileCache(tmp_path / "cache", 4 * SIZE)
    cache.folder.mkdir()
    file = file_of(server, 0)
    target, path = tmp_path / "precious", cache.folder / name.format(file.sha256)
    target.write_text("mine")
    if planted == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to(target if planted == "link" else tmp_path / "new")
    assert read(cache, file) == (server.folder / "0.tar").read_bytes()
    # The note on a damaged file goes to its own name too.
    server.faults["1.tar"] = ["flip"] * 3
    bad = cache.folder / f"{file_of(server, 1).sha256}.tar.bad"
    bad.symlink_to(target)
    with pytest.raises(DataError, match="damaged each of 3 times"):
        read(cache, file_of(server, 1))
    assert not bad.is_symlink()
    assert target.read_text() == "mine"
    assert not (tmp_path / "new").exists()


def test_a_part_that_is_a_second_name_of_a_file_is_not_written_to(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 4 * SIZE)
    cache.folder.mkdir()
    file, precious = file_of(server, 0), tmp_path / "precious"
    precious.write_text("mine")
    os.link(precious, cache.folder / f"{file.sha256}.tar.part")
    assert len(read(cache, file)) == SIZE
    assert precious.read_text() == "mine"


@pytest.mark.parametrize("shared", ["folder", "file"])
def test_what_others_could_have_put_here_is_hashed_at_its_first_use(
    server: HttpFolder, tmp_path: Path, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of the right name and size with other bytes."""
    cache = FileCache(tmp_path / "cache", 4 * SIZE)
    cache.folder.mkdir(mode=0o700)
    file = file_of(server, 0)
    path = cache.folder / f"{file.sha256}.tar"
    path.write_bytes(bytes(SIZE))
    path.chmod(0o666 if shared == "file" else 0o600)
    cache.folder.chmod(0o777 if shared == "folder" else 0o700)
    assert read(cache, file) == (server.folder / "0.tar").read_bytes()
    assert server.requests == {"0.tar": 1}
    hashed: list[int] = []
    original = cache_module.sha256_descriptor
    monkeypatch.setattr(cache_module, "sha256_descriptor", lambda d: hashed.append(d) or original(d))
    for _ in range(3):
        read(cache, file)
    # Made by this process now: what is its own, in a folder of its own, is not hashed again.
    assert len(hashed) == (1 if shared == "folder" else 0)
    read(pickle.loads(pickle.dumps(cache)), file)
    assert len(hashed) == (2 if shared == "folder" else 0)


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("name", ["{}.tar.part", "{}.tar", "lock"])
def test_nobody_waits_without_end_for_a_lock(
    server: HttpFolder, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache_module, "LOCK_SECONDS", 0.3)
    monkeypatch.setattr(cache_module, "SILENT_SECONDS", 0.6)
    monkeypatch.setattr(cache_module, "TELL_SECONDS", 0.1)
    cache = FileCache(tmp_path / "cache", 4 * SIZE)
    cache.folder.mkdir()
    file = file_of(server, 0)
    path = cache.folder / name.format(file.sha256)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        holder.stdout.readline()
        with pytest.raises(UnreachableError, match=rf"locked by process {holder.pid} \(\S+\)") as caught:
            read(cache, file)
        assert "\n" not in str(caught.value)
        if name.endswith("part"):
            assert f"waiting for process {holder.pid}" in caplog.text
    finally:
        holder.kill()
        holder.wait()
        assert holder.stdout is not None
        holder.stdout.close()
    assert read(cache, file) == (server.folder / "0.tar").read_bytes()


def test_foreign_files_in_the_folder_are_left_alone(server: HttpFolder, tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", SIZE)
    cache.folder.mkdir()
    (cache.folder / "mine.tar").write_bytes(bytes(SIZE))
    for number in range(3):
        read(cache, file_of(server, number))
    assert (cache.folder / "mine.tar").exists()


def test_where_the_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VITGRAFT_CACHE", str(tmp_path))
    assert open_cache(CacheConfig()).folder == tmp_path / "shards"
    monkeypatch.delenv("VITGRAFT_CACHE")
    monkeypatch.setenv("HOME", "/somewhere")
    assert open_cache(CacheConfig()).folder == Path("/somewhere/.cache/vitgraft/shards")
    chosen = open_cache(CacheConfig(folder="~/mine", max_bytes=7))
    assert (chosen.folder, chosen.max_bytes) == (Path("/somewhere/mine"), 7)
