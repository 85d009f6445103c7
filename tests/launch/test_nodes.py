"""Which node of how many this is: options, and environments as SLURM, torchrun and Kubernetes leave them. All pure."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitgraft.configs.errors import ConfigError
from vitgraft.launch.node_list import MAX_NODES, expand_node_list
from vitgraft.launch.nodes import DEFAULT_PORT, NodePlace, node_place

LISTS = {
    "node1": ["node1"],
    "node[01-03,7],gpu2-[1-2]": ["node01", "node02", "node03", "node7", "gpu2-1", "gpu2-2"],
    "node[8-11]": ["node8", "node9", "node10", "node11"],
    "node[08-11]": ["node08", "node09", "node10", "node11"],
    "node[098-101]": ["node098", "node099", "node100", "node101"],
    "node[1-2]-ib": ["node1-ib", "node2-ib"],
    "r[0-1]n[1-2]": ["r0n1", "r0n2", "r1n1", "r1n2"],
    "a.b_c,d[3]": ["a.b_c", "d3"],
    "login,cn[1,3,5-6],x9": ["login", "cn1", "cn3", "cn5", "cn6", "x9"],
    "n[3,1]": ["n3", "n1"],
}


@pytest.mark.parametrize(("text", "names"), LISTS.items(), ids=str)
def test_lists_as_slurm_writes_them(text: str, names: list[str]) -> None:
    assert expand_node_list(text) == names


@pytest.mark.parametrize(
    "text",
    [
        *("", "a,", ",a", "a,,b", "n[", "n]", "n[1", "n1]", "n[]", "n[1-]", "n[-1]", "n[2-1]", "n[1,]", "n[[1]]"),
        *("n[a-b]", "n 1", "n[1 - 2]", "n[1-2-3]", "n[0x1]", "n[٣]", "bp[000x133]", "$(id)", "a;b", "a\nb", "(null)"),
    ],
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"no list of nodes.*give --nodes, --node-rank and --leader"):
        expand_node_list(text)


@pytest.mark.parametrize(
    "text", ["n[0-99999999999]", "n[0-999]m[0-999]", "n[1-60000],m[1-60000]", "n[0-40000,0-40000]"]
)
def test_a_list_without_bounds_is_refused_at_once(text: str) -> None:
    with pytest.raises(ConfigError, match=f"more than {MAX_NODES} nodes"):
        expand_node_list(text)


PREFIXES = st.from_regex(r"[a-z][a-z0-9-]{0,5}[a-z-]", fullmatch=True)
RUNS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 5)), min_size=1, max_size=4)
GROUPS = st.lists(
    st.tuples(PREFIXES, RUNS, st.integers(1, 5), st.sampled_from(["", "-ib", ".x"])), min_size=1, max_size=4
)


@given(GROUPS)
def test_what_is_folded_is_expanded(groups: list[tuple[str, list[tuple[int, int]], int, str]]) -> None:
    """The list is made beside the names, number by number: the folding knows nothing of the parser."""
    items, names = [], []
    for prefix, runs, width, suffix in groups:
        ranges = []
        for first, length in runs:
            low, high = str(first).zfill(width), str(first + length).zfill(width)
            ranges.append(low if length == 0 else f"{low}-{high}")
            names += [f"{prefix}{str(number).zfill(width)}{suffix}" for number in range(first, first + length + 1)]
        items.append(f"{prefix}[{','.join(ranges)}]{suffix}")
    assert expand_node_list(",".join(items)) == names


@given(st.text(alphabet="ab01-[],.9 ", max_size=20))
def test_anything_else_is_an_error_of_ours_or_names(text: str) -> None:
    try:
        names = expand_node_list(text)
    except ConfigError:
        return
    assert names
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+", name) for name in names)


# As documented in the manuals of sbatch, salloc and srun ("output environment variables"), and as clusters show them.
SBATCH_SHELL = {
    "SLURM_JOB_ID": "4205",
    "SLURM_JOBID": "4205",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NNODES": "4",
    "SLURM_JOB_NODELIST": "node[01-03,07]",
    "SLURM_NODELIST": "node[01-03,07]",
    "SLURM_NTASKS_PER_NODE": "1",
    "SLURM_TASKS_PER_NODE": "1(x4)",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_GTIDS": "0",
    "SLURMD_NODENAME": "node01",
    "SLURM_SUBMIT_DIR": "/home/me",
    "SLURM_JOB_CPUS_PER_NODE": "64(x4)",
}
SALLOC_SHELL = {
    name: value
    for name, value in SBATCH_SHELL.items()
    if name not in ("SLURM_NODEID", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_GTIDS", "SLURMD_NODENAME")
}
# LaunchParameters=use_interactive_step: salloc's shell runs on the first node, in a step with a number of its own.
INTERACTIVE_STEP = {
    **SBATCH_SHELL,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEPID": "4294967290",
    "SLURM_STEP_NODELIST": "node01",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_PTY_PORT": "34889",
    "SLURM_PTY_WIN_COL": "236",
    "SLURM_PTY_WIN_ROW": "64",
}
STEP_OF_4 = {
    **SBATCH_SHELL,
    "SLURM_STEP_ID": "0",
    "SLURM_STEPID": "0",
    "SLURM_STEP_NODELIST": "node[01-03,07]",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
    "SLURM_NODEID": "3",
    "SLURM_PROCID": "3",
    "SLURM_GTIDS": "3",
    "SLURMD_NODENAME": "node07",
    "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SLURM_SRUN_COMM_HOST": "10.0.0.1",
    "SLURM_STEP_LAUNCHER_PORT": "36129",
}
# srun --nodes=2 in the job of four: SLURM_NNODES counts the step's nodes, SLURM_JOB_NUM_NODES the job's.
STEP_2_OF_4 = {
    **STEP_OF_4,
    "SLURM_STEP_ID": "7",
    "SLURM_STEPID": "7",
    "SLURM_STEP_NODELIST": "node[02-03]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_NNODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_NPROCS": "2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURMD_NODENAME": "node03",
}
# srun typed in salloc's shell: what that shell has and srun does not set stays, its terminal's port too.
STEP_FROM_INTERACTIVE = {**INTERACTIVE_STEP, **STEP_2_OF_4}
STEP_ON_ONE = {
    **STEP_OF_4,
    "SLURM_STEP_NODELIST": "node02",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_TASKS_PER_NODE": "1",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "1",
    "SLURM_NODEID": "0",
}
MIXED_NODES = {**STEP_OF_4, "SLURM_STEP_NODELIST": "gpu2-[1-2],node[09-10]", "SLURM_NODEID": "0"}
OLD_STEP = {name: value for name, value in STEP_2_OF_4.items() if name not in ("SLURM_STEP_ID", "SLURM_STEP_NUM_NODES")}
TYPED_WITH_TASKS = {**STEP_ON_ONE, "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_PTY_PORT": "40001"}
TASKS_8 = {**STEP_2_OF_4, "SLURM_STEP_NUM_TASKS": "16", "SLURM_NTASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}
TASKS_8_ON_ONE = {**STEP_ON_ONE, "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "8"}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node-1",
    "MASTER_PORT": "29500",
}
TORCHRUN_8 = {**TORCHRUN, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}
TORCHRUN_ALONE = {**TORCHRUN, "WORLD_SIZE": "1", "GROUP_RANK": "0", "GROUP_WORLD_SIZE": "1"}
KUBERNETES = {"JOB_COMPLETION_INDEX": "2", "HOSTNAME": "vitgraft-2", "KUBERNETES_SERVICE_HOST": "10.96.0.1"}
NOTHING = {"HOME": "/home/me", "MASTER_ADDR": "node-9", "RANK": "3"}
SLURM_PORT = 15000 + 4205

ALONE = [
    (NOTHING, {}),
    (SBATCH_SHELL, {}),
    (SALLOC_SHELL, {}),
    (INTERACTIVE_STEP, {}),
    (STEP_ON_ONE, {}),
    (TYPED_WITH_TASKS, {}),
    (KUBERNETES, {}),
    (TORCHRUN_ALONE, {}),
    (STEP_OF_4, {"nodes": 1}),
    (TASKS_8, {"nodes": 1, "node_rank": 0, "leader": "a"}),
    (TORCHRUN_ALONE, {"nodes": 1}),
    (NOTHING, {"nodes": 1, "node_rank": 0, "leader": "a:1"}),
]


def place(
    environment: dict[str, str], nodes: int | None = None, node_rank: int | None = None, leader: str | None = None
) -> NodePlace | None:
    return node_place(nodes, node_rank, leader, environment)


@pytest.mark.parametrize(("environment", "options"), ALONE)
def test_a_run_on_this_host_alone(environment: dict[str, str], options: dict[str, object]) -> None:
    assert place(environment, **options) is None  # type: ignore[arg-type]


TOGETHER = [
    # SLURM, without an option.
    (STEP_OF_4, {}, NodePlace(4, 3, "node01", SLURM_PORT, together=True)),
    (STEP_2_OF_4, {}, NodePlace(2, 1, "node02", SLURM_PORT, together=True)),
    (STEP_FROM_INTERACTIVE, {}, NodePlace(2, 1, "node02", SLURM_PORT, together=True)),
    (MIXED_NODES, {}, NodePlace(4, 0, "gpu2-1", SLURM_PORT, together=True)),
    (OLD_STEP, {}, NodePlace(2, 1, "node02", SLURM_PORT, together=True)),
    # Options win, each by itself.
    (STEP_2_OF_4, {"nodes": 2}, NodePlace(2, 1, "node02", SLURM_PORT, together=True)),
    (STEP_2_OF_4, {"leader": "ib-node02"}, NodePlace(2, 1, "ib-node02", DEFAULT_PORT, together=True)),
    (STEP_2_OF_4, {"leader": "10.0.0.2:1234"}, NodePlace(2, 1, "10.0.0.2", 1234, together=True)),
    (
        {**STEP_2_OF_4, "SLURM_STEP_NODELIST": "bp[0x1]"},
        {"leader": "a"},
        NodePlace(2, 1, "a", DEFAULT_PORT, together=True),
    ),
    (STEP_2_OF_4, {"node_rank": 0}, NodePlace(2, 0, "node02", SLURM_PORT, together=True)),
    (TASKS_8, {"nodes": 3, "node_rank": 2, "leader": "a"}, NodePlace(3, 2, "a", DEFAULT_PORT, together=True)),
    (NOTHING, {"nodes": 3, "node_rank": 0, "leader": "a"}, NodePlace(3, 0, "a", DEFAULT_PORT)),
    (NOTHING, {"nodes": 2, "node_rank": 1, "leader": "[fd00::1]:77"}, NodePlace(2, 1, "fd00::1", 77)),
    (NOTHING, {"nodes": 2, "node_rank": 1, "leader": "[fe80::1%eth0]"}, NodePlace(2, 1, "fe80::1%eth0", DEFAULT_PORT)),
    # The rest needs an option.
    (NOTHING, {"nodes": 2, "node_rank": 1}, NodePlace(2, 1, "node-9", DEFAULT_PORT)),
    ({**NOTHING, "MASTER_PORT": "99"}, {"nodes": 2, "node_rank": 1}, NodePlace(2, 1, "node-9", 99)),
    ({**NOTHING, "MASTER_ADDR": "fd00::1"}, {"nodes": 2, "node_rank": 1}, NodePlace(2, 1, "fd00::1", DEFAULT_PORT)),
    (KUBERNETES, {"nodes": 4, "leader": "vitgraft-0.vitgraft"}, NodePlace(4, 2, "vitgraft-0.vitgraft", DEFAULT_PORT)),
    (KUBERNETES, {"nodes": 4, "node_rank": 3, "leader": "v"}, NodePlace(4, 3, "v", DEFAULT_PORT)),
    (TORCHRUN, {"nodes": 2}, NodePlace(2, 1, "node-1", 29501)),
    (TORCHRUN, {"nodes": 2, "leader": "node-1"}, NodePlace(2, 1, "node-1", DEFAULT_PORT)),
    (
        SBATCH_SHELL,
        {"nodes": 4, "node_rank": 2, "leader": "node01"},
        NodePlace(4, 2, "node01", DEFAULT_PORT, together=True),
    ),
]


@pytest.mark.parametrize(("environment", "options", "expected"), TOGETHER)
def test_one_node_of_several(environment: dict[str, str], options: dict[str, object], expected: NodePlace) -> None:
    found = place(environment, **options)  # type: ignore[arg-type]
    assert found == expected
    assert found.leads == (expected.rank == 0)


@pytest.mark.parametrize("job", ["1", "9999", "10000", "67043328", "4294901759"])
def test_jobs_on_a_shared_node_have_ports_that_anyone_may_use(job: str) -> None:
    found = place({**STEP_OF_4, "SLURM_JOB_ID": job})
    assert found is not None
    assert 1024 < found.port < 32768


def test_another_way_to_expand_a_list() -> None:
    found = node_place(None, None, None, STEP_2_OF_4, expand=lambda text: {"node[02-03]": ["x", "y"]}[text])
    assert found == NodePlace(2, 1, "x", SLURM_PORT, together=True)


WRONG = [
    (NOTHING, {"nodes": 2}, "--nodes 2: --node-rank missing.*give --nodes N --node-rank R --leader HOST"),
    (NOTHING, {"node_rank": 1}, "--node-rank 1: --nodes missing"),
    (NOTHING, {"leader": "a"}, "--leader a: --nodes and --node-rank missing"),
    ({}, {"nodes": 2, "node_rank": 1}, "--leader is missing.*give"),
    (KUBERNETES, {"nodes": 4}, "--leader is missing.*give"),
    (KUBERNETES, {"leader": "a"}, "--nodes missing.*indexed job of Kubernetes"),
    (KUBERNETES, {"nodes": 2, "leader": "a"}, "node rank 2 of 2 nodes: expected 0 to 1"),
    (
        {"JOB_COMPLETION_INDEX": "two"},
        {"nodes": 2, "leader": "a"},
        "JOB_COMPLETION_INDEX.*'two': expected a whole number",
    ),
    (SBATCH_SHELL, {"nodes": 4}, "--node-rank missing.*no step of SLURM"),
    (NOTHING, {"nodes": 0}, "--nodes 0: expected 1 or more"),
    (NOTHING, {"nodes": 2, "node_rank": -1, "leader": "a"}, "--node-rank -1: expected 0 or more"),
    (NOTHING, {"nodes": 2, "node_rank": 2, "leader": "a"}, "node rank 2 of 2 nodes"),
    (NOTHING, {"nodes": 1, "node_rank": 1}, "--nodes 1 --node-rank 1: one node has only the rank 0"),
    (STEP_OF_4, {"nodes": 2}, "--nodes 2: SLURM step 4205.0 has 4 nodes"),
    (STEP_OF_4, {"nodes": 8, "leader": "a"}, "--nodes 8: SLURM step 4205.0 has 4 nodes"),
    (TASKS_8, {}, "SLURM step 4205.7 has 16 tasks, 2 nodes.*srun --nodes=2 --ntasks=2 --ntasks-per-node=1"),
    (TASKS_8_ON_ONE, {}, "SLURM step 4205.0 has 8 tasks, 1 nodes.*srun"),
    ({**STEP_OF_4, "SLURM_NODEID": "x"}, {}, "SLURM_NODEID of the environment is 'x'"),
    ({name: STEP_OF_4[name] for name in STEP_OF_4 if name != "SLURM_NODEID"}, {}, "SLURM_NODEID.*is not set"),
    ({**STEP_OF_4, "SLURM_STEP_NODELIST": "node[1-3]"}, {}, "has 3 names, SLURM step 4205.0 4 nodes.*--leader HOST"),
    ({**STEP_OF_4, "SLURM_STEP_NODELIST": "bp[0x1]"}, {}, "no list of nodes.*--leader"),
    (TORCHRUN, {}, "torchrun has started this on 2 nodes.*add --nodes 2"),
    (TORCHRUN_8, {"nodes": 2}, "torchrun has started 8 processes on this node.*--nproc-per-node 1"),
    (TORCHRUN_8, {}, "torchrun has started 8 processes"),
    (TORCHRUN, {"nodes": 3}, "--nodes 3: torchrun has 2 nodes"),
    ({**TORCHRUN, "MASTER_PORT": "65535"}, {"nodes": 2}, "MASTER_PORT.*from 1 to 65535"),
]


@pytest.mark.parametrize(("environment", "options", "says"), WRONG, ids=[says for _, _, says in WRONG])
def test_half_of_it_is_an_error_with_a_remedy(
    environment: dict[str, str], options: dict[str, object], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        place(environment, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "leader",
    [
        "",
        ":1",
        "a:",
        "a:0",
        "a:65536",
        "a:1x",
        "a:-1",
        "a:1:2",
        "fd00::1",
        "[fd00::1",
        "[x]:1",
        "[fd00::1]:",
        "a b",
        "a/b:1",
    ],
)
def test_leaders_that_are_none(leader: str) -> None:
    with pytest.raises(ConfigError, match="--leader"):
        place({}, nodes=2, node_rank=0, leader=leader)


def test_an_address_without_brackets_is_told_of_them() -> None:
    with pytest.raises(ConfigError, match=r"'fd00::1': expected HOST or HOST:PORT, an IPv6 address in brackets"):
        place({}, nodes=2, node_rank=0, leader="fd00::1")
