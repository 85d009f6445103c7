"""What the doctor makes of facts, and the facts of this host; several hosts: tests/multinode/test_doctor_hosts.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import tiny_recipe, vitgraft, write_recipe

from vitgraft.configs.errors import ConfigError
from vitgraft.launch import diagnosis, doctor
from vitgraft.launch.diagnosis import Finding, agreed
from vitgraft.launch.gpu_facts import parse_smi, parse_xids
from vitgraft.launch.remote_shell import Conversation, NoAnswer, ask_all, ssh_command

GPU = {
    "name": "H100",
    "driver": "550.54",
    "memory_mib": 81559,
    "uncorrected": 0,
    "repair_pending": False,
    "repair_failed": False,
}


def healthy(**changes: Any) -> dict[str, Any]:
    """One host's facts."""
    return {
        "python": "3.11.2",
        "packages": {"torch": "2.11.0", "numpy": "2.1.0"},
        "code": "c0de",
        "cores": 32,
        "quota": None,
        "memory_free": 64 << 30,
        "shm_free": 8 << 30,
        "run_free": 900 << 30,
        "gpus": [],
        "gpu_error": None,
        "xids": [],
        "recipe": {"hash": "abc"},
        "data": {"data.train.path": {"fingerprint": "f00", "samples": 3}},
        **changes,
    }


def three(**changes: Any) -> dict[str, dict[str, Any]]:
    """Three hosts, of which b is changed."""
    return {"a": healthy(), "b": healthy(**changes), "c": healthy()}


def judge(facts: dict[str, dict[str, Any]], slots: dict[str, int] | None = None, device: str = "auto") -> list[Finding]:
    return [
        *diagnosis.judge_versions(facts),
        *diagnosis.judge_recipe(facts),
        *diagnosis.judge_data(facts),
        *diagnosis.judge_space(facts),
        *diagnosis.judge_cores(facts),
        *diagnosis.judge_gpus(facts, slots or {}, device),
    ]


def test_healthy_hosts_have_nothing_but_fine_findings() -> None:
    assert {finding.level for finding in judge(three())} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "check", "level", "says"),
    [
        ({"python": "3.12.1"}, "python", "failure", "python 3.12.1, elsewhere 3.11.2; install the same"),
        ({"packages": {"torch": "2.12.0", "numpy": "2.1.0"}}, "packages", "failure", "torch 2.12.0, elsewhere 2.11.0"),
        ({"packages": {"torch": "2.11.0"}}, "packages", "failure", "numpy missing, elsewhere 2.1.0"),
        ({"code": "0ther"}, "vitgraft", "failure", "source files differ"),
        ({"recipe": {"hash": "xyz"}}, "recipe", "failure", "hash xyz, elsewhere abc; keep the recipe on storage"),
        ({"recipe": {"error": "r.yaml: no such recipe file"}}, "recipe", "failure", "no such recipe file"),
        (
            {"data": {"data.train.path": {"fingerprint": "bar", "samples": 3}}},
            "data",
            "failure",
            "data.train.path: fingerprint bar, elsewhere f00; keep the data",
        ),
        ({"data": {"data.train.path": {"error": "/d: no such folder"}}}, "data", "failure", "/d: no such folder"),
        ({"run_free": 100 << 20}, "disk", "failure", "0.1 GiB free where the run is written"),
        ({"run_free": 5 << 30}, "disk", "warning", "5.0 GiB free where the run is written"),
        ({"memory_free": 100 << 20}, "memory", "failure", "0.1 GiB of memory free"),
        ({"memory_free": 2 << 30}, "memory", "warning", "2.0 GiB of memory free"),
        ({"shm_free": 64 << 20}, "shm", "warning", "0.1 GiB free in /dev/shm"),
        ({"shm_free": None}, "shm", "warning", "no /dev/shm"),
        ({"cores": 4}, "cores", "warning", "4 cores, elsewhere 32; the least set the threads"),
        ({"cores": 1, "quota": 1.5}, "cores", "warning", "a CPU quota of 1.5 cores; give the container all"),
        ({"gpu_error": "nvidia-smi: no devices"}, "gpus", "failure", "nvidia-smi: no devices; see to the driver"),
    ],
)
def test_each_thing_that_is_wrong_is_found_on_its_host(
    changes: dict[str, Any], check: str, level: str, says: str
) -> None:
    found = [finding for finding in judge(three(**changes)) if finding.level != "ok"]
    assert [(finding.check, finding.level, finding.host) for finding in found] == [(check, level, "b")]
    assert says in found[0].text


@pytest.mark.parametrize(
    ("gpus", "slots", "device", "level", "says"),
    [
        ([GPU], 2, "auto", "failure", "1 GPUs for slots=2"),
        ([GPU], 2, "cpu", None, ""),
        ([], 2, "auto", "failure", "no GPU, but a has 2"),
        ([], 2, "cuda", "failure", "launch.device is cuda"),
        ([{**GPU, "uncorrected": 3}, GPU], 2, "auto", "failure", "GPU 0: 3 ECC errors"),
        ([GPU, {**GPU, "repair_failed": True}], 2, "auto", "failure", "GPU 1: its memory could not be repaired"),
        ([GPU, {**GPU, "repair_pending": True}], 2, "auto", "warning", "GPU 1: a repair of its memory is pending"),
        ([{**GPU, "driver": "535.1"}] * 2, 2, "auto", "warning", "driver 535.1, elsewhere 550.54"),
        ([{**GPU, "name": "A100"}] * 2, 2, "auto", "warning", "GPU A100, elsewhere H100"),
        ([GPU, GPU], 2, "auto", None, ""),
    ],
)
def test_gpus(gpus: list[dict[str, Any]], slots: int, device: str, level: str | None, says: str) -> None:
    facts = {"a": healthy(gpus=[GPU, GPU]), "b": healthy(gpus=gpus), "c": healthy(gpus=[GPU, GPU])}
    found = diagnosis.judge_gpus(facts, {"a": 2, "b": slots, "c": 2}, device)
    wrong = [finding for finding in found if finding.level != "ok"]
    assert [(finding.level, finding.host) for finding in wrong] == ([(level, "b")] if level else [])
    assert all(says in finding.text for finding in wrong)


def test_xids_warn() -> None:
    (found,) = diagnosis.judge_gpus({"a": healthy(gpus=[GPU], xids=["PCI:0000:19:00: 79"])}, {}, "auto")
    assert (found.level, "Xid PCI:0000:19:00: 79" in found.text) == ("warning", True)
    log = "[1.0] NVRM: Xid (PCI:0000:19:00): 79, pid=1\n[2.0] usb\n[3.0] NVRM: Xid (PCI:0000:19:00): 79, again\n"
    assert parse_xids(log) == ["PCI:0000:19:00: 79"]


SMI = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
  <driver_version>550.54.15</driver_version>
  <gpu id="00000000:19:00.0">
    <product_name>NVIDIA H100 80GB HBM3</product_name>
    <fb_memory_usage><total>81559 MiB</total></fb_memory_usage>
    <ecc_errors>
      <volatile>
        <sram_correctable>7</sram_correctable>
        <sram_uncorrectable_parity>1</sram_uncorrectable_parity>
        <sram_uncorrectable_secded>0</sram_uncorrectable_secded>
        <dram_correctable>9</dram_correctable>
        <dram_uncorrectable>2</dram_uncorrectable>
      </volatile>
      <aggregate><dram_uncorrectable>50</dram_uncorrectable></aggregate>
    </ecc_errors>
    <retired_pages><pending_retirement>N/A</pending_retirement></retired_pages>
    <remapped_rows>
      <remapped_row_pending>Yes</remapped_row_pending>
      <remapped_row_failure>No</remapped_row_failure>
    </remapped_rows>
  </gpu>
  <gpu id="00000000:3B:00.0">
    <product_name>Tesla V100</product_name>
    <fb_memory_usage><total>16160 MiB</total></fb_memory_usage>
    <ecc_errors>
      <volatile><single_bit><total>5</total></single_bit><double_bit><total>4</total></double_bit></volatile>
    </ecc_errors>
    <retired_pages><pending_retirement>Yes</pending_retirement></retired_pages>
    <remapped_rows>N/A</remapped_rows>
  </gpu>
  <gpu id="00000000:5E:00.0">
    <product_name>NVIDIA GeForce RTX 4090</product_name>
    <fb_memory_usage><total>24564 MiB</total></fb_memory_usage>
    <ecc_errors><volatile><dram_uncorrectable>N/A</dram_uncorrectable></volatile></ecc_errors>
  </gpu>
</nvidia_smi_log>
"""


def test_nvidia_smi_of_several_generations() -> None:
    gpus = parse_smi(SMI)
    assert [gpu["driver"] for gpu in gpus] == ["550.54.15"] * 3
    assert (gpus[0]["name"], gpus[0]["memory_mib"]) == ("NVIDIA H100 80GB HBM3", 81559)
    assert [gpu["uncorrected"] for gpu in gpus] == [3, 4, None]
    assert [gpu["repair_pending"] for gpu in gpus] == [True, True, False]
    assert [gpu["repair_failed"] for gpu in gpus] == [False] * 3


def test_clocks() -> None:
    skews = {"a": (0.01, 0.02), "b": (5.0, 0.1), "c": (-90.0, 0.1), "d": (3.0, 2.5)}
    found = {finding.host: finding for finding in diagnosis.judge_clock(skews)}
    assert {host: finding.level for host, finding in found.items()} == {"b": "warning", "c": "failure"}
    assert "90.0 s (0.1 s uncertain) behind this host's; synchronise it" in found["c"].text
    assert [finding.level for finding in diagnosis.judge_clock({"a": (0.5, 0.2)})] == ["ok"]


def test_bandwidth() -> None:
    rates = [("a", "b", 1e9), ("b", "c", 1e9), ("c", "a", 2e8)]
    assert [(f.level, f.host) for f in diagnosis.judge_bandwidth(rates)] == [("warning", "c")]
    assert [(f.level, f.host) for f in diagnosis.judge_bandwidth([("a", "b", 2e7), ("b", "a", 2e7)])] == [
        ("warning", "a"),
        ("warning", "b"),
    ]
    assert [f.level for f in diagnosis.judge_bandwidth(rates[:2])] == ["ok"]


def test_of_two_hosts_that_differ_the_first_counts() -> None:
    assert agreed({"a": 1, "b": 2}) == (1, ["b"])
    assert agreed({"a": 1, "b": 2, "c": 2}) == (2, ["a"])


@pytest.fixture
def host() -> Iterator[Conversation]:
    talk = Conversation("here", doctor.ASKED)
    yield talk
    talk.close(5)


def test_the_facts_of_this_host_can_be_judged(host: Conversation) -> None:
    facts = host.ask({"ask": "facts", "run": "/nowhere/at/all"}, 60)
    assert "error" not in facts
    assert judge({"here": facts})
    assert facts["packages"]["torch"][0].isdigit()
    assert facts["run_free"] > 0
    assert host.ask({"ask": "nonsense"}, 60) == {"error": "'nonsense'"}
    assert abs(host.ask({"ask": "time"}, 60)["time"] - time.time()) < 60


def test_ports_and_a_stream_to_oneself(host: Conversation) -> None:
    with socket.create_server(("", 0)) as taken:
        answer = host.ask({"ask": "listen", "port": taken.getsockname()[1]}, 20)
        assert "in use" in answer["error"]
    port = host.ask({"ask": "listen"}, 20)["port"]
    assert host.ask({"ask": "reach", "peers": {"me": ["127.0.0.1", port]}, "timeout": 5}, 20) == {"failed": {}}
    sent = host.ask({"ask": "send", "address": "127.0.0.1", "port": port, "seconds": 0.1}, 20)
    assert sent["bytes_per_second"] > 1e6
    assert host.ask({"ask": "hush"}, 20) == {}
    failed = host.ask({"ask": "reach", "peers": {"me": ["127.0.0.1", port]}, "timeout": 5}, 20)["failed"]
    assert "refused" in failed["me"]


def test_storage_that_is_not_shared_is_noticed(host: Conversation, tmp_path: Path) -> None:
    question = {"folder": str(tmp_path), "token": "t"}
    assert host.ask({"ask": "write", **question, "name": "a"}, 20) == {}
    seen = host.ask({"ask": "read", **question, "names": ["a", "b"], "patience": 0.1}, 20)
    assert seen == {"unseen": ["b"]}
    assert host.ask({"ask": "remove", **question, "name": "a"}, 20) == {}
    assert list(tmp_path.iterdir()) == []
    assert "No such file" in host.ask({"ask": "write", "folder": "/none", "token": "t", "name": "a"}, 20)["error"]


@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import time; time.sleep(60)", "no answer within 1 s; see whether the host is up"),
        ("print('Welcome!'); raise SystemExit('no space left')", "no space left"),
        ("import vitgraft.nonsense", "must be installed there under the same path as here"),
        ("import sys; print('Permission denied', file=sys.stderr); sys.exit(255)", "must work without a password"),
        ("pass", "ended with code 0"),
    ],
)
def test_a_host_that_does_not_answer_says_why(program: str, says: str) -> None:
    talk = Conversation("far", [sys.executable, "-c", program])
    time.sleep(0.3)
    for _ in range(2):  # asked again, it says the same
        answer = ask_all([talk], lambda _: {"ask": "time"}, 1 if "sleep" in program else 30)["far"]
        assert isinstance(answer, NoAnswer)
        assert says in str(answer)
    talk.close()


def test_a_missing_ssh_is_named() -> None:
    with pytest.raises(ConfigError, match="no-such-ssh: not installed here"):
        Conversation("far", ["no-such-ssh", "far"])


def test_what_a_login_prints_is_passed_over() -> None:
    program = (
        "print('Last login: today'); import runpy; runpy.run_module('vitgraft.launch.host_facts', run_name='__main__')"
    )
    talk = Conversation("far", [sys.executable, "-c", program])
    assert "time" in talk.ask({"ask": "time"}, 30)
    talk.close(5)


def test_a_host_that_is_asked_nothing_any_more_ends_by_itself() -> None:
    """As when the network between it and the asker is gone: its input stays open."""
    program = "from vitgraft.launch import host_facts; host_facts.IDLE_S = 0.5; host_facts.main()"
    process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.wait(30) == 0
    process.communicate()


def test_ssh_asks_nobody_and_quotes() -> None:
    command = ssh_command("node-1", ["python", "a b"], ["-p", "22"], 7.4)
    assert command[:3] == ["ssh", "-p", "22"]
    assert {"-oBatchMode=yes", "-oConnectTimeout=7"} <= set(command)
    assert command[-2:] == ["node-1", "python 'a b'"]


def test_the_command_on_one_host(tmp_path: Path) -> None:
    done = vitgraft("doctor", "--run-dir", tmp_path / "runs" / "a", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"]
    levels = {found["check"]: found["level"] for found in report["findings"]}
    assert levels["storage"] == "ok"
    assert levels["all-reduce"] == levels["recipe"] == "skipped"
    assert list(tmp_path.iterdir()) == []


def test_the_command_says_what_would_stop_a_run(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        recipe = write_recipe(tmp_path / "a.yaml", tiny_recipe("detection", tmp_path / "none", launch__port=port))
        done = vitgraft("doctor", recipe)
    assert done.returncode == 2
    lines = [line for line in done.stdout.splitlines() if line.startswith("failure")]
    assert len(lines) == 2
    assert "data.train.path" in lines[0]
    assert "no such folder" in lines[0]
    assert "launch.port" in lines[1]
    assert "vitgraft: doctor: 2 of the checks failed" in done.stderr


def test_bad_usage(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("a slots=x\n")
    for arguments, says in (
        (("--hostfile", tmp_path / "hosts"), "hosts:1: slots=x"),
        (("--hostfile", tmp_path / "none"), "no such file"),
        (("nonsense",), "no such recipe file"),
    ):
        done = vitgraft("doctor", *arguments)
        assert done.returncode == 2
        assert says in done.stderr
        assert done.stdout == ""


def test_ctrl_c_does_not_wait_for_the_slowest_host() -> None:
    conversations = [Conversation(host, ["sleep", "600"]) for host in "ab"]
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        ask_all(conversations, lambda _: {"ask": "time"}, 300)
    assert time.monotonic() - begun < 20
    for conversation in conversations:
        conversation.close()
