"""A rank's last words: exit code, one line, and for programs the cause and the step."""

from __future__ import annotations

import errno
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed

from vitgraft.configs.errors import DataError, ErrorCause, TrainingError, VitgraftError, cause_of
from vitgraft.data_shards.cache import FileCache
from vitgraft.trainer.checkpoint import commit
from vitgraft.trainer.checkpoint.savers import _not_written
from vitgraft.trainer.rank import as_known
from vitgraft.trainer.report import Reporter


def too_much() -> Exception:
    """What torch says where a host has no memory; it has no type of its own."""
    try:
        torch.empty(1 << 55)
    except RuntimeError as error:
        return error
    raise AssertionError("128 PiB were there")


FAILURES: dict[str, tuple[Exception, int, ErrorCause | None]] = {
    "reset": (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 5, "lost_peers"),
    "broken pipe": (BrokenPipeError(errno.EPIPE, "Broken pipe"), 5, "lost_peers"),
    "gloo": (RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer"), 5, "lost_peers"),
    "store": (torch.distributed.DistNetworkError("failed to recv, got 0 bytes"), 5, "lost_peers"),
    "NCCL": (torch.distributed.DistBackendError("NCCL error: remote process exited"), 5, "lost_peers"),
    "full": (OSError(errno.ENOSPC, "No space left on device"), 5, "no_space"),
    "quota": (OSError(errno.EDQUOT, "Disk quota exceeded"), 5, "no_space"),
    "read-only": (OSError(errno.EROFS, "Read-only file system"), 5, "read_only"),
    "forbidden": (PermissionError(errno.EACCES, "Permission denied"), 5, "read_only"),
    "host": (MemoryError(), 5, "host_memory"),
    "fork": (OSError(errno.ENOMEM, "Cannot allocate memory"), 5, "host_memory"),
    "torch on a host": (too_much(), 5, "host_memory"),
    "GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 5, "device_memory"),
    "GPU, late": (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), 5, "device_memory"),
    "GPU, in NCCL": (
        torch.distributed.DistBackendError("NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'"),
        5,
        "device_memory",
    ),
    "disk": (OSError(errno.EIO, "Input/output error"), 5, None),
    "defect": (KeyError("x"), 1, None),
    "ours": (DataError("x.tar: truncated"), 3, None),
}


@pytest.mark.parametrize("name", FAILURES)
def test_what_a_failure_is(name: str) -> None:
    error, code, cause = FAILURES[name]
    known = as_known(error)
    assert (known.exit_code, known.cause) == (code, cause)
    assert str(known)
    assert "\n" not in str(known)


def test_the_pipe_carries_cause_and_step() -> None:
    read, write = os.pipe()
    reporter = Reporter(write)
    reporter.error(TrainingError("no", cause="non_finite", step=8))
    reporter.error(DataError("bad"))
    os.close(write)
    with os.fdopen(read) as stream:
        first, second = map(json.loads, stream)
    assert first == {"kind": "error", "code": 5, "text": "no", "cause": "non_finite", "step": 8}
    assert second == {"kind": "error", "code": 3, "text": "bad", "cause": None, "step": None}


def test_they_survive_the_way_out_of_a_loader_process() -> None:
    error = pickle.loads(pickle.dumps(DataError("cache: disk full", cause="no_space", step=3)))
    assert (type(error), str(error), error.cause, error.step) == (DataError, "cache: disk full", "no_space", 3)


@pytest.mark.parametrize(
    ("number", "cause"),
    [
        (errno.ENOSPC, "no_space"),
        (errno.EDQUOT, "no_space"),
        (errno.EROFS, "read_only"),
        (errno.EACCES, "read_only"),
        (errno.EIO, None),
    ],
)
def test_a_checkpoint_that_could_not_be_written(tmp_path: Path, number: int, cause: ErrorCause | None) -> None:
    """Between the checkpointer and a rank only one line travels."""
    reason = commit.why(OSError(number, os.strerror(number)), tmp_path / "step")
    assert _not_written(3, reason).cause == cause
    assert (str(tmp_path) in reason) == (cause is not None)


def test_a_cache_that_found_no_space(tmp_path: Path) -> None:
    cache = FileCache(tmp_path / "cache", 1 << 20)
    error = cache._os_error(OSError(errno.ENOSPC, "No space left on device"))
    assert (error.exit_code, error.cause) == (3, "no_space")
    assert cache._os_error(OSError(errno.EACCES, "Permission denied")).cause is None


def test_what_says_nothing() -> None:
    assert cause_of(ValueError("no space left, out of memory, Connection")) is None
    assert VitgraftError("x").cause is None
