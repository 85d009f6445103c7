"""Recipes, overrides, the files of a run, manifests and shards, changed at random: each is read, or answered with one
line; nothing else is raised, nothing hangs, memory stays within a bound. Every target works in a process of its own."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SEED = int(os.environ.get("SOAK_SEED", "1"))
SECONDS = float(os.environ.get("SOAK_SECONDS", "180"))
MEMORY = 256 << 20
"""Bytes that reading may add to what the process has when all is imported."""
EACH_S = 10
"""Seconds within which every input is answered, on a busy machine."""
GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "checkpoint-1"
CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NUMBERS = ["0", "-1", "1", "1e400", "-1e-400", ".nan", ".inf", "NaN", "Infinity", "9" * 30, "9" * 5000, "0x" + "f" * 99]
WORDS = [
    *NUMBERS,
    *("null", "true", "~", "", "[]", "{}", '""', "'", '"', "*a", "&a", "<<", "<<: *a", "!!int x", "!!python/object:x"),
    *("2024-01-01", "2024-99-99", "1:30", "\\ud800", '"\\ud800"', '"\\0"', "\x00", "\xff", "é", "\u2028", "\ufeff"),
    *("[" * 200, "{a: " * 60, "- " * 60, "? ", "%YAML 1.1\n", "---\n", "...\n", "#", "|", ">", "=", "@", "`", "\t"),
    *("../" * 9, "/dev/zero", "a" * 70_000, "(a+", "a{9999999999}", "step-00000003", '{"a": 1}', "[1, 2", ", ", ": "),
]


def changed_text(chance: random.Random, text: str) -> str:
    """Pieces replaced, doubled, moved and removed."""
    for _ in range(chance.choice((1, 1, 2, 5))):
        start = chance.randrange(len(text) + 1)
        stop = min(len(text), start + chance.choice((0, 1, 3, 20, 200)))
        piece = chance.choice([chance.choice(WORDS), text[start:stop] * 2, "", chr(chance.randrange(0xD800))])
        text = text[:start] + piece + text[stop:]
    return text


def changed_value(chance: random.Random, text: str) -> str:
    """One value of a text in lines replaced, the rest as it was."""
    lines = text.split("\n")
    for _ in range(chance.choice((1, 1, 3))):
        number = chance.randrange(len(lines))
        key, colon, _ = lines[number].partition(": ")
        lines[number] = f"{key}{colon}{chance.choice(WORDS)}"
    return "\n".join(lines)


def changed_bytes(chance: random.Random, data: bytes) -> bytes:
    """Bits flipped, parts cut off, words written over."""
    out = bytearray(data)
    for _ in range(chance.choice((1, 2, 8))):
        if out and chance.random() < 0.6:
            out[chance.randrange(min(len(out), chance.choice((16, 600, 1 << 30))))] = chance.randrange(256)
        else:
            start = chance.randrange(len(out) + 1)
            out[start : start + chance.choice((0, 1, 8))] = chance.choice(WORDS).encode("utf-8", "replace")
    return bytes(out[: chance.randrange(len(out) + 1)] if chance.random() < 0.1 else out)


def changed_tree(chance: random.Random, tree: Any) -> Any:
    """A JSON tree with one of its nodes replaced, removed or doubled."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    tree = json.loads(json.dumps(tree))
    walk(tree)
    for _ in range(chance.choice((1, 1, 2))):
        node, key = chance.choice(places)
        odd: list[Any] = [None, True, -1, 0, 1 << 45, 1 << 61, 10**400, 1.5, 1e308, "", "x", "../x", "\ud800", "\0"]
        odd += [[], {}, [1 << 45], [1 << 30, 1 << 30], [0, 1 << 61], [1] * 100, {"a": {}}, "f" * 64]
        try:
            if isinstance(node, dict) and chance.random() < 0.2:
                node[chance.choice(["x", "", "\ud800", "|", "master|w|0"])] = node.pop(key)
            else:
                node[key] = chance.choice(odd)
        except (KeyError, IndexError):
            continue  # its parent was replaced
    return tree


def recipes(chance: random.Random, folder: Path) -> Callable[[], None]:
    from vitgraft.configs.load import dump_recipe, load_recipe, validate_recipe
    from vitgraft.configs.yaml_text import parse_yaml

    text = chance.choice(sorted(CONFIGS.glob("*/*.yaml"))).read_text()
    change = chance.choice((changed_text, changed_value))
    data = change(chance, text).encode("utf-8", "surrogatepass")
    (folder / "recipe.yaml").write_bytes(changed_bytes(chance, data) if chance.random() < 0.2 else data)

    def read() -> None:
        recipe = load_recipe(str(folder / "recipe.yaml"))
        assert validate_recipe(parse_yaml(dump_recipe(recipe), "dumped"), "dumped") == recipe
        assert recipe.identity_hash()

    return read


def overrides(chance: random.Random, folder: Path) -> Callable[[], None]:
    from vitgraft.configs.load import dump_recipe, load_recipe, read_tree, validate_recipe
    from vitgraft.configs.yaml_text import parse_yaml

    path = chance.choice(sorted(CONFIGS.glob("*/*.yaml")))
    keys: list[str] = []

    def walk(node: Any, name: str) -> None:
        keys.append(name)
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            walk(node[key], f"{name}.{key}" if name else str(key))

    walk(validate_recipe(read_tree(path), "x").model_dump(mode="json"), "")
    given = []
    for _ in range(chance.choice((1, 1, 2))):
        key, value = chance.choice(keys), chance.choice(WORDS)
        if chance.random() < 0.2:
            key = changed_text(chance, key)
        if chance.random() < 0.2:
            value = changed_text(chance, value)
        given.append(f"{key}={value}".replace("\0", ""))

    def read() -> None:
        recipe = load_recipe(str(path), given)
        assert validate_recipe(parse_yaml(dump_recipe(recipe), "dumped"), "dumped") == recipe

    return read


ROWS: dict[str, list[dict[str, Any]]] = {
    "events.jsonl": [
        {"time": 1.7e9, "event": "start", "attempt": 1, "resume": None, "world": 2, "hosts": {"a": 2}, "device": "cpu"},
        {"time": 1.7e9, "event": "end", "attempt": 1, "code": 5, "reason": "x", "kind": "crash", "rank": 0},
        {"time": 1.7e9, "event": "restart", "attempt": 1, "kind": "crash", "reason": "x", "delay_s": 0.0},
        {"time": 1.7e9, "event": "non_finite_verdict", "attempt": 1, "step": 3, "verdict": "data", "entries": [[0, 1]]},
        {"time": 1.7e9, "event": "start", "attempt": 2, "resume": 3, "world": 2, "hosts": {"a": 2}, "device": "cpu"},
    ],
    "metrics.jsonl": [
        {"step": step, "steps": 9, "attempt": 1, "time": 1.7e9 + step, "loss": 0.5, "seconds": 0.1, "lr": 0.1}
        | {"images_per_second": 3.0, "slowest_rank": 0, "own_s_median": 0.1, "own_s_max": 0.2, "epoch": 0, "samples": 4}
        for step in range(1, 5)
    ],
    "skipped.jsonl": [{"step": 1, "epoch": 0, "position": 0, "sample": 1, "key": "a", "reason": "x", "attempt": 1}],
    "non_finite.jsonl": [{"attempt": 1, "step": 3, "losses": ["loss"], "entries": [[0, 1, 2, 0, "a"]]}],
    "left_out.jsonl": [{"attempt": 1, "step": 3, "entries": [[0, 1]]}],
    "results/step-00000003.json": [{"step": 3, "metrics": {"mIoU": 0.5}, "id": "x"}],
}
TEXTS = {
    "attempt": "2\n",
    "lock": "pid 1 on x\n",
    "committed": "step-00000003\n",
    "checkpoints/latest": "step-00000003\n",
}


def run_files(chance: random.Random, folder: Path) -> Callable[[], None]:
    from vitgraft.configs.load import load_recipe
    from vitgraft.launch.inspection import list_checkpoints
    from vitgraft.launch.predecessor import end_predecessor
    from vitgraft.launch.replay import earlier_fault, read_non_finite
    from vitgraft.launch.run_dir import open_run
    from vitgraft.launch.run_state import run_end
    from vitgraft.launch.status import read_status
    from vitgraft.launch.status_view import lines
    from vitgraft.trainer.checkpoint.retention import figures_of
    from vitgraft.trainer.monitor import attempts_table
    from vitgraft.trainer.monitor_files import audited_history, read_rows
    from vitgraft.trainer.non_finite import read_left_out
    from vitgraft.trainer.skips import SkipLog

    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(GOLDEN, run)
    for name in ("results", "agents"):
        (run / name).mkdir(exist_ok=True)
    for name, rows in ROWS.items():
        if chance.random() < 0.5:
            some = [changed_tree(chance, rows) for _ in range(chance.choice((1, 2)))]
            text = "".join(json.dumps(row) + "\n" for part in some for row in (part if isinstance(part, list) else []))
            data = text.encode()
            (run / name).write_bytes(changed_bytes(chance, data) if chance.random() < 0.5 else data)
    for name, text in TEXTS.items():
        if chance.random() < 0.5:
            (run / name).write_bytes(changed_bytes(chance, text.encode()))
    if chance.random() < 0.3:
        config = (run / "config.yaml").read_text()
        (run / "config.yaml").write_bytes(changed_value(chance, config).encode("utf-8", "surrogatepass"))
    if chance.random() < 0.3:
        record = json.dumps(changed_tree(chance, {"pid": 1 << 22, "started": 5, "boot": "x", "space": "y"}))
        (run / "agents" / "x.json").write_bytes(changed_bytes(chance, record.encode()))

    def read() -> None:
        status = read_status(run)
        assert "\n".join(lines(status)).replace("\n", "").isprintable()
        json.dumps(status.as_json(), allow_nan=False)
        events = read_rows(run / "events.jsonl")
        run_end(events)
        attempts_table(events)
        audited_history(run / "metrics.jsonl")
        SkipLog(run, "stop", 3, 2)
        figures_of(run, [3])
        read_non_finite(run, 1)
        earlier_fault(run, 2)
        end_predecessor(run, "x")
        for listed in list_checkpoints(run):
            listed.as_line()
        _answered(lambda: read_left_out(run))
        handle = open_run(run, load_recipe(str(GOLDEN / "config.yaml")), "auto")
        handle.close()
        assert (run / "attempt").read_text() == f"{handle.attempt}\n"

    return read


def checkpoints(chance: random.Random, folder: Path) -> Callable[[], None]:
    from vitgraft.configs.hashing import canonical_json, sha256_file
    from vitgraft.trainer.checkpoint.read import newest_valid, open_checkpoint, read_weights, verify

    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(GOLDEN, run)
    (path,) = (run / "checkpoints").glob("step-*")
    manifest = path / "manifest.json"
    tree = json.loads(manifest.read_text())
    kind = chance.choice(("bytes", "tree", "sealed tree", "shard", "blob"))
    if kind == "bytes":
        manifest.write_bytes(changed_bytes(chance, manifest.read_bytes()))
    elif kind in ("tree", "sealed tree"):
        tree = changed_tree(chance, tree)
        if kind == "sealed tree":
            _seal(tree, canonical_json)
        manifest.write_text(json.dumps(tree))
    elif kind == "shard":
        file = path / chance.choice(tree["files"])["path"]
        file.write_bytes(_changed_safetensors(chance, file.read_bytes()))
        for record in tree["files"]:
            record |= {"bytes": (path / record["path"]).stat().st_size, "sha256": sha256_file(path / record["path"])}
        _seal(tree, canonical_json)
        manifest.write_text(json.dumps(tree))
    else:
        for blob in (run / "blobs").iterdir():
            blob.write_bytes(_changed_safetensors(chance, blob.read_bytes()))
            tree["frozen"] = sha256_file(blob)
            blob.rename(blob.with_name(tree["frozen"]))
        _seal(tree, canonical_json)
        manifest.write_text(json.dumps(tree))

    def read() -> None:
        newest_valid(run)
        checkpoint = open_checkpoint(path)
        verify(checkpoint)
        with checkpoint.reading():
            for ema in (False, True):
                read_weights(checkpoint, ema=ema)

    return read


def _seal(tree: Any, canonical_json: Callable[[Any], str]) -> None:
    import hashlib

    if isinstance(tree, dict):
        tree.pop("digest", None)
        tree["digest"] = hashlib.sha256(canonical_json(tree).encode()).hexdigest()


def _changed_safetensors(chance: random.Random, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header, rest = data[8 : 8 + size], data[8 + size :]
    if chance.random() < 0.7:
        header = json.dumps(changed_tree(chance, json.loads(header))).encode()
        return len(header).to_bytes(8, "little") + header + rest
    return changed_bytes(chance, data[: 8 + size]) + rest


TARGETS = {"recipes": recipes, "overrides": overrides, "run_files": run_files, "checkpoints": checkpoints}


def _answered(read: Callable[[], Any]) -> bool:
    """Read; false where it was refused in one line."""
    from vitgraft.configs.errors import VitgraftError

    try:
        read()
        return True
    except VitgraftError as error:
        said = str(error)
    assert "\n" not in said
    assert len(said) < 20_000
    return False


def fuzz(target: str, seed: int, seconds: float, folder: Path) -> None:
    """Print what was tried, as JSON; end with 1 at the first input that is not answered."""
    make = TARGETS[target]
    chance = random.Random(0)
    for _ in range(3):
        _answered(make(chance, folder))  # imports
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    until, tried, taken, slowest = time.monotonic() + seconds, 0, 0, 0.0
    while time.monotonic() < until:
        number = seed * 1_000_000 + tried
        read = make(random.Random(number), folder)
        signal.alarm(EACH_S)
        began = time.monotonic()
        try:
            taken += _answered(read)
        except BaseException:
            traceback.print_exc()
            sys.exit(f"{target} {number}: not answered with one line; what was read lies in {folder}")
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - began)
        tried += 1
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    print(json.dumps({"tried": tried, "taken": taken, "slowest_s": round(slowest, 2), "more_bytes": more}))
    if more > MEMORY:
        sys.exit(f"{target}: {more:,} bytes more than before, {MEMORY:,} are allowed")


@pytest.mark.soak
@pytest.mark.parametrize("target", TARGETS)
def test_whatever_is_read_is_answered(target: str, tmp_path: Path) -> None:
    seconds = SECONDS / len(TARGETS)
    command = [sys.executable, __file__, target, str(SEED), str(seconds), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 300, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-5000:]
    assert json.loads(done.stdout)["tried"] > 0


if __name__ == "__main__":

    def late(*_: object) -> None:
        raise TimeoutError(f"no answer within {EACH_S} s")

    signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, 24 << 30))  # torch reserves much that it does not use
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    fuzz(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), Path(sys.argv[4]))
