"""Reading a packed data set over a real HTTP server, a hostile one too; what may be skipped and what may not."""

from __future__ import annotations

import errno
import io
import json
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from http_folder import HttpFolder
from PIL import Image

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.schema import DataConfig
from vitgraft.configs.schema.data import SkipConfig
from vitgraft.data_shards import prefetch, remote
from vitgraft.data_shards.batch import Entry, Skipped
from vitgraft.data_shards.cache import FileCache
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.loader import eval_batches, train_batches
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.plan import MicroBatch, micro_batches
from vitgraft.data_shards.prefetch import Prefetcher
from vitgraft.data_shards.remote import UnreachableError, is_url, join, read_small, shown
from vitgraft.data_shards.stream import ShardReader
from vitgraft.trainer.skips import SkipLog, read_skipped

Configure = Callable[..., DataConfig]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 0.01)
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.5)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def served(packed: dict[str, Path], tmp_path: Path) -> Iterator[HttpFolder]:
    folder = Path(shutil.copytree(packed["detection"], tmp_path / "set"))
    with HttpFolder(folder) as server:
        yield server


def reader_of(server: HttpFolder, tmp_path: Path) -> ShardReader:
    return ShardReader(server.url, read_manifest(server.url), FileCache(tmp_path / "cache", 64 << 20))


def test_urls() -> None:
    assert [is_url(path) for path in ("s3://b/x", "memory://x", "http://h/x", "file:///x")] == [True] * 4
    plain = ("data/set", "/data/set", "digits:video/val", "c:/x", Path("s3://b"))
    assert [is_url(path) for path in plain] == [False] * 5
    assert join("s3://b/set/", "a.tar") == "s3://b/set/a.tar"
    assert join("https://h/set?sig=1", "a.tar") == "https://h/set/a.tar?sig=1"
    assert shown("https://me:secret@h:8/set/a.tar?sig=1") == "https://h:8/set/a.tar"


def test_every_sample_over_http_equals_the_local_one(
    served: HttpFolder, packed: dict[str, Path], tmp_path: Path
) -> None:
    reader = reader_of(served, tmp_path)
    local = ShardReader(packed["detection"], read_manifest(packed["detection"]))
    for sample in (21, 0, 9, 10, *range(22)):
        assert reader.read(sample).members == local.read(sample).members
    assert reader.read(3).where == f"{served.url}/shard-000000.tar:000000003"
    assert {name: count for name, count in served.requests.items() if count > 1} == {}
    assert local.remote is False


def test_file_and_memory_urls(packed: dict[str, Path], tmp_path: Path) -> None:
    import fsspec

    folder = packed["video"]
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe_file(f"/remote-test/{path.name}", path.read_bytes())
    local = ShardReader(folder, read_manifest(folder))
    for url in (f"file://{folder}", "memory://remote-test"):
        reader = ShardReader(url, read_manifest(url), FileCache(tmp_path / url[:4], 64 << 20))
        assert reader.read(20).members == local.read(20).members
    memory.rm("/remote-test", recursive=True)


def test_a_first_read_in_the_middle_fetches_one_shard(served: HttpFolder, tmp_path: Path) -> None:
    """Resume: nothing before the cursor is touched."""
    reader_of(served, tmp_path).read(15)
    assert dict(served.requests) == {"manifest.json": 1, "shard-000001.idx": 1, "shard-000001.tar": 1}


@pytest.mark.parametrize(
    "faults",
    [["500", "503"], ["cut"], ["stall"], ["short"], ["long"], ["endless"], ["flip"], ["500", "flip", "cut", "short"]],
    ids="-".join,
)
def test_one_fault_is_got_over(served: HttpFolder, tmp_path: Path, faults: list[str], packed: dict[str, Path]) -> None:
    served.faults["shard-000001.tar"] = list(faults)
    local = ShardReader(packed["detection"], read_manifest(packed["detection"]))
    assert reader_of(served, tmp_path).read(12).members == local.read(12).members
    assert served.requests["shard-000001.tar"] == len(faults) + 1
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".idx", ".tar"]


@pytest.mark.parametrize("name", ["shard-000000.tar", "shard-000000.idx"])
@pytest.mark.parametrize("fault", ["flip", "short"])
def test_damage_that_stays_is_one_line_and_is_not_fetched_for_ever(
    served: HttpFolder, tmp_path: Path, fault: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if fault == "flip" and name.endswith("idx"):
        pytest.skip("the index has no byte 600")
    served.faults[name] = [fault] * 50
    reader = reader_of(served, tmp_path)
    for sample in (0, 5):
        with pytest.raises(DataError, match=rf"{name}: damaged each of 3 times .* expected \d+ with") as caught:
            reader.read(sample)
        assert not isinstance(caught.value, UnreachableError)
    assert served.requests[name] == 3
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.name.endswith((".part", name[-3:]))] == []
    reader.read(12)
    # After a while it is tried again.
    monkeypatch.setattr("vitgraft.data_shards.cache.BAD_SECONDS", 0.0)
    served.faults[name] = []
    reader.read(0)


@pytest.mark.parametrize(
    ("fault", "message", "requests"),
    [
        ("500", r"cannot be fetched after 6 attempts \(HTTP status 500\); check the network", 6),
        ("403", r"refused \(HTTP status 403\); check the URL and your access", 1),
        ("stall", r"cannot be fetched after 6 attempts \(no answer for 0.2 s\)", 6),
        ("cut", "cannot be fetched after 6 attempts", 6),
    ],
)
def test_what_cannot_be_fetched_is_no_damage(
    served: HttpFolder, tmp_path: Path, fault: str, message: str, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "STALL_SECONDS", 0.2)
    reader = reader_of(served, tmp_path)
    served.faults["shard-000000.tar"] = [fault] * 50
    with pytest.raises(UnreachableError, match=message) as caught:
        reader.read(0)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3
    assert served.requests["shard-000000.tar"] == requests
    served.faults.clear()
    reader.read(0)


def test_a_missing_shard(served: HttpFolder, tmp_path: Path) -> None:
    reader = reader_of(served, tmp_path)
    (served.folder / "shard-000002.tar").unlink()
    with pytest.raises(UnreachableError, match=r"shard-000002\.tar: missing, though the manifest lists it"):
        reader.read(21)
    assert served.requests["shard-000002.tar"] == 1


def test_a_dripping_server_is_given_up(served: HttpFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    served.faults["shard-000000.tar"] = ["drip"] * 2
    started = time.monotonic()
    with pytest.raises(UnreachableError, match="slower than 256 KiB per second"):
        read_small(f"{served.url}/shard-000000.tar", 1000)
    assert time.monotonic() - started < 5


def test_memory_stays_bounded_by_an_endless_answer(served: HttpFolder, tmp_path: Path) -> None:
    served.faults["manifest.json"] = ["endless"]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"manifest\.json: larger than 1000 bytes"):
        read_small(f"{served.url}/manifest.json", 1000)
    served.faults["shard-000000.tar"] = ["endless", "long"]
    reader_of(served, tmp_path).read(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 24 << 10
    assert max(path.stat().st_size for path in (tmp_path / "cache").iterdir()) == (
        read_manifest(served.folder).shards[0].bytes
    )


def test_manifests_that_are_not_there_or_not_manifests(served: HttpFolder) -> None:
    (served.folder / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: manifest: Invalid JSON"):
        read_manifest(served.url)
    (served.folder / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"http://127.*: no manifest\.json"):
        read_manifest(served.url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://bucket/set", "nosuch://bucket/set/manifest.json: Protocol not known"),
        ("simplecache::http://h/set", "chained URLs"),
    ],
)
def test_urls_that_nothing_can_read(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_manifest(url) if is_url(url) else read_small(url, 10)


@pytest.mark.parametrize("scheme", sorted(remote._NO_FOLDERS))
def test_schemes_that_cannot_work_are_refused_at_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "FIRST_DELAY", 60.0)
    with pytest.raises(
        ConfigError, match=rf"^{scheme}://a/manifest.json: {scheme}:// names no folder of files; unpack"
    ):
        read_small(f"{scheme}://a/manifest.json", 10)


def test_a_client_that_cannot_be_made_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called, a wrong setting is no matter of the network."""
    monkeypatch.setattr(remote, "FIRST_DELAY", 60.0)
    monkeypatch.setattr(remote, "_NO_FOLDERS", frozenset())
    with pytest.raises(ConfigError, match=r"reference:// cannot be used \(TypeError: "):
        read_small("reference://a/manifest.json", 10)


def test_the_first_retry_is_told(served: HttpFolder, caplog: pytest.LogCaptureFixture) -> None:
    served.faults["manifest.json"] = ["503", "503"]
    assert read_manifest(served.url)
    told = f"{served.url}/manifest.json: HTTP status 503; trying again, 6 times in all"
    assert [record.getMessage() for record in caplog.records] == [told]
    caplog.clear()
    served.faults["manifest.json"] = ["stall"]
    assert read_manifest(served.url)
    assert "no answer for 0.5 s; trying again" in caplog.text


def test_secrets_in_urls_are_not_shown(served: HttpFolder) -> None:
    url = served.url.replace("http://", "http://me:hidden@") + "/nothing?sig=hidden"
    with pytest.raises(DataError) as caught:
        read_manifest(url)
    assert "hidden" not in str(caught.value)
    served.faults["manifest.json"] = ["500"] * 6
    with pytest.raises(DataError) as caught:
        read_manifest(served.url + "?sig=hidden")
    assert "hidden" not in str(caught.value)


def micros(dataset: PackedDataset, first: int, last: int, rank: int = 0, world: int = 1) -> Iterator[MicroBatch]:
    return micro_batches(
        dataset.plan,
        epoch_size=dataset.epoch_size,
        first_step=first,
        last_step=last,
        global_batch=8,
        accumulation=1,
        rank=rank,
        world=world,
    )


@pytest.mark.slow
def test_batches_over_http_in_worker_processes_equal_local_ones(
    served: HttpFolder, packed: dict[str, Path], configure: Configure, tmp_path: Path
) -> None:
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": 64 << 20}
    local = PackedDataset(packed["detection"], configure(packed["detection"]), "detection")
    expected = [batch.images for _, batch in train_batches(local, micros(local, 0, 3))]
    config = configure(packed["detection"], workers=2, prefetch=1, cache=cache)
    dataset = PackedDataset(served.url, config, "detection")
    found = [batch.images for _, batch in train_batches(dataset, micros(dataset, 0, 3))]
    assert all(map(torch.equal, expected, found))
    assert {name: count for name, count in served.requests.items() if count > 1} == {}


def fetched(server: HttpFolder) -> set[str]:
    return {name for name in server.requests if name.endswith(".tar")}


def has_fetched(server: HttpFolder, names: set[str]) -> bool:
    return fetched(server) >= names


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def test_the_next_shards_are_fetched_ahead(served: HttpFolder, configure: Configure, tmp_path: Path) -> None:
    """Before the first batch is worked on, those of the steps that follow too; each once."""
    config = configure(served.folder, cache={"folder": str(tmp_path / "cache")})
    dataset = PackedDataset(served.url, config, "detection")
    with Prefetcher(dataset.readers) as ahead:
        next(ahead.watch(micros(dataset, 0, 3)))
        wait_for(lambda: len(list((tmp_path / "cache").glob("*.tar"))) == 3)
    before = dict(served.requests)
    for sample in range(22):
        dataset.reader.read(sample)
    assert dict(served.requests) == before
    assert set(before.values()) == {1}


@pytest.fixture
def many(tmp_path: Path) -> Iterator[HttpFolder]:
    """Sixteen shards of eight images each."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    with DatasetWriter(tmp_path / "many", "image", ["a"], samples_per_shard=8) as writer:
        for number in range(128):
            writer.add({"png": picture.getvalue()}, {"label": 0, "file_name": str(number), "height": 8, "width": 8})
    with HttpFolder(tmp_path / "many") as server:
        yield server


def test_a_rank_fetches_the_shards_that_it_reads_and_no_others(
    many: HttpFolder, configure: Configure, tmp_path: Path
) -> None:
    def shards_of(micros: list[MicroBatch]) -> set[str]:
        return {f"shard-{entry.sample // 8:06d}.tar" for micro in micros for entry in micro.entries}

    everything = set()
    for rank in range(4):
        config = configure(many.folder, cache={"folder": str(tmp_path / f"host-{rank}")}, image_size=[8, 8])
        dataset = PackedDataset(many.url, config, "image")
        cut = list(micros(dataset, 0, 16, rank, 4))
        many.requests.clear()
        with Prefetcher(dataset.readers) as ahead:
            watched = ahead.watch(iter(cut))
            assert next(watched) == cut[0]
            # Those of the first batch may be left to its worker.
            later = shards_of(cut[1:])
            wait_for(partial(has_fetched, many, later))
            assert later <= fetched(many) <= shards_of(cut)
            assert list(watched) == cut[1:]
        everything |= shards_of(cut)
        assert len(shards_of(cut)) < 12
    assert len(everything) == 16


def test_the_fetcher_looks_a_bounded_number_of_entries_ahead(
    many: HttpFolder, configure: Configure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prefetch, "AHEAD", 4)
    config = configure(many.folder, cache={"folder": str(tmp_path / "cache")}, image_size=[8, 8])
    dataset = PackedDataset(many.url, config, "image")
    taken = []

    def source() -> Iterator[MicroBatch]:
        for micro in micros(dataset, 0, 16, 1, 4):
            taken.append(micro)
            yield micro

    with Prefetcher(dataset.readers) as ahead:
        watched = ahead.watch(source())
        for done in range(1, 14):
            assert next(watched) == taken[done - 1]
            # Two entries in each: four entries are two micro-batches.
            assert len(taken) == done + 2


def test_a_fetcher_that_fails_leaves_it_to_the_reader(many: HttpFolder, configure: Configure, tmp_path: Path) -> None:
    for number in range(16):
        (many.folder / f"shard-{number:06d}.tar").unlink()
    config = configure(many.folder, cache={"folder": str(tmp_path / "cache")}, image_size=[8, 8])
    dataset = PackedDataset(many.url, config, "image")
    with Prefetcher(dataset.readers) as ahead:
        assert len(list(ahead.watch(micros(dataset, 0, 4)))) == 4
    with pytest.raises(UnreachableError, match="missing, though the manifest lists it"):
        dataset.reader.read(0)


def test_two_blocks_of_shards_must_fit_into_the_cache(many: HttpFolder, configure: Configure, tmp_path: Path) -> None:
    """Here two blocks are all shards."""
    needed = sum(path.stat().st_size for path in many.folder.iterdir() if path.suffix in (".tar", ".idx"))
    cache = {"folder": str(tmp_path / "cache"), "max_bytes": needed}
    PackedDataset(many.url, configure(many.folder, cache=cache), "image")
    with pytest.raises(ConfigError, match=rf"may have {needed} bytes; raise it"):
        PackedDataset(many.url, configure(many.folder, cache=cache | {"max_bytes": needed - 1}), "image")


def test_a_cache_too_small_for_the_shuffle_is_refused(served: HttpFolder, configure: Configure, tmp_path: Path) -> None:
    config = configure(served.folder, cache={"folder": str(tmp_path / "cache"), "max_bytes": 1000})
    with pytest.raises(ConfigError, match=r"data\.cache\.max_bytes: 1000, but .* raise it"):
        PackedDataset(served.url, config, "detection")


def test_evaluation_does_not_count_an_outage_as_wrong_samples(
    served: HttpFolder, configure: Configure, tmp_path: Path
) -> None:
    config = configure(served.folder, cache={"folder": str(tmp_path / "cache")})
    dataset = PackedDataset(served.url, config, "detection", train=False)
    served.faults["shard-000000.tar"] = ["500"] * 6
    errors: list[Any] = []
    with pytest.raises(UnreachableError):
        list(eval_batches(dataset, range(4), 4, lambda *error: errors.append(error)))
    assert errors == []


# What is skipped.


@pytest.fixture
def damaged(packed: dict[str, Path], tmp_path: Path) -> Path:
    """Samples 3 and 17 of 22 hold broken images."""
    import numpy as np

    folder = Path(shutil.copytree(packed["semantic"], tmp_path / "damaged"))
    for sample in (3, 17):
        shard, local = divmod(sample, 10)
        index = np.fromfile(folder / f"shard-{shard:06d}.idx", dtype="<u8")
        with (folder / f"shard-{shard:06d}.tar").open("r+b") as stream:
            stream.seek(int(index[local]) + 512)
            stream.write(b"\0" * 400)
    return folder


@pytest.fixture
def broken_clip(packed: dict[str, Path], tmp_path: Path) -> Path:
    """Sample 3 of 22 is no video."""
    import numpy as np

    folder = Path(shutil.copytree(packed["video"], tmp_path / "video"))
    index = np.fromfile(folder / "shard-000000.idx", dtype="<u8")
    with (folder / "shard-000000.tar").open("r+b") as stream:
        stream.seek(int(index[3]) + 512)
        stream.write(b"\0" * 1000)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (1, 2), (2, 0), (4, 0)])
def test_skipped_entries_keep_their_place_at_weight_zero(
    damaged: Path, packed: dict[str, Path], configure: Configure, world: int, workers: int
) -> None:
    whole = PackedDataset(packed["semantic"], configure(packed["semantic"]), "semantic", seed=4)
    config = configure(damaged, on_error={"skip": 2}, workers=workers)
    dataset = PackedDataset(damaged, config, "semantic", seed=4)
    rows: list[tuple[int, Skipped]] = []
    for rank in range(world):
        expected = train_batches(whole, micros(whole, 0, 3, rank, world))
        for (_, good), (micro, batch) in zip(
            expected, train_batches(dataset, micros(dataset, 0, 3, rank, world)), strict=True
        ):
            assert batch.entries == good.entries
            bad = [entry.sample in (3, 17) for entry in batch.entries] or [False]
            zero = [skip or not batch.entries for skip in bad]
            assert (batch.weights == 0).tolist() == zero
            keep = ~torch.tensor(bad)
            assert torch.equal(batch.images[keep], good.images[keep])
            assert torch.equal(batch.targets[keep], good.targets[keep])
            assert not batch.images[~keep].any()
            assert (batch.targets[~keep] == 255).all()
            rows += [(micro.step, skip) for skip in batch.skipped]
    found = sorted((skip.entry.sample, skip.key, step) for step, skip in rows)
    positions = {entry.sample: entry.position for entry in whole.plan(0).entries(0, 22)}
    assert found == [(sample, f"{sample:09d}", positions[sample] // 8) for sample in (3, 17)]
    assert all("broken image" in skip.reason and "shard-00000" in skip.reason for _, skip in rows)
    moved = batch.to(torch.device("cpu"))
    assert moved.skipped == batch.skipped


def test_stop_is_the_default(damaged: Path, configure: Configure) -> None:
    dataset = PackedDataset(damaged, configure(damaged), "semantic")
    with pytest.raises(DataError, match=r"000000017 .*broken image"):
        dataset.train_batch([Entry(0, 0, 1, 0), Entry(0, 1, 17, 0)])


def test_an_outage_is_never_skipped(served: HttpFolder, configure: Configure, tmp_path: Path) -> None:
    config = configure(served.folder, cache={"folder": str(tmp_path / "cache")}, on_error={"skip": 20})
    dataset = PackedDataset(served.url, config, "detection")
    served.faults["shard-000000.tar"] = ["500"] * 6
    with pytest.raises(UnreachableError):
        dataset.train_batch([Entry(0, 0, 0, 0)])
    served.faults["shard-000000.tar"] = ["flip"] * 3
    batch = dataset.train_batch([Entry(0, 0, 0, 0), Entry(0, 1, 15, 0), Entry(0, 2, 9, 0)])
    assert batch.weights.tolist() == [0, 1, 0]
    assert "damaged each of 3 times" in batch.skipped[1].reason


@pytest.mark.parametrize("trouble", ["moved", "full", "rot"])
def test_local_trouble_is_no_damage(
    packed: dict[str, Path], configure: Configure, tmp_path: Path, trouble: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure without the samples, or weight zero for all of them, would be wrong; what a disk lost is lost."""
    folder = Path(shutil.copytree(packed["detection"], tmp_path / "set"))
    source = folder.as_uri() if trouble == "full" else folder
    config = configure(folder, cache={"folder": str(tmp_path / "cache")}, on_error={"skip": 100})
    training, evaluation = (PackedDataset(source, config, "detection", train=train) for train in (True, False))

    def failing(code: int, *_: Any) -> int:
        raise OSError(code, os.strerror(code))

    if trouble == "moved":
        folder.rename(tmp_path / "elsewhere")
    elif trouble == "full":
        monkeypatch.setattr("vitgraft.data_shards.remote.os.write", partial(failing, errno.ENOSPC))
    else:
        monkeypatch.setattr("vitgraft.data_shards.files.pread", partial(failing, errno.EIO))
        assert training.train_batch([Entry(0, 0, 0, 0)]).weights.tolist() == [0]
        assert "Input/output error" in evaluation.eval_batch([0]).errors[0][1]
        return
    with pytest.raises(UnreachableError):
        training.train_batch([Entry(0, 0, 0, 0)])
    with pytest.raises(UnreachableError):
        evaluation.eval_batch([0])


def test_a_damaged_partner_costs_no_second_entry(broken_clip: Path, configure: Configure) -> None:
    """It comes from the plan, so how the entries are cut into batches does not matter either."""
    changes: dict[str, Any] = {"on_error": {"skip": 9}, "transforms": [{"name": "resize"}, {"name": "mixup"}]}
    dataset = PackedDataset(broken_clip, configure(broken_clip, **changes), "video")
    entries = dataset.plan(0).entries(0, 22)
    whole = dataset.train_batch(entries)
    assert [skip.entry.sample for skip in whole.skipped] == [3]
    one_by_one = [dataset.train_batch([entry]) for entry in entries]
    assert [skip for batch in one_by_one for skip in batch.skipped] == whole.skipped
    assert torch.equal(torch.cat([batch.images for batch in one_by_one]), whole.images)
    assert torch.equal(torch.cat([batch.targets for batch in one_by_one]), whole.targets)


def skip(sample: int) -> Skipped:
    return Skipped(Entry(0, sample * 10, sample, 0), f"{sample:09d}", f"shard:{sample}: broken image; replace it")


def test_the_budget_counts_samples_over_attempts(tmp_path: Path) -> None:
    log = SkipLog(tmp_path, SkipConfig(skip=2), 0, attempt=1)
    log.record(4, [skip(7)])
    log.record(5, [skip(7), skip(8)])
    rows = read_skipped(tmp_path)
    assert [(row["step"], row["sample"]) for row in rows] == [(4, 7), (5, 7), (5, 8)]
    assert rows[0] == {
        "step": 4,
        "epoch": 0,
        "position": 70,
        "sample": 7,
        "repetition": 0,
        "key": "000000007",
        "reason": "shard:7: broken image; replace it",
        "attempt": 1,
    }
    with (tmp_path / "skipped.jsonl").open("a") as stream:
        stream.write('{"step": 6, "sam')
    # Resumed before step 5: what came after step 4 is done again.
    again = SkipLog(tmp_path, SkipConfig(skip=2), 4, attempt=2)
    again.record(5, [skip(8)])
    message = r"step 6: 3 samples cannot be read, data\.on_error\.skip allows 2; the last: .*:9: .*skipped\.jsonl lists"
    with pytest.raises(DataError, match=message):
        again.record(6, [skip(9)])
    assert [row["sample"] for row in read_skipped(tmp_path)] == [7, 7, 8, 8, 9]


def test_rows_of_steps_made_again_are_not_charged_to_later_attempts(tmp_path: Path) -> None:
    """Attempt 2 resumed at 80 and could read what attempt 1 could not."""
    policy = SkipConfig(skip=9)
    starts = [(1, None), (2, 80), (3, 200)]
    with (tmp_path / "events.jsonl").open("w") as stream:
        for number, resume in starts:
            event = {"event": "start", "attempt": number, "time": float(number), "world": 1, "resume": resume}
            stream.write(json.dumps(event) + "\n")
    first = SkipLog(tmp_path, policy, 0, attempt=1)
    first.record(80, [skip(1)])
    first.record(90, [skip(2)])
    second = SkipLog(tmp_path, policy, 80, attempt=2)
    assert second.samples == {1}
    second.record(95, [skip(3)])
    second.record(201, [skip(4)])
    assert SkipLog(tmp_path, policy, 200, attempt=3).samples == {1, 3}


@pytest.mark.parametrize("value", ["skip", {"skip": 0}, {"skip": -1}, {"skip": 1, "x": 2}, {}, 3])
def test_policies_that_mean_nothing_are_refused(configure: Configure, tmp_path: Path, value: Any) -> None:
    with pytest.raises(ValueError):
        configure(tmp_path, on_error=value)


def test_where_and_how_data_is_read_is_no_part_of_a_runs_identity() -> None:
    from vitgraft.configs.schema.recipe import OPERATIONAL

    assert {"data.cache", "data.on_error"} <= set(OPERATIONAL)
