"""Shares of a measurement: they add up to what one run over all samples measures, or say why they do not."""

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import BertForMaskedLM

from fisher_mask_mergekit import prepass
from fisher_mask_mergekit.combine import combine
from fisher_mask_mergekit.errors import DataError, RecipeError, SidecarError, SidecarShareError
from fisher_mask_mergekit.factored_sidecar import FactoredSidecar
from fisher_mask_mergekit.job import prepare
from fisher_mask_mergekit.merging import find_sidecar
from fisher_mask_mergekit.opening import AnySidecar, read_any
from fisher_mask_mergekit.provenance import reproducing_command
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.settings import FisherSettings
from fisher_mask_mergekit.sharing.publish import find_measured
from fisher_mask_mergekit.sidecar import Sidecar, read, write
from fisher_mask_mergekit.verify import find
from tests import tiny
from tests.test_cli import run

CPU = torch.device("cpu")
SAMPLES = 11
BESIDE = Path("fisher") / "mask_fisher.safetensors"


def measure(model: Path, data: Path, out: Path | None = None, **settings: Any) -> AnySidecar:
    asked = FisherSettings.model_validate({"data": str(data), "samples": SAMPLES} | settings)
    return prepass.compute(prepare(str(model), asked, out=out), CPU).sidecar


def shares_of(model: Path, data: Path, count: int = 3, **settings: Any) -> list[Path]:
    return [
        Path(measure(model, data, share=f"{number}/{count}", **settings).source)
        for number in range(1, count + 1)
    ]


def numbers(sidecar: AnySidecar) -> dict[str, Any]:
    if isinstance(sidecar, Sidecar):
        return dict(sidecar.fisher)
    if isinstance(sidecar, FactoredSidecar):
        return dict(sidecar.packed)
    return {record.names[0]: sidecar.fisher(record).clone() for record in sidecar.metadata.tensors}


@pytest.mark.parametrize("count", [1, 2, 3, SAMPLES])
@pytest.mark.parametrize(
    "settings",
    [
        {"dtype": "float64"},
        {"batch_size": 1},
        {"batch_size": 1, "labels": "sampled", "seed": 2},
        {"batch_size": 1, "kind": "factored"},
        {"batch_size": 1, "kind": "diagonal"},
        {"dtype": "float64", "kind": "diagonal"},
    ],
    ids=str,
)
def test_shares_add_up_to_the_whole(
    model: Path, data: Path, tmp_path: Path, settings: dict[str, Any], count: int
) -> None:
    wanted = measure(model, data, tmp_path / "whole", **settings)
    paths = shares_of(model, data, count, **settings)
    got = combine(paths[::-1], tmp_path / "out")
    # A share of all parameters is kept in float32. Of a key's bias, rounding is all there is.
    rtol, atol = (1e-6, 1e-20) if "kind" in settings else (2e-7, 0)
    assert_close(numbers(got), numbers(wanted), rtol=rtol, atol=atol)
    facts, expected = (one.metadata.model_dump(exclude={"date", "mean", "tensors"}) for one in (got, wanted))
    for name in ("loss", "accuracy"):
        assert facts.pop(name) == pytest.approx(expected.pop(name), rel=1e-6)
    assert facts == expected


@pytest.mark.parametrize("count", [1, 2, 4])
def test_shares_of_batches_do_too(model: Path, data: Path, tmp_path: Path, count: int) -> None:
    """A batch is part of the definition, so shares have whole ones; the last is not full."""
    how = {"estimator": "batch", "batch_size": 3}
    wanted = measure(model, data, tmp_path / "whole", **how)
    paths = shares_of(model, data, count, **how)
    sizes = [read(path).metadata.samples for path in paths]
    assert sizes == {1: [11], 2: [6, 5], 4: [3, 3, 3, 2]}[count]
    got = combine(paths, tmp_path / "out")
    assert_close(numbers(got), numbers(wanted), rtol=2e-7, atol=0)


def test_shares_are_kept_so_that_nothing_is_rounded_twice(model: Path, data: Path, tmp_path: Path) -> None:
    paths = shares_of(model, data, 2, dtype="float64")
    assert paths[0] == model / "fisher" / "mask_fisher-1-of-2.safetensors"
    vectors = {name: value for name, value in load_file(paths[0]).items() if name != "values"}
    assert {value.dtype for value in vectors.values()} == {torch.float64}
    assert any(not torch.equal(value, value.float().double()) for value in vectors.values())
    whole = combine(paths, tmp_path / "out")
    assert {value.dtype for name, value in load_file(whole.source).items() if name != "values"} == {
        torch.float32
    }


def test_the_order_does_not_matter(model: Path, data: Path, tmp_path: Path) -> None:
    paths = shares_of(model, data, 3)
    outs = [tmp_path / "one", tmp_path / "other"]
    combine(paths, outs[0])
    combine([paths[1], paths[2], paths[0]], outs[1])
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_places_are_in_one_share_each() -> None:
    for estimator, size in (("sample", 3), ("batch", 3), ("batch", None)):
        for total in (1, 5, 64, 100):
            for of in (1, 2, 3, 7):
                each = [
                    FisherSettings(share=f"{k}/{of}", estimator=estimator, batch_size=size)  # type: ignore[arg-type]
                    for k in range(1, of + 1)
                ]
                places = [[place for place in range(total) if one.in_share(place)] for one in each]
                assert sorted(chain(*places)) == list(range(total))
                assert [len(found) for found in places] == [one.share_size(total) for one in each]


@pytest.mark.parametrize("kind", ["mask", "factored", "diagonal"])
def test_the_whole_is_served_verified_and_inspected(
    model: Path, data: Path, tmp_path: Path, kind: str
) -> None:
    asked = ("compute", model, "--data", data, "--samples", "11", "--kind", kind, "--device", "cpu")
    suffix = "" if kind == "diagonal" else ".safetensors"
    name = "diagonal" if kind == "diagonal" else f"{kind}_fisher"
    shares = [model / "fisher" / f"{name}-{number}-of-2{suffix}" for number in (1, 2)]
    for number, share in enumerate(shares, 1):
        said = run(*asked, "--share", f"{number}/2")
        assert f"{share} is share {number}/2; when all are measured, add them up:  " in said.stderr
        assert str(share) in said.stdout
        assert "measured before" in run(*asked, "--share", f"{number}/2").stdout
        checked = run("verify", share, "--model", model, "--recompute", str(7 - number)).stdout
        assert f"came out again from all {7 - number} samples" in checked
    whole = model / "fisher" / f"{name}{suffix}"
    said = run("combine", *shares, "-o", whole)
    assert said.stdout.startswith(f"{whole}: 11 samples in 2 shares, accuracy ")
    assert "measured before" in run(*asked).stdout
    checked = run("verify", model if kind == "mask" else whole, "--recompute", "11").stdout
    assert "came out again from all 11 samples" in checked
    if kind == "mask":
        shown = run("inspect", shares[1], whole).stdout
        assert " (share 2/2 of those drawn), seed 0" in shown
        assert re.search(r"--samples 11 --share 2/2 --device cpu", shown)


def test_the_command_that_is_printed_measures_the_same_share(model: Path, data: Path, tmp_path: Path) -> None:
    share = measure(model, data, share="2/3")
    words = reproducing_command(share.metadata).split()
    out = tmp_path / "again.safetensors"
    words[words.index("--out") + 1] = str(out)
    run(*words[1:])
    assert_close(numbers(read(out)), numbers(share), rtol=0, atol=0)


def altered(sidecar: Sidecar, path: Path, **changes: Any) -> Path:
    settings = sidecar.metadata.settings.model_copy(update=changes.pop("settings", {}))
    record = sidecar.metadata.data.model_copy(update=changes.pop("data", {}))
    metadata = sidecar.metadata.model_copy(update={"settings": settings, "data": record, **changes})
    write(replace(sidecar, metadata=metadata), path)
    return path


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"weights": "0" * 64}, "weights is '[0-9a-f]{4}"),
        ({"settings": {"seed": 1}}, "settings.seed is 0 there, 1 here"),
        ({"settings": {"share": "2/3"}}, "settings.share is 'one of 2' there, 'one of 3' here"),
        ({"settings": {"max_length": 9}}, "settings.max_length is None there, 9 here"),
        ({"data": {"digest": "0" * 64}}, "data.digest is "),
        ({"data": {"label_map": {"0": 1}}}, "data.label_map is "),
        ({"versions": {"torch": "1.0"}}, "versions.fisher-mask-mergekit is '0.1.0' there, None here"),
        ({"task": "regression"}, "task is 'sequence-classification' there, 'regression' here"),
        (
            {"samples": 6},
            "is of 6 samples; as share 2/2 of 12 it would be of 6|is of 6 samples; as share 1/2",
        ),
        ({"samples": 4}, "is of 6 samples; as share 1/2 of 10 it would be of 5"),
    ],
)
def test_unlike_ones_do_not_add_up(
    model: Path, data: Path, tmp_path: Path, changes: dict[str, Any], what: str
) -> None:
    first, second = shares_of(model, data, 2)
    other = altered(read(second), tmp_path / "other", **changes)
    if changes == {"samples": 6}:  # Which could be.
        assert combine([first, other], tmp_path / "out").metadata.samples == 12
        return
    with pytest.raises(SidecarError, match=what):
        combine([first, other], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"loss": 1.7e308}, {"loss": 1.7e308}, None),  # Their mean is a number, their sum is none.
        (
            {"device": "a" * 8000},
            {"device": "b" * 8000},
            "do not add up: 'device': String should have at most",
        ),
        ({"data": {"rows": 7}}, {"data": {"rows": 7}}, "do not add up: '': .*no more samples than rows"),
    ],
)
def test_what_could_not_be_read_again_is_not_written(
    model: Path, data: Path, tmp_path: Path, first: dict[str, Any], second: dict[str, Any], what: str | None
) -> None:
    shares = [read(path) for path in shares_of(model, data, 2)]
    paths = [
        altered(share, tmp_path / f"{number}.safetensors", **changes)
        for number, (share, changes) in enumerate(zip(shares, (first, second), strict=True))
    ]
    out = tmp_path / "out"
    if what is None:
        combine(paths, out)
        assert read(out).metadata.loss == pytest.approx(1.7e308)
        return
    with pytest.raises(SidecarError, match=what):
        combine(paths, out)
    assert not out.exists()


def test_numbers_that_are_too_large_together_are_not_written(model: Path, data: Path, tmp_path: Path) -> None:
    before = measure(model, data)
    first, second = shares_of(model, data, 2)
    share = read(second)
    site, node = next((site, node) for site, vectors in share.fisher.items() for node in vectors)
    fisher = {name: dict(vectors) for name, vectors in share.fisher.items()}
    fisher[site][node] = torch.full_like(fisher[site][node], 1e300)
    write(replace(share, fisher=fisher), second)
    with pytest.raises(
        SidecarError, match=f"{site}.{node} would be more than torch.float32 holds; nothing was"
    ):
        combine([first, second], Path(before.source))
    assert_close(numbers(read(Path(before.source))), numbers(before), rtol=0, atol=0)


def test_shares_of_unlike_numbers_are_no_doubles(model: Path, data: Path, tmp_path: Path) -> None:
    half, third = shares_of(model, data, 2)[0], shares_of(model, data, 3)[0]
    with pytest.raises(SidecarError, match=r"settings\.share is 'one of 2' there, 'one of 3' here"):
        combine([half, third], tmp_path / "out")


def test_names_of_files_may_differ_between_machines(model: Path, data: Path, tmp_path: Path) -> None:
    first, second = shares_of(model, data, 2)
    changes = {
        "settings": {"data": "/elsewhere/data.jsonl"},
        "checkpoint": "/elsewhere/model",
        "device": "NVIDIA",
    }
    other = altered(read(second), tmp_path / "other", **changes)
    whole = combine([other, first], tmp_path / "out").metadata
    assert (whole.settings.data, whole.checkpoint, whole.device) == (str(data), str(model), "cpu, NVIDIA")


def test_what_is_no_share_twice_there_or_missing(model: Path, data: Path, tmp_path: Path) -> None:
    paths, out = shares_of(model, data, 3), tmp_path / "out"
    copy = Path(shutil.copy(paths[1], tmp_path / "copy"))
    whole = Path(measure(model, data).source)
    table: list[tuple[Sequence[Path], str]] = [
        ([*paths, copy], f"share 2/3 is given twice: {paths[1]} and {copy}"),
        (paths[:2], "share 3/3 is missing: 2 of 3 are given"),
        (paths[1:], "share 1/3 is missing: 2 of 3 are given"),
        ([paths[0], whole], "was measured on all samples that its request draws, .*compute --share K/N"),
        ([paths[0], tmp_path / "none"], "No such file"),
        ([paths[0], shares_of(model, data, 3, kind="diagonal")[1]], "settings.kind is 'mask' there, 'diagonal' here"),
    ]  # fmt: skip
    for given, what in table:
        with pytest.raises(SidecarError, match=what):
            combine(given, out)
    with pytest.raises(SidecarError, match="is one of the shares"):
        combine(paths, paths[2])
    out.write_text("mine")
    with pytest.raises(SidecarError, match="exists and is no sidecar; it was left as it is"):
        combine(paths, out)
    assert out.read_text() == "mine"


def merge_of(path: Path, kind: Any) -> Any:
    return find_sidecar("some model", str(path), kind, "error")


def test_a_merge_a_check_and_the_hub_take_whole_ones_only(model: Path, data: Path, tmp_path: Path) -> None:
    message = (
        r"is share 1/2 of a measurement, not all of it. Add it to the other shares:  mergekit-fisher combine"
    )
    for kind in ("mask", "diagonal"):
        share = shares_of(model, data, 2, kind=kind)[0]
        with pytest.raises(SidecarError, match=message):
            merge_of(share, kind)
        other = tiny.sibling(tmp_path / kind, model, seed=1)
        recipe = tmp_path / f"{kind}.yml"
        method = "fisher_mask" if kind == "mask" else "fisher_diagonal"
        recipe.write_text(
            f"merge_method: {method}\nbase_model: {model}\nmodels:\n"
            f"  - {{model: {model}, parameters: {{weight: 1, sidecar: {share}}}}}\n"
            f"  - {{model: {other}, parameters: {{weight: 1}}}}\n"
        )
        told = run("check", recipe, code=1).stdout
        assert re.search(message, told)
        assert "add all shares up" in told  # And not: measure into the share's place.
    with pytest.raises(SidecarError, match=message):
        find_measured(str(shares_of(model, data, 2)[0]))


def test_a_recipe_measures_a_share_of_each_model_into_a_place_of_its_own(
    model: Path, data: Path, tmp_path: Path
) -> None:
    recipe, place = tmp_path / "recipe.yml", tmp_path / "there.safetensors"
    other = tiny.sibling(tmp_path / "other", model, seed=1)
    recipe.write_text(
        f"merge_method: fisher_mask\nfisher: {{data: {data}, samples: 6}}\nmodels:\n"
        f"  - {{model: {model}}}\n  - {{model: {other}, parameters: {{sidecar: {place}}}}}\n"
    )
    for share in ("1/2", "2/2"):
        run("compute", recipe, "--share", share)
    beside = [model / BESIDE.parent / f"mask_fisher-{number}-of-2.safetensors" for number in (1, 2)]
    named = [tmp_path / f"there-{number}-of-2.safetensors" for number in (1, 2)]
    run("combine", *beside, "-o", model / BESIDE)
    run("combine", *named, "-o", place)
    assert run("compute", recipe).stdout.count("measured before") == 2
    assert [model.settings and model.settings.share for model in read_recipe(recipe).models] == [None, None]


def test_no_share_is_replaced_by_a_whole_one(model: Path, data: Path) -> None:
    share, _ = shares_of(model, data, 2)
    kept = share.read_bytes()
    with pytest.raises(
        SidecarShareError, match=r"is share 1/2 of a measurement, and was left as it is.*--force"
    ):
        measure(model, data, share)
    assert share.read_bytes() == kept
    settings = FisherSettings(data=str(data), samples=SAMPLES)
    prepass.compute(prepare(str(model), settings, out=share, force=True), torch.device("cpu"))
    assert read(share).metadata.settings.share is None


def test_a_share_in_a_checkpoints_folder_is_verified_against_it(model: Path, data: Path) -> None:
    share, _ = shares_of(model, data, 2)
    assert find(str(share))[1] == str(model)


def test_a_share_without_samples_and_one_that_cannot_be(model: Path, data: Path) -> None:
    with pytest.raises(DataError, match=r"share 3/3 of 2 samples holds none; take fewer shares"):
        measure(model, data, samples=2, share="3/3")
    for share, what in (("4/3", "K from 1 to N"), ("0/3", "match pattern"), ("1", "match pattern")):
        said = run("compute", model, "--data", data, "--share", share, code=1).stderr
        assert re.search(rf"{RecipeError.__name__}: .*share.*{what}", said)


def test_shares_are_of_the_samples_of_which_something_is_left_to_predict(model: Path, tmp_path: Path) -> None:
    rows = ['{"text": "w5 w6", "label": 0}', '{"text": "", "label": 1}', '{"text": "w7", "label": 1}'] * 4
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(rows) + "\n")
    how: dict[str, Any] = {"samples": 12, "batch_size": 1, "task": "masked-lm"}
    masked = tmp_path / "masked"
    torch.manual_seed(0)
    tiny.save(BertForMaskedLM(tiny.config_of("bert")), masked)
    wanted = measure(masked, data, tmp_path / "whole", **how)
    assert wanted.metadata.samples == 8
    shares = shares_of(masked, data, 3, **how)
    assert [read(path).metadata.samples for path in shares] == [3, 3, 2]
    got = combine(shares, masked / BESIDE)
    assert_close(numbers(got), numbers(wanted), rtol=2e-7, atol=0)
    settings = FisherSettings.model_validate({"data": str(data)} | how)
    done = prepass.compute(prepare(str(masked), settings), CPU)
    assert done.served
    assert "4 of 12 samples held nothing to predict" in done.notes[0]


FEW_FILES = """
import os, resource, sys
from pathlib import Path
from fisher_mask_mergekit.combine import combine
out, *shares = map(Path, sys.argv[1:])
lowest = os.dup(0)
resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + 8, lowest + 8))
combine(shares, out)
"""


def test_however_many_shares_there_are_few_files_are_open(model: Path, data: Path, tmp_path: Path) -> None:
    paths = shares_of(model, data, SAMPLES, kind="diagonal")
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES, tmp_path / "few", *paths],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert_close(
        numbers(read_any(tmp_path / "few")), numbers(combine(paths, tmp_path / "many")), rtol=0, atol=0
    )


def test_shares_are_added_in_their_order_in_float64(model: Path, data: Path, tmp_path: Path) -> None:
    paths = shares_of(model, data, 3, kind="diagonal")
    shares = [read_any(path) for path in paths]
    sizes = [share.metadata.samples for share in shares]
    got = numbers(combine(paths, tmp_path / "out"))
    for name, total in got.items():
        wide = torch.zeros(total.shape, dtype=torch.float64)
        for share, size in zip(shares, sizes, strict=True):
            wide += numbers(share)[name].double() * (size / sum(sizes))
        assert torch.equal(total, wide.float()), name
