"""mergekit knows the method without being asked, and torch never suffers for it."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

import fisher_mask_mergekit
from fisher_mask_mergekit.autoload import install

ROOT = Path(__file__).parent.parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, cwd="/", check=False
    )  # fmt: skip


def output(code: str, **environment: str) -> str:
    result = python(code, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


NAMES = "[m.spec.name for m in r() if m.spec.name.startswith('fisher_')]"
# How often each of the methods is there: the same for both.
LISTED = (
    f"from mergekit.merge_methods import registered_methods as r; names = {NAMES}; "
    "print(*{names.count(name) for name in ('fisher_mask', 'fisher_diagonal')})"
)


def test_the_host_lists_the_methods() -> None:
    assert output(LISTED) == "1"


def test_importing_the_package_registers_too_in_either_order_and_once() -> None:
    off = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert output(LISTED, **off) == "0"
    assert output(f"import fisher_mask_mergekit; {LISTED}", **off) == "1"
    assert output(f"import mergekit.merge_methods, fisher_mask_mergekit; {LISTED}", **off) == "1"
    assert output(f"import fisher_mask_mergekit; {LISTED}") == "1"
    assert output(f"import fisher_mask_mergekit.method; {LISTED}") == "1"
    assert output(f"import fisher_mask_mergekit.method; {LISTED}", **off) == "1"
    assert output(f"import fisher_mask_mergekit.diagonal_method; {LISTED}", **off) == "1"
    assert output(f"import fisher_mask_mergekit.merging; {LISTED}", **off) == "1"
    twice = "import mergekit.merge_methods; from fisher_mask_mergekit.autoload import install; install(); install()"
    assert output(f"{twice}; {LISTED}") == "1"


HEAVY = "('mergekit', 'transformers', 'datasets', 'pydantic', 'typer', 'safetensors')"


def loaded(code: str, names: str = HEAVY, **environment: str) -> str:
    return output(
        f"import sys\n{code}\nprint([name for name in {names} if name in sys.modules])", **environment
    )


def test_a_plain_import_of_torch_loads_nothing_heavy() -> None:
    assert loaded("import torch\nassert 'fisher_mask_mergekit.autoload' in sys.modules") == "[]"
    assert loaded("import fisher_mask_mergekit", f"({HEAVY[1:-1]}, 'torch')") == "[]"
    # The same check sees what it looks for when it is there.
    assert loaded("import torch, mergekit.merge_methods") != "[]"


@pytest.mark.parametrize(
    ("modules", "absent"),
    [
        (
            "method diagonal_method",
            "('datasets.load', 'typer', 'fisher_mask_mergekit.prepass', 'fisher_mask_mergekit.data')",
        ),
        ("merging weighting", "('mergekit', 'typer', 'transformers', 'datasets.load')"),
        ("prepass", "('mergekit', 'typer', 'fisher_mask_mergekit.method')"),
        ("cli", "('torch', 'transformers', 'datasets', 'mergekit', 'pydantic', 'optuna', 'ruamel.yaml')"),
        ("recipe", "('torch', 'transformers', 'datasets', 'mergekit')"),
        ("preview.survey", "('mergekit', 'typer', 'datasets.load', 'fisher_mask_mergekit.prepass')"),
    ],
)
def test_modules_do_not_load_what_they_do_not_need(modules: str, absent: str) -> None:
    names = ", ".join(f"fisher_mask_mergekit.{module}" for module in modules.split())
    assert loaded(f"import {names}", absent) == "[]"


@pytest.mark.parametrize("broken", ["raise ImportError('broken')", "raise SystemError('broken')", "1/0"])
def test_a_broken_registration_breaks_neither_torch_nor_mergekit(broken: str, tmp_path: Path) -> None:
    """A method's module is replaced by one that fails to import; the other method is there all the same."""
    code = f"""
import sys, importlib.abc, importlib.util
class Broken(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == 'fisher_mask_mergekit.method' else None
    def create_module(self, spec): return None
    def exec_module(self, module): {broken}
sys.meta_path.insert(0, Broken())
import torch
torch.ones(1)
from mergekit.merge_methods import registered_methods as r
print({NAMES})
"""
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "['fisher_diagonal']"
    assert "mergekit will not know the merge method 'fisher_mask'" in result.stderr


def test_install_is_idempotent_in_this_process() -> None:
    before = list(sys.meta_path)
    install()
    assert sys.meta_path == before


def test_entry_points_are_declared() -> None:
    points = distribution("fisher-mask-mergekit").entry_points
    found = {(point.group, point.name): point.value for point in points}
    assert found["torch.backends", "fisher_mask_mergekit"] == "fisher_mask_mergekit.autoload:install"
    assert found["mergekit.merge_methods", "fisher_mask"] == "fisher_mask_mergekit.method:fisher_mask"
    assert (
        found["mergekit.merge_methods", "fisher_diagonal"]
        == "fisher_mask_mergekit.diagonal_method:fisher_diagonal"
    )
    assert found["console_scripts", "mergekit-fisher"] == "fisher_mask_mergekit.cli:main"


def test_the_version_is_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fisher_mask_mergekit.__version__


@pytest.mark.parametrize("command", ["mergekit-yaml", "mergekit-multi", "mergekit-pytorch"])
def test_plain_commands_of_mergekit_know_the_method(command: str, tmp_path: Path) -> None:
    """Each gets as far as the method's own complaint, that an input has no sidecar."""
    from tests import commands, tiny

    folder = tiny.checkpoint(tmp_path / "a")
    other = tiny.sibling(tmp_path / "b", folder, seed=1)
    inner = "/model.safetensors" if command == "mergekit-pytorch" else ""
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        f"merge_method: fisher_mask\nmodels: [{{model: {folder}{inner}}}, {{model: {other}{inner}}}]\n"
    )
    arguments: list[str | Path] = [recipe, tmp_path / "out"]
    if command == "mergekit-multi":
        arguments = [recipe, "--out-path", tmp_path / "out", "-I", tmp_path / "between"]
    environment = os.environ | {"FISHER_MASK_CACHE": str(tmp_path / "cache")}
    result = commands.run([command, *arguments], env=environment, cwd=tmp_path)
    assert result.returncode == 1
    assert "Error: SidecarNotFoundError" in result.stderr
    what = str(recipe) if command == "mergekit-yaml" else f"{folder}"
    assert f"Measure it:  mergekit-fisher compute {what}" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out" / "model.safetensors").exists()
