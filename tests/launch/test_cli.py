"""The command line's help, and what it does not load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import executable, succeed, tiny_recipe, vitgraft, write_recipe
from typer.main import get_command

from vitgraft.launch.cli import app


def commands() -> list[list[str]]:
    """The words of every command that does something."""

    def walk(command: object, words: list[str]) -> list[list[str]]:
        children = getattr(command, "commands", None)
        if children is None:
            return [words]
        return [found for name, child in children.items() for found in walk(child, [*words, name])]

    return walk(get_command(app), [])


def test_the_commands_are_those_of_the_design() -> None:
    found = {" ".join(words) for words in commands()}
    assert {"train", "evaluate", "predict", "demo", "checkpoints list", "checkpoints verify"} <= found
    assert {
        f"shards pack {kind}" for kind in ("coco", "semantic", "bdd100k", "panoptic", "imagefolder", "video", "digits")
    } <= found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_has_help_with_an_example(words: list[str]) -> None:
    from typer.testing import CliRunner

    shown = CliRunner().invoke(app, [*words, "--help"])
    assert shown.exit_code == 0
    example = " ".join(shown.output.split())
    assert f"Example: vitgraft {' '.join(words)}" in example


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from vitgraft.launch.cli import app; from typer.main import get_command; get_command(app);"
        "heavy = {'torch', 'deepspeed', 'numpy', 'timm', 'torchvision', 'pydantic', 'yaml'} & set(sys.modules);"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers() -> None:
    done = vitgraft("--help")
    assert done.returncode == 0
    assert "train" in done.stdout


def test_reading_a_recipe_loads_neither_torch_nor_deepspeed() -> None:
    code = (
        "import sys; from vitgraft.configs.load import load_recipe; load_recipe('quickstart/detection');"
        "sys.exit(str({'torch', 'deepspeed'} & set(sys.modules)) if {'torch', 'deepspeed'} & set(sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_it_runs_beside_a_models_folder(tmp_path: Path) -> None:
    """A user's own ``models`` package, even a broken one, is never imported."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise SystemExit('the wrong models folder')\n")
    done = vitgraft("train", "quickstart/detection", "--set", "train.epoch=1", cwd=tmp_path)
    assert done.returncode == 2
    assert "did you mean 'epochs'?" in done.stderr


RUN = Path(__file__).resolve().parents[1] / "golden" / "checkpoint-1"


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["checkpoints", "list"]], ids=" ".join)
def test_output_that_is_closed_is_nobodys(command: list[str]) -> None:
    done = subprocess.run(
        ["bash", "-c", 'exec "$@" <&- >&-', "bash", executable(), *command, str(RUN)],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["checkpoints", "list"], []], ids=" ".join)
def test_output_for_which_there_is_no_room_is_said_in_one_line(command: list[str]) -> None:
    arguments = [*command, str(RUN)] if command else ["--help"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [executable(), *arguments], stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr == (
        "vitgraft: standard output cannot be written: No space left on device; make room or write elsewhere\n"
    )


def test_names_that_are_not_utf8_are_shown(tmp_path: Path) -> None:
    run = tmp_path / os.fsdecode(b"run-\xff")
    shutil.copytree(RUN, run)
    for command in (["status"], ["checkpoints", "list"], ["checkpoints", "verify"], ["status", "--json"]):
        done = subprocess.run([executable(), *command, run], capture_output=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/elsewhere", "a/../../b", "", "."])
def test_the_name_of_a_recipe_leads_nowhere_else(tmp_path: Path, name: str) -> None:
    done = vitgraft("train", "quickstart/detection", "--set", f"name='{name}'", cwd=tmp_path)
    assert done.returncode == 2
    assert "names no folder under runs/" in done.stderr
    assert list(tmp_path.iterdir()) == []


LONG = "x" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["train", "RECIPE", "--set", f"data.train.path={LONG}"],
        ["evaluate", LONG],
        ["checkpoints", "prune", LONG],
    ],
    ids=lambda words: words[0],
)
def test_a_name_that_no_file_can_have_is_one_line(words: list[str], tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe("semantic", "nowhere"))
    done = vitgraft(*(str(recipe) if word == "RECIPE" else word for word in words), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "File name too long; check its name and permissions" in done.stderr


@pytest.mark.parametrize(
    "setting", ["model.backbone.weights=~nobody-here/a.pth", "train.init_from=~nobody-here/a", "data.val=null"]
)
def test_a_home_folder_of_nobody_is_one_line(setting: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    succeed("shards", "pack", "digits", "--task", "semantic", "--split", "val", "--samples", "2", "--out", data)
    train = data if setting != "data.val=null" else "~nobody-here/data"
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe("semantic", train))
    done = vitgraft("train", recipe, "--run-dir", tmp_path / "run", "--set", setting)
    assert done.returncode in (2, 3, 4)
    assert done.stderr.count("\n") == 1
    assert "~nobody-here" in done.stderr
