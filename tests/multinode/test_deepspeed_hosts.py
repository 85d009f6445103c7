"""DeepSpeed's own launcher, over several hosts: the ranks get what they should, and the hosts change no loss."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import psutil
import pytest
from multinode.campaign import RANK
from multinode.namespaces import Network, wait_for
from support import executable, losses, train

from vitgraft.launch import deepspeed_launch
from vitgraft.launch.deepspeed_launch import Meeting
from vitgraft.launch.hosts import choose_slots, parse_hostfile, ssh_arguments

# All that a shell and pdsh give meaning to.
TOKEN = "token $HOME `id` \\ \"quoted\" 'single' %n %% %h; echo & (x) * ~ # !"


@pytest.fixture
def launch_folder(tmp_path: Path) -> Path:
    deepspeed_launch.check_folder(tmp_path)
    return tmp_path


def test_every_slot_gets_its_ticket(hosts: Network, launch_folder: Path) -> None:
    """The runner's line passes through pdsh, ssh and a shell; a stand-in for the ticket writes down what it got."""
    module = launch_folder / "stand_in.py"
    module.write_text(
        "import json, os, sys\n"
        "facts = {'arguments': sys.argv[1:], 'environment': dict(os.environ), 'host': os.uname().nodename}\n"
        f"open({str(launch_folder)!r} + '/rank-' + os.environ['RANK'], 'w').write(json.dumps(facts))\n"
    )
    (launch_folder / "hostfile").write_text("host1 slots=2\nhost2 slots=4\n")
    slots = choose_slots(parse_hostfile("host1 slots=2\nhost2 slots=4", "hostfile"), include="host1:1@host2:1,3")
    meeting = Meeting(hosts.hosts["host1"].address, 29511)
    arguments = ["--agent", "vitgraft-0123"]
    command = deepspeed_launch.runner_command(launch_folder / "hostfile", slots, meeting, "stand_in", arguments)
    (launch_folder / "environment").write_text(deepspeed_launch.launchers_variables("cpu"))
    ssh_args = ssh_arguments([], {"VITGRAFT_SSH_CONFIG": str(hosts.ssh_config)})
    here = {**os.environ, "PYTHONPATH": "$(id)", "NCCL_SOMETHING": TOKEN}
    runner = deepspeed_launch.runner_environment(here, launch_folder / "environment", ssh_args)
    code, out, error = hosts.hosts["host1"].run(*command, environment=runner, cwd=launch_folder, timeout=200)
    assert code == 0, error + out
    ranks = [json.loads((launch_folder / f"rank-{rank}").read_text()) for rank in range(3)]
    assert [rank["host"] for rank in ranks] == ["host1", "host2", "host2"]
    for number, rank in enumerate(ranks):
        local, *rest = rank["arguments"]
        assert local.startswith("--local_rank=")
        assert rest == arguments
        expected = {"RANK": str(number), "WORLD_SIZE": "3", "MASTER_ADDR": meeting.address, "DS_ACCELERATOR": "cpu"}
        expected["CUDA_VISIBLE_DEVICES"] = "1" if number == 0 else "1,3"
        assert {name: rank["environment"].get(name) for name in expected} == expected
        assert "NCCL_SOMETHING" not in rank["environment"]
        assert "$(id)" not in rank["environment"]["PYTHONPATH"]


# Two hosts train, and are compared with one, in test_faults.py too.
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_hosts_give_the_losses_of_one_host(
    hosts: Network, launch_folder: Path, detection_data: Path, count: int
) -> None:
    """The quick start's detector, on 22 samples at 6 a step: the fourth batch is short, the fifth of the next epoch.

    What is forwarded reaches every rank as it is, and no command line or file shows it."""
    recipe = Path("quickstart/detection")
    settings = [f"data.train.path={detection_data}", "data.val=null", "data.workers=0", "train.epochs=null"]
    settings += ["train.steps=5", "train.global_batch=6", "train.ema=0.9", "launch.threads=1", "launch.device=cpu"]
    changes = [word for setting in [*settings, "launch.max_restarts=0"] for word in ("--set", setting)]
    train(recipe, launch_folder / "one", *changes, "--processes", str(count))

    names = list(hosts.hosts)[:count]
    run = launch_folder / "several"
    hostfile = launch_folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    environment = {**os.environ, "VITGRAFT_SSH_CONFIG": str(hosts.ssh_config), "GLOO_SOCKET_IFNAME": "eth0"}
    command = [executable(), "train", recipe, "--run-dir", run, "--hostfile", hostfile, *changes]
    leader = hosts.hosts[names[0]].start(*command, environment={**environment, "HF_TOKEN": TOKEN}, cwd=launch_folder)
    try:
        for name in names:
            wait_for(lambda host=hosts.hosts[name]: has_rank(host.running(RANK)), f"a rank on {name}", 120)
        words = {name: command_lines(host.processes()) for name, host in hosts.hosts.items()}
        code, out, error = leader.finish(200)
    finally:
        leader.shell.kill()
    assert code == 0, error + out
    assert len(losses(run)) == 5
    assert losses(run) == losses(launch_folder / "one")
    assert [p.name for p in (run / "checkpoints").glob("step-*")] != []
    assert "pdsh" in words[names[0]]
    assert not [name for name in names if "token $HOME" in words[name]]
    assert not [file for file in run.rglob("*") if file.is_file() and b"token $HOME" in file.read_bytes()]
    launcher = (run / "logs" / f"deepspeed.{names[0]}.1.log").read_text()
    for name in names:
        assert f"{name}: " in launcher
        assert hosts.hosts[name].running(str(run)) == []
        assert (run / "logs" / f"agent.{name}.log").exists()


def command_lines(processes: list[psutil.Process]) -> str:
    """What anybody on a host can read of these."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(" ".join(process.cmdline()))
    return "\n".join(found)


def has_rank(processes: list[psutil.Process]) -> bool:
    """Whether one of them is a rank that was given the token."""
    return any(process.environ().get("HF_TOKEN") == TOKEN for process in processes)
