"""The demo: a real merge from nothing but bundled text."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from fisher_mask_mergekit.demo.sizes import Sizes
from fisher_mask_mergekit.errors import RecipeError


def run_demo(out: Path, say: Callable[[str], None], sizes: Sizes | None = None) -> None:
    """Train a small BERT on two tasks, measure, merge with ``mergekit-yaml``, and compare on held-out rows.

    Needs no network. Measuring, merging and evaluating are the real commands, run as a user would
    run them.

    Args:
        out: Where to work; must not exist. Removed again if a step fails.
        say: Gets each line of the story.
        sizes: How large the model and the training are; the demo's own if not given.

    Raises:
        RecipeError: If ``out`` exists, or cannot be made.
        FisherMaskError: If a command fails, with its last lines.
    """
    try:
        out.mkdir(parents=True)
    except FileExistsError as error:
        raise RecipeError(f"{out} exists; remove it, or choose another folder with --out") from error
    except OSError as error:
        raise RecipeError(f"cannot make {out}: {error.strerror or error}") from error
    # Threads that wait do not spin: where other work shares the cores, small tensors take ten times as
    # long with it. Read when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from fisher_mask_mergekit.demo.story import tell
        from fisher_mask_mergekit.demo.training import quiet

        with quiet():
            tell(out, say, sizes or Sizes())
    except BaseException:
        # A later run starts from nothing; half a demo would be in its way.
        shutil.rmtree(out, ignore_errors=True)
        raise
