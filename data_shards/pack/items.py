"""A packing as a list of items, one for each sample: prepared in several processes, written in order, resumable."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypedDict, Unpack

from vitgraft.configs.errors import DataError
from vitgraft.configs.hashing import canonical_json
from vitgraft.data_shards.images import Values
from vitgraft.data_shards.manifest import Kind, Manifest
from vitgraft.data_shards.pack.images import Exif, Reading
from vitgraft.data_shards.pack.label_report import LabelReport, OnError, Say
from vitgraft.data_shards.pack.writer import DatasetWriter, Progress, check_sample
from vitgraft.data_shards.parallel import Given, Value, outcomes

CHECKED_AT_ONCE = 64

Facts = list[tuple[str, int, int]]
"""Name, size and time of change of each file of an item."""


class PackOptions(TypedDict, total=False):
    """Options of all packers.

    ``overwrite``: replace a data set that is in the target (default false). ``samples_per_shard``: default 1000.
    ``jobs``: processes that check and prepare samples (default 1); they change no byte. ``on_error``: what faults in
    the data do (default raise). ``exif``, ``decode``, ``values``: how image files are read, see
    :class:`~vitgraft.data_shards.pack.images.Reading`. ``checked``, ``progress``: told the samples checked and packed,
    of all. ``say``: told the report on the labels, before anything is written, and what was found of an interrupted
    packing.
    """

    overwrite: bool
    samples_per_shard: int
    jobs: int
    on_error: OnError
    exif: Exif
    decode: bool
    values: Values | None
    checked: Progress
    progress: Progress
    say: Say


def reading_of(options: PackOptions) -> Reading:
    """Return the image reading options among the packer's options."""
    return Reading(options.get("exif", "auto"), options.get("decode", False), options.get("values"))


class Prepared(NamedTuple):
    """A sample as it is packed: members by extension, and the metadata."""

    members: dict[str, bytes]
    metadata: dict[str, Any]


class LeftOut(NamedTuple):
    """No sample, and why."""

    reason: str


class Item(Protocol):
    """Sample to be packed. Picklable; its bytes depend only on ``metadata`` (JSON values) and the ``files``."""

    @property
    def metadata(self) -> dict[str, Any]: ...

    @property
    def files(self) -> Sequence[Path]: ...

    def prepare(self) -> Prepared | LeftOut:
        """Read, check, encode. Pure; raises DataError, for which ``on_error`` stands."""


def pack_items(
    items: Sequence[Item],
    out: Path,
    kind: Kind,
    report: LabelReport,
    *,
    source: dict[str, Any],
    category_ids: list[int] | None = None,
    settings: Sequence[Any] = (),
    chunk: int = 8,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Write the samples of all items as a data set; goes on with what an interrupted packing of them finished.

    Args:
        report: closed, without faults.
        source: for the manifest, in which the report is added.
        settings: what decides the bytes besides the items' metadata and files.
        chunk: items that a process takes at once.

    Raises:
        DataError: there is no item; one failed (and ``on_error`` is raise), or a process was killed: what is finished
            is kept.
        ConfigError: see :class:`DatasetWriter`.
    """
    if not items and report.skipped:
        raise DataError(f"{out}: the data set is empty: all of it was left out, the first: {report.skipped[0]}")
    # Another version of these may encode the same pixels to other bytes.
    versions = [importlib.metadata.version(name) for name in ("pillow", "av")]
    on_error = options.get("on_error", "raise")
    common = [*versions, on_error, options.get("values"), *settings]
    processes = options.get("jobs", 1)
    prepare = partial(_prepare, on_error)
    read: dict[int, Facts] = {}

    def identity(number: int) -> str:
        # What is packed counts as it was when it was read; what an earlier packing wrote, as it is now.
        facts = read.pop(number) if number in read else _facts(items[number])
        return canonical_json([common, [items[number].metadata, facts]])

    source = {**source, "label_report": report.as_source()}
    if (values := options.get("values")) is not None:
        source["range"] = list(values)
    if report.skipped:
        source["skipped"] = [*report.skipped]
    writer = DatasetWriter(
        out,
        kind,
        report.classes,
        category_ids=category_ids,
        source=source,
        total=len(items),
        overwrite=options.get("overwrite", False),
        samples_per_shard=options.get("samples_per_shard", 1000),
        progress=options.get("progress"),
        identity=identity,
        threads=processes,
        say=options.get("say"),
    )
    with writer, contextlib.closing(outcomes(prepare, items[writer.items_done :], processes, chunk)) as found:
        for number, outcome in enumerate(found, writer.items_done):
            read[number], sample = outcome.get()
            match sample:
                case LeftOut(reason):
                    writer.skip(reason)
                case Prepared(members, metadata):
                    writer.add(members, metadata)
    return writer.result()


def checked(
    function: Callable[[Given], Value], items: Sequence[Given], report: LabelReport, options: PackOptions
) -> list[Value | None]:
    """Return ``function(item)`` of each item, computed in several processes; faults are reported and give ``None``."""
    found: list[Value | None] = []
    progress = options.get("checked")
    with contextlib.closing(outcomes(function, items, options.get("jobs", 1), CHECKED_AT_ONCE)) as results:
        for outcome in results:
            found.append(None)
            with report.collect():
                found[-1] = outcome.get()
            if progress is not None:
                progress(len(found), len(items))
    return found


def _prepare(on_error: OnError, item: Item) -> tuple[Facts, Prepared | LeftOut]:
    # Facts first: a file that changes while it is read, or after, is another one when the packing is gone on with.
    facts = _facts(item)
    if on_error == "raise":
        return facts, item.prepare()
    try:
        sample = item.prepare()
        if isinstance(sample, Prepared):
            # As the writer will, which can no longer leave it out.
            where = str(item.files[0]) if item.files else "sample"
            check_sample({**sample.members, "json": canonical_json(sample.metadata).encode()}, where)
        return facts, sample
    except DataError as error:
        return facts, LeftOut(str(error))


def _facts(item: Item) -> Facts:
    return [(str(file), *_size_and_time(file)) for file in item.files]


def _size_and_time(file: Path) -> tuple[int, int]:
    try:
        found = file.stat()
    except OSError:
        # Reading it will say so.
        return -1, -1
    return found.st_size, found.st_mtime_ns
