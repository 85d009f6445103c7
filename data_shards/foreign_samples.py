"""Required members of a foreign sample, and the metadata made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.decode import (
    VIDEO_EXTENSIONS,
    decode_json,
    decode_label,
    probe_video,
)
from vitgraft.data_shards.files import pread
from vitgraft.data_shards.foreign_boxes import ForeignBoxes
from vitgraft.data_shards.images import IMAGE_EXTENSIONS, decode_image, oriented_size, read_header, value_range
from vitgraft.data_shards.listing import IMAGE_SUFFIXES
from vitgraft.data_shards.manifest import CLASSED, IGNORE, Kind
from vitgraft.data_shards.pack.images import DeepImages, Exif, which_way_up
from vitgraft.data_shards.pack.label_ids import missing_class
from vitgraft.data_shards.pack.label_report import NOTHING_TO_LEARN, TURNED, LabelReport
from vitgraft.data_shards.stream import MAX_SAMPLE_BYTES
from vitgraft.data_shards.tar_scan import Group

_PICTURES = (*IMAGE_EXTENSIONS, "jpeg")
_USUAL = {*_PICTURES, "mp4", "avi", "mkv", "webm", "mov"}
_OTHERS = tuple(sorted({suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES} - {*_PICTURES}))
_CLASS = ("cls", "json:label")
ROLES: dict[Kind, dict[str, tuple[str, ...]]] = {
    "detection": {"image": (*_PICTURES, *_OTHERS), "label": ("json",)},
    "semantic": {"image": ("jpg", "jpeg", "webp", *_OTHERS), "label": ("label.png", "seg.png", "mask.png", "png")},
    "video": {"video": VIDEO_EXTENSIONS, "label": _CLASS},
    "image": {"image": (*_PICTURES, *_OTHERS), "label": _CLASS},
}
"""Roles of the members of each kind of sample, and the accepted members; NAME:FIELD is a field of a JSON member.
Where a sample has an unusual one beside a usual one, the usual one is taken."""


def take_roles(kind: Kind, given: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """Return the members by role, in search order: ``ROLES``, overridden by those ``given``.

    Raises:
        ConfigError: no such role, no name of a member, or one for both roles.
    """
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


class SampleChecker:
    """Makes a sample's metadata from its members, and refuses samples that training could not use.

    Args:
        exif: whether images are turned; ``auto``: unless label map, masks or stated size are those of stored pixels.
        decode: images are decoded, not only their headers read.
    """

    def __init__(
        self,
        kind: Kind,
        report: LabelReport,
        roles: dict[str, tuple[str, ...]],
        exif: Exif = "auto",
        decode: bool = False,
    ) -> None:
        self.kind, self.classes, self.report, self.roles, self.exif = kind, report.classes, report, roles, exif
        self._decode = decode
        self._boxes = ForeignBoxes(report)
        self._deep = DeepImages(remedy="pack the images of the tars, with")
        self._by_name = {name: number for number, name in enumerate(report.classes)}
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
        """Return the metadata of a sample; raise ``DataError`` for an invalid one."""
        if group.end - group.start > MAX_SAMPLE_BYTES:
            raise DataError(f"{where}: {group.end - group.start} bytes, more than {MAX_SAMPLE_BYTES}; split the sample")
        pixels = self._take(group, "video" if self.kind == "video" else "image", where)
        label = self._take(group, "label", where)
        data = _bytes_of(group, pixels, descriptor, where)
        metadata: dict[str, Any] = {"file_name": f"{group.key}.{pixels}"}
        if self.kind == "video":
            metadata |= probe_video(data, where)
        member, _, name = label.partition(":")
        text = _bytes_of(group, member, descriptor, where)
        if self.kind != "video":
            metadata |= self._image_facts(data, text, where)
        if self.kind == "semantic":
            self._check_label_map(text, (metadata["height"], metadata["width"]), where)
        elif self.kind == "detection":
            metadata["annotations"] = self._boxes.read(text, (metadata["height"], metadata["width"]), where)
            self._boxes.count(metadata["annotations"])
        else:
            metadata["label"] = self._class_of(text, name, where)
            self.report.counts[metadata["label"]] += 1
        if "orientation" in metadata:
            self.report.repair(TURNED, where)
        self.report.samples += 1
        return metadata

    def close(self) -> None:
        """Report the findings on all samples."""
        self._boxes.close()
        if self.kind == "semantic" and self.report.samples:
            choose, accept = "unpack the tars and use shards pack semantic with", "pass --on-error skip"
            message = missing_class(self.report, [IGNORE], choose=choose, accept=accept)
            if message is not None:
                self.report.doubt(message, NOTHING_TO_LEARN)
        self._deep.tell(self.report, None)

    def _stated_size(self, label: bytes, where: str) -> tuple[Any, Any] | None:
        """Return the (height, width) stated by the labels; ``None``: not stated."""
        if self.kind == "semantic":
            height, width = decode_label(label, where).shape
            return height, width
        if self.kind != "detection":
            return None
        tree = decode_json(label, where)
        if "height" in tree and "width" in tree:
            return tree["height"], tree["width"]
        items = tree.get("annotations")
        for item in items if isinstance(items, list) else ():
            segmentation = item.get("segmentation") if isinstance(item, dict) else None
            size = segmentation.get("size") if isinstance(segmentation, dict) else None
            if isinstance(size, list) and len(size) == 2:
                return size[0], size[1]
        return None

    def _image_facts(self, data: bytes, label: bytes, where: str) -> dict[str, int]:
        """Return height, width and, where one is applied, orientation."""
        header = read_header(data, where)
        if header.depth > 16:
            raise DataError(f"{where}: an image of 32-bit values, of which nobody knows the white; leave it out")
        if header.depth > 8:
            self._deep.add(header, value_range(data, where))
        elif self._decode:
            decode_image(data, where)
        stated = self._stated_size(label, where) if header.orientation > 1 else None
        orientation, _ = which_way_up(header, self.exif, stated)
        height, width = oriented_size(header.size, orientation)
        return {"height": height, "width": width} | ({"orientation": orientation} if orientation > 1 else {})

    def _take(self, group: Group, role: str, where: str) -> str:
        """Return the member that the sample has for a role.

        Raises:
            DataError: none, or several.
        """
        found = [wanted for wanted in self.roles[role] if wanted.partition(":")[0] in group.members]
        if self.roles[role] == ROLES[self.kind][role] and role != "label":
            found = [wanted for wanted in found if wanted in _USUAL] or found
        if not found:
            there = ", ".join(f".{extension}" for extension in sorted(group.members))
            raise DataError(
                f"{where}: no {role} (.{', .'.join(self.roles[role][:8])}) among {there[:200]}; see --member"
            )
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

    def _check_label_map(self, data: bytes, size: tuple[int, int], where: str) -> None:
        label = decode_label(data, where)
        if tuple(label.shape) != size:
            raise DataError(f"{where}: label map of {tuple(label.shape)} pixels, image of {size}; leave the sample out")
        wrong = label[(label != IGNORE) & ((label < 0) | (label >= len(self.classes)))]
        if len(wrong):
            raise DataError(f"{where}: class id {int(wrong[0])} of {len(self.classes)} and {IGNORE}; see --classes")
        pixels = torch.bincount(label.flatten().to(torch.int64), minlength=IGNORE + 1).tolist()
        self.report.unlabelled += pixels.pop(IGNORE)
        self.report.counts.update({number: count for number, count in enumerate(pixels) if count})


def _bytes_of(group: Group, extension: str, descriptor: int, where: str) -> bytes:
    member = group.members[extension]
    data = pread(descriptor, member.offset, member.size)
    if len(data) != member.size:
        raise DataError(f"{where}: .{extension} is cut short; copy the tar again")
    return data
