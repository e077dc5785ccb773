"""What is installed: built, it holds the package and nothing else, the same bytes wherever and whenever it is built."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.test_registration import LISTED, ROOT, output

pytestmark = pytest.mark.xdist_group("wheel")  # What they share is made once.
BUILT_FROM = ("fisher_mask_mergekit", "pyproject.toml", "README.md", "LICENSE", "NOTICE", ".gitignore")


def build(source: Path, out: Path, umask: int = 0o022) -> Path:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source],
        check=True, capture_output=True, umask=umask,
    )  # fmt: skip
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_registers_too(wheel: Path, tmp_path: Path) -> None:
    """Unpacked outside the source tree, and put before the editable install on the path."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    where = "import torch, fisher_mask_mergekit.autoload as a, mergekit.merge_methods; print(a.__file__)"
    assert output(where, PYTHONPATH=str(tmp_path)).startswith(str(tmp_path))
    assert output(LISTED, PYTHONPATH=str(tmp_path)) == "1"


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "fisher_mask_mergekit"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    if listed.returncode:
        pytest.skip("not a clone: git does not know what belongs to the package")
    about = {"METADATA", "WHEEL", "entry_points.txt", "RECORD", "licenses/LICENSE", "licenses/NOTICE"}
    version = "-".join(wheel.name.split("-")[:2])
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert not any(info.external_attr >> 28 == 0o12 for info in archive.infolist())  # No links.
    assert sorted(names) == sorted(
        {name for name in listed.stdout.splitlines() if (ROOT / name).is_file()}
        | {f"{version}.dist-info/{name}" for name in about}
    )


def test_the_wheel_is_the_same_bytes_wherever_it_is_built(wheel: Path, tmp_path: Path) -> None:
    """Another folder, other times of its files, another umask, what running the package leaves in it."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(ROOT / name, copy / name)
    for file in copy.rglob("*.py"):
        os.utime(file, (0, 0))
    (copy / "fisher_mask_mergekit" / "__pycache__").mkdir()
    (copy / "fisher_mask_mergekit" / "__pycache__" / "left.cpython-311.pyc").write_bytes(b"left")
    assert build(copy, tmp_path / "out", umask=0o077).read_bytes() == wheel.read_bytes()
