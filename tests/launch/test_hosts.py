"""Hostfiles, filters and what DeepSpeed's runner is given: all pure."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
from deepspeed.launcher import runner
from hypothesis import given
from hypothesis import strategies as st

from vitgraft.configs.errors import ConfigError
from vitgraft.launch import deepspeed_launch
from vitgraft.launch.deepspeed_launch import Meeting
from vitgraft.launch.hosts import (
    MAX_SLOTS,
    Host,
    choose_slots,
    parse_hostfile,
    read_hostfile,
    ssh_arguments,
    write_hostfile,
)

NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,20}", fullmatch=True)
HOSTS = st.lists(
    st.builds(Host, NAMES, st.integers(1, MAX_SLOTS), st.booleans()), min_size=1, unique_by=lambda host: host.name
).filter(lambda hosts: any(not host.spare for host in hosts))


@given(HOSTS)
def test_what_is_written_is_read_back(hosts: list[Host]) -> None:
    assert parse_hostfile(write_hostfile(hosts), "hosts") == hosts


@given(HOSTS)
def test_deepspeed_reads_the_hosts_that_take_part(hosts: list[Host]) -> None:
    slots = choose_slots(hosts)
    lines = deepspeed_launch.deepspeed_hostfile(slots).splitlines()
    pool = runner._parse_hostfile(lines)
    chosen = runner.parse_inclusion_exclusion(pool, deepspeed_launch.slot_filter(slots), "")
    assert list(chosen.items()) == [(name, list(used)) for name, used in slots.items()]


@given(HOSTS, st.data())
def test_filters_mean_what_they_mean_to_deepspeed(hosts: list[Host], data: st.DataObject) -> None:
    regular = [Host(host.name, min(host.slots, 4)) for host in hosts]
    some = data.draw(st.lists(st.sampled_from(regular), min_size=1, unique_by=lambda host: host.name))
    parts = []
    for host in some:
        numbers = data.draw(st.lists(st.integers(0, host.slots - 1), unique=True))
        parts.append(f"{host.name}:{','.join(map(str, numbers))}" if numbers else host.name)
    text = "@".join(parts)
    pool = runner._parse_hostfile(write_hostfile(regular).splitlines())
    for include, exclude in ((text, ""), ("", text)):
        theirs = runner.parse_inclusion_exclusion(pool, include, exclude)
        if not theirs:
            with pytest.raises(ConfigError, match="leaves no slot"):
                choose_slots(regular, include, exclude)
        else:
            ours = choose_slots(regular, include, exclude)
            assert list(ours.items()) == [(name, tuple(used)) for name, used in theirs.items()]


def test_a_hostfile_as_people_write_it() -> None:
    text = "# the cluster\n\nnode-1 slots=8   # rack 1\n  node-2\tslots=4\n#node-3 slots=8\nnode-4 spare=true slots=8\n"
    assert parse_hostfile(text, "hosts") == [Host("node-1", 8), Host("node-2", 4), Host("node-4", 8, spare=True)]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a slots=1\nb\n", "hosts:2: b has no slots; write e.g. node-1 slots=8"),
        ("a slots=0", "hosts:1: slots=0: expected a number from 1 to 1024"),
        ("a slots=-1", "hosts:1: slots=-1: expected a number"),
        ("a slots=eight", "hosts:1: slots=eight: expected a number"),
        ("a slots=99999999999999999999", "expected a number"),
        ("a slots=1²", "expected a number"),
        ("a slots=1\n\n# x\na slots=2", "hosts:4: a is already in line 1"),
        ("a slots=1 slots=2", "hosts:1: slots is there twice"),
        ("a slots=1 spare=yes", "hosts:1: spare=yes: expected true or false"),
        ("a slots=1 cores=2", "hosts:1: 'cores=2' is not understood"),
        ("a 8", "hosts:1: '8' is not understood"),
        ("me@a slots=1", "hosts:1: 'me@a' is no host name"),
        ("node[1-4] slots=1", "is no host name"),
        ("-oProxyCommand=x slots=1", "is no host name"),
        ("", "hosts: no hosts"),
        ("a slots=1 spare=true", "hosts: only spare hosts"),
    ],
)
def test_bad_hostfiles_are_refused_with_line_and_remedy(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_hostfile(text, "hosts")
    assert says in str(caught.value)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "large").write_bytes(b"#" * (2 << 20))
    for name, says in (
        ("binary", "not UTF-8 text"),
        ("large", "larger than"),
        ("none", "no such file"),
        (".", "a folder"),
        ("/dev/zero", "not a regular file"),
    ):
        with pytest.raises(ConfigError, match=says):
            read_hostfile(tmp_path / name)


def test_spares_take_part_only_by_name() -> None:
    hosts = [Host("a", 2), Host("b", 2, spare=True), Host("c", 3)]
    assert choose_slots(hosts) == {"a": (0, 1), "c": (0, 1, 2)}
    assert choose_slots(hosts, exclude="a") == {"c": (0, 1, 2)}
    assert list(choose_slots(hosts, include="c:1,0@b").items()) == [("b", (0, 1)), ("c", (0, 1))]


@pytest.mark.parametrize(
    ("include", "exclude", "says"),
    [
        ("a", "c", "give one of them"),
        ("d", "", "'d' is not in the hostfile; it has a, c"),
        ("a:2", "", "a has no slot '2'; it has 0 to 1"),
        ("a:x", "", "a has no slot 'x'"),
        ("a:", "", "a has no slot ''"),
        ("a@@c", "", "'' is not in the hostfile"),
        ("", "a@c", "leaves no slot"),
    ],
)
def test_bad_filters(include: str, exclude: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        choose_slots([Host("a", 2), Host("c", 3)], include, exclude)
    assert says in str(caught.value)


def test_ssh_arguments() -> None:
    assert ssh_arguments([], {}) == []
    assert ssh_arguments(["-p", "2222"], {"VITGRAFT_SSH_CONFIG": "/etc/x"}) == ["-F", "/etc/x", "-p", "2222"]
    for bad in ("-o Port=1", "a\tb", 'x"', "'", "%h", "\\", ""):
        with pytest.raises(ConfigError, match=r"launch\.ssh_args"):
            ssh_arguments([bad], {})
    with pytest.raises(ConfigError, match="VITGRAFT_SSH_CONFIG"):
        ssh_arguments([], {"VITGRAFT_SSH_CONFIG": "/my files/x"})


@pytest.mark.parametrize(
    "words",
    [
        ["-oProxyCommand=touch"],
        ["-o", "proxycommand=touch"],
        ["-4oProxyCommand=touch"],
        ["-oPermitLocalCommand=yes", "-oLocalCommand=touch"],
        ["-oKnownHostsCommand=/tmp/x"],
        ["-oPKCS11Provider=/tmp/x.so"],
        ["-I", "/tmp/x.so"],
        ["-F", "/tmp/config"],
        ["-oInclude=/tmp/config"],
        ["-J", "-oProxyCommand=touch"],
        ["-l", "$(touch)"],
        ["-oProxyJump=-oProxyCommand=x"],
        ["-S", "/tmp/socket"],
        ["-E", "/home/me/.bashrc"],
        ["another-host"],
        ["-p"],
    ],
)
def test_a_recipe_cannot_have_ssh_run_anything(words: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"launch\.ssh_args: .*VITGRAFT_SSH_CONFIG"):
        ssh_arguments(words, {})


@pytest.mark.parametrize(
    "words",
    [
        ["-p2222", "-i", "/home/me/.ssh/cluster", "-l", "me", "-Cq4"],
        ["-oStrictHostKeyChecking=accept-new", "-o", "ServerAliveInterval=5", "-oUserKnownHostsFile=/dev/null"],
        ["-J", "me@gate:22,[fd00::1]:22"],
        ["-c", "aes128-gcm@openssh.com"],
    ],
)
def test_what_ssh_needs_to_reach_hosts_is_taken(words: list[str]) -> None:
    assert ssh_arguments(words, {}) == words


def test_folders_that_no_line_carries_are_refused() -> None:
    for folder in ("/a b", "/a$b", "/a;b", "/a%b", ""):
        with pytest.raises(ConfigError, match="unusual characters"):
            deepspeed_launch.check_folder(folder)  # type: ignore[arg-type]
    deepspeed_launch.check_folder(Path("/home/me/work_1-2.3"))


def test_the_runner_is_told_everything() -> None:
    slots = {"node-1": (0, 1), "node-2": (2,)}
    assert deepspeed_launch.deepspeed_hostfile(slots) == "node-1 slots=2\nnode-2 slots=3\n"
    arguments = deepspeed_launch.rank_arguments(Path("/runs/a"), 3, "cuda", Path("/runs/a/checkpoints/step-00000001"))
    command = shlex.join(
        deepspeed_launch.runner_command(
            Path("/runs/a/hosts"), slots, Meeting("10.0.0.1", 29500), "vitgraft.trainer.rank", arguments
        )
    )
    assert "-m deepspeed.launcher.runner --hostfile /runs/a/hosts --include node-1:0,1@node-2:2" in command
    assert "--master_addr 10.0.0.1 --master_port 29500" in command
    assert "--launcher pdsh --force_multi" in command
    assert command.endswith(
        "--module vitgraft.trainer.rank --run-dir /runs/a --attempt 3 --device cuda "
        "--resume /runs/a/checkpoints/step-00000001"
    )


def test_what_ranks_and_runner_find_in_their_environment() -> None:
    here = {
        "NCCL_IB_HCA": "mlx5",
        "GLOO_SOCKET_IFNAME": "eth0",
        "VITGRAFT_CACHE": "/cache",
        "VITGRAFT_REPORT_FD": "7",
        "CUDA_VISIBLE_DEVICES": "3",
        "OMP_NUM_THREADS": "9",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HF_TOKEN": "secret",
        "PYTHONPATH": "$(id)",
        "PDSH_RCMD_TYPE": "rsh",
        "HOME": "/home/me",
    }
    ranks = deepspeed_launch.rank_environment(here, device="cpu", threads=2)
    assert ranks == {
        "NCCL_IB_HCA": "mlx5",
        "GLOO_SOCKET_IFNAME": "eth0",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "HF_TOKEN": "secret",
        "VITGRAFT_CACHE": "/cache",
        "OMP_NUM_THREADS": "2",
        "DS_ACCELERATOR": "cpu",
        "PYTHONUNBUFFERED": "1",
        "PYTHONSAFEPATH": "1",
    }
    its_own = deepspeed_launch.runner_environment(here, Path("/runs/a/env"), ["-p", "2222"])
    assert its_own["HOME"] == "/home/me"
    assert its_own["DS_ENV_FILE"] == "/runs/a/env"
    alive = "-oServerAliveInterval=10 -oServerAliveCountMax=3"
    assert its_own["PDSH_RCMD_TYPE"] == "ssh"
    assert its_own["PDSH_SSH_ARGS"] == f"-a -x -oBatchMode=yes -p 2222 {alive} %h"


def test_the_runner_finds_nothing_to_put_on_command_lines() -> None:
    """What its own code exports on every host, by these beginnings of names, it must not find."""
    exported = [*runner.EXPORT_ENVS, *CUDA_Accelerator().export_envs(), *CPU_Accelerator().export_envs()]
    here = {"HOME": "/home/me", **{f"{name}_TOKEN": "secret $(id)" for name in exported}}
    its_own = deepspeed_launch.runner_environment(here, Path("/runs/a/env"), [])
    found = {name: value for name, value in its_own.items() if name.startswith(tuple(exported))}
    assert found == {"PYTHONSAFEPATH": "1"}
    assert its_own["HOME"] == "/home/me"
    assert deepspeed_launch.launchers_variables("cuda") == "DS_ACCELERATOR=cuda\n"
