"""Frames of a video that can be decoded from a key frame instead of the start, found from its packets alone."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

SEEK_GAIN = 8
"""Frames that a seek must save: it costs about as much as decoding a few."""


class Times(NamedTuple):
    """When frames are shown, in the stream's units, by number; and the numbers of the key frames."""

    shown: list[int]
    keys: list[int]


def times_of(container: Any, stream: Any, length: int) -> Times | None:
    """When each frame is shown, by the packets alone; ``None`` unless every packet makes one frame at its own time."""
    # One more would be too many; the last is empty.
    ahead = itertools.islice(container.demux(stream), length + 2)
    packets = [(packet.pts, packet.is_keyframe) for packet in ahead if packet.size]
    shown = [pts for pts, _ in packets if pts is not None]
    if len(packets) != length or len(set(shown)) != length:
        return None
    shown.sort()
    keys = [bisect.bisect_left(shown, pts) for pts, is_key in packets if is_key]
    return Times(shown, sorted(keys)) if keys and min(keys) == 0 else None


def stretches_of(wanted: Sequence[int], keys: Sequence[int]) -> list[tuple[int, list[int]]]:
    """Key frames to decode from, each with the wanted frames up to the next; a seek must save enough decoding."""
    found: list[tuple[int, list[int]]] = []
    following = 0
    for number in wanted:
        key = keys[bisect.bisect_right(keys, number) - 1]
        if not found or key > following + SEEK_GAIN:
            found.append((key if key > following + SEEK_GAIN else 0, []))
        found[-1][1].append(number)
        following = number + 1
    return found
