"""What a report counts and says, and what a fault does under each policy; the same for every packer."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from vitgraft.configs.errors import DataError
from vitgraft.data_shards.manifest import read_manifest
from vitgraft.data_shards.pack.items import pack_items
from vitgraft.data_shards.pack.label_report import BOXES, CLIPPED, NOTHING_TO_LEARN, TURNED, LabelFault, LabelReport
from vitgraft.launch.cli import app

from ..packing_items import Text


def filled(report: LabelReport) -> list[str]:
    """Note one thing of every sort, and return the lines."""
    report.samples = 2
    report.counts.update({0: 3})
    report.crowds.update({0: 1})
    report.repair(TURNED, "a.jpg")
    report.repair(CLIPPED, "annotation 3")
    report.repair("read from strings", "annotation 4")
    report.pass_over("files of no image format", "notes.txt")
    report.leave_out("boxes without area", "annotation 5")
    with report.collect():
        raise LabelFault("annotation 6: bbox is wrong; fix it", BOXES)
    report.doubt("class dog has crowds alone; see --classes", NOTHING_TO_LEARN)
    return report.lines()


def test_every_sort_of_finding_is_one_line_and_counted_at_the_end() -> None:
    report = LabelReport("instances", ["dog", "cat"])
    assert filled(report) == [
        "labels: 2 samples, 3 instances, 0 samples without label",
        f"  {'dog':24s} {3:>12} instances, 1 of them crowds",
        "  classes without any: cat",
        "  turned: 1: a.jpg",
        "  clipped: 1: annotation 3",
        "  read from strings: 1: annotation 4",
        "  left out: 1 boxes without area: annotation 5",
        "  passed over: 1 files of no image format: notes.txt",
        "  1 wrong boxes, the first: annotation 6: bbox is wrong; fix it",
        "  1 sets or classes with nothing to learn from, the first: class dog has crowds alone; see --classes",
        "  in all: 1 turned, 1 clipped, 1 read from strings, 1 left out, 1 passed over, 1 crowds; faults: 2",
    ]
    with pytest.raises(
        DataError, match=r"annotation 6: .* \(2 faults in all: 1 wrong boxes, 1 sets or classes with nothing"
    ):
        report.close()


def test_what_is_faulty_is_left_out_on_request() -> None:
    report = LabelReport("instances", ["dog", "cat"], on_error="skip")
    assert filled(report)[-4:] == [
        "  left out: 1 wrong boxes: annotation 6: bbox is wrong; fix it",
        "  passed over: 1 files of no image format: notes.txt",
        "  packed all the same: class dog has crowds alone; see --classes",
        "  in all: 1 turned, 1 clipped, 1 read from strings, 2 left out, 1 passed over, 1 crowds; faults: none",
    ]
    report.close()
    source = report.as_source()
    assert source["left_out"]["wrong boxes"] == {"count": 1, "first": ["annotation 6: bbox is wrong; fix it"]}
    assert source["repaired"]["turned"] == {"count": 1, "first": ["a.jpg"]}
    assert (source["crowds"], source["accepted"]) == ({"dog": 1}, ["class dog has crowds alone; see --classes"])
    assert json.loads(json.dumps(source)) == source


def test_names_from_outside_cannot_speak_to_the_terminal() -> None:
    report = LabelReport("instances", ["dog\x1b[2J", "cat\n"], counts=Counter({0: 1}), on_error="skip")
    report.leave_out("images without label", "a\nb\x1b]0;x\x07.jpg")
    with report.collect():
        raise LabelFault("image '\x1b[31m': no such file")
    report.repair("clipped", "\udce9.jpg")
    lines = report.lines()
    assert all(line.isprintable() for line in lines)
    assert "  left out: 1 images without label: a?b?]0;x?.jpg" in lines
    assert str(LabelFault("image '\x1b[31m': no such file")) == "image '?[31m': no such file"


def test_long_lists_stay_one_line() -> None:
    report = LabelReport("instances", ["dog"])
    for number in range(9):
        report.leave_out("images without label", f"{number}{'x' * 70}.jpg")
    (line,) = (line for line in report.lines() if "without label:" in line)
    assert line.endswith(", ...")
    assert len(line) < 300


def test_a_sample_that_fails_while_it_is_packed_is_left_out_on_request(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    for name, data in (("a", b"1"), ("b", b"bad"), ("c", b"2")):
        (tmp_path / "texts" / name).write_bytes(data)
    items = [Text(tmp_path / "texts" / name) for name in "abc"]
    given: dict[str, Any] = {"out": tmp_path / "set", "kind": "video", "source": {}}
    with pytest.raises(DataError, match="b: bad sample"):
        pack_items(items, report=LabelReport("clips", ["x"]), **given)
    report = LabelReport("clips", ["x"], on_error="skip")
    with report.collect():
        raise LabelFault("d: no such video")
    manifest = pack_items(items, report=report, on_error="skip", **given)
    assert manifest.samples == 2
    assert manifest.source["skipped"] == ["d: no such video", "b: bad sample; replace it"]


@pytest.mark.parametrize("option", [["--drop-faulty"], ["--on-error", "skip"]])
def test_both_spellings_mean_the_same(coco: Any, write_coco: Any, option: list[str]) -> None:
    folder, tree = coco
    tree["annotations"].append(tree["annotations"][0] | {"id": 2, "bbox": "none"})
    words = ["shards", "pack", "coco", "--images", folder / "images", "--annotations", write_coco(folder, tree)]
    words += ["--out", folder / "set"]
    assert CliRunner().invoke(app, [*map(str, words)]).exit_code != 0
    assert not (folder / "set").exists()
    done = CliRunner().invoke(app, [*map(str, words), *option])
    assert done.exit_code == 0, done.output
    assert "1 faults left out, the first: " in done.output
    assert len(read_manifest(folder / "set").source["skipped"]) == 1


@pytest.mark.parametrize("name", ["coco", "semantic", "bdd100k", "panoptic", "imagefolder", "video"])
def test_every_packer_takes_the_policy(name: str) -> None:
    text = CliRunner().invoke(app, ["shards", "pack", name, "--help"], env={"COLUMNS": "200"}).output
    assert "--on-error" in text
    assert "--drop-faulty" in text


def test_so_does_the_index_of_foreign_tars() -> None:
    text = CliRunner().invoke(app, ["shards", "index", "--help"], env={"COLUMNS": "200"}).output
    assert "--on-error" in text
    assert "--drop-faulty" in text
