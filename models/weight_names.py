"""Names of files of weights in a recipe, and checks of such a file without torch.

A file is named by its path, or as ``hf:OWNER/REPO/FILE`` on the Hugging Face hub (timm's ``hf-hub:OWNER/REPO`` names
the file ``model.safetensors``; ``OWNER/REPO@REVISION`` a branch, tag or commit). ``FILE#KEY`` names one of several
state dicts in a file, or a prefix that the wanted names have.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from vitgraft.configs.errors import CheckpointError, ConfigError, DataError, VitgraftError, printable
from vitgraft.configs.files import home_path, open_regular, parse_json

MAX_HEADER_BYTES = 16 << 20
"""Limit of the header of a .safetensors file; a published one of a thousand tensors has below 0.2 MB."""
_HUB = ("hf:", "hf-hub:")
_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_STRANGERS = (
    (rb"version https://git-lfs\.", "a pointer of Git LFS, not the file itself; fetch it with git lfs pull"),
    (rb"\s*<(!doctype|html)", "a web page; download the file itself, not the page that shows it"),
    (rb"\s*<\?xml", "an XML document, perhaps a server's error; download the file again"),
    (rb"\s*[{\[][^\x00]{7}", "JSON text, perhaps an index or a server's error; name the file of tensors"),
    (rb"\x1f\x8b\x08|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd", "compressed; unpack it first"),
    (rb"\x89HDF", "an HDF5 file; convert it to .safetensors"),
    (rb".{257}ustar", "a tar archive, which torch wrote before version 0.1.10; unpack it, or save it again"),
)
"""First bytes of files often mistaken for weights, and the message for each."""


def check_file(name: str, where: str) -> None:
    """Refuse a name that is none, a local file that is missing, and one of a kind that holds no tensors.

    Raises:
        ConfigError: no such name or file; one on the hub is not looked at.
        CheckpointError: as :func:`check_kind`.
    """
    path, _ = _parsed(name, where, ConfigError)
    if isinstance(path, Path):
        check_kind(path, where)


def locate(file: str | Path, where: str) -> tuple[Path, str | None]:
    """Return the local path of a file, fetched from the Hugging Face hub (or its cache) if it is named so, and its
    ``#KEY``.

    Raises ``ConfigError`` for an address, or a name on the hub that is malformed or cannot be fetched;
    ``CheckpointError`` when there is no such local file.
    """
    path, key = _parsed(str(file), where, CheckpointError)
    return (path if isinstance(path, Path) else _fetched(path, where)), key


def check_kind(path: Path, where: str) -> None:
    """Raise ``CheckpointError`` for a file that begins as no file of tensors does, such as a web page."""
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f"{where}: {path} cannot be read: {error.strerror}; check its permissions") from None
    if not head:
        raise CheckpointError(
            f"{where}: {path} is empty; expected a whole .safetensors file, or a .pth file of tensors"
        )
    said = next((said for start, said in _STRANGERS if re.match(start, head, re.IGNORECASE | re.DOTALL)), None)
    if said is not None:
        raise CheckpointError(f"{where}: {path} is {said}")


def metadata_of(name: str, where: str) -> dict[str, str]:
    """Return the metadata of a local .safetensors file, such as that of ``vitgraft export``.

    Empty for every other file, and for one that cannot be read, of which whoever loads it says more.
    """
    path, _ = _parsed(name, where, ConfigError)
    if not isinstance(path, Path):
        return {}
    try:
        with os.fdopen(open_regular(path), "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_json(file.read(length), str(path)) if length <= MAX_HEADER_BYTES else {}
    except (OSError, DataError):
        return {}
    texts = header.get("__metadata__") if isinstance(header, dict) else None
    return {k: v for k, v in texts.items() if isinstance(v, str)} if isinstance(texts, dict) else {}


def shown(value: object, limit: int = 160) -> str:
    """Return a text for a message: one line of at most ``limit`` characters, unprintable ones as question marks.

    What is longer ends at a word, with "…".
    """
    line = " ".join(str(value)[: 4 * limit].split())
    if len(line) > limit:
        kept = line[: limit - 1]
        line = (kept.rpartition(" ")[0] or kept) + "…"
    return printable(line)


def numbers_of(metadata: dict[str, str], key: str, count: int) -> list[float] | None:
    """Return a list of ``count`` numbers in a file's metadata; ``None`` for anything else."""
    try:
        value = parse_json(metadata.get(key, ""), key)
    except DataError:
        return None
    fits = isinstance(value, list) and len(value) == count and all(type(v) in (int, float) for v in value)
    return [float(v) for v in value] if fits else None


def _parsed(name: str, where: str, missing: type[VitgraftError]) -> tuple[Path | str, str | None]:
    """Return (path or name on the hub, key); raise ``ConfigError`` for an address, ``missing`` for no local file."""
    if _URL.match(name):
        raise ConfigError(
            f"{where}: {name} is an address; download the file and name it, or give hf:OWNER/REPO/FILE for one on "
            "the Hugging Face hub"
        )
    key = None
    if "#" in name and not home_path(name).is_file():
        name, _, key = name.rpartition("#")
    if any(name.startswith(prefix) for prefix in _HUB):
        return name, key
    path = home_path(name)
    if path.is_dir():
        raise missing(f"{where}: {path} is a folder; name the .safetensors or .pth file in it")
    if not path.is_file():
        raise missing(f"{where}: {path}: no such file; name a .safetensors or .pth file")
    return path, key


def _fetched(name: str, where: str) -> Path:
    hub = next(prefix for prefix in _HUB if name.startswith(prefix))
    parts = name.removeprefix(hub).split("/", 2)
    if len(parts) < 2 or not all(parts):
        raise ConfigError(f"{where}: {name!r} names no file on the hub; expected {hub}OWNER/REPO/FILE")
    repo, _, revision = parts[1].partition("@")
    inside = parts[2] if len(parts) == 3 else "model.safetensors"
    import huggingface_hub  # slow to import, seldom needed

    try:
        return Path(huggingface_hub.hf_hub_download(f"{parts[0]}/{repo}", inside, revision=revision or None))
    except Exception as error:  # what the hub's client and the network raise is not bounded to a class
        said = f"{type(error).__name__}: {shown(error)}"
        raise ConfigError(
            f"{where}: {name} could not be fetched ({said}); check the name and the network, or name a local file"
        ) from error
