"""Pixels as other decoders see them, frames by number, and clear errors for everything broken."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision.io import ImageReadMode
from torchvision.io import decode_image as torchvision_decode

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.schema.data import ClipConfig
from vitgraft.data_shards import decode, images, video
from vitgraft.data_shards.pack.digits import encode_clip


def png(array: Any, mode: str | None = None) -> bytes:
    stream = io.BytesIO()
    image = Image.fromarray(array)
    (image if mode is None else image.convert(mode)).save(stream, "PNG")
    return stream.getvalue()


def test_images_as_torchvision_decodes_them(test_data: Path) -> None:
    for path in sorted((test_data / "camvid_mini" / "val").glob("*.png"))[:3]:
        data = path.read_bytes()
        theirs = torchvision_decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
        assert torch.equal(images.decode_image(data, "x"), theirs)
        assert images.image_size(path, "x") == tuple(theirs.shape[1:])


def test_grey_palette_alpha_and_16_bit_become_rgb() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    expected = torch.from_numpy(grey).expand(3, 3, 4)
    for data in (png(grey), png(grey, "P"), png(grey, "LA"), png(grey.astype(np.uint16) * 256)):
        assert torch.equal(images.decode_image(data, "x"), expected)


def photo(orientation: int, form: str = "PNG", size: tuple[int, int] = (4, 8)) -> bytes:
    """An image of random pixels whose EXIF says so."""
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    pixels = np.random.RandomState(orientation).randint(0, 255, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(stream, form, exif=exif, **({"lossless": True} if form == "WEBP" else {}))
    return stream.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_stored_pixels_turned_as_pillow_turns_them(form: str, orientation: int, tmp_path: Path) -> None:
    data = photo(orientation, form)
    displayed = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    header = images.read_header(data, "x")
    assert (header.size, header.orientation, header.displayed) == ((4, 8), orientation, displayed.shape[:2])
    assert images.decode_image(data, "x").shape == (3, 4, 8)
    turned = images.decode_image(data, "x", orientation)
    assert np.array_equal(turned.permute(1, 2, 0).numpy(), displayed)
    assert turned.permute(1, 2, 0).is_contiguous()
    (tmp_path / "a.jpg").write_bytes(data)
    loaded, applied = images.load_image(tmp_path / "a.jpg")
    assert applied == orientation
    assert torch.equal(loaded, turned)


def test_an_orientation_that_is_none_is_not_applied() -> None:
    for value in (0, 9, 300):
        assert images.read_header(photo(value), "x").orientation == 1
    with pytest.raises(DataError, match="orientation '9', expected 1 to 8"):
        images.orientation_of({"orientation": 9}, "set:1")


@pytest.mark.parametrize("data", [b"", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a" + b"\0" * 50])
def test_no_image(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^set:7: broken image .* replace it$"):
        images.decode_image(data, "set:7")


def test_a_cut_image_is_an_error_and_not_a_grey_area() -> None:
    data = png(np.random.RandomState(0).randint(0, 255, (50, 50, 3)).astype(np.uint8))
    with pytest.raises(DataError, match="broken image"):
        images.decode_image(data[: len(data) // 2], "x")


def test_images_are_refused_by_their_header_when_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(DataError, match="10x10 pixels, more than 99"):
        images.decode_image(png(np.zeros((10, 10), np.uint8)), "x")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: no such file"):
        images.decode_image(tmp_path / "none.png", str(tmp_path / "none.png"))


def test_label_maps_of_every_usual_encoding() -> None:
    ids = np.array([[0, 1, 2], [3, 255, 4]], dtype=np.uint8)
    palette = Image.fromarray(ids, mode="P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    stream = io.BytesIO()
    palette.save(stream, "PNG")
    for data in (png(ids), stream.getvalue(), png(ids.astype(np.uint16))):
        assert torch.equal(decode.decode_label(data, "x"), torch.from_numpy(ids.astype(np.int32)))
    assert decode.decode_label(png(np.full((2, 2), 999, np.uint16)), "x").unique().tolist() == [999]
    with pytest.raises(DataError, match="mode RGB"):
        decode.decode_label(png(np.arange(12, dtype=np.uint8).reshape(2, 2, 3)), "x")


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"NaN"])
def test_metadata_must_be_a_json_object(data: bytes) -> None:
    with pytest.raises(DataError, match="set:1: metadata"):
        decode.decode_json(data, "set:1")


@pytest.mark.parametrize(
    "change",
    [
        {"bbox": [0, 0, 1]},
        {"bbox": [0, 0, float("nan"), 1]},
        {"bbox": [0, 0, "x", 1]},
        {"class": 2},
        {"class": -1},
        {"class": 0.5},
        {"area": -1},
        {"area": float("nan")},
        {"area": 10**400},
        {"area": None},
        {"iscrowd": 2},
        {"iscrowd": True},
        {"segmentation": {"size": [9, 9], "counts": "1"}},
        {"segmentation": {"size": [4, 4]}},
        {"segmentation": 5},
    ],
)
def test_damaged_annotations(change: dict[str, Any]) -> None:
    good = {"id": 1, "bbox": [0, 0, 2, 2], "class": 1, "area": 4, "iscrowd": 0, "segmentation": None}
    decode.check_annotations({"height": 4, "width": 4, "annotations": [good]}, 2, "x")
    with pytest.raises(DataError, match="annotations are damaged"):
        decode.check_annotations({"height": 4, "width": 4, "annotations": [good | change]}, 2, "x")


def test_masks_and_boxes_in_their_place() -> None:
    from pycocotools import mask as coco_mask

    truth = np.zeros((5, 6), dtype=np.uint8)
    truth[1:4, 2:5] = 1
    counts = coco_mask.encode(np.asfortranarray(truth))["counts"].decode()
    items = [
        {"id": 1, "bbox": [2, 1, 3, 3], "segmentation": {"size": [5, 6], "counts": counts}},
        {"id": 2, "bbox": [2.0, 1.0, 3.0, 3.0], "segmentation": None},
    ]
    masks = decode.decode_masks(items, (5, 6), "x")
    assert torch.equal(masks, torch.from_numpy(np.stack([truth, truth])))
    items[0]["segmentation"] = {"size": [5, 6], "counts": "zzzzzzzz"}
    with pytest.raises(DataError, match="annotation 1: damaged mask"):
        decode.decode_masks(items, (5, 6), "x")


def clip(frames: int = 8, sampling: str = "dense", stride: int = 4) -> ClipConfig:
    return ClipConfig.model_validate({"frames": frames, "sampling": sampling, "stride": stride})


def test_frames_of_evaluation() -> None:
    assert decode.sample_frames(100, clip(4, stride=2), train=False) == [46, 48, 50, 52]
    assert decode.sample_frames(7, clip(4, stride=2), train=False) == [0, 2, 4, 6]
    assert decode.sample_frames(5, clip(4, stride=2), train=False) == [0, 2, 4, 4]
    assert decode.sample_frames(12, clip(4, "uniform"), train=False) == [1, 4, 7, 10]
    assert decode.sample_frames(2, clip(4, "uniform"), train=False) == [0, 1, 1, 1]
    assert decode.sample_frames(1, clip(3), train=False) == [0, 0, 0]


def test_frames_of_training_cover_what_they_may_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = [decode.sample_frames(10, clip(3, stride=3), True, generator) for _ in range(200)]
    assert {tuple(frames) for frames in dense} == {(0, 3, 6), (1, 4, 7), (2, 5, 8), (3, 6, 9)}
    uniform = [decode.sample_frames(9, clip(3, "uniform"), True, generator) for _ in range(300)]
    for segment in range(3):
        assert {frames[segment] for frames in uniform} == {3 * segment, 3 * segment + 1, 3 * segment + 2}


def test_real_videos_against_recorded_facts(test_data: Path) -> None:
    """Frame counts and mean colours of first, middle and last frame, recorded with an independent script."""
    root = test_data / "video_clips"
    facts = json.loads((root / "clips.json").read_text())
    checked = 0
    for fact in facts:
        if fact["file"].endswith("corrupted.mp4"):
            continue
        path = root / fact["file"]
        found = decode.probe_video(path, fact["file"])
        assert found["frames"] == fact["frames_decoded_pyav"], fact["file"]
        indices = [0, found["frames"] // 2, found["frames"] - 1]
        means = decode.decode_frames(path.read_bytes(), indices, fact["file"]).float().mean((2, 3))
        expected = torch.tensor([fact[f"mean_rgb_{name}"] for name in ("first", "middle", "last")])
        assert torch.allclose(means, expected, atol=0.05), fact["file"]
        checked += 1
    assert checked >= 19


def test_headers_that_promise_a_frame_too_many(test_data: Path) -> None:
    path = test_data / "video_clips" / "torchvision" / "TrumanShow_wave_f_nm_np1_fr_med_26.avi"
    assert decode.probe_video(path, "x")["frames"] == 48
    with pytest.raises(DataError, match=r"frame 48 cannot be decoded"):
        decode.decode_frames(path, [47, 48], "x")


def test_rotation_tags_are_applied(test_data: Path) -> None:
    """The same keyboard filmed with the phone held in four ways: after rotation its letters stand upright."""
    folder = test_data / "video_clips" / "decord"
    shapes = {a: decode.decode_frames(folder / f"video_{a}.mov", [0], "x").shape[2:] for a in (0, 90, 180, 270)}
    assert shapes == {0: (320, 568), 90: (568, 320), 180: (320, 568), 270: (568, 320)}
    for angle, shape in shapes.items():
        facts = decode.probe_video(folder / f"video_{angle}.mov", "x")
        assert (facts["height"], facts["width"]) == tuple(shape)


def test_rotation_goes_the_right_way(tmp_path: Path, test_data: Path) -> None:
    """FFmpeg's own filter graph is the judge: transpose=clock for a tag of 90 degrees."""
    import av
    import av.filter

    path = test_data / "video_clips" / "decord" / "video_90.mov"
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0))
        graph = av.filter.Graph()
        source = graph.add_buffer(template=container.streams.video[0])
        turn, sink = graph.add("transpose", "clock"), graph.add("buffersink")
        source.link_to(turn)
        turn.link_to(sink)
        graph.configure()
        graph.push(frame)
        expected = graph.pull().to_ndarray(format="rgb24")
    ours = decode.decode_frames(path, [0], "x")[0].permute(1, 2, 0).numpy()
    assert np.abs(ours.astype(int) - expected.astype(int)).mean() < 3


def test_a_corrupted_video_is_one_line(test_data: Path) -> None:
    path = test_data / "video_clips" / "decord" / "corrupted.mp4"
    for read in (lambda: decode.probe_video(path, str(path)), lambda: decode.decode_frames(path, [9999], str(path))):
        with pytest.raises(DataError, match=r"corrupted\.mp4: broken video .* replace it$"):
            read()


@pytest.mark.parametrize("data", [b"", b"no video", b"RIFF\0\0\0\0AVI LIST"])
def test_no_video(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^set:3: .*video"):
        decode.probe_video(data, "set:3")


def test_frames_may_repeat_and_come_by_number() -> None:
    frames = [np.full((32, 32, 3), 20 * i, dtype=np.uint8) for i in range(10)]
    found = decode.decode_frames(encode_clip(frames, 10), [0, 3, 9, 9], "x").float().mean((1, 2, 3))
    assert torch.allclose(found, torch.tensor([0.0, 60.0, 180.0, 180.0]), atol=4)


class StandIn:
    """torchcodec's VideoDecoder as documented, over PyAV: what it claims may be more than it can decode."""

    promised = 0
    late = 0
    opened = 0

    def __init__(self, source: Any, *, num_ffmpeg_threads: int, seek_mode: str) -> None:
        assert (num_ffmpeg_threads, seek_mode) == (1, "exact")
        StandIn.opened += 1
        try:
            self._video = video.PyAVVideo(Path(source) if isinstance(source, str) else source, "stand-in")
            height, width = self._video.size
        except DataError as error:
            raise RuntimeError(f"Could not open: {error}") from None
        fps = self._video.fps or None
        self.metadata = SimpleNamespace(width=width, height=height, average_fps=fps, begin_stream_seconds=0.0)

    def __len__(self) -> int:
        return self._video.length + StandIn.promised

    def get_frame_at(self, index: int) -> Any:
        return SimpleNamespace(data=self.get_frames_at([index]).data[0], pts_seconds=(index + StandIn.late) / 30)

    def get_frames_at(self, indices: list[int]) -> Any:
        if max(indices) >= len(self):
            raise IndexError(f"Index {max(indices)} is out of bounds")
        try:
            return SimpleNamespace(
                data=decode.decode_frames(self._video, [max(index - StandIn.late, 0) for index in indices], "x")
            )
        except DataError as error:
            raise RuntimeError(f"Requested next frame while there are no more frames: {error}") from None


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Installs a torchcodec; ``promised``: frames at the end that hold nothing; ``late``: by how many frames each is
    shown after its packet, and so taken for an earlier one."""

    def install(promised: int = 0, late: int = 0, fields: Sequence[str] = ("rotation",)) -> None:
        decoders: Any = ModuleType("torchcodec.decoders")
        decoders.VideoDecoder = StandIn
        decoders.VideoStreamMetadata = SimpleNamespace(__dataclass_fields__=dict.fromkeys(fields))
        monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
        monkeypatch.setattr(StandIn, "promised", promised)
        monkeypatch.setattr(StandIn, "late", late)
        monkeypatch.setattr(StandIn, "opened", 0)
        video._torchcodec.cache_clear()

    yield install  # type: ignore[misc]
    monkeypatch.undo()
    video._torchcodec.cache_clear()


NAMES = ["torchvision/TrumanShow_wave_f_nm_np1_fr_med_26.avi", "decord/flipping_a_pancake.mkv", "decord/video_90.mov"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("promised", [0, 2])
def test_torchcodec_gives_what_pyav_gives(
    test_data: Path, stand_in: Callable[..., None], name: str, promised: int
) -> None:
    stand_in(promised)
    path = test_data / "video_clips" / name
    for source in (path, path.read_bytes()):
        ours, theirs = video.open_video(source, "x"), video.open_video(source, "x", "pyav")
        assert (ours.length, ours.fps, ours.size) == (theirs.length, theirs.fps, theirs.size)
        last = theirs.length - 1
        assert torch.equal(
            decode.decode_frames(ours, [0, last, last], "x"), decode.decode_frames(theirs, [0, last, last], "x")
        )
    assert StandIn.opened == 2
    # What a packed data set says of its videos does not depend on torchcodec.
    decode.probe_video(path, "x")
    assert StandIn.opened == 2


@pytest.mark.parametrize("decoder", [None, "torchcodec"])
def test_what_torchcodec_would_number_wrongly_pyav_decodes(
    test_data: Path, stand_in: Callable[..., None], decoder: Any
) -> None:
    stand_in(promised=1, late=2)
    path = test_data / "video_clips" / NAMES[0]
    ours, theirs = video.open_video(path, "x", decoder), video.open_video(path, "x", "pyav")
    assert ours.length == theirs.length == 48
    assert torch.equal(decode.decode_frames(ours, [0, 20, 47], "x"), decode.decode_frames(theirs, [0, 20, 47], "x"))
    assert StandIn.opened == 1


def test_what_torchcodec_cannot_read_pyav_may(
    test_data: Path, stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such codec")

    monkeypatch.setattr(StandIn, "get_frames_at", refuse)
    path = test_data / "video_clips" / "decord" / "video_0.mov"
    assert torch.equal(decode.decode_frames(path, [1], "x"), decode.decode_frames(path, [1], "x", "pyav"))
    with pytest.raises(DataError, match=r"^x: broken video \(no such codec\); .* replace it$"):
        decode.decode_frames(path, [1], "x", "torchcodec")


@pytest.mark.parametrize("decoder", [None, "torchcodec"])
def test_torchcodec_with_broken_and_short_videos(test_data: Path, stand_in: Callable[..., None], decoder: Any) -> None:
    stand_in()
    folder = test_data / "video_clips" / "decord"
    for path, indices in ((folder / "corrupted.mp4", [9999]), (folder / "video_0.mov", [2, 3])):
        with pytest.raises(DataError, match=r"^x: "):
            decode.decode_frames(path, indices, "x", decoder)
    with pytest.raises(DataError, match="no such file"):
        decode.decode_frames(folder / "none.mp4", [0], "x", decoder)


@pytest.mark.parametrize("fields", [(), None])
def test_without_torchcodec(
    test_data: Path, stand_in: Callable[..., None], monkeypatch: pytest.MonkeyPatch, fields: Any
) -> None:
    """Absent, or older than 0.11, which does not turn frames upright: PyAV decodes, and asking for it is an error."""
    if fields is None:
        stand_in()
        monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
        video._torchcodec.cache_clear()
    else:
        stand_in(fields=fields)
    path = test_data / "video_clips" / "decord" / "video_90.mov"
    assert isinstance(video.open_video(path, "x"), video.PyAVVideo)
    with pytest.raises(ConfigError, match=r"data\.clip\.decoder: torchcodec 0\.11 .* set the key to pyav$"):
        video.open_video(path, "x", "torchcodec")


def test_the_real_torchcodec_where_it_is_installed(test_data: Path) -> None:
    pytest.importorskip("torchcodec", exc_type=ImportError)
    root = test_data / "video_clips"
    for fact in json.loads((root / "clips.json").read_text()):
        if fact["file"].endswith("corrupted.mp4"):
            continue
        ours, theirs = (video.open_video(root / fact["file"], "x", name) for name in (None, "pyav"))
        assert (ours.length, ours.size) == (theirs.length, theirs.size), fact["file"]
        indices = [0, ours.length // 2, ours.length - 1]
        difference = (
            decode.decode_frames(ours, indices, "x").float() - decode.decode_frames(theirs, indices, "x").float()
        )
        assert float(difference.abs().mean()) < 2, fact["file"]


def test_the_recipe_names_the_decoder(packed: dict[str, Path], configure: Any, stand_in: Callable[..., None]) -> None:
    from vitgraft.data_shards.dataset import PackedDataset

    stand_in()
    opened = []
    for decoder in (None, "torchcodec", "pyav"):
        clip = {"frames": 4, "stride": 2, "decoder": decoder}
        dataset = PackedDataset(packed["video"], configure(packed["video"], clip=clip), "video")
        dataset.train_batch(dataset.plan(0).entries(0, 2))
        dataset.eval_batch([0])
        opened.append(StandIn.opened)
    assert opened == [3, 6, 6]


def _label_as(mode: str, format: str = "PNG", **options: Any) -> tuple[bytes, np.ndarray]:
    ids = np.arange(12, dtype=np.uint8).reshape(3, 4)
    stream = io.BytesIO()
    Image.fromarray(ids).convert(mode).save(stream, format, **options)
    return stream.getvalue(), ids


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_label_maps_that_were_saved_with_equal_channels(mode: str) -> None:
    data, ids = _label_as(mode)
    assert np.array_equal(decode.decode_label(data, "label").numpy(), ids)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_label_maps_in_formats_that_change_ids(format: str) -> None:
    """Also under another name: a grey JPEG called .png would be read with wrong ids at every edge."""
    data, _ = _label_as("L", format)
    with pytest.raises(DataError, match="label: label maps in JPEG or WebP are refused, as they change ids"):
        decode.decode_label(data, "label")


def test_label_maps_in_colours_or_with_holes() -> None:
    pixels = np.zeros((3, 4, 4), np.uint8)
    pixels[..., 3] = 255
    pixels[1, 2, :3] = 7, 7, 8
    for channels, mode in ((3, "RGB"), (4, "RGBA")):
        stream = io.BytesIO()
        Image.fromarray(pixels[..., :channels]).save(stream, "PNG")
        with pytest.raises(DataError, match=rf"mode {mode}, 7 7 8 at x 2, y 1.*--colours"):
            decode.decode_label(stream.getvalue(), "label")
    pixels[1, 2] = 7, 7, 7, 254
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    with pytest.raises(DataError, match="transparent pixels"):
        decode.decode_label(stream.getvalue(), "label")


@pytest.mark.parametrize(
    "error",
    [AssertionError(), KeyError("x"), ZeroDivisionError("y"), RuntimeError("z"), TypeError("a\nb"), IndexError()],
)
def test_whatever_pillow_raises_of_a_damaged_file_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise error

    data = png(np.zeros((3, 4), np.uint8))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", refuse)
    for read in (images.decode_image, decode.decode_label, images.encode_png, images.value_range):
        with pytest.raises(DataError, match=r"^x: broken image \(.+\); expected") as caught:
            read(data, "x")
        assert "\n" not in str(caught.value)


def test_an_image_that_memory_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise MemoryError

    data = png(np.zeros((3, 4), np.uint8))
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", refuse)
    with pytest.raises(DataError, match="x: decoding takes more memory than there is"):
        images.decode_image(data, "x")
