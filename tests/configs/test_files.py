"""What comes from outside is read bounded and answered with one line; what is written spares the inputs."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path
from typing import Any

import pytest

from vitgraft.configs.errors import ConfigError, DataError
from vitgraft.configs.files import (
    is_own,
    json_rows,
    lock_within,
    open_regular,
    parse_json,
    read_bytes,
    read_json,
    read_text,
)
from vitgraft.configs.load import find_recipe
from vitgraft.configs.outputs import keep_inputs, write_output
from vitgraft.launch.status import read_status


def test_only_regular_files_are_read_and_nothing_blocks(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, word in (
        (fifo, "not a regular file"),
        (Path("/dev/zero"), "not a regular file"),
        (tmp_path, "a folder"),
        (tmp_path / "none", "no such file"),
        (Path("a\0b"), "no name that a file can have"),
    ):
        with pytest.raises(DataError, match=word):
            read_bytes(path, 100)


def test_the_bound_holds_for_files_that_do_not_tell_their_size(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    assert read_bytes(file, 100) == b"x" * 100
    with pytest.raises(DataError, match="larger than 99 bytes"):
        read_bytes(file, 99)
    with pytest.raises(DataError, match="larger than 5 bytes"):
        read_bytes(Path("/proc/self/status"), 5)  # its size is 0


def test_the_error_is_the_callers(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"not UTF-8 text \(unexpected end of data at byte 3\)"):
        read_text(tmp_path / "text", 100, ConfigError)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("{", ":1: not valid JSON"),
        ("1e400", "the number 1e400 is not finite"),
        ("[NaN]", "NaN is not a number of JSON"),
        ("-Infinity", "-Infinity is not a number of JSON"),
        ("[" * 200_000, "nested too deeply"),
        ("1" * 5000, "more than 4300 digits"),
        (b'"\xff"', "not UTF-8"),
    ],
)
def test_json_that_cannot_be_taken_is_one_line(text: str | bytes, word: str) -> None:
    with pytest.raises(DataError, match=word) as caught:
        parse_json(text, "x.json")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("x.json:")


def test_a_byte_order_mark_is_no_json_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"a": 1.5}')
    assert read_json(tmp_path / "x.json", 100) == {"a": 1.5}


def test_damaged_rows_of_a_log_are_passed_over() -> None:
    data = b'{"a": 1}\n\xff\n[1]\n\n{"loss": NaN}\n{"torn'
    rows = list(json_rows(data))
    assert rows[0] == {"a": 1}
    assert len(rows) == 2


def test_a_link_is_not_followed_where_others_can_write(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.close(open_regular(tmp_path / "link"))
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link", follow=False)


def test_what_others_can_write_is_not_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_text("x")
    file.chmod(0o644)
    assert is_own(file.stat())
    file.chmod(0o664)
    assert not is_own(file.stat())


def test_a_lock_is_waited_for_within_bounds(tmp_path: Path) -> None:
    first, second = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    assert lock_within(first, 0)
    begin = time.monotonic()
    assert not lock_within(second, 0.2)
    assert time.monotonic() - begin >= 0.2
    fcntl.flock(first, fcntl.LOCK_UN)
    assert lock_within(second, 0.2)
    os.close(first), os.close(second)


def test_outputs_spare_inputs_by_any_name(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "out"
    photos.mkdir(), out.mkdir()
    (photos / "a.png").write_bytes(b"photo")
    (out / "soft.png").symlink_to(photos / "a.png")
    os.link(photos / "a.png", out / "hard.png")
    (tmp_path / "alias").symlink_to(photos)
    (photos / "other.json").write_text("{}")
    for output in (photos / "a.png", out / "soft.png", out / "hard.png", tmp_path / "alias" / "a.png"):
        with pytest.raises(ConfigError, match=r"--out x: .* would be written over an input"):
            keep_inputs([output], [photos / "a.png"], "--out x")
    keep_inputs([photos / "other.json", out / "new.png"], [photos / "a.png"], "--out x")
    with pytest.raises(ConfigError, match="over an input"):
        keep_inputs([photos / "other.json"], [photos], "--out x")
    assert (photos / "a.png").read_bytes() == b"photo"


def test_an_output_appears_at_once_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "out.json").symlink_to(tmp_path / "kept")
    write_output(tmp_path / "out.json", "new", "--out x")
    assert (tmp_path / "out.json").read_text() == "new"
    assert (tmp_path / "kept").read_text() == "kept"
    write_output(Path("/dev/null"), "new", "--out x")
    assert not Path("/dev/null").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out x: .* cannot be written"):
        write_output(tmp_path / "file" / "out.json", "new", "--out x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "kept", "out.json"]


def test_an_error_is_one_line_that_no_terminal_obeys() -> None:
    assert str(DataError("a\nb\x1b[2Jc\u202ed")) == "a b?[2Jc?d"


def test_what_may_not_be_looked_at_is_not_said_to_be_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look = os.stat

    def denied(path: Any, *arguments: Any, **options: Any) -> os.stat_result:
        if str(path).startswith(str(tmp_path / "closed")):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return look(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", denied)
    with pytest.raises(ConfigError, match="Permission denied; check the permissions of the folders above it"):
        find_recipe(str(tmp_path / "closed" / "a.yaml"))
    with pytest.raises(ConfigError, match="Permission denied"):
        read_status(tmp_path / "closed")
    with pytest.raises(ConfigError, match="no run directory"):
        read_status(tmp_path / "none")
