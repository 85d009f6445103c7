"""Image files as people have them: turned by EXIF, in any format, of 12 bits, cut short."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from typer.testing import CliRunner

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.images import decode_image, load_image, parse_range
from vitgraft.data_shards.manifest import Manifest, read_manifest
from vitgraft.data_shards.pack.bdd100k import pack_bdd100k
from vitgraft.data_shards.pack.coco import pack_coco
from vitgraft.data_shards.pack.imagefolder import pack_imagefolder
from vitgraft.data_shards.pack.items import PackOptions
from vitgraft.data_shards.pack.panoptic import pack_panoptic
from vitgraft.data_shards.pack.semantic import pack_semantic
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import RawSample, ShardReader
from vitgraft.launch.shards_cli import shards


def save(path: Path, orientation: int = 1, size: tuple[int, int] = (12, 16), mode: str = "RGB", **options: Any) -> Any:
    """Save random pixels of (height, width) under an EXIF orientation; returns them as Pillow displays them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.random.RandomState(orientation).randint(0, 255, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, exif=exif, **options)
    return np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))


def coco_file(path: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    """A COCO file of these images, each with one box."""
    tree: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "thing"}]}
    for number, (name, (height, width)) in enumerate(sizes.items(), 1):
        tree["images"].append({"id": number, "file_name": name, "height": height, "width": width})
        box = {"id": number, "image_id": number, "category_id": 1, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0}
        tree["annotations"].append(box)
    path.write_text(json.dumps(tree))
    return path


def samples(folder: Path) -> list[tuple[RawSample, dict[str, Any]]]:
    reader = ShardReader(folder, read_manifest(folder))
    found = [reader.read(number) for number in range(len(reader))]
    return [(raw, json.loads(raw.members["json"])) for raw in found]


def repaired(manifest: Manifest) -> dict[str, int]:
    return {what: found["count"] for what, found in manifest.source["label_report"]["repaired"].items()}


def loaded(folder: Path, configure: Any, kind: Any) -> list[torch.Tensor]:
    """The images (H, W, 3) that training and evaluation see."""
    dataset = PackedDataset(folder, configure(folder), kind, train=False)
    found = []
    for number in range(len(dataset)):
        raw = dataset.reader.read(number)
        found.append(dataset._pixels(raw, dataset._metadata(raw)).permute(1, 2, 0))
    return found


def test_images_that_are_annotated_as_displayed_are_turned(tmp_path: Path, configure: Any) -> None:
    shown = [save(tmp_path / "img" / f"{n}.png", n) for n in range(1, 9)]
    sizes = {f"{n}.png": image.shape[:2] for n, image in zip(range(1, 9), shown, strict=True)}
    lines: list[str] = []
    out = tmp_path / "out"
    manifest = pack_coco(tmp_path / "img", coco_file(tmp_path / "a.json", sizes), out, say=lines.append)
    assert repaired(manifest) == {"turned": 7}
    assert (
        "EXIF: the annotations of 3 images fit both ways up: packed as they are displayed; the other way: " in lines[0]
    )
    assert [facts.get("orientation", 1) for _, facts in samples(out)] == list(range(1, 9))
    assert [raw.members["png"] for raw, _ in samples(out)] == [
        (tmp_path / "img" / f"{n}.png").read_bytes() for n in range(1, 9)
    ]
    for image, expected in zip(loaded(out, configure, "detection"), shown, strict=True):
        assert np.array_equal(image.numpy(), expected)
    assert verify(out).ok
    report = inspect(out, 8, tmp_path / "pictures")
    assert report.unreadable == {}
    assert report.sizes == {(12, 16): 4, (16, 12): 4}


def test_images_that_are_annotated_as_stored_stay_so(tmp_path: Path, configure: Any) -> None:
    for number in (3, 6, 8):
        save(tmp_path / "img" / f"{number}.png", number)
    lines: list[str] = []
    annotations = coco_file(tmp_path / "a.json", {f"{n}.png": (12, 16) for n in (3, 6, 8)})
    manifest = pack_coco(tmp_path / "img", annotations, tmp_path / "out", say=lines.append)
    # Who saw two images as they are stored saw the third so, too, whose size does not tell.
    assert repaired(manifest) == {}
    assert lines[0] == "EXIF: 2 images are packed as they are stored, not as they are displayed"
    assert "1 images fit both ways up: packed as they are stored; the other way: --exif apply" in lines[1]
    stored = [decode_image(tmp_path / "img" / f"{n}.png", "x").permute(1, 2, 0) for n in (3, 6, 8)]
    assert all(map(torch.equal, loaded(tmp_path / "out", configure, "detection"), stored))
    with pytest.raises(DataError, match=r"6\.png: image 2 is 12x16 pixels under its EXIF orient"):
        pack_coco(tmp_path / "img", annotations, tmp_path / "out", exif="apply", overwrite=True)


def test_exif_can_be_ignored(tmp_path: Path) -> None:
    save(tmp_path / "img" / "a.png", 3)
    annotations = coco_file(tmp_path / "a.json", {"a.png": (12, 16)})
    assert repaired(pack_coco(tmp_path / "img", annotations, tmp_path / "out", exif="ignore")) == {}
    assert "orientation" not in samples(tmp_path / "out")[0][1]


@pytest.mark.parametrize("name", ["exif_turned_180", "exif_displayed_size"])
def test_photos_of_a_phone(name: str, fault_data: Path, tmp_path: Path, configure: Any) -> None:
    folder = fault_data / name
    manifest = pack_coco(folder / "img", folder / "ann.json", tmp_path / "out")
    assert repaired(manifest) == {"turned": 3}
    colours = {"red": 0, "green": 1, "blue": 2}
    images = loaded(tmp_path / "out", configure, "detection")
    for image, (_, facts) in zip(images, samples(tmp_path / "out"), strict=True):
        for item in facts["annotations"]:
            x, y, w, h = map(int, item["bbox"])
            middle = image[y + h // 2, x + w // 2].tolist()
            assert np.argmax(middle) == colours[manifest.classes[item["class"]]]


def pack_labels(packer: str, folder: Path, size: tuple[int, int], **options: Any) -> Manifest:
    """Pack an image of 12 x 16 stored pixels, displayed 16 x 12, with a label map of ``size``."""
    save(folder / "img" / "a.png", 6)
    (folder / "lab").mkdir(exist_ok=True)
    out, ids = folder / "out", np.zeros(size, np.uint8)
    ids[0] = 1
    if packer == "semantic":
        Image.fromarray(ids).save(folder / "lab" / "a.png")
        return pack_semantic(folder / "img", folder / "lab", out, ["x", "y"], **options)
    if packer == "bdd100k":
        Image.fromarray(ids).save(folder / "lab" / "a_train_id.png")
        return pack_bdd100k([folder / "img"], folder / "lab", out, task="semantic", **options)
    Image.fromarray(np.stack([ids + 1, ids * 0, ids * 0], axis=2)).save(folder / "lab" / "a.png")
    segments = [{"id": 1, "category_id": 1}, {"id": 2, "category_id": 2}]
    tree = {
        "images": [{"id": 1, "file_name": "a.png", "height": size[0], "width": size[1]}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "x", "isthing": 1}, {"id": 2, "name": "y", "isthing": 0}],
    }
    (folder / "a.json").write_text(json.dumps(tree))
    return pack_panoptic(folder / "img", folder / "a.json", out, masks=folder / "lab", **options)


@pytest.mark.parametrize("packer", ["semantic", "bdd100k", "panoptic"])
def test_the_size_of_a_label_map_says_which_way_up_its_image_is(packer: str, tmp_path: Path, configure: Any) -> None:
    for size, orientation in (((16, 12), 6), ((12, 16), 1)):
        manifest = pack_labels(packer, tmp_path, size, overwrite=True)
        assert repaired(manifest) == ({"turned": 1} if orientation == 6 else {})
        ((_, facts),) = samples(tmp_path / "out")
        assert (facts.get("orientation", 1), facts["height"], facts["width"]) == (orientation, *size)
        assert verify(tmp_path / "out").ok
        assert loaded(tmp_path / "out", configure, "semantic")[0].shape[:2] == size
    with pytest.raises(DataError, match="orientation 6"):
        pack_labels(packer, tmp_path, (12, 16), exif="apply", overwrite=True)


def test_boxes_without_stated_sizes_and_classes_go_with_the_displayed_image(tmp_path: Path, configure: Any) -> None:
    shown = save(tmp_path / "img" / "cat" / "a.png", 6)
    manifest = pack_imagefolder(tmp_path / "img", tmp_path / "images")
    assert repaired(manifest) == {"turned": 1}
    assert np.array_equal(loaded(tmp_path / "images", configure, "image")[0].numpy(), shown)
    frames = [
        {"name": "a.jpg", "labels": [{"id": "1", "category": "car", "box2d": {"x1": 0, "y1": 13, "x2": 5, "y2": 15}}]}
    ]
    (tmp_path / "det.json").write_text(json.dumps(frames))
    manifest = pack_bdd100k([tmp_path / "img"], tmp_path / "det.json", tmp_path / "boxes")
    assert repaired(manifest) == {"turned": 1}
    assert np.array_equal(loaded(tmp_path / "boxes", configure, "detection")[0].numpy(), shown)


FORMATS = {
    "a.bmp": {},
    "b.tif": {},
    "c.tif": {"compression": "tiff_lzw"},
    "d.gif": {},
    "e.ppm": {},
    "f.tga": {},
    "g.jp2": {"irreversible": False},
    "h.pcx": {},
}


def test_images_of_other_formats_are_packed_as_png(tmp_path: Path, configure: Any) -> None:
    shown = {name: save(tmp_path / "img" / name, 6, **options) for name, options in FORMATS.items()}
    sizes = {name: image.shape[:2] for name, image in shown.items()}
    manifest = pack_coco(tmp_path / "img", coco_file(tmp_path / "a.json", sizes), tmp_path / "out", decode=True)
    assert repaired(manifest)["converted"] == len(FORMATS)
    assert {extension for raw, _ in samples(tmp_path / "out") for extension in raw.members} == {"png", "json"}
    for image, expected in zip(loaded(tmp_path / "out", configure, "detection"), shown.values(), strict=True):
        assert np.array_equal(image.numpy(), expected)


def test_images_of_other_formats_in_the_other_packers(tmp_path: Path) -> None:
    save(tmp_path / "img" / "a.bmp")
    (tmp_path / "lab").mkdir()
    Image.fromarray(np.zeros((12, 16), np.uint8)).save(tmp_path / "lab" / "a.png")
    assert repaired(pack_semantic(tmp_path / "img", tmp_path / "lab", tmp_path / "1", ["x"])) == {"converted": 1}
    assert "png" in samples(tmp_path / "1")[0][0].members
    box = {"category": "car", "box2d": {"x1": 1, "y1": 1, "x2": 9, "y2": 9}}
    (tmp_path / "det.json").write_text(json.dumps([{"name": "a.bmp", "labels": [box]}]))
    assert repaired(pack_bdd100k([tmp_path / "img"], tmp_path / "det.json", tmp_path / "2")) == {"converted": 1}
    save(tmp_path / "folders" / "cat" / "a.tiff")
    save(tmp_path / "folders" / "dog" / "a.jpg")
    manifest = pack_imagefolder(tmp_path / "folders", tmp_path / "3")
    assert (manifest.samples, repaired(manifest)) == (2, {"converted": 1})


def test_the_first_page_counts_and_is_said_to(tmp_path: Path, configure: Any) -> None:
    pages = [Image.new("RGB", (16, 12), colour) for colour in ("red", "green")]
    (tmp_path / "img").mkdir()
    for name in ("a.tif", "b.gif", "c.webp", "d.png"):
        options = {"lossless": True} if name == "c.webp" else {}
        pages[0].save(tmp_path / "img" / name, save_all=True, append_images=pages[1:], **options)
    annotations = coco_file(tmp_path / "a.json", dict.fromkeys(("a.tif", "b.gif", "c.webp", "d.png"), (12, 16)))
    manifest = pack_coco(tmp_path / "img", annotations, tmp_path / "out")
    assert repaired(manifest) == {"converted": 2, "first of several frames or pages": 4}
    assert all((image == torch.tensor([255, 0, 0])).all() for image in loaded(tmp_path / "out", configure, "detection"))


def grey(folder: Path, values: Any, name: str = "a.png") -> Path:
    """An image of these values with its COCO file."""
    folder.mkdir(exist_ok=True)
    Image.fromarray(values).save(folder / name)
    return coco_file(folder.parent / "a.json", {name: values.shape})


def test_values_of_12_bits_need_a_range(tmp_path: Path, configure: Any) -> None:
    values = np.linspace(0, 4095, 12 * 16).astype(np.uint16).reshape(12, 16)
    annotations = grey(tmp_path / "img", values)
    with pytest.raises(DataError, match=r"1 16-bit grey images hold values from 0 to 4095 of .*; pass --range 0,4095"):
        pack_coco(tmp_path / "img", annotations, tmp_path / "out")
    manifest = pack_coco(tmp_path / "img", annotations, tmp_path / "out", values=(0, 4095))
    assert repaired(manifest) == {"converted": 1}
    expected = np.rint(values / 4095 * 255)
    (image,) = loaded(tmp_path / "out", configure, "detection")
    assert np.array_equal(image.numpy(), np.repeat(expected[..., None], 3, axis=2))


def test_values_that_use_16_bits_are_packed_and_told(tmp_path: Path, configure: Any) -> None:
    values = np.linspace(0, 65535, 12 * 16).astype(np.uint16).reshape(12, 16)
    for name in ("a.png", "a.tif"):
        lines: list[str] = []
        annotations = grey(tmp_path / "img", values, name)
        pack_coco(tmp_path / "img", annotations, tmp_path / "out", say=lines.append, overwrite=True)
        assert lines.pop(0) == "1 16-bit grey images hold values from 0 to 65535 of 0 to 65535"
        (image,) = loaded(tmp_path / "out", configure, "detection")
        assert np.array_equal(image[..., 0].numpy(), values >> 8)


def test_values_of_32_bits_need_a_range(tmp_path: Path, configure: Any) -> None:
    values = np.linspace(0, 1, 12 * 16).astype(np.float32).reshape(12, 16)
    annotations = grey(tmp_path / "img", values, "a.tif")
    with pytest.raises(DataError, match="values of 32 bits, 0 to 1; say with --range LOW,HIGH"):
        pack_coco(tmp_path / "img", annotations, tmp_path / "out")
    pack_coco(tmp_path / "img", annotations, tmp_path / "out", values=(0, 1))
    (image,) = loaded(tmp_path / "out", configure, "detection")
    assert np.array_equal(image[..., 0].numpy(), np.rint(values.astype(np.float64) * 255))


@pytest.mark.parametrize("text", ["1,1", "2,1", "0,nan", "-inf,1", "5", "a,b", "1,2,3", ","])
def test_a_range_that_is_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--range .* expected the values of black and of white"):
        parse_range(text)
    assert parse_range("-1.5,4095") == (-1.5, 4095)
    assert parse_range("") is None


def cut_jpeg(folder: Path) -> Path:
    """Two images, the second of which ends too early, with their COCO file."""
    save(folder / "img" / "a.jpg", size=(120, 160))
    stream = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (120, 160, 3)).astype(np.uint8)).save(stream, "JPEG")
    (folder / "img" / "b.jpg").write_bytes(stream.getvalue()[: len(stream.getvalue()) // 2])
    return coco_file(folder / "a.json", {"a.jpg": (120, 160), "b.jpg": (120, 160)})


def test_decoding_finds_what_is_cut_short(tmp_path: Path) -> None:
    annotations = cut_jpeg(tmp_path)
    options: PackOptions = {"overwrite": True}
    assert pack_coco(tmp_path / "img", annotations, tmp_path / "out", **options).samples == 2
    with pytest.raises(DataError, match=r"b\.jpg: broken image .*truncated"):
        pack_coco(tmp_path / "img", annotations, tmp_path / "out", decode=True, **options)
    manifest = pack_coco(tmp_path / "img", annotations, tmp_path / "out", decode=True, on_error="skip", **options)
    assert manifest.samples == 1
    assert verify(tmp_path / "out").ok


def test_what_was_damaged_before_packing_is_told_so(tmp_path: Path) -> None:
    annotations = cut_jpeg(tmp_path)
    pack_coco(tmp_path / "img", annotations, tmp_path / "out")
    report = verify(tmp_path / "out")
    assert list(report.bad_samples) == ["000000001"]
    assert "or pack with --decode --drop-faulty, which leaves them out" in report.remedy
    drawn = inspect(tmp_path / "out", 2, tmp_path / "pictures")
    assert drawn.pictures == [tmp_path / "pictures" / "000000000.png"] == list((tmp_path / "pictures").iterdir())
    assert list(drawn.unreadable) == ["000000001"]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--out .*file.* cannot be written"):
        inspect(tmp_path / "out", 1, tmp_path / "file")


def test_the_truncated_photo(fault_data: Path, tmp_path: Path) -> None:
    folder = fault_data / "truncated_jpeg"
    with pytest.raises(DataError, match=r"001\.jpg: broken image"):
        pack_coco(folder / "img", folder / "ann.json", tmp_path / "out", decode=True)
    manifest = pack_coco(folder / "img", folder / "ann.json", tmp_path / "out", decode=True, on_error="skip")
    assert manifest.samples == 3


def test_the_command_line_passes_on_how_images_are_read(fault_data: Path, tmp_path: Path) -> None:
    def pack(name: str, *options: str) -> Any:
        folder, out = fault_data / name, str(tmp_path / "out")
        words = ["pack", "coco", "--images", str(folder / "img"), "--annotations", str(folder / "ann.json")]
        return CliRunner().invoke(shards, [*words, "--out", out, "--overwrite", *options])

    assert pack("exif_turned_180", "--exif", "ignore").exit_code == 0
    assert repaired(read_manifest(tmp_path / "out")) == {}
    assert pack("png_12bit", "--range", "0,4095").exit_code == 0
    assert repaired(read_manifest(tmp_path / "out")) == {"converted": 4}
    assert isinstance(pack("png_12bit").exception, DataError)
    assert isinstance(pack("truncated_jpeg", "--decode").exception, DataError)
    for text in ("5", "a,b", "1,2,3", "9,0"):
        assert isinstance(pack("png_12bit", "--range", text).exception, ConfigError)
    assert pack("images_tiff").exit_code == 0


def test_colours_of_12_bits_are_a_fault(tmp_path: Path) -> None:
    (tmp_path / "img").mkdir()
    save_colours(tmp_path / "img" / "a.png", np.full((12, 16, 3), 4000, np.uint16))
    annotations = coco_file(tmp_path / "a.json", {"a.png": (12, 16)})
    with pytest.raises(DataError, match=r"1 16-bit colour images .* of 0 to 255 in the upper 8 bits.*; convert them"):
        pack_coco(tmp_path / "img", annotations, tmp_path / "out")
    save_colours(tmp_path / "img" / "a.png", np.linspace(0, 65535, 576).astype(np.uint16).reshape(12, 16, 3))
    pack_coco(tmp_path / "img", annotations, tmp_path / "out")


def save_colours(path: Path, pixels: Any) -> None:
    """A PNG of (H, W, 3) uint16, which Pillow does not write."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    path.write_bytes(data)


def test_a_loose_image_that_would_be_black_asks_for_the_range(tmp_path: Path) -> None:
    values = np.linspace(0, 4095, 12 * 16).astype(np.uint16).reshape(12, 16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"would be all but black; pass --range 0,4095, or the range with which"):
        load_image(tmp_path / "a.png")
    image, _ = load_image(tmp_path / "a.png", (0, 4095))
    assert np.array_equal(image[0].numpy(), np.rint(values / 4095 * 255))
