"""One rank of the trainer: ``python -m vitgraft.trainer.rank --run-dir RUN …`` with RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT in the environment, as DeepSpeed's launcher and torchrun set them too."""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from vitgraft.configs.cores import asked_threads
from vitgraft.configs.errors import TrainingError, VitgraftError, cause_of
from vitgraft.configs.load import load_recipe
from vitgraft.trainer.heartbeat import Heart
from vitgraft.trainer.report import Reporter
from vitgraft.trainer.signals import OF_THE_JOB, ignore_job_signals

PARENT_VARIABLE = "VITGRAFT_PARENT_PID"
_PR_SET_PDEATHSIG = 1
_LOST_PEERS = ("Connection", "gloo", "NCCL", "server socket")
_DEVICE_MEMORY = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "Cuda failure 2")
_HOST_MEMORY = "DefaultCPUAllocator: can't allocate memory"


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its launcher dies, however that dies (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and os.getppid() != int(parent):
        os._exit(1)  # it died before the kernel was asked


def hear_stops() -> threading.Event:
    """Set when the launcher asks this rank to stop, also if it has asked already: signals are blocked in a rank that it
    starts until they are heard here."""
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    # Loader processes inherit what is ignored, and what is blocked: they are started later.
    ignore_job_signals(but=(signal.SIGTERM,))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_JOB)
    return stop


def make_deterministic() -> None:
    """Select deterministic kernels on CUDA."""
    import torch

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def main(arguments: list[str] | None = None) -> int:
    """Train; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vitgraft.trainer.rank", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory with its config.yaml")
    parser.add_argument("--attempt", type=int, default=1, help="number of this start of the run")
    parser.add_argument("--resume", type=Path, default=None, help="checkpoint to go on from")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    parser.add_argument("--local_rank", type=int, default=None, help="accepted from DeepSpeed's launcher")
    options = parser.parse_args(arguments)
    die_with_parent()
    stop = hear_stops()
    reporter = Reporter.from_environment()
    try:
        _train(options, reporter, Heart(reporter), stop)
    except Exception as error:  # the last line of defence: log the traceback, tell the launcher, end
        logging.getLogger("vitgraft").exception("rank ends")
        known = as_known(error)
        reporter.error(known)
        return known.exit_code
    return 0


def as_known(error: Exception) -> VitgraftError:
    """Return an error with exit code 5 for a failure of the machine, and with 1, a defect of vitgraft, for any
    other."""
    import torch

    if isinstance(error, VitgraftError):
        return error
    text, cause = str(error), cause_of(error)
    # Not all of torch's failures have a type of their own.
    if isinstance(error, torch.OutOfMemoryError) or any(words in text for words in _DEVICE_MEMORY):
        cause = "device_memory"
    elif _HOST_MEMORY in text:
        cause = "host_memory"
    elif isinstance(error, torch.distributed.DistError) or any(word in text for word in _LOST_PEERS):
        cause = cause or "lost_peers"
    first = (text.splitlines() or [type(error).__name__])[0]
    if cause in ("device_memory", "host_memory"):
        remedy = "lower the batch, raise accumulation or activation_checkpointing"
        return TrainingError(f"out of memory: {first}; {remedy}", cause=cause)
    if cause == "lost_peers":
        return TrainingError(f"lost the other ranks: {first}", cause=cause)
    if cause == "no_space":
        return TrainingError(f"no space left: {first}; free some and start again with the same command", cause=cause)
    if isinstance(error, OSError):
        remedy = "; make it writable and start again with the same command" if cause == "read_only" else ""
        return TrainingError(f"{type(error).__name__}: {error}{remedy}", cause=cause)
    return VitgraftError(f"a defect of vitgraft: {type(error).__name__}: {error}; the log has the traceback")


def _train(options: argparse.Namespace, reporter: Reporter, heart: Heart, stop: threading.Event) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    recipe = load_recipe(str(options.run_dir / "config.yaml"))
    import torch

    torch.set_num_threads(asked_threads(os.environ) or 1)
    if recipe.train.deterministic and options.device == "cuda":
        make_deterministic()
    from vitgraft.trainer.session import Assignment, open_session
    from vitgraft.trainer.train import TrainLoop

    first = os.environ.get("RANK", "0") == "0"
    if first:
        reporter.progress("start", 0, 1)
    _join(options.device)
    assignment = Assignment(options.run_dir, options.attempt, options.resume, options.device)
    loop = TrainLoop(open_session(recipe, assignment, reporter), stop.is_set, heart)
    if first:
        reporter.progress("start", 1, 1)
    try:
        loop.catch_up()
        loop.run()
    except Exception as error:
        known = as_known(error)
        known.step = loop.step if known.step is None else known.step
        if known is error:
            raise
        raise known from error
    _leave()


def _join(device: str) -> None:
    """Form the group of ranks."""
    from vitgraft.trainer.rendezvous import join

    join("nccl" if device == "cuda" else "gloo")


def _leave() -> None:
    """Exit after a barrier: the first rank to exit must not make the others fail."""
    import torch.distributed as dist

    from vitgraft.trainer import comm

    comm.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of torch and DeepSpeed must not delay or change the end.
    os._exit(code)
