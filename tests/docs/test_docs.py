"""The documents are true: their commands exist, their links lead somewhere, their code runs."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from support_checkpoints import VALUES, write
from typer.main import get_command
from typer.testing import CliRunner

from vitgraft.configs.errors import VitgraftError
from vitgraft.configs.load import find_recipe, load_recipe
from vitgraft.launch.cli import app
from vitgraft.launch.nodes import node_place

ROOT = Path(__file__).resolve().parents[2]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "ARCHITECTURE.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md"]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return [text for found, text in FENCE.findall(page.read_text()) if found == language]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Every vitgraft command in a bash block: where it stands, and its words."""
    for page in GUIDES:
        for block in blocks(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                words = words[: next((at for at, word in enumerate(words) if word in (">", "|")), None)]
                if words and Path(words[0]).name == "vitgraft":
                    yield f"{page.name}: {line.strip()}", words[1:]


def parse(words: list[str]) -> dict[str, Any]:
    """The command's parameters by name, as typer understands the words; nothing is run."""
    command: Any = get_command(app)
    rest = list(words)
    while (children := getattr(command, "commands", None)) is not None:
        assert rest, f"{command.name} needs a subcommand"
        assert rest[0] in children, f"{command.name} has no command {rest[0]}"
        command = children[rest.pop(0)]
    try:
        parameters: dict[str, Any] = command.make_context(command.name, rest).params
    except typer.BadParameter.__mro__[1] as error:  # the base of all usage errors, wherever typer keeps it
        raise AssertionError(f"{command.name}: {error}") from error
    return parameters


COMMANDS = list(commands())


@pytest.mark.parametrize(("line", "words"), COMMANDS, ids=[line for line, _ in COMMANDS])
def test_every_command_exists_with_its_options_and_keys(line: str, words: list[str]) -> None:
    parameters = parse(words)
    if words[0] != "train":
        return
    recipe = parameters["recipe"]
    try:
        packaged = find_recipe(recipe)
    except VitgraftError:
        # A file that the reader is to write.
        assert recipe.endswith(".yaml"), line
        return
    assert packaged.is_file()
    load_recipe(recipe, parameters["overrides"])


def test_wrong_commands_would_be_found() -> None:
    for wrong in (["trian", "a"], ["train"], ["train", "a", "--rundir", "b"], ["shards", "pack", "coco", "--out", "x"]):
        with pytest.raises(AssertionError):
            parse(wrong)
    assert len({words[0] for _, words in COMMANDS}) >= 4
    assert {page.name for page in GUIDES if any(line.startswith(page.name) for line, _ in COMMANDS)} >= {
        "README.md",
        "own_data.md",
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    prose = FENCE.sub("", page.read_text())
    targets = [target.split("#")[0] for target in LINK.findall(prose) if not re.match(r"https?:|mailto:|#", target)]
    missing = [target for target in targets if not (page.parent / target).is_file()]
    assert not missing


def test_the_code_that_reads_a_checkpoint_reads_one(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, world=3)
    (code,) = blocks(ROOT / "docs" / "checkpoints.md", "python")
    assert code.count('"RUN/checkpoints/step-00000120"') == 1
    names: dict[str, Any] = {}
    exec(compile(code.replace("RUN/checkpoints/step-00000120", str(folder)), "checkpoints.md", "exec"), names)
    weights = names["weights"]
    assert list(weights) == ["w"]
    assert (weights["w"] == (VALUES * 3).reshape(2, 5)).all()


def test_the_job_files_that_are_shown_are_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a packaged recipe for the reader's own."""
    monkeypatch.chdir(tmp_path)
    shown = [words for _, words in COMMANDS if words[:2] == ["launch", "slurm"]]
    assert shown
    for words in shown:
        known = ["quickstart/detection" if word == "recipe.yaml" else word for word in words]
        done = CliRunner().invoke(app, [*known, "--set", "train.global_batch=32"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert subprocess.run(["bash", "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_the_manifest_for_kubernetes_is_consistent() -> None:
    (text,) = (block for block in blocks(ROOT / "docs" / "launch.md", "yaml") if "kind: Job" in block)
    service, job = yaml.safe_load_all(text)
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    program, *words = container["command"]
    parameters = parse(words)
    assert (program, words[0]) == ("vitgraft", "train")
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"] == parameters["nodes"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    place = node_place(parameters["nodes"], None, parameters["leader"], {"JOB_COMPLETION_INDEX": "3"})
    assert place is not None
    assert (place.rank, place.port) == (3, container["ports"][0]["containerPort"])
    assert place.host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    named = {
        rule["onExitCodes"]["containerName"] for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule
    }
    assert named == {container["name"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


def test_the_scripts_that_are_shown_are_scripts() -> None:
    for script in blocks(ROOT / "docs" / "launch.md", "sh"):
        assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
