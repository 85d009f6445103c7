"""The evaluator: ``python -m vitgraft.trainer.evaluator --run-dir RUN``

It follows the committed checkpoints of a run and evaluates those that are due: figures and pictures go to RUN/results,
curves to RUN/tensorboard/evaluator. By hand it evaluates what is due and ends, unless it is to ``--follow``. Asked
to drain (:mod:`vitgraft.trainer.signals`) it evaluates what is due, then ends. It can be killed at any moment: an
evaluation is there whole or is done again.

    python -m vitgraft.trainer.evaluator --run-dir runs/first --device cuda:1 --backlog all --follow
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from vitgraft.configs.errors import InterruptedRun, VitgraftError
from vitgraft.configs.load import load_recipe
from vitgraft.trainer.rank import PARENT_VARIABLE, die_with_parent, make_deterministic
from vitgraft.trainer.report import Reporter
from vitgraft.trainer.signals import DRAIN, OF_THE_JOB, ignore_job_signals

ROLE = "evaluator"
BEAT_S = 1.0
LATE_S = 90.0
"""NFS may hide for a minute what another host has committed."""
NICENESS = 5
"""On a CPU the trainer's ranks come first."""
SIGNALS = (DRAIN, *OF_THE_JOB)
"""What the launcher must block until this process listens: asked before that, it hears later instead of dying."""
_log = logging.getLogger("vitgraft")


@dataclass
class Pulse:
    """Signs of life, from a thread of their own. ``done``: evaluations. ``outstanding``: the step that is evaluated."""

    reporter: Reporter
    done: int = 0
    outstanding: int | None = None

    def start(self) -> None:
        """Beat from now on, until this process ends."""
        threading.Thread(target=self._beat, name="beat", daemon=True).start()

    def at(self, step: int | None) -> None:
        """What is being evaluated now. Told at once: it may be what this process dies of."""
        self.outstanding = step
        self.tell()

    def tell(self) -> None:
        """One sign of life."""
        self.reporter.beat(ROLE, self.done, self.outstanding)

    def _beat(self) -> None:
        while True:
            self.tell()
            time.sleep(BEAT_S)


def main(arguments: list[str] | None = None) -> int:
    """Evaluate; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m vitgraft.trainer.evaluator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory with its config.yaml")
    parser.add_argument("--attempt", type=int, help="number of this start of the run: end when another one owns it")
    parser.add_argument("--device", type=_device, default="cpu", metavar="cpu|cuda|cuda:N", help="where to compute")
    parser.add_argument("--backlog", choices=["all", "latest"], help="instead of the recipe's; without either: all")
    parser.add_argument("--drain", action="store_true", help="evaluate what is due, then end (by hand the default)")
    parser.add_argument("--follow", action="store_true", help="go on following the run (under a launcher the default)")
    parser.add_argument("--give-up", type=int, action="append", default=[], metavar="STEP", help="leave this step out")
    options = parser.parse_args(arguments)
    child = PARENT_VARIABLE in os.environ
    if child:
        die_with_parent()
    drain = threading.Event()
    if options.drain or not (options.follow or child):
        drain.set()
    _listen(drain, child)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    pulse = Pulse(Reporter.from_environment())
    pulse.start()
    try:
        _follow(options, pulse, drain, child)
    except VitgraftError as error:
        # Not to the launcher as an error: that would be one of the run.
        print(f"vitgraft: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return InterruptedRun.exit_code
    except Exception:  # the launcher starts a successor; this log says why it had to
        _log.exception("evaluator ends")
        return 1
    return 0


def _follow(options: argparse.Namespace, pulse: Pulse, drain: threading.Event, child: bool) -> None:
    if options.device == "cpu":
        if child:
            os.nice(NICENESS)
        # On a host with GPUs torch would else take memory of the first for what it pins.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    recipe = load_recipe(str(options.run_dir / "config.yaml"))
    import torch

    from vitgraft.trainer.following import Follower

    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if recipe.train.deterministic:
            make_deterministic()
    backlog = options.backlog or (recipe.evaluator.backlog if recipe.evaluator is not None else "all")
    follower = Follower(options.run_dir, options.attempt, recipe, device, backlog, pulse)
    for step in options.give_up:
        follower.give_up(step, "the evaluator has died over it again and again")
    # By hand a run may be drained that has not come to its last step.
    follower.serve(drain, LATE_S if child else 0.0)
    if child and pulse.done:
        follower.retain()


def _device(text: str) -> str:
    if re.fullmatch("cpu|cuda(:[0-9]{1,3})?", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is none of cpu, cuda and cuda:N")
    return text


def _listen(drain: threading.Event, child: bool) -> None:
    signal.signal(DRAIN, lambda *_: drain.set())
    if child:  # by hand there is nobody else to end it
        ignore_job_signals()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked until now by the launcher


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads of torch must not delay or change the end.
    os._exit(code)
