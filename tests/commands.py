"""Installed commands, each in a process of its own, forked from one that has imported what takes them longest.

Nothing that reads the environment is imported there: a command has the one that it is given, and its own entry point.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

SCRIPTS = Path(sys.executable).parent
_HEAVY = ("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "pandas", "pyarrow.dataset",
          "pydantic", "safetensors.torch", "scipy.optimize", "sklearn.metrics", "tokenizers", "typer")  # fmt: skip


def run(
    command: Sequence[str | Path], *, env: Mapping[str, str], cwd: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command that is installed beside this Python, as :func:`subprocess.run` would."""
    program, *arguments = map(str, command)
    with tempfile.TemporaryDirectory() as folder:
        files = [str(Path(folder) / name) for name in ("stdout", "stderr")]
        argv = [str(SCRIPTS / program), *arguments]
        request = {"argv": argv, "env": dict(env), "cwd": str(cwd), "files": files}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        stdout, stderr = (Path(file).read_text(encoding="utf-8", errors="replace") for file in files)
    return subprocess.CompletedProcess(argv, code, stdout, stderr)


@cache
def _server() -> "subprocess.Popen[str]":
    """One for all tests of this process; it ends when this process does, as its input ends then."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _serve() -> None:
    for name in _HEAVY:
        importlib.import_module(name)
    assert "huggingface_hub" not in sys.modules
    gc.freeze()  # What is here already is not searched for garbage in every command.
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _become(json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _become(request: dict[str, Any]) -> None:
    """The command, in this process."""
    for number, file in enumerate(request["files"], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    atexit.register(gc.unfreeze)  # Some libraries say at the end what was not freed.
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
