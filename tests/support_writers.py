"""Ranks that only hand over, and a launcher that only keeps a checkpointer: writing without DeepSpeed."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from support import tiny_recipe
from support_checkpoints import manifest_of

from vitgraft.configs.load import dump_recipe, validate_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch.checkpointer import CheckpointerKeeper
from vitgraft.launch.run_dir import RunHandle
from vitgraft.trainer.checkpoint import layout
from vitgraft.trainer.checkpoint.handover import BUFFER_VARIABLE, Answer, Control, HandoverBuffer, place_files
from vitgraft.trainer.checkpoint.image import lay_out
from vitgraft.trainer.checkpointer import Checkpointer, Lane
from vitgraft.trainer.report import Reporter


def make_run(folder: Path, **settings: Any) -> tuple[Path, Recipe]:
    """An empty run directory with its recipe. ``settings``: keys as in ``tiny_recipe``."""
    tree = tiny_recipe("semantic", "nowhere", settings.pop("val", None), **settings)
    recipe = validate_recipe(tree, "test")
    for name in ("checkpoints", "results", "logs"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_recipe(recipe))
    return folder, recipe


def memfd() -> tuple[int, str]:
    """An empty memfd and the path under which any process opens it."""
    descriptor = os.memfd_create("vitgraft-test", os.MFD_CLOEXEC)
    return descriptor, f"/proc/{os.getpid()}/fd/{descriptor}"


class FakeRank:
    """A rank whose state is ``numel`` numbers of one vector that all ranks share."""

    def __init__(self, run: Path, path: str, rank: int, world: int, numel: int = 10, attempt: int = 1) -> None:
        self.run, self.rank, self.world, self.numel, self.attempt = run, rank, world, numel, attempt
        start, self.stop = layout.even_range(numel, rank, world)
        self.start, self.sequence = start, 0
        key = layout.range_key(layout.MASTER, "w", start)
        self.images = {layout.shard_name(rank): lay_out({key: ("F32", [self.stop - start])})}
        if rank == 0:
            self.images[layout.BUFFERS] = lay_out({"steps": ("I64", [])})
        self.parts, size = place_files({name: image.size for name, image in self.images.items()})
        self.buffer = HandoverBuffer.create(path, 1 << 16, size)

    def values(self, step: int) -> NDArray[np.float32]:
        """What this rank's part is at a step."""
        return (np.arange(self.start, self.stop, dtype=np.float32) % 1000) * step

    def hand_over(self, step: int, last_step: int = 100) -> None:
        """Copy and give, without waiting for anything."""
        contents = [self.values(step).tobytes(), np.int64(step).tobytes()]
        for part, content in zip(self.parts, contents, strict=False):
            header = self.images[part.path].header
            self.buffer.payload[part.offset : part.offset + part.bytes] = header + content
        self.sequence += 1
        draft = manifest_of(self.run, step, [], self.world, self.attempt)
        manifest = draft.model_copy(update={"parameters": {"w": [self.numel]}})
        control = Control(
            sequence=self.sequence,
            step=step,
            last_step=last_step,
            world=self.world,
            rank=self.rank,
            files=self.parts,
            manifest=manifest.model_dump_json() if self.rank == 0 else None,
        )
        self.buffer.hand_over(control)

    def answer(self) -> Answer | None:
        """The answer to the last hand-over, if there is one."""
        return self.buffer.answered(self.sequence - 1)


def make_ranks(run: Path, world: int, numel: int = 10) -> tuple[list[FakeRank], list[str]]:
    """Ranks and the paths of their buffers, which live as long as this process."""
    paths = [memfd()[1] for _ in range(world)]
    return [FakeRank(run, path, rank, world, numel) for rank, path in enumerate(paths)], paths


class Told(Reporter):
    """Remembers what a role reports."""

    def __init__(self) -> None:
        super().__init__(None)
        self.messages: list[dict[str, Any]] = []

    def _send(self, message: dict[str, Any], fallback: str | None = None) -> None:
        self.messages.append(message)

    def texts(self) -> list[str]:
        return [message["text"] for message in self.messages if "text" in message]


def checkpointer(run: Path, recipe: Recipe, paths: list[str], attempt: int = 1) -> Checkpointer:
    """One in this process, which :func:`poll_until_idle` drives."""
    return Checkpointer(run, attempt, recipe, [Lane(path) for path in paths], Told())


def poll_until_idle(role: Checkpointer, seconds: float = 20) -> None:
    """Let it work until nothing is outstanding."""
    deadline = time.monotonic() + seconds
    while role.poll():
        assert time.monotonic() < deadline, "not finished in time"
        time.sleep(0.002)


class Keeping:
    """A launcher of fake ranks: a real checkpointer process, watched as in a run."""

    def __init__(self, run: Path, recipe: Recipe, world: int, numel: int = 10, silence: float = 30.0) -> None:
        self.run = run
        self.lock = (run / "lock").open("w")
        self.keeper = CheckpointerKeeper(
            run, 1, silence, self.lock.fileno(), RunHandle(run, 1, None, self.lock, []).event
        )
        self.read_end, self.write_end = os.pipe()
        os.set_blocking(self.read_end, False)
        self.messages: list[dict[str, Any]] = []
        self.keeper.make_buffers(world)
        paths = [self.keeper.for_rank(rank)[BUFFER_VARIABLE] for rank in range(world)]
        self.keeper.start(self.write_end)
        self.ranks = [FakeRank(run, path, rank, world, numel) for rank, path in enumerate(paths)]

    def tend(self) -> bool:
        """What the launcher's loop does."""
        with contextlib.suppress(BlockingIOError):
            for line in os.read(self.read_end, 1 << 16).splitlines():
                message = json.loads(line)
                self.messages.append(message)
                if message["kind"] == "beat":
                    self.keeper.heard(message)
        return self.keeper.tend()

    def until(self, condition: Callable[[], Any], seconds: float = 60) -> None:
        """Watch until ``condition()`` holds."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "waited in vain"
            self.tend()
            time.sleep(0.002)

    def hand_over(self, step: int) -> None:
        """Of all ranks."""
        for rank in self.ranks:
            rank.hand_over(step)

    def answers(self) -> list[Answer | None]:
        """Of all ranks."""
        return [rank.answer() for rank in self.ranks]

    def pid(self) -> int:
        """Of the checkpointer that works now."""
        assert self.keeper.pid is not None
        return self.keeper.pid

    def drain(self, seconds: float = 60) -> None:
        """End it as the launcher does when the ranks have ended."""
        self.keeper.drain()
        deadline = time.monotonic() + seconds
        while self.tend():
            assert time.monotonic() < deadline, "does not end"
            time.sleep(0.002)

    def events(self) -> list[dict[str, Any]]:
        """RUN/events.jsonl."""
        path = self.run / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def __enter__(self) -> Keeping:
        return self

    def __exit__(self, *_: object) -> None:
        self.keeper.end()
        self.lock.close()
        os.close(self.read_end)
        os.close(self.write_end)
