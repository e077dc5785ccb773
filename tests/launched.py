"""Processes as a launcher starts them, and what they are to measure. As a script, one of them: FOLDER DEVICE, its measurements."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE = 240
"""Seconds after which processes that should have ended are killed."""


@dataclass(frozen=True)
class Ended:
    """A process that ended by itself."""

    code: int
    stdout: str
    stderr: str


def places(rank: int, count: int, port: int) -> dict[str, str]:
    """What torch's launcher tells one of its processes."""
    known = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in {**known, "MASTER_PORT": port}.items()}


def free_port() -> int:
    """A port of this machine at which nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(
    commands: Sequence[Sequence[Any]],
    *,
    folders: Sequence[Path] | None = None,
    alone: bool = False,
    until: int | None = None,
) -> list[Ended]:
    """Run Python in as many processes, and wait for all.

    Args:
        commands: Its arguments, of each.
        folders: Where each runs, if not here.
        alone: Whether it is no process of a launcher's, but a launcher itself, for one.
        until: The process at whose end the others are killed, as a launcher kills them.
    """
    port = free_port()
    root = str(Path(__file__).parent.parent)
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, command)],
            env=os.environ | {"PYTHONPATH": root} | ({} if alone else places(rank, len(commands), port)),
            cwd=folders[rank] if folders else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        if until is not None:
            started[until].wait(PATIENCE)
            for process in started:
                process.kill()
        outputs = [process.communicate(timeout=PATIENCE) for process in started]
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                process.kill()
    return [Ended(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


@dataclass(frozen=True)
class Case:
    """A measurement."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    how: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = {**self.settings, **self.how}
        return " ".join([self.model, *(f"{name}={value}" for name, value in given.items())])


SHARDS = {"spread": "shards"}
CASES = (
    Case("bert"),
    Case("bert", {"samples": 1}),
    Case("bert", {"labels": "sampled", "mask_placement": "pre"}, {"batch_tokens": 30}),
    Case("bert", {"labels": "exact", "samples": 3}),
    Case("bert", {"estimator": "batch", "batch_size": 3}),
    Case("bert", {"estimator": "batch", "labels": "sampled"}),
    Case("bert", {"dtype": "float32"}),
    Case("bert", {"kind": "factored", "samples": 3}),
    Case("bert", {"kind": "factored", "labels": "exact"}),
    Case("bert", {"kind": "diagonal", "samples": 3}),
    Case("bert", {"kind": "diagonal", "samples": 1, "labels": "exact"}),
    Case("llama", {"kind": "diagonal", "batch_size": 2}),
    Case("bert", {"batch_size": 2}, SHARDS),
    Case("bert", {"samples": 1}, SHARDS),
    Case("bert", {"labels": "exact"}, SHARDS | {"recompute": True}),
    Case("bert", {"labels": "sampled", "dtype": "float32"}, {"spread": "offload"}),
    Case("llama", {"mask_placement": "pre"}, {"spread": "offload", "batch_tokens": 30}),
    Case("gpt2", {"labels": "sampled"}, SHARDS),
    Case("mixtral", {}, SHARDS),
)  # fmt: skip


def measured(case: Case, folder: Path, device: Any = "cpu", **processes: Any) -> Any:
    """What a case gives in this process, or in it and others, on the device of this one."""
    import torch

    from fisher_mask_mergekit.execution import Execution
    from fisher_mask_mergekit.job import prepare
    from fisher_mask_mergekit.measuring import measure
    from fisher_mask_mergekit.settings import FisherSettings

    given = {"samples": 7, "dtype": "float64", "data": str(folder / "data.jsonl"), **case.settings}
    job = prepare(str(folder / case.model), FisherSettings.model_validate(given), force=True)
    assert job.inputs is not None
    how = case.how if processes else {name: value for name, value in case.how.items() if name != "spread"}
    return measure(job, job.inputs, torch.device(device), Execution(**how), **processes)


def make(folder: Path) -> None:
    """The checkpoints and the data that the cases name."""
    from transformers import (
        GPT2Config,
        GPT2ForSequenceClassification,
        MixtralConfig,
        MixtralForSequenceClassification,
    )

    from tests import tiny

    for name in ("bert", "llama"):
        tiny.checkpoint(folder / name, name)
    values: dict[str, Any] = {"vocab_size": tiny.VOCABULARY, "num_labels": 2, "pad_token_id": 0}
    gpt2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=40, **values)
    experts = MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=40, **values,
    )  # fmt: skip
    tiny.save(GPT2ForSequenceClassification(gpt2), folder / "gpt2")
    tiny.save(MixtralForSequenceClassification(experts), folder / "mixtral")
    tiny.write_data(folder / "data.jsonl")


def main(folder: Path, device: str) -> None:
    """Measure all cases together with the other processes; the first keeps what they gave."""
    import torch

    from fisher_mask_mergekit.processes import joined

    found = {}
    place, here = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    with joined(device, place, here) as (processes, own):
        for case in CASES:
            found[str(case)] = measured(case, folder, own, processes=processes)
            if not processes.is_first:  # Everyone has the same sums.
                del found[str(case)]
        if processes.is_first:
            torch.save(found, folder / f"{processes.count}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
