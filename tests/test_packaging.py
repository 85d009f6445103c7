"""What is installed is what is in the tree, and the source keeps to its layers."""

from __future__ import annotations

import ast
import configparser
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("configs", "models", "data_shards", "trainer", "launch")
NO_PACKAGES = {"tests", "benchmarks", "typings", "docs", "build", "dist", "runs"}
PRIVATE = ("_hp_mapping", "grad_position", "ds_numel", "ds_shape", "fp32_partitioned_groups_flat", "__compatible_ops__")


def walk() -> Iterator[Path]:
    """Files of the tree that a package could hold, relative to the root."""
    for folder, names, files in os.walk(ROOT):
        top = Path(folder) == ROOT
        names[:] = [
            n
            for n in names
            if not n.startswith(".")
            and n != "__pycache__"
            and not n.endswith(".egg-info")
            and not (top and n in NO_PACKAGES)
        ]
        yield from (Path(folder, file).relative_to(ROOT) for file in files)


def source() -> dict[Path, ast.Module]:
    return {path: ast.parse((ROOT / path).read_text()) for path in walk() if path.suffix == ".py"}


def imported(tree: ast.Module) -> set[str]:
    """Full names of everything imported anywhere in a file, and dotted uses such as torch.distributed."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found.add(f"{node.value.id}.{node.attr}")
    return found


def using(package: str) -> set[str]:
    """Files whose code imports or names ``package``."""
    return {
        str(path)
        for path, tree in source().items()
        if any(name == package or name.startswith(package + ".") for name in imported(tree))
    }


def test_the_packages_of_setup_cfg_are_the_folders_of_the_tree() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    listed = config["options"]["packages"].split()
    folders = {path.parent for path in walk() if path.suffix == ".py" and path.parent != Path()}
    assert sorted(listed) == sorted("vitgraft." + ".".join(folder.parts) for folder in folders)
    assert all((ROOT / folder / "__init__.py").is_file() for folder in folders)


def test_only_trainer_imports_deepspeed() -> None:
    assert {path.split("/")[0] for path in using("deepspeed")} == {"trainer"}


def test_no_torch_distributed_below_the_trainer_but_for_synchronised_norms() -> None:
    below = {path for path in using("torch.distributed") if not path.startswith(("trainer/", "launch/"))}
    assert below <= {"models/norms.py", "models/cpu_sync_batchnorm.py"}
    assert "trainer/comm.py" in using("torch.distributed")


def test_private_attributes_of_deepspeed_are_touched_in_one_file() -> None:
    touching = {}
    for path, tree in source().items():
        names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        names |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in PRIVATE}
        touching[str(path)] = names & set(PRIVATE)
    assert {path for path, names in touching.items() if names} == {"trainer/deepspeed_state.py"}
    assert touching["trainer/deepspeed_state.py"] == set(PRIVATE)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the tree, without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "tree"
    for path in walk():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, copy / path)
    _pip("wheel", str(copy), "--no-deps", "--no-build-isolation", "-w", str(folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = wheel.parent / "site"
    _pip("install", "--no-deps", "--no-index", "--target", str(folder), str(wheel))
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_tree_and_no_other(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    wanted = {
        "vitgraft/" + path.as_posix()
        for path in walk()
        if path.parts[0] in LAYERS and (path.suffix in {".py", ".yaml"} or path.name == "py.typed")
    }
    assert held == wanted
    assert {f"vitgraft/{layer}/py.typed" for layer in LAYERS} <= held


@pytest.mark.slow
def test_the_installed_copy_works_beside_a_models_folder_of_the_users_own(site: Path, tmp_path: Path) -> None:
    for name in ("models", "configs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('the user\\'s own folder')\n")
    program = f"""
import sys
# An editable install of the tree, if there is one, must not answer in the installed copy's place.
sys.meta_path[:] = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "") + repr(f)]
sys.path.insert(0, {str(site)!r})
sys.path.insert(1, {str(tmp_path)!r})
import vitgraft.models.contract
from vitgraft.configs.load import find_recipe, load_recipe
print(vitgraft.models.contract.__file__)
for name in ("quickstart/detection", "starter/coco"):
    print(find_recipe(name), load_recipe(name).task)
from vitgraft.launch import cli, entry
print(cli.__file__, flush=True)
sys.argv = ["vitgraft", "--help"]
entry.main()
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    contract, detection, starter, cli, *help_lines = done.stdout.splitlines()
    assert contract == str(site / "vitgraft/models/contract.py")
    assert detection == f"{site / 'vitgraft/configs/quickstart/detection.yaml'} detection"
    assert starter == f"{site / 'vitgraft/configs/starter/coco.yaml'} detection"
    assert cli == str(site / "vitgraft/launch/cli.py")
    assert any("train" in line for line in help_lines)
    assert (site / "bin" / "vitgraft").is_file()
