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

from vitgraft.configs.errors import TrainingError, VitgraftError
from vitgraft.configs.load import load_recipe
from vitgraft.trainer.report import Reporter

PARENT_VARIABLE = "VITGRAFT_PARENT_PID"
THREADS_VARIABLE = "OMP_NUM_THREADS"
_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its launcher dies, however that dies (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent is not None and os.getppid() != int(parent):
        os._exit(1)  # it died before the kernel was asked


def main(arguments: list[str] | None = None) -> int:
    """Train; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vitgraft.trainer.rank", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory with its config.yaml")
    parser.add_argument("--attempt", type=int, default=1, help="number of this start of the run")
    parser.add_argument("--resume", type=Path, default=None, help="checkpoint to go on from")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to train")
    parser.add_argument("--local_rank", type=int, default=None, help="accepted from DeepSpeed's launcher")
    options = parser.parse_args(arguments)
    die_with_parent()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    reporter = Reporter.from_environment()
    try:
        _train(options, reporter, stop)
    except VitgraftError as error:
        logging.getLogger("vitgraft").exception("rank ends")
        reporter.error(error)
        return error.exit_code
    except Exception as error:  # the last line of defence: log the traceback, tell the launcher, end
        logging.getLogger("vitgraft").exception("rank ends")
        reporter.error(_as_known(error))
        return _as_known(error).exit_code
    return 0


def _as_known(error: Exception) -> VitgraftError:
    """Failures of the machine are the run's (exit 5); anything else is a defect of ours (exit 1)."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return TrainingError(f"out of memory: {error}; lower the batch, raise accumulation or activation_checkpointing")
    if isinstance(error, OSError):
        return TrainingError(f"{type(error).__name__}: {error}")
    lost = ("Connection", "gloo", "NCCL", "server socket")
    if isinstance(error, torch.distributed.DistError) or any(word in str(error) for word in lost):
        return TrainingError(f"lost the other ranks: {str(error).splitlines()[0]}")
    return VitgraftError(f"a defect of vitgraft: {type(error).__name__}: {error}; the log has the traceback")


def _train(options: argparse.Namespace, reporter: Reporter, stop: threading.Event) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    recipe = load_recipe(str(options.run_dir / "config.yaml"))
    import torch

    torch.set_num_threads(int(os.environ.get(THREADS_VARIABLE, "1")))
    if recipe.train.deterministic and options.device == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
    from vitgraft.trainer.session import Assignment, open_session
    from vitgraft.trainer.train import TrainLoop

    first = os.environ.get("RANK", "0") == "0"
    if first:
        reporter.progress("start", 0, 1)
    _join(options.device)
    assignment = Assignment(options.run_dir, options.attempt, options.resume, options.device)
    loop = TrainLoop(open_session(recipe, assignment, reporter), stop.is_set)
    if first:
        reporter.progress("start", 1, 1)
    loop.catch_up()
    loop.run()
    _leave()


def _join(device: str) -> None:
    """Form the group of ranks."""
    import deepspeed

    from vitgraft.trainer.deepspeed_state import avoid_compilation

    avoid_compilation()
    deepspeed.init_distributed(dist_backend="nccl" if device == "cuda" else "gloo", verbose=False)


def _leave() -> None:
    """Leave behind a barrier: the first rank to exit must not take the others with it."""
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
