"""Ranks that disagree on what they save: both say so, in time, and hand nothing over. Real processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch.multiprocessing as mp
from disagreement_ranks import CASES, STEP, rank_main
from support_writers import memfd

WITHIN_S = 10.0


def test_ranks_that_disagree_end_and_hand_nothing_over(tmp_path: Path) -> None:
    """In the step, the recipe, the data or the run directory; once they agree, the same save is handed over."""
    (tmp_path / "run").mkdir()
    mp.spawn(rank_main, args=(str(tmp_path), [memfd()[1], memfd()[1]]), nprocs=2)
    run = str(tmp_path / "run")
    values = {
        "step": (f"{STEP}", f"{STEP + 1}"),
        "recipe": ("'h'", "'other'"),
        "data fingerprint": ("'f'", "'other'"),
        "run directory": (f"'{run}'", f"'{run}/other'"),
    }
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for case, row in zip(CASES, found["cases"], strict=True):
            ours, theirs = values[case][rank], values[case][1 - rank]
            expected = f"rank {rank} has {case} {ours}, rank {1 - rank} has {theirs}; start all ranks alike"
            assert (row["code"], row["text"]) == (5, expected)
            assert not row["handed_over"], case
            assert row["seconds"] < WITHIN_S, case
        assert found["alike"] == STEP
    assert not (tmp_path / "run" / "checkpoints").exists()
