"""Label maps in every usual encoding come out as class ids, or as one line that says why not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.data_shards.decode import decode_label
from vitgraft.data_shards.manifest import IGNORE, read_manifest
from vitgraft.data_shards.pack.pairs import Pairing
from vitgraft.data_shards.pack.semantic import pack_semantic
from vitgraft.data_shards.report import inspect, verify
from vitgraft.data_shards.stream import ShardReader
from vitgraft.launch.cli import app

CITYSCAPES_IDS = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
CAMVID = ["sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist"]


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    """images/a.png and labels/a.png of 4x3 pixels with ids 0, 1 and 255."""
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    Image.fromarray(np.zeros((3, 4, 3), dtype=np.uint8)).save(tmp_path / "images" / "a.png")
    Image.fromarray(np.array([[0, 0, 1, 1], [0, 1, 255, 1], [0, 0, 0, 0]], np.uint8)).save(
        tmp_path / "labels" / "a.png"
    )
    return tmp_path


def label_of(folder: Path, sample: int = 0) -> np.ndarray:
    reader = ShardReader(folder, read_manifest(folder))
    return decode_label(reader.read(sample).members["label.png"], "x").numpy()


def test_camvid(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "camvid_mini"
    manifest = pack_semantic(root / "val", root / "valannot", tmp_path / "set", CAMVID, ignore=[11])
    assert (manifest.samples, manifest.classes) == (12, CAMVID)
    paths = sorted((root / "valannot").glob("*.png"))
    counts = np.zeros(256, dtype=np.int64)
    for number, path in enumerate(paths):
        theirs = np.asarray(Image.open(path))
        assert np.array_equal(label_of(tmp_path / "set", number), np.where(theirs == 11, IGNORE, theirs))
        counts += np.bincount(theirs.ravel(), minlength=256)
    assert verify(tmp_path / "set").ok
    report = inspect(tmp_path / "set", draw=1, out=tmp_path / "pictures")
    assert list(report.class_counts.values()) == counts[:11].tolist()
    assert report.unlabelled == counts[11]
    assert report.sizes == {(360, 480): 12}
    assert report.pictures[0].is_file()


def test_without_saying_what_is_ignored_the_id_is_named(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "camvid_mini"
    with pytest.raises(DataError, match=r"\.png: label id 11 is none of the 11 classes"):
        pack_semantic(root / "val", root / "valannot", tmp_path / "set", CAMVID)
    assert list(tmp_path.iterdir()) == []


def test_the_report_counts_pixels_and_every_fault(pair: Path) -> None:
    told: list[str] = []
    manifest = pack_semantic(
        pair / "images", pair / "labels", pair / "set", ["x", "y", "z"], ignore=[255], say=told.append
    )
    assert told[0] == "labels: 1 samples, 11 pixels, 1 pixels without label"
    assert told[-2:] == [
        "  classes without any: z",
        "  in all: 0 turned, 0 clipped, 0 left out, 0 passed over, 0 crowds; faults: none",
    ]
    assert manifest.source["label_report"]["classes"] == {"x": 7, "y": 4, "z": 0}
    for name in ("b", "c"):
        Image.new("RGB", (5, 3)).save(pair / "images" / f"{name}.png")
    Image.new("L", (4, 3)).save(pair / "labels" / "b.png")
    Image.new("L", (5, 3), 9).save(pair / "labels" / "c.png")
    counted = r"b\.png: 4x3 .*\(2 faults in all: 1 size mismatches, 1 ids outside the class list\)"
    with pytest.raises(DataError, match=counted):
        pack_semantic(pair / "images", pair / "labels", pair / "other", ["x", "y", "z"], ignore=[255])
    assert not (pair / "other").exists()


def test_palette_images_are_read_as_indices(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "seg_samples_small" / "palette_256x128"
    how = Pairing("_img.jpg", "_gt.png")
    manifest = pack_semantic(root / "imgs", root / "gts", tmp_path / "set", ["a", "b", "c", "d"], pairing=how)
    assert manifest.samples == 5
    for number, path in enumerate(sorted((root / "gts").iterdir())):
        assert Image.open(path).mode == "P"
        assert np.array_equal(label_of(tmp_path / "set", number), np.asarray(Image.open(path)))


def test_reduce_zero_as_for_ade20k(test_data: Path, tmp_path: Path) -> None:
    root = test_data / "ade20k_sample"
    classes = [f"class{i}" for i in range(150)]
    pack_semantic(root / "images", root / "annotations", tmp_path / "set", classes, reduce_zero=True)
    for number, path in enumerate(sorted((root / "annotations").glob("*.png"))):
        theirs = np.asarray(Image.open(path)).astype(int)
        assert np.array_equal(label_of(tmp_path / "set", number), np.where(theirs == 0, 255, theirs - 1))


def test_sixteen_bit_label_maps(pair: Path) -> None:
    Image.fromarray(np.full((3, 4), 1, dtype=np.uint16)).save(pair / "labels" / "a.png")
    pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y"])
    assert label_of(pair / "set").tolist() == [[1] * 4] * 3
    Image.fromarray(np.full((3, 4), 256, dtype=np.uint16)).save(pair / "labels" / "a.png")
    with pytest.raises(DataError, match=r"a\.png: label id 256"):
        pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y"], overwrite=True)


def test_255_is_always_ignored(pair: Path) -> None:
    pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y"], ignore=[1])
    assert label_of(pair / "set").tolist() == [[0, 0, 255, 255], [0, 255, 255, 255], [0, 0, 0, 0]]


def test_several_ids_are_ignored(pair: Path) -> None:
    """By the command, as a user gives them; ids are those in the file, before --reduce-zero."""
    Image.fromarray(np.array([[1, 2, 7, 9], [0, 1, 2, 3], [255, 7, 9, 1]], dtype=np.uint8)).save(
        pair / "labels" / "a.png"
    )

    def run(*more: str) -> Result:
        command = ["shards", "pack", "semantic", "--images", str(pair / "images"), "--labels", str(pair / "labels")]
        return CliRunner().invoke(
            app, [*command, "--classes", "x,y,z", "--reduce-zero", "--out", str(pair / "set"), *more]
        )

    with pytest.raises(DataError, match="label id 7 is none of the 3 classes"):
        raise run().exception or AssertionError
    with pytest.raises(ConfigError, match="--ignore 7;9: expected integers with commas"):
        raise run("--ignore", "7;9").exception or AssertionError
    assert run("--ignore", "7,9").exit_code == 0
    assert label_of(pair / "set").tolist() == [[0, 1, 255, 255], [255, 0, 1, 2], [255, 255, 255, 0]]


def test_pairs_are_found_by_stem_also_in_folders(pair: Path) -> None:
    for name in ("images", "labels"):
        (pair / name / "town").mkdir()
        (pair / name / "a.png").rename(pair / name / "town" / "b.png")
    assert pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y"]).samples == 1


def test_lonely_files_wrong_sizes_and_empty_sets(pair: Path) -> None:
    def pack(classes: tuple[str, ...] = ("x", "y")) -> None:
        pack_semantic(pair / "images", pair / "labels", pair / "set", list(classes))

    with pytest.raises(DataError, match="label id 1 is none of the 1 classes"):
        pack(("x",))
    with pytest.raises(DataError, match="listed twice"):
        pack(("x", "x"))
    Image.new("RGB", (5, 3)).save(pair / "images" / "a.png")
    with pytest.raises(DataError, match=r"labels/a\.png: 4x3 pixels, its image .* has 5x3"):
        pack()
    Image.new("RGB", (4, 3)).save(pair / "images" / "b.png")
    with pytest.raises(DataError, match=r"b\.png: no label map"):
        pack()
    (pair / "images" / "a.png").unlink()
    Image.new("L", (4, 3)).save(pair / "labels" / "b.png")
    with pytest.raises(DataError, match=r"labels/a\.png: no image a"):
        pack()
    (pair / "images" / "b.png").unlink()
    with pytest.raises(DataError, match="data set is empty"):
        pack()
    with pytest.raises(DataError, match="nowhere: no such folder"):
        pack_semantic(pair / "images", pair / "nowhere", pair / "set", ["x"])
    assert not (pair / "set").exists()


def photograph(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3)).save(path)


def labelled(path: Path, pixels: list[list[Any]], palette: bool = False) -> None:
    """A PNG of 4x3 ids, or of colours."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.array(pixels, dtype=np.uint8))
    if palette:
        image.putpalette(range(256))
    image.save(path)


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(app, ["shards", "pack", "semantic", *map(str, words), "--jobs", "1"])


def names_of(folder: Path) -> list[str]:
    reader = ShardReader(folder, read_manifest(folder))
    return [json.loads(reader.read(number).members["json"])["file_name"] for number in range(len(reader))]


def test_cityscapes_as_published(tmp_path: Path) -> None:
    """Ends of names on both sides, colours and instances beside the ids, and ids that are not the training's."""
    for town, number in (("aachen", 19), ("aachen", 20), ("bochum", 19)):
        key = f"train/{town}/{town}_000000_{number:06d}"
        photograph(tmp_path / "leftImg8bit" / f"{key}_leftImg8bit.png")
        ids = [[0, 7, 8, 33], [24, 26, 255, 1], [7] * 4]
        labelled(tmp_path / "gtFine" / f"{key}_gtFine_labelIds.png", ids)
        labelled(tmp_path / "gtFine" / f"{key}_gtFine_color.png", [[[1, 2, 3]] * 4] * 3)
        Image.fromarray(np.full((3, 4), 26001, dtype=np.uint16)).save(
            tmp_path / "gtFine" / f"{key}_gtFine_instanceIds.png"
        )
        (tmp_path / "gtFine" / f"{key}_gtFine_polygons.json").write_text("{}")
    # Which nobody labelled.
    photograph(tmp_path / "leftImg8bit" / "train/aachen/aachen_000000_000021_leftImg8bit.png")
    words = ["--images", tmp_path / "leftImg8bit/train", "--labels", tmp_path / "gtFine/train"]
    words += ["--out", tmp_path / "set", "--classes", ",".join(f"class{number}" for number in range(19))]
    ends = ["--image-suffix", "_leftImg8bit.png", "--label-suffix", "_gtFine_labelIds.png"]
    done = run(*words, *ends, "--ids", ",".join(map(str, CITYSCAPES_IDS)))
    assert done.exit_code == 0, done.output
    assert "left out: 1 images without label" in done.output
    assert names_of(tmp_path / "set") == [
        "aachen/aachen_000000_000019_leftImg8bit.png",
        "aachen/aachen_000000_000020_leftImg8bit.png",
        "bochum/bochum_000000_000019_leftImg8bit.png",
    ]
    assert label_of(tmp_path / "set").tolist() == [[255, 0, 1, 18], [11, 13, 255, 255], [0] * 4]
    listed = tmp_path / "some.txt"
    listed.write_text("bochum/bochum_000000_000019\naachen/aachen_000000_000020_leftImg8bit.png\n")
    others = ",".join(map(str, range(19, 40)))
    assert run(*words, *ends, "--ignore", others, "--list", listed, "--overwrite").exit_code == 0
    assert [name[:27] for name in names_of(tmp_path / "set")] == [
        "aachen/aachen_000000_000020",
        "bochum/bochum_000000_000019",
    ]
    # Not the whole end: nothing is silently empty.
    with pytest.raises(DataError, match=r"no files that end in _gtFine_labelIDs\.png; check the path and --la"):
        raise run(*words, *ends, "--label-suffix", "_gtFine_labelIDs.png", "--overwrite").exception or AssertionError
    (tmp_path / "leftImg8bit" / "train/aachen/aachen_000000_000019_leftImg8bit.png").unlink()
    with pytest.raises(DataError, match=r"19_gtFine_labelIds\.png: no image aachen/aachen_000000_000019 in"):
        raise run(*words, *ends, "--overwrite").exception or AssertionError


def test_voc_as_published(tmp_path: Path) -> None:
    """Palette PNGs of some of the images, of which a list takes some."""
    for stem in ("2007_000032", "2007_000033", "2007_000039", "2008_000001"):
        photograph(tmp_path / "JPEGImages" / f"{stem}.jpg")
    for number, stem in enumerate(("2007_000032", "2007_000033", "2007_000039")):
        labelled(tmp_path / "SegmentationClass" / f"{stem}.png", [[0, number, 255, 0]] * 3, palette=True)
    train = tmp_path / "ImageSets" / "Segmentation" / "train.txt"
    train.parent.mkdir(parents=True)
    train.write_text("2007_000032\n2007_000039\n\n")
    words = ["--images", tmp_path / "JPEGImages", "--labels", tmp_path / "SegmentationClass", "--out", tmp_path / "set"]
    words += ["--classes", "background,aeroplane,bicycle,bird,boat", "--list", train]
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert ", 0 left out, 0 passed over, " in done.output
    assert names_of(tmp_path / "set") == ["2007_000032.jpg", "2007_000039.jpg"]
    assert label_of(tmp_path / "set", 1).tolist() == [[0, 2, 255, 0]] * 3
    # Some lists name files, and some name one twice.
    train.write_text("2007_000033.jpg\n2007_000033\n")
    done = run(*words, "--overwrite")
    assert "left out: 1 lines whose image was listed before" in done.output
    assert names_of(tmp_path / "set") == ["2007_000033.jpg"]
    for text, message in (
        ("2008_000001\n2007_000032\n", r"train\.txt:1: no label map 2008_000001\.png in"),
        ("2007_000032\n2009_000001 -1\n2009_000002\n", r"txt:2: no image '2009_000001 -1' in .*\(2 faults in all"),
        ("\n", "no line names an image"),
        ("9" * 300, "no image '9999"),
    ):
        train.write_text(text)
        with pytest.raises(DataError, match=message):
            raise run(*words, "--overwrite").exception or AssertionError
    with pytest.raises(DataError, match=r"absent\.txt: no such file"):
        raise run(*words, "--list", tmp_path / "absent.txt", "--overwrite").exception or AssertionError


def test_camvid_as_published(tmp_path: Path) -> None:
    """Colours, which a text file names; names that are no class do not count."""
    photograph(tmp_path / "701_StillsRaw_full" / "0001TP_006690.png")
    sky, road, void, animal = [128, 128, 128], [128, 64, 128], [0, 0, 0], [64, 128, 64]
    labels = tmp_path / "LabeledApproved_full" / "0001TP_006690_L.png"
    labelled(labels, [[sky, road, void, animal]] * 3)
    colours = tmp_path / "label_colors.txt"
    colours.write_text("64 128 64\tAnimal\n128 64 128\tRoad\n128 128 128\tSky\n0 0 0\t\tVoid\n192 0 64\tRoad\n")
    words = ["--images", tmp_path / "701_StillsRaw_full", "--labels", tmp_path / "LabeledApproved_full"]
    words += ["--out", tmp_path / "set", "--label-suffix", "_L.png", "--colours", colours]
    done = run(*words, "--classes", "Sky,Road")
    assert done.exit_code == 0, done.output
    assert label_of(tmp_path / "set").tolist() == [[0, 1, 255, 255]] * 3
    assert read_manifest(tmp_path / "set").source["colours"]["#c00040"] == 1

    def refused(*more: str) -> BaseException:
        return run(*words, "--overwrite", *more).exception or AssertionError()

    with pytest.raises(DataError, match=r"label_colors\.txt: no colour of class 'Tree' \(1 such"):
        raise refused("--classes", "Sky,Tree")
    labelled(labels, [[sky, road, void, [1, 2, 3]]] * 3)
    with pytest.raises(DataError, match=r"_L\.png: colour 1 2 3 is not among the 5 listed"):
        raise refused("--classes", "Sky")
    for line, message in (
        ("128 128 Sky", "'128 128 Sky'; expected R G B NAME"),
        ("128 128 256 Sky", "expected R G B NAME"),
        ("128 128 128 Sky\n128 128 128 Tree", r"label_colors\.txt:2: colour 128 128 128 is listed twice"),
    ):
        colours.write_text(line + "\n")
        with pytest.raises(DataError, match=message):
            raise refused("--classes", "Sky")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ids": [1, 2]}, "2 for 3 classes"),
        ({"ids": [1, 2, 2]}, "one for each class, none twice"),
        ({"ids": [1, 2, 3], "ignore": [4]}, "exclude each other"),
        ({"colours": Path("x"), "reduce_zero": True}, "exclude each other"),
        ({"pairing": Pairing(label_suffix="_L")}, r"--label-suffix _L: expected .*\.png, "),
        ({"pairing": Pairing(image_suffix="_leftImg8bit")}, "--image-suffix _leftImg8bit: expected"),
    ],
)
def test_options_that_mean_nothing(pair: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack_semantic(pair / "images", pair / "labels", pair / "set", ["x", "y", "z"], **options)
    assert not (pair / "set").exists()


def masks(folder: Path, values: list[int], size: int = 3) -> list[str | Path]:
    """Images and label maps of these ids, and the words that pack them."""
    for number in range(2):
        photograph(folder / "img" / f"{number}.jpg")
        labelled(folder / "lab" / f"{number}.png", [[*values, *values[-1:] * (4 - len(values))]] * size)
    return ["--images", folder / "img", "--labels", folder / "lab", "--out", folder / "set", "--overwrite"]


@pytest.mark.parametrize(
    ("values", "classes", "remedy"),
    [
        ([0, 255], "background,object", "pass --ids 0,255; if it means unlabelled, pass --ignore 255"),
        ([0, 1, 255], "background,cat,dog", "pass --ids 0,1,255; "),
        ([0, 255], "a,b,c,d,e,f", "pass --ids with the id of each class; "),
        ([0, 255], "object", "'object' is the only class, .* --ids 0,255 and --classes with both names; "),
    ],
)
def test_masks_whose_255_is_a_class(tmp_path: Path, values: list[int], classes: str, remedy: str) -> None:
    """The class would vanish, and a model that never says it would score 1.0."""
    words = masks(tmp_path, values)
    with pytest.raises(DataError, match=remedy):
        raise run(*words, "--classes", classes).exception or AssertionError
    assert not (tmp_path / "set").exists()
    # Both remedies work.
    done = run(*words, "--classes", classes, "--ignore", "255")
    assert done.exit_code == 0, done.output
    if "," not in classes:
        classes = "background,object"
    ids = [*values[:-1], *range(100, 100 + classes.count(",") + 1 - len(values)), 255]
    done = run(*words, "--classes", classes, "--ids", ",".join(map(str, ids)))
    assert done.exit_code == 0, done.output
    last = classes.count(",")
    assert label_of(tmp_path / "set").tolist()[0] == [ids.index(v) for v in [*values, *values[-1:] * 4][:4]]
    assert read_manifest(tmp_path / "set").source["label_report"]["classes"][classes.split(",")[last]] > 0


def test_masks_of_the_faults_folder(fault_data: Path, tmp_path: Path) -> None:
    folder = fault_data / "masks_0_255"
    words = ["--images", folder / "img", "--labels", folder / "lab", "--classes", folder / "names.txt"]
    with pytest.raises(DataError, match=r"class 'object' has no pixel, and \d+% of all pixels are 255"):
        raise run(*words, "--out", tmp_path / "set").exception or AssertionError
    done = run(*words, "--out", tmp_path / "set", "--ids", "0,255")
    assert done.exit_code == 0, done.output
    folder = fault_data / "labels_rgb_grey"
    words = ["--images", folder / "img", "--labels", folder / "lab", "--classes", "background,object"]
    done = run(*words, "--out", tmp_path / "grey")
    assert done.exit_code == 0, done.output
    assert min(read_manifest(tmp_path / "grey").source["label_report"]["classes"].values()) > 0


def test_an_absent_class_among_many_is_no_fault(tmp_path: Path) -> None:
    done = run(*masks(tmp_path, [0, 1, 255]), "--classes", "a,b,c,d,e")
    assert done.exit_code == 0, done.output
    assert "classes without any: c, d, e" in done.output
    with pytest.raises(DataError, match="no pixel is of any class, all 24 are ignored"):
        raise run(*masks(tmp_path, [0]), "--classes", "a,b", "--reduce-zero").exception or AssertionError


def test_label_maps_in_jpeg_are_refused_with_the_reason(tmp_path: Path) -> None:
    words = [*masks(tmp_path, [0, 1]), "--classes", "a,b"]
    Image.new("L", (4, 3)).save(tmp_path / "lab" / "0.jpg")
    (tmp_path / "lab" / "0.png").unlink()
    with pytest.raises(DataError, match=r"no label map 0\.png in .*; there is one, but label maps in JPEG"):
        raise run(*words).exception or AssertionError
    (tmp_path / "lab" / "1.png").unlink()
    with pytest.raises(DataError, match=r"0\.jpg: label maps in JPEG or WebP are refused"):
        raise run(*words).exception or AssertionError


def test_colours_in_jpeg_are_refused_with_the_reason_too(tmp_path: Path) -> None:
    words = [*masks(tmp_path, [0, 1]), "--classes", "a,b"]
    (tmp_path / "colours.txt").write_text("0 0 0 a\n255 255 255 b\n")
    # Under the name of a PNG.
    Image.new("RGB", (4, 3)).save(tmp_path / "lab" / "0.png", "JPEG")
    with pytest.raises(DataError, match=r"0\.png: label maps in JPEG or WebP are refused"):
        raise run(*words, "--colours", tmp_path / "colours.txt").exception or AssertionError
    with pytest.raises(ConfigError, match=r"--label-suffix _L\.jpg: label maps in JPEG or WebP are refused"):
        raise run(*words, "--label-suffix", "_L.jpg").exception or AssertionError


def test_what_lies_among_images_and_labels_is_counted_and_named(tmp_path: Path) -> None:
    words = masks(tmp_path, [0, 1])
    for name in ("img/._0.jpg", "img/.DS_Store", "img/notes.txt", "lab/Thumbs.db", "lab/._0.png"):
        (tmp_path / name).write_bytes(b"")
    done = run(*words, "--classes", "a,b")
    assert done.exit_code == 0, done.output
    assert "passed over: 3 hidden files and folders: " in done.output
    assert "passed over: 2 other files: " in done.output
