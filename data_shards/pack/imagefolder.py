"""Pack images with one class each: folders named after their classes, or arrays in CIFAR's format."""

from __future__ import annotations

import io
import lzma
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt
from PIL import Image

from vitgraft.configs.errors import DataError
from vitgraft.configs.files import open_regular
from vitgraft.data_shards.images import MAX_PIXELS
from vitgraft.data_shards.listing import IMAGE_SUFFIXES, composed, is_hidden, list_files
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.files import check_classes
from vitgraft.data_shards.pack.images import OpenedImage, Reading, open_image, settle
from vitgraft.data_shards.pack.items import PackOptions, Prepared, checked, pack_items, reading_of
from vitgraft.data_shards.pack.label_report import SIZES, UNKNOWN, LabelFault, LabelReport
from vitgraft.data_shards.pack.other_formats import refuse_other_format
from vitgraft.data_shards.pack.pairs import note_passed_over
from vitgraft.data_shards.pack.video_lists import SPLITS, doubt_splits, sort_labels

MAX_ARRAY_BYTES = 64 << 30
"""Larger arrays are refused before they are read."""
_ANY_RATIO_BYTES, _MAX_RATIO = 256 << 20, 200
"""Largest size of a compressed array, and its largest ratio beyond that; real images compress at most tenfold."""
IMAGE_KEYS = ("images", "data", "x", "x_train", "x_test")
LABEL_KEYS = ("labels", "fine_labels", "y", "y_train", "y_test")
# What numpy, zipfile and the decompressors raise of damaged or encrypted files; TokenError is of numpy's header.
_BROKEN_ARRAYS = (
    *(OSError, ValueError, EOFError, RuntimeError, struct.error, OverflowError, TypeError, MemoryError),
    *(tokenize.TokenError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
)


_NO_CLASSES = {*SPLITS, "images", "labels", "JPEGImages", "Annotations"}
"""Folders of data sets for detection."""


@dataclass(frozen=True)
class ClassedImage:
    """An image file with one class. ``metadata``: as packed."""

    opened: OpenedImage
    metadata: dict[str, Any]

    @property
    def files(self) -> tuple[Path, ...]:
        """See :class:`~vitgraft.data_shards.pack.items.Item`."""
        return (self.opened.path,)

    def prepare(self) -> Prepared:
        """Return the image, as it is where its format is a packed one."""
        return Prepared(self.opened.member(), self.metadata)


@dataclass(frozen=True)
class ClassedPixels:
    """An image (H, W, 3) or (H, W) of the arrays in ``files``, with one class. ``metadata``: as packed."""

    pixels: npt.NDArray[np.uint8]
    metadata: dict[str, Any]
    files: tuple[Path, ...]

    def prepare(self) -> Prepared:
        """Return the pixels as a PNG."""
        stream = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self.pixels)).save(stream, "PNG")
        return Prepared({"png": stream.getvalue()}, self.metadata)


def pack_imagefolder(
    images: Path,
    out: Path,
    *,
    classes: list[str] | None = None,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack IMAGES/CLASS/…/NAME.jpg (or png, webp) as they are.

    Args:
        classes: names by class id, all folders among them; ``None``: the folders, sorted (by number when all are
            integers).
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: an image outside a class's folder, or broken, or a folder that is no class; nothing was written.
    """
    listing = list_files(images, IMAGE_SUFFIXES)
    folders = {path.name for path in images.iterdir() if path.is_dir() and not is_hidden(path.name)}
    if folders <= _NO_CLASSES:
        refuse_other_format(images)
    names = sort_labels(folders) if classes is None else classes
    if not names:
        raise DataError(f"{images}: the data set is empty: no folders; expected {images}/CLASS/NAME.jpg")
    check_classes(names, "classes")
    by_name = {composed(name): number for number, name in enumerate(names)}
    report = LabelReport("images", names, on_error=options.get("on_error", "raise"))
    note_passed_over(listing, report)
    if classes is None:
        doubt_splits(images, folders, report)
    found: list[tuple[Path, int]] = []
    for path in listing.files:
        name = path.relative_to(images)
        with report.collect():
            if len(name.parts) < 2:
                raise LabelFault(f"{path}: lies in no folder of a class; expected {images}/CLASS/{path.name}")
            number = by_name.get(composed(name.parts[0]))
            if number is None:
                message = f"{path}: folder {name.parts[0]!r} is none of the {len(names)} classes; add it to --classes"
                raise LabelFault(message, UNKNOWN)
            found.append((path, number))
    items = [
        item
        for item in checked(partial(_opened, images, reading_of(options)), found, report, options)
        if item is not None
    ]
    settle([(item.opened, item.metadata) for item in items], report, options.get("say"))
    return _pack(items, out, report, {"packer": "imagefolder", "images": str(images)}, options)


def _opened(images: Path, reading: Reading, labelled: tuple[Path, int]) -> ClassedImage:
    path, label = labelled
    opened = open_image(path, reading)
    height, width = opened.size
    metadata = {"label": label, "file_name": str(path.relative_to(images)), "height": height, "width": width}
    return ClassedImage(opened, metadata)


def pack_arrays(
    arrays: Path,
    out: Path,
    *,
    labels: Path | None = None,
    classes: list[str] | None = None,
    **options: Unpack[PackOptions],
) -> Manifest:
    """Check everything, then pack arrays of uint8 pixels, each image as a PNG of the same pixels.

    Args:
        arrays: an .npz with images and labels under one of ``IMAGE_KEYS`` and ``LABEL_KEYS``, or an .npy with images:
            (N, H, W, 3), (N, 3, H, W), grey (N, H, W), or CIFAR's rows (N, 3072), red before green before blue.
        labels: an .npy with class ids (N,); needed beside an .npy with images.
        classes: names by class id; ``None``: ``"0"``, ``"1"``, … up to the largest label.
        options: see :class:`~vitgraft.data_shards.pack.items.PackOptions`.

    Raises:
        DataError: not such arrays, other lengths, or a label that is no class; nothing was written. Pickles, also
            inside of .npy files, are never read.
    """
    pixels, ids = _load(arrays, labels)
    # Not a mapped array any more: its images go to other processes.
    views = np.asarray(_as_images(pixels, str(arrays)))
    where = str(labels or arrays)
    if ids.dtype.kind not in "iu" or ids.ndim != 1 or len(ids) != len(views):
        raise DataError(
            f"{where}: labels {ids.dtype} {ids.shape} for {len(views)} images; expected one integer for each image"
        )
    if not len(ids):
        raise DataError(f"{arrays}: the data set is empty: no images")
    numbers = ids.tolist()
    # A stray label as large as an address must not make as many names.
    names = [str(number) for number in range(min(max(*numbers, 0), 1 << 16) + 1)] if classes is None else classes
    check_classes(names, "classes")
    report = LabelReport("images", names, on_error=options.get("on_error", "raise"))
    found: list[ClassedPixels] = []
    files = (arrays,) if labels is None else (arrays, labels)
    for index, number in enumerate(numbers):
        with report.collect():
            if not 0 <= number < len(names):
                raise LabelFault(
                    f"{where}: label {number} of image {index} is none of the {len(names)} classes", UNKNOWN
                )
            height, width = (int(side) for side in views[index].shape[:2])
            facts = {"label": number, "file_name": f"{arrays.stem}-{index:09d}.png", "height": height, "width": width}
            found.append(ClassedPixels(views[index], facts, files))
    source = {"packer": "imagefolder", "arrays": str(arrays), "array_labels": None if labels is None else str(labels)}
    return _pack(found, out, report, source, options)


def _pack(
    images: Sequence[ClassedImage | ClassedPixels],
    out: Path,
    report: LabelReport,
    source: dict[str, Any],
    options: PackOptions,
) -> Manifest:
    report.samples = len(images)
    report.counts.update(int(image.metadata["label"]) for image in images)
    report.close(options.get("say"))
    return pack_items(images, out, "image", report, source=source, **options)


def _load(arrays: Path, labels: Path | None) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    if arrays.suffix == ".npz" and labels is None:
        return _member(arrays, IMAGE_KEYS), _member(arrays, LABEL_KEYS)
    if arrays.suffix == ".npy" and labels is not None:
        return _npy(arrays), _npy(labels)
    raise DataError(f"{arrays}: expected an .npz with images and labels, or an .npy with images and --labels FILE.npy")


def _npy(path: Path) -> npt.NDArray[Any]:
    with _refused(path, ".npy"):
        # numpy opens by name, and would wait for a fifo's writer.
        os.close(open_regular(path))
        # Mapped, so that a header that promises more than the file holds allocates nothing.
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise DataError(f"{path}: expected one array of .npy format")
    return array


def _member(path: Path, keys: tuple[str, ...]) -> npt.NDArray[Any]:
    with (
        _refused(path, ".npz"),
        os.fdopen(open_regular(path), "rb") as file,
        zipfile.ZipFile(file) as archive,
    ):
        held = {name.removesuffix(".npy"): name for name in archive.namelist()}
        key = next((key for key in keys if key in held), None)
        if key is None:
            listed = ", ".join(sorted(held)[:10])
            raise DataError(f"{path}: holds {listed}; expected an array called {' or '.join(keys)}")
        info = archive.getinfo(held[key])
        if info.file_size > MAX_ARRAY_BYTES:
            raise DataError(f"{path}: {key} has more than {MAX_ARRAY_BYTES} bytes; split it")
        if info.file_size > max(
            _ANY_RATIO_BYTES, _MAX_RATIO * min(info.compress_size, os.fstat(file.fileno()).st_size)
        ):
            raise DataError(
                f"{path}: {key} would inflate more than {_MAX_RATIO} times to {info.file_size:,} bytes; if it is "
                "sound, save it again with numpy.savez"
            )
        with archive.open(info) as stream:
            _check_header(stream, info.file_size, f"{path}: {key}")
        with archive.open(info) as stream:
            array: npt.NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
        return array


@contextmanager
def _refused(path: Path, form: str) -> Iterator[None]:
    """Raise errors of numpy and the decompressors inside the block as ``DataError``."""
    try:
        yield
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; check the path") from None
    except _BROKEN_ARRAYS as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be read as {form} ({reason}); pickled objects are not accepted") from None


def _check_header(stream: Any, size: int, where: str) -> None:
    """Refuse an array that promises more than its file holds, before anything is allocated for it."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    promised = dtype.itemsize
    for side in shape:
        promised *= side
    if promised > size:
        raise DataError(f"{where}: promises {promised} bytes and holds {size}; save it again")


def _as_images(pixels: npt.NDArray[Any], where: str) -> npt.NDArray[np.uint8]:
    """Return (N, H, W, 3) or grey (N, H, W) uint8, as a view."""
    shape = pixels.shape
    if pixels.dtype != np.uint8:
        raise DataError(f"{where}: images of {pixels.dtype}; expected uint8, 0 to 255")
    if len(shape) == 2 and shape[1] == 3072:
        pixels = pixels.reshape(-1, 3, 32, 32)
    if pixels.ndim == 4 and pixels.shape[3] != 3 and pixels.shape[1] == 3:
        pixels = pixels.transpose(0, 2, 3, 1)
    if not (pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[3] == 3)):
        raise DataError(f"{where}: images {shape}; expected (N, H, W, 3), (N, 3, H, W), (N, H, W) or (N, 3072)")
    if not 0 < pixels.shape[1] * pixels.shape[2] <= MAX_PIXELS:
        raise LabelFault(f"{where}: images of {pixels.shape[2]}x{pixels.shape[1]} pixels; shrink them", SIZES)
    return pixels
