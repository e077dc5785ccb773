"""The command that a sidecar's provenance gives: it measures the same, to the bit."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from fisher_mask_mergekit import store
from fisher_mask_mergekit.diagonal_sidecar import read_diagonal
from fisher_mask_mergekit.errors import RecipeError
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.prepass import compute
from fisher_mask_mergekit.provenance import reproducing_command
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sidecar import read
from tests import tiny
from tests.test_cli import run
from tests.test_sidecar import metadata_for

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    "options",
    [
        {"data": "my data.jsonl"},
        {"data": "my data.jsonl", "samples": 9, "seed": 3, "labels": "sampled", "max_length": 8, "dtype": "bfloat16",
         "batch_size": 4, "mask_placement": "pre", "text": "text", "label": "label"},
        {"data": "my data.jsonl", "estimator": "batch", "batch_size": 5, "label_map": {0: 1, "1": "LABEL_0"}},
        {"data": "odd.jsonl", "text": ["a, b", "[c]"], "loss": "sum", "label": "-l"},
    ],
    ids=("defaults", "plain", "label map", "odd names"),
)  # fmt: skip
def test_the_printed_command_gives_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny.checkpoint(Path("the model"))
    text = tiny.write_data(Path("my data.jsonl")).read_text()
    Path("odd.jsonl").write_text(re.sub(r'"text": (".*?"), "label"', r'"a, b": \1, "[c]": \1, "-l"', text))
    made = compute(prepare("the model", FisherSettings.model_validate(options)), torch.device("cpu")).path
    (line,) = [one for one in run("inspect", made).stdout.splitlines() if "mergekit-fisher compute" in one]
    command = shlex.split(line)[2:]
    run(*command)
    again = Path(command[command.index("--out") + 1])
    assert again.resolve() != made.resolve()
    assert_close(load_file(again), load_file(made), rtol=0, atol=0)
    now, then = (read(path).metadata.model_dump(mode="json", exclude={"date"}) for path in (again, made))
    assert now == then


def test_the_command_of_a_full_size_sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, data = tiny.checkpoint(Path("model")), tiny.write_data(Path("data.jsonl"), rows=5)
    run("compute", model, "--kind", "diagonal", "--data", data)
    made = read_diagonal(model / store.DIAGONAL_BESIDE)
    run(*shlex.split(reproducing_command(made.metadata))[1:])
    again = read_diagonal(Path("reproduced"))
    for record in made.metadata.tensors:
        assert_close(again.fisher(record), made.fisher(record), rtol=0, atol=0)


def test_names_are_pinned_to_the_commits_that_were_measured() -> None:
    sites = tiny.sites_of(tiny.classifier("bert"))
    plain = metadata_for(sites)
    assert (
        "compute somebody/bert-sst2@95f0f6f859b35c8ff0863ae3cd4e2dbc702c0ae2 --data"
        in reproducing_command(plain)
    )
    for given in ("glue:sst2", "glue:sst2@main"):
        settings = FisherSettings(data=given)
        data = plain.data.model_copy(update={"revision": COMMIT})
        command = reproducing_command(metadata_for(sites, settings=settings, data=data, device="NVIDIA H200"))
        assert f"--data glue:sst2@{COMMIT} --device cuda --out reproduced.safetensors" in command
    assert "--device mps" in reproducing_command(metadata_for(sites, device="mps"))


def test_code_of_the_checkpoints_own_is_recorded(tmp_path: Path) -> None:
    settings = FisherSettings(data=str(tiny.write_data(tmp_path / "data.jsonl", rows=3)))
    folder = str(tiny.checkpoint(tmp_path / "model"))
    made = compute(prepare(folder, settings, trust_remote_code=True), torch.device("cpu")).path
    assert read(made).metadata.trust_remote_code
    assert "--trust-remote-code" in run("inspect", made).stdout


def test_what_a_sidecar_says_stays_in_its_line_and_asks_for_no_code() -> None:
    metadata = metadata_for(
        tiny.sites_of(tiny.classifier("bert")),
        checkpoint="-bert\n  Run this first:  x",
        trust_remote_code=True,
    )
    command = reproducing_command(metadata)
    assert "\n" not in command + metadata.described_checkpoint
    assert "--trust-remote-code" not in command
    assert command.startswith("mergekit-fisher compute './-bert")


def test_options_that_are_not_json_are_refused(tmp_path: Path) -> None:
    model = tiny.checkpoint(tmp_path / "model")
    for option, value in (("--text", '["a"'), ("--label-map", "{a: 0}")):
        said = run("compute", model, "--data", "data.jsonl", option, value, code=1).stderr
        assert said.startswith(f"{RecipeError.__name__}: {option}: not JSON: ")
