"""Write a command's outputs atomically, and never over its inputs."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterable
from pathlib import Path

from vitgraft.configs.errors import ConfigError


def keep_inputs(outputs: Iterable[Path], inputs: Iterable[Path], option: str) -> None:
    """Refuse to write over an input, whatever name, link or mount leads to it.

    Args:
        outputs: files that the command is going to write. Call this before the first expensive step.
        inputs: files and folders that it was given; of a folder every file in it is an input.
        option: the option that names the outputs, such as ``--out predictions``.

    Raises:
        ConfigError: an output is an input.
    """
    files: set[tuple[int, int]] = set()
    folders: list[Path] = []
    for given in inputs:
        with contextlib.suppress(OSError, ValueError):
            facts = os.stat(given)
            files.add((facts.st_dev, facts.st_ino))
            if os.path.isdir(given):
                folders.append(given.resolve())
    for output in outputs:
        try:
            facts = os.stat(output)
        except (OSError, ValueError):
            continue  # nothing is there
        resolved = output.resolve()
        if (facts.st_dev, facts.st_ino) in files or any(resolved.is_relative_to(folder) for folder in folders):
            raise ConfigError(f"{option}: {output} would be written over an input; choose another place")


def write_output(path: Path, data: bytes | str, option: str) -> None:
    """Write a file at once: a reader, and whoever interrupts, finds the old content or the new.

    Folders above it are made. What a link names is replaced by the file, not written through; a device or fifo, such as
    /dev/stdout, is written to.

    Raises:
        ConfigError: the place cannot be written.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            path.write_bytes(content)
            return
        draft = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}")
        try:
            with draft.open("xb") as stream:
                stream.write(content)
            os.replace(draft, path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ConfigError(
            f"{option}: {path} cannot be written: {error.strerror}; make room or choose another place"
        ) from None
