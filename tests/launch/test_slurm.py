"""The job file for SLURM, run by bash with stand-ins for srun and scontrol: SLURM itself is not there."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.main import get_command
from typer.testing import CliRunner

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import load_recipe
from vitgraft.configs.schema import Recipe
from vitgraft.launch.cli import app
from vitgraft.launch.slurm import MAX_SIGNAL_SECONDS, SlurmJob, check_job_world, job_file

# Words as people have them in paths and values, and some that a shell would take apart.
WORDS = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S", "Zs"]), min_size=1, max_size=12).filter(
    str.isprintable
)
STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys
from pathlib import Path
here = Path(sys.argv[0])
with here.with_suffix(".jsonl").open("a") as file:
    file.write(json.dumps({{"words": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}}) + "\\n")
orders = json.loads(here.with_suffix(".orders").read_text())
if orders["signal"]:
    os.kill(os.getppid(), orders["signal"])
sys.exit(orders["code"])
"""


def job(**settings: Any) -> SlurmJob:
    known: dict[str, Any] = {"name": "vitgraft-x", "folder": "/work", "nodes": 2, "train": ["vitgraft", "train", "r"]}
    return SlurmJob(**{**known, **settings})


def directives(text: str) -> list[str]:
    """The options that sbatch takes: each line after the first that begins with #SBATCH, up to the first command."""
    lines = text.splitlines()
    assert lines[0] == "#!/bin/bash"
    found = []
    for line in lines[1:]:
        if line and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
            assert len(words) == 1, line
            found += words
    return found


class Cluster:
    """Stand-ins for srun and scontrol that write down how they were called and end as they are told."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        for name in ("srun", "scontrol"):
            (self.bin / name).write_text(STAND_IN)
            (self.bin / name).chmod(0o755)

    def run(self, text: str, folder: Path, srun: int, scontrol: int = 0, signals: int = 0) -> tuple[int, str]:
        """Exit code and standard error of the job."""
        (self.bin / "srun.orders").write_text(json.dumps({"code": srun, "signal": signals}))
        (self.bin / "scontrol.orders").write_text(json.dumps({"code": scontrol, "signal": 0}))
        (folder / "job.sh").write_text(text)
        environment = {**os.environ, "PATH": f"{self.bin}:/usr/bin:/bin", "SLURM_JOB_ID": "4205", "OF_THE_USER": "a b"}
        done = subprocess.run(
            ["/bin/bash", "job.sh"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stderr

    def calls(self, name: str) -> list[dict[str, Any]]:
        record = self.bin / f"{name}.jsonl"
        return [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_what_sbatch_is_asked_for() -> None:
    full = job(
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=96,
        time="1-00:00:00",
        partition="gpu",
        account="vision",
        signal_seconds=300,
        sbatch=["--qos=long", "--gres=gpu:8", "--contiguous"],
    )
    assert directives(job_file(full)) == [
        "--job-name=vitgraft-x",
        "--chdir=/work",
        "--nodes=4",
        "--ntasks-per-node=1",
        "--cpus-per-task=96",
        "--gpus-per-node=8",
        "--time=1-00:00:00",
        "--partition=gpu",
        "--account=vision",
        "--signal=USR1@300",
        "--requeue",
        "--open-mode=append",
        "--export=ALL",
        "--qos=long",
        "--gres=gpu:8",
        "--contiguous",
    ]
    bare = directives(job_file(job()))
    assert "--exclusive" in bare
    assert not [option for option in bare if option.startswith(("--cpus", "--gpus", "--time", "--part", "--acc"))]


def test_one_task_a_node_is_started_and_none_ended_for_another(cluster: Cluster, tmp_path: Path) -> None:
    assert cluster.run(job_file(job(nodes=3, cpus_per_task=16)), tmp_path, srun=0) == (0, "")
    (call,) = cluster.calls("srun")
    assert call["words"][-3:] == ["vitgraft", "train", "r"]
    assert set(call["words"][:-3]) == {
        *("--nodes=3", "--ntasks=3", "--ntasks-per-node=1", "--cpus-per-task=16", "--cpu-bind=none"),
        *("--kill-on-bad-exit=0", "--wait=0", "--export=ALL"),
    }
    assert call["environment"]["OF_THE_USER"] == "a b"
    assert cluster.calls("scontrol") == []


@pytest.mark.parametrize("code", [0, 1, 2, 3, 4, 5, 6, 74, 76, 130, 137, 143])
def test_the_job_ends_as_srun_did(cluster: Cluster, tmp_path: Path, code: int) -> None:
    assert cluster.run(job_file(job()), tmp_path, srun=code) == (code, "")
    assert cluster.calls("scontrol") == []


def test_a_stop_behind_a_checkpoint_is_queued_again(cluster: Cluster, tmp_path: Path) -> None:
    code, said = cluster.run(job_file(job()), tmp_path, srun=75)
    assert code == 0
    assert "job 4205 is queued again" in said
    assert [call["words"] for call in cluster.calls("scontrol")] == [["requeue", "4205"]]


def test_what_cannot_be_queued_again_says_so(cluster: Cluster, tmp_path: Path) -> None:
    code, said = cluster.run(job_file(job()), tmp_path, srun=75, scontrol=1)
    assert code == 75
    assert "submit this file again" in said


def test_a_cancelled_job_is_not_queued_again(cluster: Cluster, tmp_path: Path) -> None:
    """scancel: SIGTERM to this shell too, which waits for srun nevertheless."""
    assert cluster.run(job_file(job()), tmp_path, srun=75, signals=signal.SIGTERM) == (75, "")
    assert cluster.calls("scontrol") == []


@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, min_size=1, max_size=4), WORDS)
@example(["$HOME", "`id`", "a'b\"c", "{x}", "\\"], "a\\b # 'c' \"d\" $e\\")
def test_any_word_reaches_srun_and_sbatch(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], name: str
) -> None:
    folder = tmp_path_factory.mktemp("words")
    cluster = Cluster(folder)
    text = job_file(job(name=name, folder=f"/a/{name}", train=["vitgraft", *words], sbatch=[f"--comment={name}"]))
    assert cluster.run(text, folder, srun=0) == (0, "")
    assert cluster.calls("srun")[0]["words"][-len(words) - 1 :] == ["vitgraft", *words]
    found = directives(text)
    assert found[:2] == [f"--job-name={name}", f"--chdir=/a/{name}"]
    assert found[-1] == f"--comment={name}"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"name": "a\n#SBATCH --uid=0"}, "cannot hold line breaks"),
        ({"folder": "/a\rb"}, "cannot hold line breaks"),
        ({"train": ["vitgraft", "a\nb"]}, "cannot hold line breaks"),
        ({"partition": "a\x00"}, "cannot hold line breaks"),
        ({"sbatch": ["--comment=a\nb"]}, "cannot hold line breaks"),
        ({"sbatch": ["qos=long"]}, "expected a long option of sbatch, e.g. --sbatch=--qos=long"),
        ({"sbatch": ["-q long"]}, "expected a long option"),
        ({"sbatch": ["--qos long"]}, "expected a long option"),
        ({"sbatch": ["--nodes=3"]}, "sets it itself .--nodes.; leave it out"),
        ({"sbatch": ["--signal=B:USR1"]}, "sets it itself .--signal-seconds."),
        ({"sbatch": ["--array=0-3"]}, "sets it itself"),
        ({"sbatch": ["--no-requeue"]}, "sets it itself"),
        ({"signal_seconds": 0}, "--signal-seconds 0: expected 1 to 65535"),
        ({"signal_seconds": MAX_SIGNAL_SECONDS + 1}, "--signal-seconds 65536"),
        ({"time": "soon"}, "--time soon: expected minutes"),
        ({"time": "1-2-3"}, "--time 1-2-3: expected minutes"),
        ({"time": "3"}, "--time 3: with --signal-seconds 120.*told to stop as soon as it starts"),
        ({"time": "3:00"}, "told to stop as soon"),
        ({"time": "0:03:00"}, "told to stop as soon"),
        ({"time": "0-0:03"}, "told to stop as soon"),
        ({"time": "0-01", "signal_seconds": 3540}, "told to stop as soon"),
    ],
)
def test_what_no_job_file_can_say(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        job_file(job(**changes))


@pytest.mark.parametrize("time", ["4", "3:01", "0:03:01", "0-0:04", "0-0:03:01", "1-0", "12:00:00", "0"])
def test_times_as_slurm_takes_them(time: str) -> None:
    assert f"--time={time}" in directives(job_file(job(time=time)))


def test_worlds_that_are_known_beforehand() -> None:
    def recipe(*changes: str) -> Recipe:
        return load_recipe("quickstart/detection", ["train.global_batch=16", "launch.processes=null", *changes])

    check_job_world(recipe(), 2, 8)
    check_job_world(recipe(), 3, None)
    with pytest.raises(
        ConfigError, match=r"a world of 24 cannot carry global_batch 16.*possible worlds: 1, 2, 4, 8, 16"
    ):
        check_job_world(recipe(), 3, 8)
    with pytest.raises(ConfigError, match="with 2 ranks on each, a world of 6"):
        check_job_world(recipe("launch.device=cpu"), 3, 8)
    # As on one host: no more ranks than GPUs.
    check_job_world(recipe("launch.processes=8"), 4, 4)
    with pytest.raises(ConfigError, match="with 8 ranks on each, a world of 32"):
        check_job_world(recipe("launch.processes=8"), 4, None)


def run(*words: str) -> str:
    """Standard output of ``vitgraft launch slurm`` in this process; its errors are raised."""
    done = CliRunner().invoke(app, ["launch", "slurm", *words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_command_prints_a_file_whose_command_is_one_of_ours(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = run(
        *("quickstart/detection", "--nodes", "2", "--gpus-per-node", "4", "--run-dir", "/shared/my runs/first"),
        *("--set", "train.epochs=2", "--set", "data.val=null", "--sbatch", "--qos=long", "--time", "30"),
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert f"--chdir={tmp_path}" in directives(text)
    assert "--qos=long" in directives(text)
    cluster.run(text, tmp_path, srun=0)
    (call,) = cluster.calls("srun")
    program, *words = [word for word in call["words"] if not word.startswith("--") or "=" not in word]
    assert Path(program).name == "vitgraft"
    command: Any = get_command(app)
    parameters = command.commands["train"].make_context("train", words[1:]).params
    assert words[0] == "train"
    assert parameters["recipe"] == "quickstart/detection"
    assert parameters["run_dir"] == Path("/shared/my runs/first")
    assert parameters["overrides"] == ["train.epochs=2", "data.val=null"]


def test_a_recipe_that_does_not_hold_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for words, says in (
        (("quickstart/detection", "--set", "train.epoch=1"), "did you mean 'epochs'"),
        (("no/such",), "no such recipe"),
        (("quickstart/detection", "--set", "launch.processes=7"), "possible worlds"),
    ):
        with pytest.raises(ConfigError, match=says):
            run(*words, "--nodes", "2")
    assert capsys.readouterr().out == ""
