"""What a sample's JSON says is not trusted: every reader answers with one line that names the sample."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.batch import Entry
from vitgraft.data_shards.dataset import PackedDataset
from vitgraft.data_shards.draw import draw_sample
from vitgraft.data_shards.frames import frame_name
from vitgraft.data_shards.pack.reencode import encode_mp4
from vitgraft.data_shards.pack.writer import DatasetWriter
from vitgraft.data_shards.report import inspect, verify

WRONG: list[Any] = [None, "1", [], {}, True, 1.5, 0, -1, 2**31, 2**45, 2**70, 10**400]
WRONG += [float("nan"), float("inf")]


def write(folder: Path, kind: Any, members: dict[str, bytes], metadata: dict[str, Any]) -> Path:
    with DatasetWriter(folder, kind, ["a", "b"], overwrite=True) as writer:
        writer.add(members | {"extra": b""}, metadata)
    return folder


def image() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.zeros((40, 48, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


KINDS = {
    "frames": ["video", "frames"],
    "fps": ["frames"],
    "label": ["video", "image"],
    "height": ["image", "detection"],
    "width": ["video", "image"],
    "orientation": ["image", "semantic"],
    "annotations": ["detection"],
}
TAKEN = {"label": ["0"], "annotations": ["[]", "{}"]}
VIDEO = encode_mp4([np.zeros((40, 48, 3), np.uint8)] * 3, 10, crf=40)
SETS: dict[str, tuple[dict[str, bytes], dict[str, Any]]] = {
    "video": ({"mp4": VIDEO}, {"frames": 3, "fps": 10.0, "label": 1}),
    "frames": ({frame_name(number): image() for number in range(3)}, {"frames": 3, "fps": 10.0, "label": 1}),
    "image": ({"png": image()}, {"label": 1}),
    "semantic": ({"png": image(), "label.png": image()}, {}),
    "detection": ({"png": image()}, {"annotations": []}),
}


@pytest.mark.parametrize("key", KINDS)
def test_wrong_values(key: str, tmp_path: Path, configure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Canonical JSON, which packers write, knows no NaN: others may.
    monkeypatch.setattr("vitgraft.data_shards.pack.writer.canonical_json", json.dumps)
    for name, wrong in itertools.product(KINDS[key], WRONG):
        kind: Any = "video" if name == "frames" else name
        members, facts = SETS[name]
        folder = write(tmp_path / "set", kind, members, {"height": 40, "width": 48, **facts, key: wrong})
        dataset = PackedDataset(folder, configure(folder), kind)
        with contextlib.suppress(DataError):
            dataset.train_batch([Entry(0, 0, 0, 0)])
        raw = dataset.reader.read(0)
        with contextlib.suppress(DataError):
            draw_sample(raw, dataset.manifest)
        found = PackedDataset(folder, configure(folder), kind, train=False).eval_batch([0])
        reasons = [*verify(folder).bad_samples.values(), *inspect(folder, 1, tmp_path / "pictures").unreadable.values()]
        for reason in [*reasons, *(line for _, line in found.errors)]:
            assert len(reason) < 500
            assert "\n" not in reason
        assert reasons or key == "fps" or repr(wrong) in TAKEN.get(key, ()), (name, wrong)
