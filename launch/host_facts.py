"""Facts of a host: ``python -m vitgraft.launch.host_facts`` reads questions, one JSON object a line, and answers each
with one line. ``vitgraft doctor`` starts one on every host over ssh, and asks all the same questions.

By hand: ``echo '{"ask": "facts"}' | python -m vitgraft.launch.host_facts``. It ends with its standard input, or when
no question comes for a while: a leader whose network is lost closes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import queue
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vitgraft.configs.cores import deciding_quota, usable_cores
from vitgraft.launch.network_probe import NetworkProbe, own_address

ANSWER = "vitgraft-answer "
"""Begins each answer; whatever else a login prints is passed over."""
IDLE_S = 180.0
GRACE_S = 10.0
"""Seconds that an answer may take after the connection has closed."""
_PACKAGES = ("configs", "models", "data_shards", "trainer", "launch")
_TRIED = 8
_TOKEN = ".vitgraft-doctor-"

Answer = dict[str, Any]


def main() -> None:
    """Answer until the connection closes or is idle for ``IDLE_S``."""
    questions: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(questions,), daemon=True).start()
    probe = NetworkProbe()
    with contextlib.suppress(queue.Empty):
        while (line := questions.get(timeout=IDLE_S)) is not None:
            print(ANSWER + json.dumps(answer_to(json.loads(line), probe)), flush=True)


def _read(questions: queue.Queue[str | None]) -> None:
    for line in sys.stdin:
        questions.put(line)
    questions.put(None)
    time.sleep(GRACE_S)
    # Still busy, e.g. waiting for the other hosts of an all-reduce; the answer is no longer awaited.
    os._exit(1)


def answer_to(question: Answer, probe: NetworkProbe) -> Answer:
    """Run what is asked for; what goes wrong is an answer too."""
    arguments = dict(question)
    handlers: dict[str, Callable[..., Answer]] = {
        "time": lambda: {"time": clock()},
        "enter": enter,
        "facts": facts,
        "write": write_token,
        "read": read_tokens,
        "remove": remove_token,
        "listen": probe.listen,
        "reach": probe.reach,
        "send": probe.send,
        "hush": probe.close,
        "free_port": probe.free_port,
        "all_reduce": probe.all_reduce,
    }
    try:
        return handlers[arguments.pop("ask")](**arguments)
    except Exception as error:  # the asker decides what it means
        return {"error": " ".join(str(error).split()) or type(error).__name__}


def clock() -> float:
    """Return the seconds since 1970, by this host's clock."""
    return time.time()


def enter(folder: str, environment: dict[str, str]) -> Answer:
    """Change to the folder and set the ranks' environment variables; ``missing``: the folder does not exist."""
    os.environ.update(environment)
    try:
        os.chdir(folder)
    except OSError as error:
        return {"missing": f"{folder}: {error.strerror}"}
    return {"missing": None}


def facts(recipe: str | None = None, data: dict[str, str] | None = None, run: str | None = None) -> Answer:
    """Return the facts of this host alone. ``data``: paths of packed data sets, by the recipe's key."""
    from vitgraft.launch.gpu_facts import read_gpus

    memory = _memory()
    return {
        "host": os.uname().nodename,
        "address": own_address(os.environ),
        "python": platform.python_version(),
        "packages": package_versions(),
        "code": code_hash(),
        "cores": usable_cores(),
        "quota": deciding_quota(),
        "memory_free": memory["MemAvailable"],
        "shm_free": _free("/dev/shm"),
        "run_free": _free(run) if run is not None else None,
        **read_gpus(),
        "recipe": _recipe(recipe) if recipe is not None else None,
        "data": {key: _data(path) for key, path in (data or {}).items()},
    }


def package_versions() -> dict[str, str]:
    """Return the version of every package that vitgraft needs, as installed here; ``missing`` where it is not."""
    found = {}
    for requirement in importlib.metadata.requires("vitgraft") or []:
        if "extra ==" not in requirement:
            match = re.match(r"[A-Za-z0-9._-]+", requirement)
            name = match.group() if match else requirement
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "missing"
    return found


def code_hash() -> str:
    """Return the SHA-256 over vitgraft's own source files: different checkouts may have the same version number."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = importlib.util.find_spec(f"vitgraft.{package}")
        for root in map(Path, (spec.submodule_search_locations or []) if spec else []):
            for path in sorted(root.rglob("*.py")):
                digest.update(f"{package}/{path.relative_to(root)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _memory() -> dict[str, int]:
    rows = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows}


def _free(path: str) -> int | None:
    folder = nearest_existing(Path(path))
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def nearest_existing(path: Path) -> Path:
    """Return the path, or the folder above it that exists."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _recipe(name: str) -> Answer:
    from vitgraft.configs.errors import VitgraftError
    from vitgraft.configs.load import load_recipe

    try:
        return {"hash": load_recipe(name).identity_hash()}
    except VitgraftError as error:
        return {"error": str(error)}


def _data(path: str) -> Answer:
    """Return the fingerprint of a packed data set, and whether all file sizes and a few samples are right."""
    from vitgraft.configs.errors import VitgraftError
    from vitgraft.data_shards.manifest import read_manifest
    from vitgraft.data_shards.sources import resolve_source
    from vitgraft.data_shards.stream import ShardReader

    try:
        folder = resolve_source(path)
        manifest = read_manifest(folder)
        reader = ShardReader(folder, manifest)
        try:
            if not reader.remote:
                for sample in {manifest.samples * part // _TRIED for part in range(_TRIED if manifest.samples else 0)}:
                    reader.read(sample)
        finally:
            reader.close()
        return {"fingerprint": manifest.fingerprint, "samples": manifest.samples}
    except (VitgraftError, OSError) as error:
        return {"error": str(error)}


def write_token(folder: str, token: str, name: str) -> Answer:
    """Write this host's file to the folder; return ``{}`` or an error."""
    path = Path(folder) / f"{_TOKEN}{token}-{name}"
    with path.open("x", encoding="utf-8") as stream:
        stream.write(name)
        stream.flush()
        os.fsync(stream.fileno())
    return {}


def read_tokens(folder: str, token: str, names: list[str], patience: float = 5.0) -> Answer:
    """Return the hosts whose files are not visible here after ``patience`` seconds (network file systems lag)."""
    deadline = time.monotonic() + patience
    while True:
        unseen = [name for name in names if not _holds(Path(folder) / f"{_TOKEN}{token}-{name}", name)]
        if not unseen or time.monotonic() > deadline:
            return {"unseen": unseen}
        time.sleep(0.2)


def _holds(path: Path, name: str) -> bool:
    try:
        return path.read_text(encoding="utf-8") == name
    except OSError:
        return False


def remove_token(folder: str, token: str, name: str) -> Answer:
    """Delete this host's file."""
    with contextlib.suppress(OSError):
        (Path(folder) / f"{_TOKEN}{token}-{name}").unlink()
    return {}


if __name__ == "__main__":
    main()
