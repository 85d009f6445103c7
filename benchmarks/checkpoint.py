"""Checkpoints: what a save costs the trainer, how fast it reaches the disk, and how fast a resume reads it back.

One process, ZeRO-2 on the CPU, and a real checkpointer process beside it. In every round, taking turns:

stall        until the weights may change again, against copying the same bytes in memory, DeepSpeed's synchronous
             ``engine.save_checkpoint`` (as it is, and until its files are on the disk, as ours will be) and the staging
             of torch.distributed.checkpoint's ``async_save`` of the same state
background   bytes per second from hand-over to commit of two shards of 512 MiB, against plain writes with fsync, and
             SHA-256 of both shards in two threads: the slower of the two is the bound
resume       verify, load the model's weights, read and place the states, against reading and hashing the same files
memory       what a save adds to the host's memory, in units of the rank's shard

Stall, background and resume have bounds, and so has the memory of the hand-over buffer.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from common.measure import machine, spread, write
from rich.console import Console
from rich.table import Table
from torch import nn

from vitgraft.configs.hashing import sha256_file
from vitgraft.configs.load import dump_recipe, validate_recipe
from vitgraft.trainer.checkpoint import layout
from vitgraft.trainer.checkpoint.commit import final_folder
from vitgraft.trainer.checkpoint.handover import Control, HandoverBuffer, place_files
from vitgraft.trainer.checkpoint.read import Checkpoint, open_checkpoint, verify
from vitgraft.trainer.checkpoint.save import RunFacts, TrainerState, load_checkpoint
from vitgraft.trainer.checkpoint.savers import HandoverSaver
from vitgraft.trainer.signals import DRAIN

DEPTH, WIDTH, ROUNDS = 6, 512, 5
BACKGROUND_BYTES = 1 << 30
"""Two shards of what each of eight ranks holds of ViT-L with all its weights trained."""
RECIPE = {
    "model": {
        "backbone": {"name": "vit", "embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8},
        "adapter": {"name": "simple_pyramid"},
        "head": {"name": "upernet"},
    },
    "data": {"train": {"path": "nowhere"}, "image_size": [32, 32]},
    "train": {"steps": 1, "global_batch": 1, "optimizer": {"name": "adamw", "lr": 1e-3}},
}
MOST = {"copy in memory": 1.3, "deepspeed save_checkpoint": 0.1}
"""Bounds of the stall, by what it is compared with."""
LEAST = {"background": 0.8, "resume": 0.8}
"""Bounds of rates, as a share of what the machine does."""
MOST_BUFFER = 1.05
"""Bound of the buffer's memory, in shards."""
DATA = layout.DataState(fingerprint="f", seed=0, epoch=0, cursor=0)


def timed(action: Callable[[], Any]) -> float:
    """Seconds that an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def make_engine() -> Any:
    """A DeepSpeed engine after its first step."""
    import deepspeed

    from vitgraft.trainer.deepspeed_state import avoid_compilation

    avoid_compilation()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1_000_000_000,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.randn(1, 4, WIDTH)).square().mean())
    engine.step()
    return engine


class Writers:
    """A checkpointer process for a run of its own, with a buffer for each rank."""

    def __init__(self, run: Path, ranks: int) -> None:
        self.run, self.steps = run, 0
        (run / "checkpoints").mkdir(parents=True)
        tree = {**RECIPE, "train": {**RECIPE["train"], "checkpoint": {"keep_last": 1}}}
        (run / "config.yaml").write_text(dump_recipe(validate_recipe(tree, "benchmark")))
        self.descriptors = [os.memfd_create("benchmark") for _ in range(ranks)]
        self.paths = [f"/proc/{os.getpid()}/fd/{descriptor}" for descriptor in self.descriptors]
        command = [sys.executable, "-m", "vitgraft.trainer.checkpointer", "--run-dir", str(run), "--attempt", "1"]
        self.process = subprocess.Popen([*command, "--buffers", *self.paths], stderr=subprocess.DEVNULL)

    def next_step(self) -> int:
        """Each save is of another step."""
        self.steps += 1
        return self.steps

    def end(self) -> None:
        """Let it finish, and the memory go."""
        self.process.send_signal(DRAIN)
        if self.process.wait() != 0:
            raise RuntimeError("the checkpointer failed")
        for descriptor in self.descriptors:
            os.close(descriptor)


def facts_of(run: Path) -> RunFacts:
    """What a manifest says of this run."""
    normalisation = layout.Normalisation(mean=[0, 0, 0], std=[1, 1, 1], image_size=[32, 32])
    return RunFacts(run, 1, "h", ["a"], normalisation, None)


def measure_stall(engine: Any, state: TrainerState, folder: Path) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds by way of saving and round, and the memory that ours takes."""
    import torch.distributed.checkpoint as dcp

    writers = Writers(folder / "stall", 1)
    before = private_bytes()
    saver = HandoverSaver(state, facts_of(writers.run), 100, writers.paths[0])
    saver.begin(writers.next_step(), 0, DATA)
    shard = shard_bytes(state)
    memory = {
        "buffer_per_shard": os.fstat(writers.descriptors[0]).st_blocks * 512 / shard,
        "checkpointer_private_per_shard": private_bytes(writers.process.pid) / shard,
        "trainer_private_growth_per_shard": (private_bytes() - before) / shard,
    }
    saver.finish()
    source, target = torch.rand(shard // 4), torch.rand(shard // 4)
    tensors = {key: value.detach() for key, value in state.tensors().items()}

    def ours() -> Callable[[], object]:
        saver.begin(writers.next_step(), 0, DATA)
        return saver.finish

    def copy() -> Callable[[], object]:
        target.copy_(source)
        return lambda: None

    def deepspeed() -> Callable[[], object]:
        engine.save_checkpoint(str(folder / "deepspeed"), tag="t", save_latest=False)
        return lambda: None

    def deepspeed_durable() -> Callable[[], object]:
        deepspeed()
        for path in (folder / "deepspeed" / "t").iterdir():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
        return lambda: None

    def torch_dcp() -> Callable[[], object]:
        return dcp.async_save(tensors, checkpoint_id=str(folder / "dcp")).result  # type: ignore[no-any-return, union-attr]

    ways = {"vitgraft": ours, "copy in memory": copy, "deepspeed save_checkpoint": deepspeed}
    ways |= {"deepspeed save_checkpoint, fsync": deepspeed_durable, "torch dcp async_save": torch_dcp}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        turn = number % len(ways)
        for name, way in [*ways.items()][turn:] + [*ways.items()][:turn]:
            started = time.perf_counter()
            finish = way()
            taken = time.perf_counter() - started
            # What goes on in the background must not slow the others down.
            finish()
            shutil.rmtree(folder / "deepspeed", ignore_errors=True)
            shutil.rmtree(folder / "dcp", ignore_errors=True)
            if number:
                seconds[name].append(taken)
    writers.end()
    return seconds, memory


def shard_bytes(state: TrainerState) -> int:
    """Bytes of the rank's vectors."""
    return sum(value.numel() * 4 for value in state.tensors().values())


def private_bytes(pid: int | str = "self") -> int:
    """Anonymous memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


def measure_background(state: TrainerState, folder: Path) -> dict[str, list[float]]:
    """Seconds by way and round for two shards."""
    writers = Writers(folder / "background", 2)
    draft = state.manifest(facts_of(writers.run), 0, 0, DATA)
    half = BACKGROUND_BYTES // 2
    buffers = []
    for rank, path in enumerate(writers.paths):
        names = [layout.shard_name(rank), *([layout.BUFFERS] if rank == 0 else [])]
        # The checkpointer knows nothing of tensors: any bytes will do.
        parts, size = place_files({name: half if name != layout.BUFFERS else 8 for name in names})
        buffers.append((HandoverBuffer.create(path, 1 << 20, size), parts))
        buffers[-1][0].payload[:] = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().data
    views = [buffer.payload[:half] for buffer, _ in buffers]

    def ours() -> None:
        step = writers.next_step()
        for rank, (buffer, parts) in enumerate(buffers):
            manifest = draft.model_copy(update={"step": step, "world": 2}).model_dump_json() if rank == 0 else None
            facts = {"sequence": step, "step": step, "last_step": 100, "world": 2, "rank": rank}
            buffer.hand_over(Control(**facts, files=parts, manifest=manifest))
        for buffer, _ in buffers:
            answer = buffer.wait(writers.steps)
            if answer.error is not None:
                raise RuntimeError(answer.error)

    def plain_writes() -> None:
        for number, view in enumerate(views):
            with (folder / f"plain-{number}").open("wb", buffering=0) as stream:
                written = 0
                while written < len(view):
                    written += stream.write(view[written:])
                os.fsync(stream.fileno())

    def hashing() -> None:
        with ThreadPoolExecutor(len(views)) as pool:
            list(pool.map(lambda view: hashlib.sha256(view).digest(), views))

    ways = {"vitgraft": ours, "writes and fsync": plain_writes, "SHA-256": hashing}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 1):
        turn = number % len(ways)
        for name, way in [*ways.items()][turn:] + [*ways.items()][:turn]:
            taken = timed(way)
            if number:
                seconds[name].append(taken)
        for path in folder.glob("plain-*"):
            path.unlink()
    writers.end()
    return seconds


def measure_resume(state: TrainerState, checkpoint: Checkpoint) -> dict[str, list[float]]:
    """Seconds by way and round: what the launcher and the rank do beside building, and hashing the files alone."""
    files = [checkpoint.path / record.path for record in checkpoint.manifest.files]

    def ours() -> None:
        verify(open_checkpoint(checkpoint.path))
        found = open_checkpoint(checkpoint.path)
        load_checkpoint(state.engine.module, found)
        state.restore(found)

    def hashing() -> None:
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(sha256_file, files))

    seconds: dict[str, list[float]] = {"vitgraft": [], "read and hash": []}
    for number in range(ROUNDS + 1):
        ways = [("vitgraft", ours), ("read and hash", hashing)]
        for name, way in ways if number % 2 else ways[::-1]:
            taken = timed(way)
            if number:
                seconds[name].append(taken)
    return seconds


def by_round(ours: list[float], theirs: list[float]) -> dict[str, float]:
    """Ours / theirs, by round."""
    return spread([mine / other for mine, other in zip(ours, theirs, strict=True)])


def judged(found: float, *, least: float = 0.0, most: float = float("inf")) -> dict[str, Any]:
    """A bound, and whether it is kept."""
    return {"bound": f">= {least}" if least else f"<= {most}", "kept": least <= found <= most}


def summarise(
    stall: dict[str, list[float]],
    memory: dict[str, float],
    background: dict[str, list[float]],
    resume: dict[str, list[float]],
    shard: int,
) -> dict[str, Any]:
    """The content of results/checkpoint.json."""
    slower = [max(pair) for pair in zip(background["writes and fsync"], background["SHA-256"], strict=True)]
    stalls = {name: by_round(stall["vitgraft"], stall[name]) for name in stall if name != "vitgraft"}
    rates = {
        "background": by_round(slower, background["vitgraft"]),
        "resume": by_round(resume["read and hash"], resume["vitgraft"]),
    }
    buffer = memory["buffer_per_shard"]
    return {
        "what": "seconds by round; stall: vitgraft / peer, smaller is better; rates: vitgraft / bound, 1 is the bound",
        "rounds": ROUNDS,
        "shard_bytes": shard,
        "background_bytes": BACKGROUND_BYTES,
        "stall_ratio": stalls,
        "copy_per_deepspeed_save": by_round(stall["copy in memory"], stall["deepspeed save_checkpoint"]),
        **{f"{part}_rate_ratio": ratio for part, ratio in rates.items()},
        "memory": memory,
        "bounds": {
            **{f"stall / {name}": judged(stalls[name]["median"], most=bound) for name, bound in MOST.items()},
            **{f"{part} rate": judged(rates[part]["median"], least=bound) for part, bound in LEAST.items()},
            "memory: buffer per shard": judged(buffer, most=MOST_BUFFER),
        },
        "seconds": {
            part: {name: spread(values) for name, values in found.items()}
            for part, found in (("stall", stall), ("background", background), ("resume", resume))
        },
        **machine("torch", "deepspeed"),
    }


def show(summary: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title=f"A shard of {summary['shard_bytes'] / 1e6:.0f} MB, ratios by round")
    for column in ("figure", "median", "min", "max", "bound"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    rows = {f"stall / {name}": ratio for name, ratio in summary["stall_ratio"].items()}
    rows["copy in memory / deepspeed save_checkpoint"] = summary["copy_per_deepspeed_save"]
    rows |= {f"{part} rate": summary[f"{part}_rate_ratio"] for part in LEAST}
    rows |= {f"memory: {name.replace('_', ' ')}": {"median": value} for name, value in summary["memory"].items()}
    for name, ratio in rows.items():
        bound = summary["bounds"].get(name)
        said = "" if bound is None else f"{bound['bound']} {'kept' if bound['kept'] else 'MISSED'}"
        table.add_row(name, *(f"{ratio[key]:.3f}" if key in ratio else "" for key in ("median", "min", "max")), said)
    Console(width=120).print(table)


def main() -> int:
    """Measure, print and write; 1 when a bound is not kept."""
    torch.manual_seed(0)
    engine = make_engine()
    state = TrainerState(engine, None)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        stall, memory = measure_stall(engine, state, folder)
        background = measure_background(state, folder)
        written = final_folder(folder / "stall", ROUNDS + 2)
        resume = measure_resume(state, open_checkpoint(written))
        summary = summarise(stall, memory, background, resume, shard_bytes(state))
    show(summary)
    write("checkpoint", summary)
    return 0 if all(bound["kept"] for bound in summary["bounds"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
