"""Indices and a manifest for tars that others wrote (WebDataset, img2dataset, …), whose bytes stay where they are.

The index of NAME.tar with n samples, NAME.idx, is little-endian uint64: n starts and n ends of the samples in the tar,
then n + 1 places in the index of the metadata, which follows as JSON texts, one after the other. The metadata is what
our packers write into a sample's JSON, made and checked here once.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.hashing import canonical_json, sha256_file
from vitgraft.data_shards.decode import (
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    check_annotations,
    decode_json,
    decode_label,
    decode_masks,
    image_size,
    probe_video,
)
from vitgraft.data_shards.files import pread
from vitgraft.data_shards.index_folder import IndexFolder
from vitgraft.data_shards.manifest import (
    CLASSED,
    IGNORE,
    MANIFEST,
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
from vitgraft.data_shards.remote import download, is_url, join, list_names, shown
from vitgraft.data_shards.shards import index_name
from vitgraft.data_shards.stream import MAX_SAMPLE_BYTES, member_name

MAX_TAR_BYTES = 64 << 30
"""Of a tar behind a URL, which is fetched to be indexed."""
MAX_HEADER_BYTES = 1 << 20
"""Of what a tar says about a member beyond its 512 bytes of header (long names, times)."""
MAX_SAMPLES = 2_000_000
"""In one tar: their keys are held in memory."""
_LISTED_FAULTS = 20
_PICTURES = (*IMAGE_EXTENSIONS, "jpeg")
_CLASS = ("cls", "json:label")
ROLES: dict[Kind, dict[str, tuple[str, ...]]] = {
    "detection": {"image": _PICTURES, "label": ("json",)},
    "semantic": {"image": ("jpg", "jpeg", "webp"), "label": ("label.png", "seg.png", "mask.png", "png")},
    "video": {"video": VIDEO_EXTENSIONS, "label": _CLASS},
    "image": {"image": _PICTURES, "label": _CLASS},
}
"""What a sample of each kind needs, and the members that are taken for it; NAME:FIELD is a field of a JSON member."""

Progress = Callable[[int, int], None]


class Member(NamedTuple):
    """Where a member's bytes lie in its tar."""

    offset: int
    size: int


@dataclass
class Group:
    """The members of one sample, which lie together at bytes start..end."""

    key: str
    start: int
    end: int
    members: dict[str, Member] = field(default_factory=dict)


def index_tars(
    source: Path | str,
    kind: Kind,
    classes: Sequence[str],
    *,
    out: Path | None = None,
    members: Mapping[str, Sequence[str]] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Make a folder or URL of tars readable as a data set, without copying them.

    Args:
        source: the folder, or a URL as ``str``, whose tars are fetched one after the other to be read once.
        kind, classes: as in the manifest.
        out: folder of indices and manifest; ``None``: beside the tars.
        members: for roles of ``ROLES``: other members to take.
        on_error: ``skip`` leaves out samples that lack something or are broken, and counts them in the manifest's
            ``source``. A tar that is broken itself always raises.
        progress: called with tars done and in all.

    Raises:
        ConfigError: no such role, a URL without ``out``, or ``out`` holds something else or is in use.
        DataError: no tars, a tar that a reader must not trust, or a sample that is not what ``kind`` needs. What was
            there before is as it was.
    """
    roles = _roles(kind, members or {})
    check_classes(list(classes), "classes")
    target, names = _target(source, out), _tar_names(source)
    check = _Checker(kind, list(classes), roles)
    shards: list[Shard] = []
    faults: list[str] = []
    skipped = 0
    try:
        with IndexFolder(target) as folder:
            _check_unused(target, overwrite or folder.resumed)
            for number, name in enumerate(names):
                with _Local(source, name, folder.work) as tar:
                    starts, ends, texts = [], [], []
                    for group in scan_tar(tar.path, tar.where):
                        where = f"{tar.where}:{group.key}"
                        try:
                            texts.append(canonical_json(check(group, tar.descriptor, where)).encode())
                        except DataError as error:
                            if on_error == "raise":
                                raise
                            skipped += 1
                            faults += [str(error)] if len(faults) < _LISTED_FAULTS else []
                            continue
                        starts.append(group.start)
                        ends.append(group.end)
                    if starts:
                        shards.append(_write_index(folder, name, tar, starts, ends, texts))
                if progress is not None:
                    progress(number + 1, len(names))
            if not shards:
                first = f"; the first: {faults[0]}" if faults else ""
                raise DataError(f"{_shown(source)}: no tar holds a usable {kind} sample{first}")
            root = None if target == source else str(source) if is_url(source) else str(Path(source).resolve())
            foreign = Foreign(members=check.renamed, root=root)
            facts: dict[str, Any] = {"packer": "index", "members": {role: list(taken) for role, taken in roles.items()}}
            facts |= {"skipped": skipped, "first_skipped": faults}
            manifest = make_manifest(kind, list(classes), None, shards, facts, foreign)
            folder.publish(dump_manifest(manifest).encode())
    except OSError as error:
        raise DataError(f"{target}: {error.strerror or error}; check space and permissions, or give --out") from None
    return manifest


def scan_tar(path: Path, where: str) -> Iterator[Group]:
    """The samples of a tar by its headers alone, in order.

    Raises:
        DataError: not a plain tar, or one with anything but files and folders with relative names, sizes that cannot
            be, or members of a sample apart or twice.
    """
    size = path.stat().st_size
    keys: set[str] = set()
    group: Group | None = None
    try:
        with tarfile.open(path, mode="r:", tarinfo=_BoundedTarInfo) as tar:
            while (member := tar.next()) is not None:
                # tarfile collects all members, as if there were few.
                tar.members = []  # type: ignore[attr-defined]
                _check_member(member, size, where)
                if member.isdir():
                    continue
                key, extension = member_name(member.name)
                if group is None or group.key != key:
                    if group is not None:
                        yield group
                    if key in keys:
                        raise DataError(f"{where}: key {key[:80]!r} occurs twice, apart; sort the tar by name")
                    if len(keys) >= MAX_SAMPLES:
                        raise DataError(f"{where}: more than {MAX_SAMPLES} samples; split the tar")
                    keys.add(key)
                    group = Group(key, member.offset, member.offset)
                if extension in group.members:
                    raise DataError(f"{where}: member {member.name[:80]!r} occurs twice; write the tar again")
                group.members[extension] = Member(member.offset_data, member.size)
                group.end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            end = tar.offset
    except (tarfile.TarError, ValueError, UnicodeError, EOFError, RecursionError) as error:
        raise DataError(f"{where}: not a readable tar ({error}); expected one without compression") from None
    # tarfile takes damaged headers behind the first for the end, and passes over what follows it.
    with path.open("rb") as stream:
        stream.seek(end)
        while block := stream.read(1 << 20):
            if block.strip(b"\0"):
                raise DataError(f"{where}: no tar header at byte {end} of {size}: damaged or joined; write it again")
    if group is not None:
        yield group


class _BoundedTarInfo(tarfile.TarInfo):
    """Refuses headers about headers that are too large before tarfile reads them into memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedTarInfo:
        found = super().frombuf(buf, encoding, errors)
        if found.type == tarfile.XGLTYPE:
            raise tarfile.ReadError("a global pax header, which would change all members after it")
        special = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
        # Of less than nothing, tarfile would read all that follows.
        if found.type in special and not 0 <= found.size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"{found.size} bytes of extended header")
        return found


def _check_member(member: tarfile.TarInfo, tar_bytes: int, where: str) -> None:
    name = member.name
    shown_name = repr(name[:80])
    if name.startswith("/") or ".." in name.split("/") or not name.isprintable():
        raise DataError(
            f"{where}: member {shown_name}: expected a relative path that stays inside; write the tar again"
        )
    if member.isdir():
        return
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        kind = "a link" if member.islnk() or member.issym() else "a special or sparse file"
        raise DataError(f"{where}: member {shown_name} is {kind}; expected plain files, write the tar again")
    left = tar_bytes - member.offset_data
    if not 0 <= member.size <= min(MAX_SAMPLE_BYTES, left):
        raise DataError(
            f"{where}: member {shown_name} declares {member.size} bytes, {max(left, 0)} follow and "
            f"{MAX_SAMPLE_BYTES} are allowed; copy the tar again or leave the member out"
        )
    key, extension = member_name(name)
    if not extension or key.endswith("/") or not key:
        raise DataError(f"{where}: member {shown_name}: expected KEY.EXTENSION; leave it out of the tar")


class _Checker:
    """Makes a sample's metadata from its members, and refuses samples that training could not use."""

    def __init__(self, kind: Kind, classes: list[str], roles: dict[str, tuple[str, ...]]) -> None:
        self.kind, self.classes, self.roles = kind, classes, roles
        self._by_name = {name: number for number, name in enumerate(classes)}
        self.renamed: dict[str, str] = {}
        for role, wanted in roles.items():
            for extension in wanted:
                if role == "image":
                    # Decoders look at the content.
                    self.renamed[extension] = extension if extension in IMAGE_EXTENSIONS else "jpg"
                elif role == "video":
                    self.renamed[extension] = extension if extension in VIDEO_EXTENSIONS else "mp4"
                elif kind == "semantic":
                    self.renamed[extension] = "label.png"

    def __call__(self, group: Group, descriptor: int, where: str) -> dict[str, Any]:
        """The metadata. Raises DataError."""
        if group.end - group.start > MAX_SAMPLE_BYTES:
            raise DataError(f"{where}: {group.end - group.start} bytes, more than {MAX_SAMPLE_BYTES}; split the sample")
        pixels = self._take(group, "video" if self.kind == "video" else "image", where)
        label = self._take(group, "label", where)
        data = _bytes_of(group, pixels, descriptor, where)
        metadata: dict[str, Any] = {"file_name": f"{group.key}.{pixels}"}
        if self.kind == "video":
            metadata |= probe_video(data, where)
        else:
            metadata["height"], metadata["width"] = image_size(data, where)
        member, _, name = label.partition(":")
        text = _bytes_of(group, member, descriptor, where)
        if self.kind == "semantic":
            self._check_label_map(text, (metadata["height"], metadata["width"]), where)
        elif self.kind == "detection":
            metadata["annotations"] = self._annotations(text, metadata, where)
        else:
            metadata["label"] = self._class_of(text, name, where)
        return metadata

    def _take(self, group: Group, role: str, where: str) -> str:
        """Which of the role's members the sample has."""
        found = [wanted for wanted in self.roles[role] if wanted.partition(":")[0] in group.members]
        if not found:
            there = ", ".join(f".{extension}" for extension in sorted(group.members))
            raise DataError(f"{where}: no {role} (.{', .'.join(self.roles[role])}) among {there[:200]}; see --member")
        if role != "label" and len(found) > 1:
            raise DataError(f"{where}: both .{found[0]} and .{found[1]}; say which with --member {role}=")
        if self.kind == "semantic" and role == "label" and len(found) > 1:
            raise DataError(f"{where}: both .{found[0]} and .{found[1]}; say which with --member label=")
        return found[0]

    def _class_of(self, data: bytes, name: str, where: str) -> int:
        value: Any
        value = decode_json(data, where).get(name) if name else data[:1000].decode("utf-8", "replace").strip()
        if isinstance(value, str) and value in self._by_name:
            return self._by_name[value]
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(self.classes):
            return value
        raise DataError(f"{where}: label {str(value)[:80]!r} is none of the {len(self.classes)} classes; see --classes")

    def _annotations(self, data: bytes, metadata: dict[str, Any], where: str) -> list[dict[str, Any]]:
        items = decode_json(data, where).get("annotations")
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise DataError(f'{where}: expected JSON {{"annotations": [{{"bbox": [x, y, w, h], "class": …}}, …]}}')
        named = [
            {
                "id": number,
                "bbox": item.get("bbox"),
                "class": self._by_name.get(item["class"]) if isinstance(item.get("class"), str) else item.get("class"),
                "area": 0.0 if item.get("area") is None else item["area"],
                "iscrowd": int(bool(item.get("iscrowd"))),
                "segmentation": item.get("segmentation"),
            }
            for number, item in enumerate(items)
        ]
        check_annotations(metadata | {"annotations": named}, len(self.classes), where)
        decode_masks(named, (metadata["height"], metadata["width"]), where)
        for item, given in zip(named, items, strict=True):
            item["bbox"] = [float(value) for value in item["bbox"]]
            if item["segmentation"] is not None:
                item["segmentation"] = {key: item["segmentation"][key] for key in ("size", "counts")}
            if given.get("area") is None:
                item["area"] = _area(item)
        return named

    def _check_label_map(self, data: bytes, size: tuple[int, int], where: str) -> None:
        label = decode_label(data, where)
        if tuple(label.shape) != size:
            raise DataError(f"{where}: label map of {tuple(label.shape)} pixels, image of {size}; leave the sample out")
        wrong = label[(label != IGNORE) & ((label < 0) | (label >= len(self.classes)))]
        if len(wrong):
            raise DataError(f"{where}: class id {int(wrong[0])} of {len(self.classes)} and {IGNORE}; see --classes")


def _area(item: dict[str, Any]) -> float:
    """Pixels of an annotation's mask, or of its box where it has none: evaluation tells small from large by them."""
    from pycocotools import mask as coco_mask

    if item["segmentation"] is not None:
        return float(coco_mask.area(item["segmentation"]))
    return float(max(item["bbox"][2], 0) * max(item["bbox"][3], 0))


def _bytes_of(group: Group, extension: str, descriptor: int, where: str) -> bytes:
    member = group.members[extension]
    data = pread(descriptor, member.offset, member.size)
    if len(data) != member.size:
        raise DataError(f"{where}: .{extension} is cut short; copy the tar again")
    return data


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
            self.descriptor = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            return self
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
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
        """SHA-256 (hex) of the tar."""
        return self.sha256 or sha256_file(self.path)


def _roles(kind: Kind, given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    roles = dict(ROLES[kind])
    for role, wanted in given.items():
        if role not in roles:
            raise ConfigError(f"--member {role}=…: a {kind} sample has {' and '.join(roles)}; name one of these")
        # Extensions are compared in small letters; fields of JSON keep their capitals.
        parts = [part.removeprefix(".").partition(":") for part in wanted]
        roles[role] = tuple(f"{extension.lower()}{mark}{name}" for extension, mark, name in parts)
        fields = kind in CLASSED and role == "label"
        if not parts or any(not extension or bool(mark) != bool(name and fields) for extension, mark, name in parts):
            example = f"{role}={ROLES[kind][role][0]}"
            raise ConfigError(f"--member {role}={','.join(wanted)}: expected names of members, e.g. {example}")
    first, second = ({part.partition(":")[0] for part in wanted} for wanted in roles.values())
    if first & second:
        raise ConfigError(f"--member: .{min(first & second)} cannot be both {' and '.join(roles)}; name other members")
    return roles


def _target(source: Path | str, out: Path | None) -> Path:
    """The folder to write into."""
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
        if parse_manifest(manifest.read_bytes(), str(manifest)).foreign is None:
            raise ConfigError(f"{target}: holds a packed data set, which needs no index; choose another folder")
        if not overwrite:
            raise ConfigError(f"{target}: is indexed already; pass --overwrite to do it again")
    elif any(target.glob("*.idx")):
        raise ConfigError(f"{target}: holds .idx files of something else; remove them or give another folder as --out")


def _tar_names(source: Path | str) -> list[str]:
    if isinstance(source, str) and is_url(source):
        try:
            names = [name for name in list_names(source) if name.endswith(".tar")]
        except FileNotFoundError:
            names = []
    else:
        names = sorted(path.name for path in Path(source).glob("*.tar"))
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
