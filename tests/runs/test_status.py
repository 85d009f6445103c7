"""What a real run leaves for those who look at it: ``vitgraft status``, the rows and TensorBoard's curves."""

from __future__ import annotations

import json
from pathlib import Path

from support import history, succeed

STEPS = 20


def test_the_status_of_a_finished_run(unbroken: Path) -> None:
    status = json.loads(succeed("status", unbroken, "--json").stdout)
    assert (status["state"], status["exit_code"], status["step"], status["steps"]) == ("finished", 0, STEPS, STEPS)
    assert (status["world"], status["device"]) == (2, "cpu")
    # Another test may have started the finished run again.
    assert status["restarts"] == status["attempt"] - 1
    assert (status["checkpoint_step"], status["evaluation_step"]) == (STEPS, STEPS)
    assert "box_AP" in status["evaluation"]
    assert {role["role"]: role["processes"] for role in status["roles"]} == {"trainer": 2, "checkpointer": 1}
    assert status["loss"] == history(unbroken)[STEPS]["loss"]
    assert [event["event"] for event in status["events"][-2:]] == ["start", "end"]
    assert "finished" in succeed("status", unbroken).stdout


def test_the_rows_and_curves_of_a_run(unbroken: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = history(unbroken)
    for row in rows.values():
        assert row["steps"] == STEPS
        assert row["mfu"] is None  # nobody told this CPU's peak
        assert 0 < row["own_s_median"] <= row["own_s_max"]
        assert row["slowest_rank"] in (0, 1)
    # No rank works longer than the steps last, though each measures from one meeting to the next.
    assert sum(row["own_s_max"] for row in rows.values()) <= 1.5 * sum(row["seconds"] for row in rows.values())
    assert sorted(row["time"] for row in rows.values()) == [rows[step]["time"] for step in sorted(rows)]
    shown = EventAccumulator(str(unbroken / "tensorboard"), size_guidance={"scalars": 0})
    shown.Reload()
    assert [point.step for point in shown.Scalars("ranks/own_s_max")] == list(range(1, STEPS + 1))
    assert {"train/loss", "loss/mask", "speed/step_s", "evaluation/box_AP"} <= set(shown.Tags()["scalars"])
    assert shown.Tags()["images"]
    assert "run/attempts/text_summary" in shown.Tags()["tensors"]
