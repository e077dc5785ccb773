"""What all commands print and how they end: nothing else prints or exits."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

import typer

from fisher_mask_mergekit.errors import FisherMaskError, ToldError
from fisher_mask_mergekit.shown import shown

if TYPE_CHECKING:
    from rich.progress import Progress


@contextmanager
def errors() -> Iterator[None]:
    """Turn what a user can cause into one message and an exit code."""
    try:
        yield
    except ToldError:
        raise typer.Exit(1) from None
    except FisherMaskError as error:
        say(f"{type(error).__name__}: {error}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        say("interrupted; no half-written file was left")
        raise typer.Exit(130) from None


def say(text: str, to: TextIO | None = None) -> None:
    """What is not the result: on standard error, if nothing else is given."""
    print(shown(text), file=to or sys.stderr)


def print_json(value: Any) -> None:
    """The result, for programs."""
    import json

    print(json.dumps(value, indent=2))


def print_lines(lines: Iterable[str]) -> None:
    """The result, line by line."""
    for line in lines:
        print(shown(line))


def _bar(unit: str) -> "Progress":
    """A bar on standard error: what for, how far, ``unit`` with the task's fields, and the remaining time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),  # Else it leaves an empty line.
    )


@contextmanager
def progress(name: str) -> Iterator[tuple[Any, Any]]:
    """A bar with samples, tokens per second and remaining time."""
    import time

    with _bar("samples, {task.fields[speed]:,.0f} tokens/s,") as bar:
        task = bar.add_task(shown(name), total=None, speed=0.0)
        started = time.perf_counter()
        tokens = 0

        def on_start(samples: int) -> None:
            nonlocal started
            started = time.perf_counter()
            bar.update(task, total=samples)

        def on_batch(batch: Any) -> None:
            nonlocal tokens
            mask = batch.inputs.get("attention_mask", batch.inputs["input_ids"])
            tokens += int(mask.count_nonzero())
            bar.update(task, advance=len(batch.index), speed=tokens / (time.perf_counter() - started))

        yield on_start, on_batch


@contextmanager
def trial_progress(total: int) -> Iterator[Any]:
    """A bar with trials, the best score so far and remaining time."""
    with _bar("trials, best {task.fields[best]},") as bar:
        task = bar.add_task("tune", total=total, best="none yet")

        def on_trial(study: Any) -> None:
            best = study.best.value if study.trials else None
            bar.update(task, completed=len(study.trials), best="none yet" if best is None else f"{best:.1f}")

        yield on_trial


def silence_loading() -> None:
    """What the libraries say while they read a checkpoint."""
    import huggingface_hub.utils
    import transformers

    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.disable_progress_bars()


def silence_progress_bars() -> None:
    """The libraries' own bars, for loading weights and data, would break ours."""
    import datasets

    datasets.disable_progress_bars()
    silence_loading()
