"""Damage files at random and try them in a process of its own, with bounded memory and time."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import random
import resource
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from vitgraft.configs.errors import VitgraftError

SEED = int(os.environ.get("SOAK_SEED", "0"))
SECONDS = float(os.environ.get("SOAK_SECONDS", "180"))
PATIENCE = 30
"""Seconds that one input may take, on a busy machine."""
_NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)

Target = Callable[[bytes, random.Random], None]


def damaged(data: bytes, generator: random.Random, others: Sequence[bytes]) -> bytes:
    """Some bytes changed, most of them near the start, where sizes and tables are; or cut, moved, repeated, spliced."""
    found = bytearray(data)
    for _ in range(generator.choice((1, 1, 2, 4, 16))):
        reach = len(found) if generator.random() < 0.5 else min(len(found), 64)
        place = generator.randrange(max(1, reach))
        match generator.randrange(8):
            case 0:
                found[place : place + 1] = bytes([generator.randrange(256)])
            case 1 if found:
                found[place] ^= 1 << generator.randrange(8)
            case 2 | 3:
                width, order = generator.choice((1, 2, 4)), generator.choice(("little", "big"))
                number = generator.choice(_NUMBERS) & ((1 << 8 * width) - 1)
                found[place : place + width] = number.to_bytes(width, order)  # type: ignore[arg-type]
            case 4:
                del found[place : place + generator.choice((1, 2, 8, 100))]
            case 5:
                found[place:place] = found[place : place + generator.choice((1, 4, 50))]
            case 6 if generator.random() < 0.3:
                del found[generator.randrange(len(found) + 1) :]
            case 7 if generator.random() < 0.2:
                other = generator.choice(others)
                found[place:] = other[min(place, len(other)) :]
    return bytes(found)


def campaign(target: Target, originals: Sequence[bytes], folder: Path, *, memory: int) -> None:
    """Try damaged originals for ``SECONDS``: each is taken, or refused with one line of ours.

    Args:
        target: importable by name; takes the bytes and a generator.
        folder: gets ``last``, the input that was being tried, and ``log``.
        memory: bytes that the process may take beyond what it has when it starts.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=_child, args=(target, list(originals), SEED, SECONDS, folder, memory)
    )
    process.start()
    process.join(SECONDS + 10 * PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode != 0:
        log = (folder / "log").read_text() if (folder / "log").exists() else ""
        pytest.fail(f"seed {SEED}: exit {process.exitcode}; the input is {folder / 'last'}\n{log[-8000:]}")


def _child(target: Target, originals: list[bytes], seed: int, seconds: float, folder: Path, memory: int) -> None:
    with (folder / "log").open("w") as log:
        faulthandler.enable(log)
        for data in originals:
            with contextlib.suppress(VitgraftError):
                target(data, random.Random(0))
        before = _peak()
        # Far beyond the bound, so that what goes over it is seen and not refused.
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + 3 * memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        end, number, taken = time.monotonic() + seconds, 0, 0
        while time.monotonic() < end:
            generator = random.Random(f"{seed}/{number}")
            data = damaged(generator.choice(originals), generator, originals)
            (folder / "last").write_bytes(data)
            faulthandler.dump_traceback_later(PATIENCE, exit=True, file=log)
            try:
                target(data, generator)
                taken += 1
            except VitgraftError as error:
                if "\n" in str(error) or len(str(error)) > 1000:
                    log.write(f"input {number}: no line: {str(error)[:3000]!r}")
                    log.flush()
                    os._exit(3)
            except BaseException:
                log.write(f"input {number}\n{traceback.format_exc()}")
                log.flush()
                os._exit(4)
            faulthandler.cancel_dump_traceback_later()
            if _peak() - before > memory:
                log.write(f"input {number}: took {(_peak() - before) >> 20} MiB")
                log.flush()
                os._exit(5)
            number += 1
        log.write(f"{number} inputs, {taken} taken, {(_peak() - before) >> 20} MiB")
    print((folder / "log").read_text())


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
