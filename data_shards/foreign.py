"""Indices and a manifest for foreign tars (WebDataset, img2dataset, …), which are read in place.

The index of NAME.tar with n samples, NAME.idx, is little-endian uint64: n starts and n ends of the samples in the tar,
then n + 1 places in the index of the metadata, which follows as JSON texts, one after the other. The metadata is what
our packers write into a sample's JSON, made and checked here once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.files import open_regular, read_bytes
from vitgraft.configs.hashing import canonical_json, sha256_file
from vitgraft.data_shards.foreign_samples import SampleChecker, take_roles
from vitgraft.data_shards.index_folder import IndexFolder
from vitgraft.data_shards.listing import HIDDEN, is_hidden
from vitgraft.data_shards.manifest import (
    MANIFEST,
    MAX_MANIFEST_BYTES,
    SHARD_NAME,
    Foreign,
    Kind,
    Manifest,
    Shard,
    dump_manifest,
    make_manifest,
    parse_manifest,
)
from vitgraft.data_shards.pack.files import check_classes
from vitgraft.data_shards.pack.images import Exif
from vitgraft.data_shards.pack.label_report import LabelReport, OnError, Say
from vitgraft.data_shards.remote import download, is_url, join, list_names, shown
from vitgraft.data_shards.shards import index_name
from vitgraft.data_shards.tar_scan import scan_tar

MAX_TAR_BYTES = 64 << 30
"""Of a tar behind a URL, which is fetched to be indexed."""
_UNITS: dict[Kind, str] = {"detection": "instances", "semantic": "pixels", "video": "clips", "image": "images"}

Progress = Callable[[int, int], None]


def index_tars(
    source: Path | str,
    kind: Kind,
    classes: Sequence[str],
    *,
    out: Path | None = None,
    members: Mapping[str, Sequence[str]] | None = None,
    on_error: OnError = "raise",
    exif: Exif = "auto",
    decode: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    say: Say | None = None,
) -> Manifest:
    """Make a folder or URL of tars readable as a data set, without copying them.

    Args:
        source: the folder, or a URL as ``str``, whose tars are fetched one after the other to be read once.
        kind, classes: as in the manifest.
        out: folder of indices and manifest; ``None``: beside the tars.
        members: for roles of ``ROLES``: other members to take.
        on_error: ``skip`` leaves out samples that lack something or are broken, and annotations that cannot be taken,
            and lists them in the manifest's ``source``. A tar that is broken itself always raises.
        exif: whether images are turned by their EXIF orientation, see
            :class:`~vitgraft.data_shards.foreign_samples.SampleChecker`; the manifest's ``source`` counts them.
        decode: decode every image too, so that what is cut short is found.
        progress: called with tars done and in all.
        say: told the report on the labels, before the manifest is written.

    Raises:
        ConfigError: no such role, a URL without ``out``, or ``out`` holds something else or is in use.
        DataError: no tars, a tar that a reader must not trust, or a sample that is not what ``kind`` needs. What was
            there before is as it was.
    """
    roles = take_roles(kind, members or {})
    check_classes(list(classes), "classes")
    target, names = _target(source, out), _tar_names(source)
    report = LabelReport(_UNITS[kind], list(classes), on_error=on_error)
    check = SampleChecker(kind, report, roles, exif, decode)
    shards: list[Shard] = []
    try:
        with IndexFolder(target) as folder:
            _check_unused(target, overwrite or folder.resumed)
            for number, name in enumerate(names):
                with _Local(source, name, folder.work) as tar:
                    starts, ends, texts = [], [], []
                    hidden = partial(_pass_over, report, tar.where)
                    for group in scan_tar(tar.path, tar.where, hidden):
                        where = f"{tar.where}:{group.key}"
                        try:
                            metadata = check(group, tar.descriptor, where)
                        except DataError as error:
                            if on_error == "raise":
                                raise
                            report.fault(error)
                            continue
                        texts.append(canonical_json(metadata).encode())
                        starts.append(group.start)
                        ends.append(group.end)
                    if starts:
                        shards.append(_write_index(folder, name, tar, starts, ends, texts))
                if progress is not None:
                    progress(number + 1, len(names))
            if not shards:
                first = f"; the first: {report.skipped[0]}" if report.skipped else ""
                raise DataError(f"{_shown(source)}: no tar holds a usable {kind} sample{first}")
            check.close()
            report.close(say)
            root = None if target == source else str(source) if is_url(source) else str(Path(source).resolve())
            foreign = Foreign(members=check.renamed, root=root)
            facts: dict[str, Any] = {"packer": "index", "members": {role: list(taken) for role, taken in roles.items()}}
            facts |= {"skipped": report.skipped, "label_report": report.as_source()}
            manifest = make_manifest(kind, list(classes), None, shards, facts, foreign)
            folder.publish(dump_manifest(manifest).encode())
    except OSError as error:
        raise DataError(f"{target}: {error.strerror or error}; check space and permissions, or give --out") from None
    return manifest


def _pass_over(report: LabelReport, where: str, name: str) -> None:
    report.pass_over(HIDDEN, f"{where}:{name}")


class _Local:
    """Context manager: a tar as a local file; one behind a URL is fetched, and removed again."""

    def __init__(self, source: Path | str, name: str, work: Path) -> None:
        self.url = join(source, name) if isinstance(source, str) and is_url(source) else None
        self.path = Path(source) / name if self.url is None else work / name
        self.where = str(self.path) if self.url is None else shown(self.url)
        self.descriptor = -1
        self.sha256 = ""

    def __enter__(self) -> _Local:
        if self.url is None:
            self.descriptor = open_regular(self.path)
            return self
        self.descriptor = open_regular(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644, follow=False)
        try:
            size, self.sha256 = download(self.url, self.descriptor, MAX_TAR_BYTES)
            if size > MAX_TAR_BYTES:
                raise DataError(f"{self.where}: more than {MAX_TAR_BYTES} bytes; split the tar")
            # An earlier attempt may have brought more than the last.
            os.ftruncate(self.descriptor, size)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)
        if self.url is not None:
            self.path.unlink(missing_ok=True)

    def digest(self) -> str:
        """Return the SHA-256 (hex) of the tar."""
        return self.sha256 or sha256_file(self.path)


def _target(source: Path | str, out: Path | None) -> Path:
    """Return the folder to write into."""
    if is_url(source) and out is None:
        raise ConfigError(f"{_shown(source)}: indices of tars behind a URL are written to a local folder; give --out")
    target = Path(source) if out is None else out
    if out is not None and not is_url(source) and out.resolve() == Path(source).resolve():
        target = Path(source)
    if not is_url(source) and not Path(source).is_dir():
        raise DataError(f"{source}: no such folder; name a folder or URL of tars")
    return target


def _check_unused(target: Path, overwrite: bool) -> None:
    """Refuse a folder with anything that this would replace unasked."""
    manifest = target / MANIFEST
    if manifest.exists():
        if parse_manifest(read_bytes(manifest, MAX_MANIFEST_BYTES), str(manifest)).foreign is None:
            raise ConfigError(f"{target}: holds a packed data set, which needs no index; choose another folder")
        if not overwrite:
            raise ConfigError(f"{target}: is indexed already; pass --overwrite to do it again")
    elif any(target.glob("*.idx")):
        raise ConfigError(f"{target}: holds .idx files of something else; remove them or give another folder as --out")


def _tar_names(source: Path | str) -> list[str]:
    if isinstance(source, str) and is_url(source):
        try:
            names = [name for name in list_names(source) if name.endswith(".tar") and not is_hidden(name)]
        except FileNotFoundError:
            names = []
    else:
        names = sorted(path.name for path in Path(source).glob("*.tar") if not is_hidden(path.name))
    if not names:
        raise DataError(f"{_shown(source)}: no .tar files; name a folder (over http one whose page lists its files)")
    for name in names:
        if re.match(SHARD_NAME, name) is None:
            raise DataError(f"{_shown(source)}: {name!r}: expected letters, digits, '.', '-' and '_'; rename the tar")
    return names


def _write_index(
    folder: IndexFolder, name: str, tar: _Local, starts: list[int], ends: list[int], texts: list[bytes]
) -> Shard:
    count = len(starts)
    places = np.cumsum([8 * (3 * count + 1), *map(len, texts)])
    numbers = np.concatenate([starts, ends, places]).astype("<u8")
    data = numbers.tobytes() + b"".join(texts)
    folder.write(index_name(name), data)
    return Shard(
        name=name,
        samples=count,
        bytes=os.fstat(tar.descriptor).st_size,
        sha256=tar.digest(),
        index_sha256=sha256(data).hexdigest(),
        index_size=len(data),
    )


def _shown(source: Path | str) -> str:
    return shown(source) if isinstance(source, str) and is_url(source) else str(source)
