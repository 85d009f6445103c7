"""Hosts for all tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from multinode.campaign import SAMPLES
from multinode.namespaces import Network, missing
from support import succeed


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """Three hosts; skips, naming what is missing, where there can be none."""
    lacking = missing()
    if lacking is not None:
        pytest.skip(lacking)
    with Network(tmp_path_factory.mktemp("hosts"), ["host1", "host2", "host3"]) as hosts:
        yield hosts


@pytest.fixture
def hosts(network: Network) -> Iterator[Network]:
    """The hosts, as new before and after the test."""
    network.restore()
    yield network
    network.restore()


@pytest.fixture(scope="session")
def detection_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """22 scenes: at a global batch of 6 the last batch of an epoch is short."""
    folder = tmp_path_factory.mktemp("detection") / "train"
    succeed("shards", "pack", "digits", "--task", "detection", "--split", "train", "--samples", "22", "--out", folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """At a global batch of 6 the last batch of an epoch is short."""
    out = tmp_path_factory.mktemp("semantic") / "train"
    what = ("digits", "--task", "semantic", "--split", "train", "--samples", str(SAMPLES))
    succeed("shards", "pack", *what, "--out", out)
    return out
