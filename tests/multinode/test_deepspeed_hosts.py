"""DeepSpeed's own launcher, over several hosts: the ranks get what they should, and the hosts change no loss."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from multinode.namespaces import Network
from support import executable, losses, tiny_recipe, train, write_recipe

from vitgraft.launch import deepspeed_launch
from vitgraft.launch.deepspeed_launch import Meeting
from vitgraft.launch.hosts import choose_slots, parse_hostfile, ssh_arguments

# All that a shell and pdsh give meaning to.
AWKWARD = "a $HOME `id` \\ \"quoted\" 'single' %n %% %h; echo & (x) * ~ # !"


def start_everywhere(
    hosts: Network, names: list[str], command: list[str], environment: dict[str, str], folder: Path
) -> tuple[int, str, str]:
    """Run DeepSpeed's runner on the first host, as a user would."""
    env_file = folder / "environment"
    env_file.write_text(deepspeed_launch.environment_file(environment))
    ssh_args = ssh_arguments([], {"VITGRAFT_SSH_CONFIG": str(hosts.ssh_config)})
    runner = deepspeed_launch.runner_environment({**os.environ, "PYTHONPATH": "$(id)"}, env_file, ssh_args)
    return hosts.hosts[names[0]].run(*command, environment=runner, cwd=folder, timeout=200)


@pytest.fixture
def launch_folder(tmp_path: Path) -> Path:
    deepspeed_launch.check_folder(tmp_path)
    return tmp_path


def test_arguments_and_environment_arrive_as_they_are(hosts: Network, launch_folder: Path) -> None:
    """The runner's line passes through pdsh, ssh and a shell; a stand-in for the rank writes down what it got."""
    module = launch_folder / "stand_in.py"
    module.write_text(
        "import json, os, sys\n"
        "facts = {'arguments': sys.argv[1:], 'environment': dict(os.environ), 'host': os.uname().nodename}\n"
        f"open({str(launch_folder)!r} + '/rank-' + os.environ['RANK'], 'w').write(json.dumps(facts))\n"
    )
    (launch_folder / "hostfile").write_text("host1 slots=2\nhost2 slots=4\n")
    slots = choose_slots(parse_hostfile("host1 slots=2\nhost2 slots=4", "hostfile"), include="host1:1@host2:1,3")
    arguments = ["--run-dir", f"/tmp/{AWKWARD}", "plain", "no'space$HOME%n", ""]
    meeting = Meeting(hosts.hosts["host1"].address, 29511)
    command = deepspeed_launch.runner_command(launch_folder / "hostfile", slots, meeting, "stand_in", arguments)
    given = {"NCCL_SOMETHING": AWKWARD, "NCCL_OTHER": "plain", "NCCL_EMPTY": "", "GLOO_SOCKET_IFNAME": "eth0"}
    environment = deepspeed_launch.rank_environment({**given, "HOSTS_OWN": "1"}, device="cpu", threads=3)
    code, out, error = start_everywhere(hosts, ["host1", "host2"], command, environment, launch_folder)
    assert code == 0, error + out
    ranks = [json.loads((launch_folder / f"rank-{rank}").read_text()) for rank in range(3)]
    assert [rank["host"] for rank in ranks] == ["host1", "host2", "host2"]
    for number, rank in enumerate(ranks):
        local, *rest = rank["arguments"]
        assert local.startswith("--local_rank=")
        assert rest == arguments
        expected = {**environment, "RANK": str(number), "WORLD_SIZE": "3", "MASTER_ADDR": meeting.address}
        assert {name: rank["environment"].get(name) for name in expected} == expected
        assert "HOSTS_OWN" not in rank["environment"]
        assert "$(id)" not in rank["environment"]["PYTHONPATH"]


# Two hosts train, and are compared with one, in test_faults.py too.
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.soak), 3])
def test_hosts_give_the_losses_of_one_host(
    hosts: Network, launch_folder: Path, detection_data: Path, count: int
) -> None:
    """22 samples at 6 a step: the fourth batch is short, the fifth of the next epoch."""
    settings = {"train__steps": 5, "train__global_batch": 6, "train__ema": 0.9}
    tree = tiny_recipe("detection", detection_data, **settings)
    recipe = write_recipe(launch_folder / "recipe.yaml", tree)
    train(recipe, launch_folder / "one", "--processes", str(count))

    names = list(hosts.hosts)[:count]
    run = launch_folder / "several"
    hostfile = launch_folder / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    environment = {**os.environ, "VITGRAFT_SSH_CONFIG": str(hosts.ssh_config), "GLOO_SOCKET_IFNAME": "eth0"}
    command = [executable(), "train", recipe, "--run-dir", run, "--hostfile", hostfile]
    code, out, error = hosts.hosts[names[0]].run(*command, environment=environment, cwd=launch_folder, timeout=200)
    assert code == 0, error + out
    assert len(losses(run)) == 5
    assert losses(run) == losses(launch_folder / "one")
    assert [p.name for p in (run / "checkpoints").glob("step-*")] != []
    launcher = (run / "logs" / f"deepspeed.{names[0]}.1.log").read_text()
    for name in names:
        assert f"{name}: " in launcher
        assert hosts.hosts[name].running(str(run)) == []
