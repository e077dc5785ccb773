"""Run the commands that a user would type."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from fisher_mask_mergekit.errors import FisherMaskError

_LAST_LINES = 8
_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    # Output is read as UTF-8, and the demo has used the tokenizer's threads before it starts a command.
    "PYTHONIOENCODING": "utf-8",
    "TOKENIZERS_PARALLELISM": "false",
}


def spell(*piped: Sequence[str], to: Path | None = None) -> str:
    """A command as one would type it, or several that each read what the one before writes, and where that goes."""
    return f"    $ {' | '.join(map(shlex.join, piped))}" + (f" > {shlex.quote(str(to))}" if to else "")


def run_command(command: Sequence[str]) -> str:
    """Run a command that is installed beside this Python, else one on the path.

    Args:
        command: Its name and arguments.

    Returns:
        What it printed, without what it wrote to standard error.

    Raises:
        FisherMaskError: If it is not there, or fails; with its last lines.
    """
    beside = str(Path(sys.executable).parent)
    program = shutil.which(command[0], path=beside) or shutil.which(command[0])
    if program is None:
        raise FisherMaskError(f"there is no command {command[0]} in {beside} or on the path")
    done = subprocess.run(
        [program, *command[1:]],
        env={**os.environ, **_ENVIRONMENT},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        last = "\n  ".join(["", *lines[-_LAST_LINES:]]) if lines else " nothing was printed"
        raise FisherMaskError(f"'{shlex.join(command)}' failed with exit code {done.returncode}:{last}")
    return done.stdout
