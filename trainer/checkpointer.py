"""The checkpointer of one host: ``python -m vitgraft.trainer.checkpointer --run-dir RUN --attempt N --buffers PATH…``

It writes and hashes what the ranks hand over, commits, applies the retention policy and copies to a store. Asked to
drain (:mod:`vitgraft.trainer.signals`) it ends when everything that all ranks have handed over is committed, and copied
unless the copy is dropped. It can be killed at any moment: a successor finds in the buffers and in
``step-N.ATTEMPT.tmp`` how far this one was. It never imports torch.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from vitgraft.configs.errors import CheckpointError, VitgraftError
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.trainer.checkpoint import commit
from vitgraft.trainer.checkpoint.files import remove_tree, write_hashed
from vitgraft.trainer.checkpoint.handover import Answer, Control, HandoverBuffer
from vitgraft.trainer.checkpoint.layout import BUFFERS, Manifest, RankRecord, shard_name
from vitgraft.trainer.checkpoint.read import complete_checkpoints
from vitgraft.trainer.checkpoint.retention import retain
from vitgraft.trainer.checkpoint.store_copy import StoreCopy
from vitgraft.trainer.rank import PARENT_VARIABLE, die_with_parent
from vitgraft.trainer.report import Reporter
from vitgraft.trainer.signals import DRAIN, DROP_COPY, OF_THE_JOB, ignore_job_signals

ROLE = "checkpointer"
BEAT_S = 1.0
POLL_S = 0.02
OTHER_HOSTS_S = 30.0
"""How long the last writers of other hosts are waited for when everything ends: the next attempt waits as long for what
a dead host will never write. NFS may show a name later; such a checkpoint is dropped, with a word."""
SIGNALS = (DRAIN, DROP_COPY, *OF_THE_JOB)
"""What the launcher must block until this process listens: asked before that, it hears later instead of dying."""
_log = logging.getLogger("vitgraft")


@dataclass
class Lane:
    """One rank's buffer: what it handed over, and how far the writing is."""

    path: str
    buffer: HandoverBuffer | None = None
    control: Control | None = None
    answered: Answer | None = None
    written: Future[str | None] | None = None
    """The writing of what is outstanding: ``None`` or the reason why it failed."""

    def look(self) -> bool:
        """Whether something is outstanding."""
        if self.buffer is None:
            self.buffer = HandoverBuffer.attach(self.path)
            if self.buffer is None:
                return False
            self.answered = self.buffer.answered(wait=True)
        done = 0 if self.answered is None else self.answered.sequence
        if self.control is None or self.control.sequence <= done:
            control = self.buffer.control(done)
            if control is None:
                return False
            self.control, self.written = control, None
        return True

    def answer(self, error: str | None) -> None:
        """Tell the rank."""
        assert self.buffer is not None
        assert self.control is not None
        self.answered = Answer(sequence=self.control.sequence, step=self.control.step, error=error)
        self.buffer.answer(self.answered)


@dataclass
class Checkpointer:
    """Serves the buffers of one host's ranks. The host of rank 0 commits, whoever wrote; the hosts know of one another
    by the run directory alone."""

    run: Path
    attempt: int
    recipe: Recipe
    lanes: list[Lane]
    reporter: Reporter
    leads: bool = True
    """Whether this is the host of rank 0, the only one that deletes old checkpoints and copies new ones."""
    commits: int = 0
    draining: float | None = None
    outstanding: int | None = None
    """The step whose checkpoint is being written."""
    _pool: ThreadPoolExecutor = field(init=False)
    _copy: StoreCopy | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._pool = ThreadPoolExecutor(len(self.lanes), thread_name_prefix="writer")
        url = self.recipe.train.checkpoint.copy_to
        if url is not None and self.leads:
            self._copy = StoreCopy(self.run, url, lambda text: self.reporter.event("copy_failed", text))
            # A predecessor may have been killed in the middle of it.
            for checkpoint in complete_checkpoints(self.run)[-1:]:
                self._copy.offer(checkpoint.path)

    def serve(self, drain: threading.Event, drop_copy: threading.Event | None = None) -> None:
        """Work until asked to drain, then finish; the copy to a store too, unless asked to drop it."""
        while True:
            # Asked before looking: what was handed over before the signal must be seen.
            if drain.is_set() and self.draining is None:
                self.draining = time.monotonic()
            if not self.poll() and self.draining is not None:
                break
            time.sleep(POLL_S)
        if self.leads:  # evaluations have ended meanwhile, and a predecessor may have died while it deleted
            self._retain(None)
        if self._copy is not None:
            self._copy.close(drop_copy)
        self._pool.shutdown()

    def poll(self) -> bool:
        """Look at every buffer once and do what can be done; returns whether something is outstanding."""
        waiting: dict[int, list[Lane]] = {}
        for lane in self.lanes:
            if lane.look():
                assert lane.control is not None
                waiting.setdefault(lane.control.step, []).append(lane)
        self.outstanding = min(waiting, default=None)
        for step, lanes in sorted(waiting.items()):
            for lane in lanes:
                if lane.written is None:
                    lane.written = self._pool.submit(self._write, lane)
            if all(lane.written is not None and lane.written.done() for lane in lanes):
                self._advance(step, lanes)
        return bool(waiting)

    def _write(self, lane: Lane) -> str | None:
        """Write what one rank handed over, unless a predecessor has; in a thread."""
        control, buffer = lane.control, lane.buffer
        assert control is not None
        assert buffer is not None
        run, attempt, step = self.run, self.attempt, control.step
        folder = commit.temporary_folder(run, step, attempt)
        try:
            if commit.is_committed(run, attempt, step) or commit.interrupted_commit(run, attempt, step) is not None:
                return None
            folder.mkdir(parents=True, exist_ok=True)
            known = commit.read_record(folder, control.rank, attempt=attempt, step=step, world=control.world)
            if known is not None and known.error is None:
                return None
            self._check_room(folder, control)
            started = time.monotonic()
            files = [
                write_hashed(folder / part.path, [buffer.payload[part.offset : part.offset + part.bytes]])
                for part in control.files
            ]
            record = RankRecord(attempt=attempt, step=step, world=control.world, rank=control.rank, files=files)
            commit.write_record(folder, record)
        except Exception as error:  # whatever it is, the rank must not wait for ever
            _log.exception("step %d, rank %d", step, control.rank)
            return self._why(error, step)
        size = sum(part.bytes for part in control.files)
        _log.info(
            "step %d, rank %d: %d bytes in %.2f s", step, control.rank, size, max(1e-9, time.monotonic() - started)
        )
        return None

    def _check_room(self, folder: Path, control: Control) -> None:
        """Fail before the disk is full to the last byte, which others write to as well: all shards are alike."""
        known = {"attempt": self.attempt, "step": control.step, "world": control.world}
        missing = [rank for rank in range(control.world) if commit.read_record(folder, rank, **known) is None]
        # Being written by the others, or left by a predecessor and replaced: that much is taken already.
        there = sum(_bytes(folder / name) for name in [*map(shard_name, missing), *([BUFFERS] if 0 in missing else [])])
        disk = os.statvfs(folder)
        if disk.f_bavail * disk.f_frsize + there < len(missing) * sum(part.bytes for part in control.files):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))

    def _advance(self, step: int, lanes: list[Lane]) -> None:
        """Every shard that is here is written: commit, wait for others, or give up."""
        known = [lane.answered.error for lane in self.lanes if lane.answered is not None and lane.answered.step == step]
        failures = [*known, *(lane.written.result() for lane in lanes if lane.written is not None)]
        failure = next((reason for reason in failures if reason is not None), None)
        if failure is not None:
            self._give_up(step, lanes, failure)
            return
        leader = next((lane.control for lane in lanes if lane.control is not None and lane.control.rank == 0), None)
        try:
            done = self._commit(leader) if leader is not None else self._committed_elsewhere(step)
        except Exception as error:
            _log.exception("step %d", step)
            self._give_up(step, lanes, self._why(error, step))
            return
        if done:
            self._finish(step, lanes, leader)
        elif self.draining is not None:
            # The ranks have ended: what is not handed over by now never will be, only other hosts may still write.
            here = all(lane.control is not None and len(self.lanes) >= lane.control.world for lane in lanes)
            if here or time.monotonic() - self.draining > OTHER_HOSTS_S:
                self._give_up(step, lanes, "not all ranks handed their part over")

    def _commit(self, leader: Control) -> bool:
        """Commit if all ranks' shards are there; returns whether the checkpoint is."""
        run, attempt, step = self.run, self.attempt, leader.step
        if commit.is_committed(run, attempt, step):
            commit.point_to(commit.final_folder(run, step), attempt)
            return True
        manifest = commit.interrupted_commit(run, attempt, step)
        if manifest is not None:
            commit.publish(run, manifest)
            return True
        folder, records = commit.temporary_folder(run, step, attempt), []
        for rank in range(leader.world):
            record = commit.read_record(folder, rank, attempt=attempt, step=step, world=leader.world)
            if record is None:
                commit.check_owner(run, attempt)  # a newer one has swept it
                return False
            if record.error is not None:
                raise VitgraftError(record.error)
            records += record.files
        draft = Manifest.model_validate_json(leader.manifest or "{}")
        commit.commit(run, commit.with_files(draft, records))
        return True

    def _committed_elsewhere(self, step: int) -> bool:
        """Whether the host of rank 0 has committed.

        Raises:
            VitgraftError: it has given up.
        """
        gone = not commit.temporary_folder(self.run, step, self.attempt).exists()
        if commit.is_committed(self.run, self.attempt, step):
            return True
        if gone:
            raise VitgraftError("the host of rank 0 could not commit; its log says why")
        return False

    def _finish(self, step: int, lanes: list[Lane], leader: Control | None) -> None:
        for lane in lanes:
            lane.answer(None)
        self.commits += 1
        if leader is None:
            return
        self.reporter.progress("commit", step, leader.last_step)
        self._retain(step)
        if self._copy is not None:
            self._copy.offer(commit.final_folder(self.run, step))

    def _why(self, error: Exception, step: int) -> str:
        """One line on a failure; that of a stale attempt is that it is stale, whatever it ran into."""
        try:
            commit.check_owner(self.run, self.attempt)
        except (CheckpointError, OSError) as stale:
            return str(stale)
        return commit.why(error, commit.temporary_folder(self.run, step, self.attempt))

    def _give_up(self, step: int, lanes: list[Lane], reason: str) -> None:
        folder = commit.temporary_folder(self.run, step, self.attempt)
        controls = [lane.control for lane in lanes if lane.control is not None]
        try:
            if any(control.rank == 0 or len(self.lanes) >= control.world for control in controls):
                remove_tree(folder)
            else:  # the host of rank 0 removes it
                for control in controls:
                    facts = {"attempt": self.attempt, "step": step, "world": control.world, "rank": control.rank}
                    commit.write_record(folder, RankRecord(**facts, files=[], error=reason))
        except OSError:
            _log.exception("step %d: cleaning up", step)
        for lane in lanes:
            lane.answer(reason)
        if self.draining is not None:  # no rank is left to say it
            self.reporter.note(f"checkpoint of step {step} not written: {reason}")

    def _retain(self, step: int | None) -> None:
        try:
            commit.check_owner(self.run, self.attempt)
            deleted = retain(self.run, self.recipe, step)
        except CheckpointError as stale:
            _log.warning("%s", stale)
        except OSError as error:
            self.reporter.note(f"WARNING an old checkpoint could not be deleted: {error}")
        else:
            if deleted:
                _log.info("deleted %s", ", ".join(deleted))


def main(arguments: list[str] | None = None) -> int:
    """Serve; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m vitgraft.trainer.checkpointer", description=__doc__)
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory with its config.yaml")
    parser.add_argument("--attempt", type=int, required=True, help="number of this start of the run")
    parser.add_argument("--buffers", nargs="+", required=True, help="hand-over buffers of this host's ranks")
    parser.add_argument("--follow", action="store_true", help="leave retention and copies to the host of rank 0")
    parser.add_argument("--drain", action="store_true", help="finish what was handed over, then end")
    parser.add_argument("--drop-copy", action="store_true", help="do not wait for the copy to a store then")
    options = parser.parse_args(arguments)
    die_with_parent()
    drain, drop_copy = threading.Event(), threading.Event()
    _listen(drain, drop_copy)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    reporter = Reporter.from_environment()
    if options.drain:
        drain.set()
    if options.drop_copy:
        drop_copy.set()
    try:
        recipe = load_recipe(str(options.run_dir / "config.yaml"))
        lanes = [Lane(path) for path in options.buffers]
        checkpointer = Checkpointer(options.run_dir, options.attempt, recipe, lanes, reporter, leads=not options.follow)
        threading.Thread(target=_beat, args=(checkpointer,), name="beat", daemon=True).start()
        checkpointer.serve(drain, drop_copy)
    except Exception:  # the launcher starts a successor; this log says why it had to
        _log.exception("checkpointer ends")
        return 1
    return 0


def _listen(drain: threading.Event, drop_copy: threading.Event) -> None:
    def without_copy(*_: object) -> None:
        drop_copy.set()
        drain.set()

    signal.signal(DRAIN, lambda *_: drain.set())
    signal.signal(DROP_COPY, without_copy)
    if PARENT_VARIABLE in os.environ:  # by hand there is nobody else to end it
        ignore_job_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked until now by the launcher


def _beat(checkpointer: Checkpointer) -> None:
    """Begins when the start-up is over, for which the launcher has more patience."""
    pause = min(BEAT_S, checkpointer.recipe.train.checkpoint.writer_silence_s / 5)
    while True:
        checkpointer.reporter.beat(ROLE, checkpointer.commits, checkpointer.outstanding)
        time.sleep(pause)


def _bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
