"""The lists that the common video data sets publish: which videos, which classes, in which order."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.manifest import Manifest
from vitgraft.data_shards.pack.class_lists import read_classes
from vitgraft.data_shards.pack.video import pack_video
from vitgraft.data_shards.pack.video_lists import detect, hmdb51, kinetics, read_video_list, ssv2, ucf101
from vitgraft.data_shards.stream import ShardReader

HEADER = "label,youtube_id,time_start,time_end,split\n"
UCF = "torchvision/v_SoccerJuggling_g23_c01.avi"
HMDB = ["torchvision/RATRACE_wave_f_nm_np1_fr_goo_37.avi", "torchvision/TrumanShow_wave_f_nm_np1_fr_med_26.avi"]
CARTWHEEL = "torchvision/hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi"


@pytest.fixture
def clips(test_data: Path, tmp_path: Path) -> Callable[..., Path]:
    """Puts genuine clips under other names into a folder."""

    def place(**files: str) -> Path:
        for name, source in files.items():
            path = tmp_path / "videos" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(test_data / "video_clips" / source, path.with_suffix(Path(source).suffix))
        return tmp_path / "videos"

    return place


def packed(folder: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """(file name, class) of each sample."""
    reader = ShardReader(folder, manifest)
    found = [json.loads(reader.read(i).members["json"]) for i in range(len(reader))]
    return [(item["file_name"], manifest.classes[item["label"]]) for item in found]


def test_kinetics(clips: Callable[..., Path], tmp_path: Path) -> None:
    """Genuine Kinetics clips as downloaders name them, in folders of classes or not, whole ids too."""
    root = clips(
        **{
            "using segway__R6llTwEh07w_000012_000022": "torchvision/R6llTwEh07w.mp4",
            "SOX5yA1l24A": "torchvision/SOX5yA1l24A.mp4",
            "train__arm wrestling__dQw_demo_000001_000011": "mmaction2/demo.mp4",
        }
    )
    text = (
        HEADER + "using segway,R6llTwEh07w,12,22,train\nusing segway,SOX5yA1l24A,5.0,15.0,train\n"
        '"arm wrestling",dQw_demo,1,11,train\n"zumba, slow",absent,0,10,validate\n'
    )
    (tmp_path / "train.csv").write_text(text)
    manifest = pack_video(tmp_path / "train.csv", tmp_path / "set", root=root, split="train")
    # The classes are those of the whole file, so that train and val agree.
    assert manifest.classes == ["arm wrestling", "using segway", "zumba, slow"]
    assert packed(tmp_path / "set", manifest) == [
        ("R6llTwEh07w_000012_000022", "using segway"),
        ("SOX5yA1l24A_000005_000015", "using segway"),
        ("dQw_demo_000001_000011", "arm wrestling"),
    ]
    with pytest.raises(DataError, match=r"train\.csv:5: absent_000000_000010: no such video"):
        pack_video(tmp_path / "train.csv", tmp_path / "all", root=root)
    assert not (tmp_path / "all").exists()
    manifest = pack_video(tmp_path / "train.csv", tmp_path / "all", root=root, on_error="skip")
    assert manifest.samples == 3
    place = f"{tmp_path / 'train.csv'}:5"
    assert manifest.source["skipped"] == [f"{place}: absent_000000_000010: no such video; check the list and --root"]


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        ("youtube_id,time_start,time_end,split\nx,1,2,test\n", None, "no column 'label'.*test sets"),
        ("label,youtube_id,time_start,time_end\nx,a,1,2\n", "val", "no column 'split'"),
        (HEADER + "x,,1,2,train\n", None, "k.csv:2: no label or youtube_id"),
        (HEADER + "x,a\n", None, "k.csv:2: time None; expected seconds"),
        (HEADER + "x,a,one,2,train\n", None, "k.csv:2: time 'one'"),
        (HEADER + "x,a,1e999,2,train\n", None, "k.csv:2: time '1e999'"),
        (HEADER + "x,a,-4,2,train\n", None, "k.csv:2: time '-4'"),
        (HEADER + 'x,"a"b,1,2,train\n', None, "k.csv:2: not CSV"),
    ],
)
def test_wrong_kinetics_lists(text: str, split: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        kinetics(text, "k.csv", split)


def test_something_something(clips: Callable[..., Path], tmp_path: Path) -> None:
    root = clips(**{"74225": HMDB[0], "116154": HMDB[1]})
    entries = [
        {"id": "74225", "label": "spinning a cube", "template": "Spinning [something]", "placeholders": ["a cube"]},
        {"id": 116154, "template": "Putting [something] on [something]"},
    ]
    (tmp_path / "train.json").write_text(json.dumps(entries))
    order = {"Spinning something": "0", "Putting something on something": "2", "Opening something": "1"}
    (tmp_path / "labels.json").write_text(json.dumps(order))
    classes = read_classes(str(tmp_path / "labels.json"))
    assert classes == ["Spinning something", "Opening something", "Putting something on something"]
    manifest = pack_video(tmp_path / "train.json", tmp_path / "set", root=root, classes=classes)
    assert packed(tmp_path / "set", manifest) == [("74225", classes[0]), ("116154", classes[2])]
    manifest = pack_video(tmp_path / "train.json", tmp_path / "sorted", root=root)
    assert manifest.classes == ["Putting something on something", "Spinning something"]
    with pytest.raises(DataError, match="label 'Spinning something' is none of the 1 classes"):
        pack_video(tmp_path / "train.json", tmp_path / "none", root=root, classes=["Opening something"])


@pytest.mark.parametrize(
    "tree", [{"id": 1}, ["x"], [{"id": "1"}], [{"id": None, "template": "x"}], [{"id": "1", "template": [1]}], 3]
)
def test_wrong_something_something_lists(tree: Any) -> None:
    with pytest.raises(DataError, match=r"s\.json.* expected"):
        ssv2(tree, "s.json")


def test_ucf101(clips: Callable[..., Path], tmp_path: Path) -> None:
    root = clips(
        SoccerJuggling__v_SoccerJuggling_g23_c01=UCF,
        v_ApplyEyeMakeup_g08_c01="mmaction2/test.avi",
    )
    lines = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "SoccerJuggling/v_SoccerJuggling_g23_c01.avi"]
    (tmp_path / "trainlist01.txt").write_text(f"{lines[0]} 1\r\n{lines[1]} 84\r\n")
    (tmp_path / "testlist01.txt").write_text("\n".join(lines))
    (tmp_path / "classInd.txt").write_text("1 SoccerJuggling\n2 Billiards\n3 ApplyEyeMakeup\n")
    expected = [(lines[0], "ApplyEyeMakeup"), (lines[1], "SoccerJuggling")]
    for name in ("trainlist01.txt", "testlist01.txt"):
        manifest = pack_video(tmp_path / name, tmp_path / f"set-{name}", root=root)
        assert packed(tmp_path / f"set-{name}", manifest) == expected
        assert manifest.classes == ["ApplyEyeMakeup", "SoccerJuggling"]
    classes = read_classes(str(tmp_path / "classInd.txt"))
    assert classes == ["SoccerJuggling", "Billiards", "ApplyEyeMakeup"]
    manifest = pack_video(tmp_path / "testlist01.txt", tmp_path / "set", root=root, classes=classes)
    assert packed(tmp_path / "set", manifest) == expected
    with pytest.raises(DataError, match=r"u\.txt:2: 'clip\.avi'; expected CLASS/VIDEO"):
        ucf101("A/a.avi 1\nclip.avi\n", "u.txt")
    shutil.copytree(root / "SoccerJuggling", root / "other" / "copy")
    shutil.move(root / "SoccerJuggling", root / "more")
    with pytest.raises(DataError, match="are both called v_SoccerJuggling_g23_c01; remove one"):
        pack_video(tmp_path / "testlist01.txt", tmp_path / "twice", root=root)


def test_hmdb51(clips: Callable[..., Path], tmp_path: Path) -> None:
    root = clips(wave__one=HMDB[0], wave__two=HMDB[1], cartwheel__three=CARTWHEEL)
    folder = tmp_path / "splits"
    folder.mkdir()
    (folder / "wave_test_split1.txt").write_text("one.avi 1 \ntwo.avi 2 \nabsent.avi 0 \n")
    (folder / "cartwheel_test_split1.txt").write_text("three.avi 1 \n")
    (folder / "wave_test_split2.txt").write_text("two.avi 1 \n")
    (folder / "._wave_test_split1.txt").write_bytes(b"\xff Mac OS X")
    classes = ["cartwheel", "wave"]
    for split, fold, expected in (
        (None, None, [("cartwheel/three.avi", "cartwheel"), ("wave/one.avi", "wave")]),
        ("test", 1, [("wave/two.avi", "wave")]),
        ("train", 2, [("wave/two.avi", "wave")]),
    ):
        out = tmp_path / f"set-{split}-{fold}"
        manifest = pack_video(folder, out, root=root, split=split, fold=fold)
        assert packed(out, manifest) == expected
        assert manifest.classes == (classes if fold != 2 else ["wave"])
    with pytest.raises(DataError, match=r"no files CLASS_test_split3\.txt"):
        pack_video(folder, tmp_path / "none", root=root, fold=3)
    with pytest.raises(DataError, match=r"splits: wave:2: 'two\.avi'; expected VIDEO\.avi and 0, 1 or 2"):
        hmdb51({"wave": "one.avi 1\ntwo.avi\n"}, "splits")
    with pytest.raises(ConfigError, match="--split val: expected train or test"):
        hmdb51({"wave": "one.avi 1\n"}, "splits", "val")


def test_folders(clips: Callable[..., Path], tmp_path: Path) -> None:
    root = clips(wave__deep__one=HMDB[0], cartwheel__three=CARTWHEEL)
    (root / "empty").mkdir()
    (root / "wave" / "notes.txt").write_text("no video")
    manifest = pack_video(root, tmp_path / "set")
    assert manifest.classes == ["cartwheel", "empty", "wave"]
    assert packed(tmp_path / "set", manifest) == [("cartwheel/three.avi", "cartwheel"), ("wave/deep/one.avi", "wave")]
    report = manifest.source["label_report"]
    assert report["classes"] == {"cartwheel": 1, "empty": 0, "wave": 1}
    (root / "cartwheel" / "three.avi").rename(root / "three.avi")
    with pytest.raises(DataError, match=r"three\.avi: lies in no folder of a class"):
        pack_video(root, tmp_path / "none")
    with pytest.raises(DataError, match="data set is empty"):
        pack_video(root / "empty", tmp_path / "none")


def test_formats_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "splits").mkdir()
    (tmp_path / "splits" / "wave_test_split1.txt").write_text("")
    (tmp_path / "classes" / "wave").mkdir(parents=True)
    texts = {
        "a.csv": (HEADER, "kinetics"),
        "b.csv": ("a.mp4,wave\n", "list"),
        "c.txt": ("a.mp4 0\n", "list"),
        "trainlist02.txt": ("A/a.avi 1\n", "ucf101"),
        "d.json": ("[]", "ssv2"),
    }
    for name, (text, _) in texts.items():
        (tmp_path / name).write_text(text)
    expected = {name: found for name, (_, found) in texts.items()} | {"splits": "hmdb51", "classes": "folders"}
    assert {name: detect(tmp_path / name) for name in expected} == expected
    with pytest.raises(DataError, match=r"c\.txt: no such folder; format folders reads a folder"):
        read_video_list(tmp_path / "c.txt", "folders")
    with pytest.raises(DataError, match="splits: is a folder; format ucf101 reads a file"):
        read_video_list(tmp_path / "splits", "ucf101")
    for name, options in (("c.txt", {"split": "train"}), ("a.csv", {"fold": 1}), ("classes", {"fold": 2})):
        with pytest.raises(ConfigError, match=r"lists of format .* have none"):
            read_video_list(tmp_path / name, **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="--split dev: expected train, val or test"):
        read_video_list(tmp_path / "a.csv", split="dev")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a\0b"])
def test_names_do_not_lead_out_of_the_root(name: str, tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "l.json").write_text(json.dumps([{"id": name, "template": "x"}]))
    with pytest.raises(DataError, match=r"leads out of|expected a path relative"):
        pack_video(tmp_path / "l.json", tmp_path / "set", root=tmp_path / "videos")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.json", '{"a": "0", "b": "2"}', "numbered from 0"),
        ("labels.json", '{"a": [0], "b": 1}', "numbered from 0"),
        ("labels.json", '["a", 3]', "expected a JSON list of names"),
        ("labels.json", '["a", "a"]', "'a' is listed twice"),
        ("classInd.txt", "1 a\n3 b\n", "numbered from 1"),
        ("names.txt", "\n", "no class names"),
    ],
)
def test_wrong_class_files(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        read_classes(str(tmp_path / name))


def test_class_names(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("1 a\n\nb c\n")
    (tmp_path / "names.json").write_text('["x", "y"]')
    assert read_classes(str(tmp_path / "names.txt")) == ["1 a", "b c"]
    assert read_classes(str(tmp_path / "names.json")) == ["x", "y"]
    assert read_classes("run, wave") == ["run", "wave"]
