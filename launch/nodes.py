"""One command on each node: which of how many nodes this is, and where the first one listens. Pure functions.

What the command's options leave open is read from what the starter of processes leaves in the environment:

| what | SLURM, in a job step of several nodes | torchrun, one process a node | Kubernetes | others |
|---|---|---|---|---|
| nodes | SLURM_STEP_NUM_NODES, SLURM_NNODES | GROUP_WORLD_SIZE | | |
| node rank | SLURM_NODEID | GROUP_RANK | JOB_COMPLETION_INDEX | |
| leader | first of SLURM_STEP_NODELIST | MASTER_ADDR, MASTER_PORT + 1 | | MASTER_ADDR, MASTER_PORT |

Only SLURM's step is believed without any option: the rest may be there for other reasons.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vitgraft.configs.errors import ConfigError
from vitgraft.launch.node_list import expand_node_list

DEFAULT_PORT = 29400
_FIRST_SLURM_PORT, _SLURM_PORTS = 15000, 10000
_HOST = re.compile(r"[A-Za-z0-9_.-]+")
_ADDRESS_6 = re.compile(r"[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?")
_GIVE = "give --nodes N --node-rank R --leader HOST"

Environment = Mapping[str, str]
Expand = Callable[[str], list[str]]


@dataclass(frozen=True)
class NodePlace:
    """This node among those of a run. Node 0 leads: it listens on ``port`` of ``host``, the others connect.
    ``together``: SLURM has started all of them at once."""

    nodes: int
    rank: int
    host: str
    port: int
    together: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is node 0."""
        return self.rank == 0


@dataclass(frozen=True)
class _Told:
    """What the environment tells; ``source`` names it in errors."""

    source: str
    nodes: int | None = None
    rank: int | None = None


def node_place(
    nodes: int | None,
    node_rank: int | None,
    leader: str | None,
    environment: Environment,
    expand: Expand = expand_node_list,
) -> NodePlace | None:
    """This node's place, from ``--nodes``, ``--node-rank`` and ``--leader``, completed by the environment.

    Args:
        leader: HOST, HOST:PORT or [IPv6]:PORT.
        expand: from SLURM's compact list to names.

    Returns:
        None for a run on this host alone: one node, or no option and no step of SLURM with several nodes.

    Raises:
        ConfigError: something is missing, contradictory or no number; or several tasks were started on a node.
    """
    if nodes is not None and nodes < 1:
        raise ConfigError(f"--nodes {nodes}: expected 1 or more")
    if node_rank is not None and node_rank < 0:
        raise ConfigError(f"--node-rank {node_rank}: expected 0 or more; the first node is 0")
    if nodes == 1:
        if node_rank:
            raise ConfigError(f"--nodes 1 --node-rank {node_rank}: one node has only the rank 0; raise --nodes")
        return None
    complete = nodes is not None and node_rank is not None and leader is not None
    told = _Told("options") if complete else _told(environment)
    if nodes is None and node_rank is None and leader is None:
        if told.source.startswith("torchrun") and (told.nodes or 0) > 1:
            raise ConfigError(
                f"torchrun has started this on {told.nodes} nodes, but vitgraft train was not told; "
                f"add --nodes {told.nodes} to it"
            )
        if not told.source.startswith("SLURM"):
            return None
    count, rank = _checked(nodes, node_rank, leader, told)
    if count == 1:
        return None
    host, port = _parse_leader(leader) if leader is not None else _told_leader(told, environment, expand)
    return NodePlace(count, rank, host, port, together="SLURM_JOB_ID" in environment)


def _checked(nodes: int | None, node_rank: int | None, leader: str | None, told: _Told) -> tuple[int, int]:
    count = told.nodes if nodes is None else nodes
    rank = told.rank if node_rank is None else node_rank
    if count is None or rank is None:
        given = {"--nodes": nodes, "--node-rank": node_rank, "--leader": leader}
        found = " ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        missing = " and ".join(name for name, value in (("--nodes", count), ("--node-rank", rank)) if value is None)
        raise ConfigError(
            f"{found}: {missing} missing, and the environment does not tell ({told.source}); {_GIVE} on every node"
        )
    if node_rank is None and told.nodes is not None and told.nodes != count:
        raise ConfigError(
            f"--nodes {count}: {told.source} has {told.nodes} nodes and numbers them; leave --nodes out, or give "
            "--node-rank too"
        )
    if rank >= count:
        raise ConfigError(f"node rank {rank} of {count} nodes: expected 0 to {count - 1}; correct it, or --nodes")
    return count, rank


def _told(environment: Environment) -> _Told:
    step = _slurm_step(environment)
    if step is not None:
        return step
    if "GROUP_RANK" in environment and "GROUP_WORLD_SIZE" in environment:
        each = _number(environment, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in environment else 1
        if each != 1:
            raise ConfigError(
                f"torchrun has started {each} processes on this node (LOCAL_WORLD_SIZE); vitgraft train starts the "
                "ranks itself: use torchrun --nproc-per-node 1"
            )
        return _Told("torchrun", _number(environment, "GROUP_WORLD_SIZE"), _number(environment, "GROUP_RANK"))
    if "JOB_COMPLETION_INDEX" in environment:
        return _Told("an indexed job of Kubernetes", rank=_number(environment, "JOB_COMPLETION_INDEX"))
    return _Told("no step of SLURM with several nodes, no torchrun, no indexed job of Kubernetes")


def _slurm_step(environment: Environment) -> _Told | None:
    """The step of SLURM with several nodes in which this is the only task of its node, or None.

    The shells of sbatch and salloc are in no step, or in one of their own on one node.
    """
    step_name = "SLURM_STEP_ID" if "SLURM_STEP_ID" in environment else "SLURM_STEPID"
    if "SLURM_JOB_ID" not in environment or step_name not in environment:
        return None
    source = f"SLURM step {environment['SLURM_JOB_ID']}.{environment[step_name]}"
    # In a step SLURM_NNODES counts the step's nodes, SLURM_JOB_NUM_NODES those of the whole job.
    nodes = _first_number(environment, "SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES")
    tasks = _first_number(environment, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
    # A terminal on one node (srun --pty) is for typing: there, tasks are a way to ask for cores.
    typed = nodes == 1 and "SLURM_PTY_PORT" in environment
    if tasks is not None and nodes is not None and tasks != nodes and not typed:
        raise ConfigError(
            f"{source} has {tasks} tasks, {nodes} nodes; vitgraft train starts the ranks itself and wants one task a "
            f"node: srun --nodes={nodes} --ntasks={nodes} --ntasks-per-node=1 --cpus-per-task=CORES"
        )
    if nodes is None or nodes == 1:
        return None
    return _Told(source, nodes, _number(environment, "SLURM_NODEID"))


def _told_leader(told: _Told, environment: Environment, expand: Expand) -> tuple[str, int]:
    if told.source.startswith("SLURM"):
        name = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in environment else "SLURM_JOB_NODELIST"
        names = expand(environment[name]) if name in environment else []
        if len(names) != told.nodes:
            raise ConfigError(
                f"{name}={environment.get(name, '')} has {len(names)} names, {told.source} {told.nodes} nodes; "
                "name the first one: --leader HOST"
            )
        # Jobs may share a node, so each has a port of its own; below those that systems give out by themselves.
        return names[0], _FIRST_SLURM_PORT + _number(environment, "SLURM_JOB_ID") % _SLURM_PORTS
    host = environment.get("MASTER_ADDR", "")
    if not host:
        raise ConfigError(f"--leader is missing, and neither SLURM nor MASTER_ADDR tells it; {_GIVE} on every node")
    if told.source == "torchrun":
        # On MASTER_PORT torchrun itself listens.
        port = _number(environment, "MASTER_PORT") + 1
    else:
        port = _number(environment, "MASTER_PORT") if "MASTER_PORT" in environment else DEFAULT_PORT
    return _parse_leader(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", "MASTER_ADDR, MASTER_PORT: ")


def _parse_leader(text: str, where: str = "--leader ") -> tuple[str, int]:
    bracketed = re.fullmatch(r"\[([^\]]*)\](?::(.*))?", text)
    if bracketed is not None:
        host, port, good = bracketed[1], bracketed[2], _ADDRESS_6.fullmatch(bracketed[1])
    else:
        host, colon, rest = text.partition(":")
        # More than one colon is an IPv6 address without brackets.
        port, good = rest if colon else None, None if ":" in rest else _HOST.fullmatch(host)
    if not good:
        raise ConfigError(f"{where}{text!r}: expected HOST or HOST:PORT, an IPv6 address in brackets: [fd00::1]:29400")
    if port is None:
        return host, DEFAULT_PORT
    if not (port.isascii() and port.isdigit() and 1 <= int(port[:6]) <= 65535):
        raise ConfigError(f"{where}{text!r}: the port is no number from 1 to 65535; write e.g. {host}:{DEFAULT_PORT}")
    return host, int(port)


def _first_number(environment: Environment, *names: str) -> int | None:
    return next((_number(environment, name) for name in names if name in environment), None)


def _number(environment: Environment, name: str) -> int:
    value = environment.get(name)
    if value is None or not (value.isascii() and value.isdigit() and len(value) <= 18):
        found = "not set" if value is None else repr(value)
        raise ConfigError(f"{name} of the environment is {found}: expected a whole number; {_GIVE} on every node")
    return int(value)
