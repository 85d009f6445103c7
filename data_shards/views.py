"""Evaluation of a video by several views: places in time × places along the long side (multi-clip, multi-crop)."""

from __future__ import annotations

import itertools

from torch import Tensor

from vitgraft.configs.schema.data import ClipConfig
from vitgraft.data_shards.geometry import Sample, crop
from vitgraft.data_shards.transforms import Prepared, Transforms


def clips_of(count: int, clip: ClipConfig, clips: int) -> list[list[int]]:
    """Return the frame numbers of each clip of a video of ``count`` frames; one clip is that of ``sample_frames``.

    dense: the places where a window may start are cut into ``clips`` equal parts, and the middle of each starts one.
    uniform: so are the frames of each segment, and the n-th clip has the middle of every n-th part. Where the video is
    too short, its last frame is repeated, and clips may be alike.
    """

    def middles(low: int, high: int) -> list[int]:
        edges = [low + i * (high - low) // clips for i in range(clips + 1)]
        return [max(a, (a + b - 1) // 2) for a, b in itertools.pairwise(edges)]

    last = count - 1
    if clip.sampling == "dense":
        span = (clip.frames - 1) * clip.stride + 1
        starts = middles(0, max(count - span, 0) + 1)
        return [[min(start + i * clip.stride, last) for i in range(clip.frames)] for start in starts]
    if count < clip.frames:
        return [[min(i, last) for i in range(clip.frames)]] * clips
    segments = itertools.pairwise(i * count // clip.frames for i in range(clip.frames + 1))
    return [list(frames) for frames in zip(*(middles(low, high) for low, high in segments), strict=True)]


def crops_of(clip: Tensor, before: tuple[int, int], transforms: Transforms, crops: int) -> list[Prepared]:
    """Return crops of a clip (T, 3, h, w) uint8, each filling the canvas.

    The clip covers the canvas (:func:`~vitgraft.data_shards.geometry.covering`): on a square one its short side has the
    canvas's side. The crops lie evenly along what reaches beyond: 1: the centre; 3: left, centre and right, or top,
    centre and bottom.

    Args:
        before: the (height, width) that it had before it was resized to that.
    """
    canvas, covered = transforms.canvas, Sample(clip)
    scale = covered.size[0] / before[0], covered.size[1] / before[1]
    spare = covered.size[0] - canvas[0], covered.size[1] - canvas[1]
    views = []
    for number in range(crops):
        top, left = (side // 2 if crops == 1 else round(side * number / (crops - 1)) for side in spare)
        views.append(Prepared(transforms.place(crop(covered, top, left, *canvas)).image, canvas, scale))
    return views
