"""YAML from outside: bounded, plain, and every key once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitgraft.configs.errors import ConfigError
from vitgraft.configs.load import load_recipe
from vitgraft.configs.yaml_text import dump_yaml, parse_yaml


def bomb(levels: int, merge: bool = False) -> str:
    """Each line stands for nine times the one before it."""
    lines = ["a0: &a0 {x: 1}" if merge else "a0: &a0 [x]"]
    for level in range(1, levels):
        names = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} " + (f"{{k{level}: 1, <<: [{names}]}}" if merge else f"[{names}]"))
    return "\n".join(lines)


REFUSED = [
    ("a: 1\nb: 2\na: 3", "f.yaml:3: the key 'a' is given twice, in line 1 and in line 3; keep one"),
    ("a: 1\n'a': 3", "in line 1 and in line 2"),
    ("x:\n  b: {c: 1,\n      c: 2}", "f.yaml:3: the key 'c' is given twice, in line 2 and in line 3"),
    ("x: &x {a: 1}\ny:\n  <<: *x\n  <<: *x", "f.yaml:4: the key '<<' is given twice, in line 3 and in line 4"),
    ("x: &x {a: 1, a: 2}\ny: {<<: *x}", "in line 1 and in line 1"),
    ("a:\n\tb: 1", "f.yaml:2: not valid YAML: a tab where YAML takes spaces only; fix the syntax"),
    ("a: {!!seq b: 1}", "f.yaml:1: a key that is a list or a mapping"),
    ("!!map a: 1", "f.yaml:1: a key that is a list or a mapping"),
    ("a: 012", "f.yaml:1: '012' begins with a zero, which some read as octal; write it without"),
    ("a: -0_9", "begins with a zero"),
    (bomb(9), "larger than 262,144 characters, each alias counted"),
    (bomb(9, merge=True), "larger than 262,144 characters, each alias counted"),
    ("a: &a " + "x" * 100_000 + "\nb: [" + "*a, " * 10 + "]", "larger than"),
    ("a: &a [*a]", "f.yaml:1: the alias *a stands within what it names"),
    ("a: &a {<<: *a}", "stands within"),
    ("[" * 100_000, "nested more than 50 deep"),
    ("{a: " * 1000, "nested more than 50 deep"),
    ("- " * 1000, "nested more than 50 deep"),
    ("a: " + "9" * 5000, "a number of 5,000 characters"),
    ("a: 0x" + "f" * 5000, "a number of 5,002 characters"),
    ("a: 99999999999999999999", "does not fit into 64 bits"),
    ("a: !!int abc", "f.yaml:1: 'abc' is not an integer"),
    ("a: !!int ''", "is not an integer"),
    ("a: !!float abc", "is not a number"),
    ("a: !!bool abc", "is not true or false"),
    ("a: 1e400", "'1e400' is not finite"),
    ("a: .nan", "is not finite"),
    ('a: "\\0"', "is not text"),
    ('a: "\\ud800"', "is not text"),
    ('a: "\\U00110000"', "an escape that is no character"),
    ("a: \x07", "not valid YAML"),
    ("? [a]\n: b", "a key that is a list or a mapping"),
    ("a: !!timestamp x", "could not determine a constructor"),
    ("a: !!binary x", "could not determine a constructor"),
    ("a: !!set {a, b}", "could not determine a constructor"),
    ("a: 1\n---\nb: 1", "another document"),
    ("a: *b", "undefined alias"),
]


@pytest.mark.parametrize(("text", "expected"), REFUSED, ids=[expected[:40] for _, expected in REFUSED])
def test_what_is_refused_is_refused_at_once_in_one_line(text: str, expected: str) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "f.yaml")
    assert expected in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.monotonic() - began < 5


def test_merges_and_aliases_that_people_write_are_taken() -> None:
    text = "base: &base {a: 1, b: [1, 2]}\nmore: &more {a: 3, c: 4}\none: {<<: *base, a: 5}\ntwo: {<<: [*base, *more]}"
    assert parse_yaml(text, "f.yaml") == {
        "base": {"a": 1, "b": [1, 2]},
        "more": {"a": 3, "c": 4},
        "one": {"a": 5, "b": [1, 2]},
        "two": {"a": 1, "b": [1, 2], "c": 4},
    }


def test_dates_and_times_are_text() -> None:
    for text in ("2024-01-01", "2024-13-45", "2001-12-14t21:59:43.10-05:00", "1:30", "="):
        assert parse_yaml(f"a: {text}", "f.yaml") == {"a": text}


def test_what_is_written_is_read_again() -> None:
    tree = {"a": [1, 2.5, 1e-7, True, None, "", "é☃", "a: b", "- x", "#", "1e5"], "b": {"1": []}}
    assert parse_yaml(dump_yaml(tree), "f.yaml") == tree


def test_a_recipe_that_multiplies_ends_every_command_that_reads_it(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(bomb(12))
    with pytest.raises(ConfigError, match=r"recipe\.yaml:\d+: larger than"):
        load_recipe(str(recipe))
    with pytest.raises(ConfigError, match="larger than"):
        load_recipe("quickstart/detection", ["train.deepspeed={" + bomb(12).replace("\n", ", ") + "}"])


def test_the_largest_text_that_is_read_can_be_interrupted() -> None:
    """Python code all of it, so that Ctrl-C is heard."""
    text = "'a: >\\n' + ' x\\n' * 330_000"
    program = f"from vitgraft.configs.yaml_text import parse_yaml\nprint('ready', flush=True)\nparse_yaml({text}, 'f')"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=5) != 0
    child.communicate()
