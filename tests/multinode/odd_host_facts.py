"""Stands in for vitgraft.launch.host_facts: says odd things on the hosts that its arguments name, HOST:WHAT=VALUE."""

from __future__ import annotations

import os
import sys

from vitgraft.launch import host_facts


def make_odd(what: str, value: str) -> None:
    """Replace one fact of this process's."""
    clock, versions = host_facts.clock, host_facts.package_versions
    if what == "clock":
        host_facts.clock = lambda: clock() + float(value)
    elif what == "python":
        host_facts.platform.python_version = lambda: value
    elif what == "code":
        host_facts.code_hash = lambda: value
    else:
        host_facts.package_versions = lambda: {**versions(), what: value}


def main() -> None:
    """Answer as the real one does, but for what the arguments say of this host."""
    for argument in sys.argv[1:]:
        host, _, oddity = argument.partition(":")
        if host == os.uname().nodename:
            make_odd(*oddity.split("=", 1))
    host_facts.main()


if __name__ == "__main__":
    main()
