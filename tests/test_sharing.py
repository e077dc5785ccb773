"""`mergekit-fisher push` and `pull` against a hub on this machine, and recipes that name what is on it."""

import json
from collections.abc import Callable, Iterator
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from mergekit.merge_methods import merge_state_dicts
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from typer.testing import CliRunner

from fisher_mask_mergekit import store
from fisher_mask_mergekit.cli import app
from fisher_mask_mergekit.errors import SidecarMismatchError
from fisher_mask_mergekit.merging import MergeError
from fisher_mask_mergekit.recipe import read_recipe
from fisher_mask_mergekit.sharing.hub_weights import compare_with_hub
from fisher_mask_mergekit.sharing.public_metadata import public
from fisher_mask_mergekit.sidecar import Sidecar, read, write
from fisher_mask_mergekit.tuning.held_back import sidecar_path
from tests import tiny
from tests.hub_contents import Fault, Hub, Repository
from tests.hub_session import go_offline, new_process, session
from tests.test_check import measure, recipe_for
from tests.test_diagonal_sidecar import made_up, write_for
from tests.test_sidecar import sidecar_for

CARD = b"---\nlicense: mit  # mine\n---\n# Bert\n"
PATH = store.BESIDE.as_posix()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with session(tmp_path, monkeypatch, []) as hub:
        yield hub


@pytest.fixture
def bert(tmp_path: Path, hub: Hub) -> Path:
    """A checkpoint here, measured, whose weights are on the hub as org/bert."""
    folder = tiny.checkpoint(tmp_path / "bert")
    (folder / "README.md").write_bytes(CARD)
    hub.push("models/org/bert", folder)
    measure(folder, checkpoint=str(folder), revision=None)
    return folder


def run(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Standard output and error of a command."""
    new_process()
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == code, done.output
    return done.stdout, done.stderr


def files(hub: Hub, revision: str = "main", name: str = "org/bert") -> dict[str, bytes]:
    return dict(hub.repositories[f"models/{name}"].at(revision)[1])


def test_push_commits_sidecar_and_card_together_and_pull_fetches_it(
    hub: Hub, bert: Path, tmp_path: Path
) -> None:
    before = files(hub)
    stdout, stderr = run("push", bert, "--repo", "org/bert")
    after = files(hub)
    assert after.keys() - before.keys() == {PATH}
    assert {name for name in before if after[name] != before[name]} == {"README.md"}
    sha = hub.repositories["models/org/bert"].branches["main"]
    url, reference = stdout.splitlines()
    assert url.endswith(f"/org/bert/commit/{sha}")
    assert reference == f"hub:org/bert/{PATH}@{sha}"
    assert stderr == f"'{bert}' is called 'org/bert' in what is published\n"
    assert str(tmp_path).encode() not in after[PATH] + after["README.md"]
    card = after["README.md"].decode()
    assert card.startswith(
        "---\nlicense: mit  # mine\ntags:\n- fisher-mask-mergekit\n- fisher-information\n---\n# Bert\n"
    )
    assert "| samples | 9, drawn by seed 0" in card
    assert ModelCard(card).data.to_dict()["license"] == "mit"
    # Sidecars are large files for git, cards are not.
    assert [line.split("?")[0] for line in hub.requests if line.startswith("PUT ")] == [
        f"PUT /lfs/{next(iter(hub.lfs))}"
    ]

    stdout, _ = run("pull", "org/bert", "--out", tmp_path / "copy" / "mine.safetensors")
    assert stdout.startswith(f"{reference}: 9 samples of glue:sst2, accuracy 0.500, loss 0.7000, ")
    assert stdout.endswith("mine.safetensors\n")
    mine, pulled = read(bert / store.BESIDE), read(tmp_path / "copy" / "mine.safetensors")
    assert (pulled.metadata.checkpoint, pulled.metadata.sites) == ("org/bert", mine.metadata.sites)
    assert_close(
        {output: dict(nodes) for output, nodes in pulled.fisher.items()},
        {output: dict(nodes) for output, nodes in mine.fisher.items()},
        rtol=0,
        atol=0,
    )


def test_pushed_again_it_is_the_same_commit(hub: Hub, bert: Path) -> None:
    first = run("push", bert, "--repo", "org/bert")[0]
    commits = len(hub.repositories["models/org/bert"].commits)
    # What is published is called by the commit that it was compared with, which is another one by now.
    sidecar = read(bert / store.BESIDE)
    write(
        Sidecar(sidecar.metadata.model_copy(update={"revision": "1" * 40}), sidecar.fisher, sidecar.values),
        bert / "s.safetensors",
    )
    second = run("push", bert / "s.safetensors", "--repo", "org/bert")[0]
    third = run("push", bert / "s.safetensors", "--repo", "org/bert")[0]
    assert first != second == third
    assert len(hub.repositories["models/org/bert"].commits) == commits + 1
    assert files(hub)["README.md"].count(b"## Fisher information for merging") == 1


def test_a_pull_request_leaves_the_main_branch_alone(hub: Hub, bert: Path) -> None:
    before = files(hub)
    stdout, _ = run("push", bert, "--repo", "org/bert", "--create-pr")
    url, reference = stdout.splitlines()
    assert files(hub) == before
    number = url.rpartition("/discussions/")[2]
    assert PATH in files(hub, f"refs/pr/{number}")
    assert run("pull", reference)[0].startswith(reference)
    assert run("pull", f"org/bert@refs/pr/{number}")[0].startswith(reference)


def test_a_new_repository_is_made_and_its_sidecar_named_by_recipes(
    hub: Hub, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, stderr = run("push", bert, "--repo", "org/sidecars", "--private")
    assert "models/org/sidecars" in hub.private
    assert "org/sidecars has no weights in safetensors, so it was not compared with any" in stderr
    assert f"'{bert}' is called 'bert' in what is published" in stderr
    card = files(hub, name="org/sidecars")["README.md"].decode()
    assert f'  - model: bert\n    parameters: {{weight: 1.0, sidecar: "hub:org/sidecars/{PATH}"}}' in card
    assert "has no weights in safetensors" in run("pull", "org/sidecars")[1]
    monkeypatch.setenv("HF_TOKEN", "hf_stranger")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(bert / "stranger"))
    assert (
        "or it takes a login\n  check its name" in run("pull", "org/sidecars", "--out", bert / "s", code=1)[1]
    )
    assert not (bert / "s").exists()


def test_a_sidecar_of_other_weights_is_neither_pushed_nor_pulled(
    hub: Hub, bert: Path, tmp_path: Path
) -> None:
    other = tiny.sibling(tmp_path / "other", bert, seed=3)
    measure(other)
    before = files(hub)
    _, stderr = run("push", other, "--repo", "org/bert", code=1)
    assert stderr.startswith(
        "SidecarMismatchError: the sidecar was measured on 'somebody/bert-sst2' (revision 95f0f6f), not on the weights in org/bert (revision "
    )
    assert stderr.endswith(
        " has other values there\n  Measure these:  mergekit-fisher compute org/bert --data DATASET\n"
    )
    assert files(hub) == before
    hub.repositories["models/org/bert"].commit(before | {PATH: (other / store.BESIDE).read_bytes()})
    assert "not on the weights in org/bert" in run("pull", "org/bert", code=1)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_weights_are_compared_without_a_download(hub: Hub, bert: Path, dtype: torch.dtype) -> None:
    state = {name: tensor.to(dtype) for name, tensor in load_file(bert / "model.safetensors").items()}
    half = len(state) // 2
    parts = {
        f"model-0000{n}-of-00002.safetensors": dict(list(state.items())[slice(*ends)])
        for n, ends in ((1, (0, half)), (2, (half, None)))
    }
    folder = bert.parent / "sharded"
    folder.mkdir()
    for name, part in parts.items():
        save_file(part, folder / name)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    sha = hub.push("models/org/sharded", folder)
    sidecar = read(bert / store.BESIDE)
    assert compare_with_hub(sidecar, "org/sharded", sha) == len(sidecar.governed)
    name = list(sidecar.governed)[-1]
    changed = Sidecar(sidecar.metadata, sidecar.fisher, {**sidecar.values, name: sidecar.values[name] + 1})
    with pytest.raises(SidecarMismatchError, match=f"tensor '{name}' has other values there"):
        compare_with_hub(changed, "org/sharded", sha)


def test_weights_of_another_architecture(hub: Hub, bert: Path, tmp_path: Path) -> None:
    sha = hub.repositories["models/org/bert"].branches["main"]
    with pytest.raises(SidecarMismatchError, match="it governs none of its tensors"):
        compare_with_hub(sidecar_for(tiny.classifier("llama")), "org/bert", sha)
    wide = sidecar_for(tiny.classifier("bert", intermediate_size=64))
    with pytest.raises(SidecarMismatchError, match=r"intermediate\.dense\.weight' has other values there"):
        compare_with_hub(wide, "org/bert", sha)


def test_many_tensors_are_sampled(hub: Hub, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fisher_mask_mergekit.sharing.hub_weights._COMPARED", 5)
    sidecar = read(bert / store.BESIDE)
    sha = hub.repositories["models/org/bert"].branches["main"]
    hub.requests.clear()
    compared = compare_with_hub(sidecar, "org/bert", sha)
    assert compared is not None
    assert 3 <= compared <= 5
    gets = [request for request in hub.requests if request.startswith("GET /org/bert/resolve")]
    assert len(gets) == compared + 2  # The file's header, and how long it is.


def test_pickled_weights_would_be_hidden_by_a_sidecar(hub: Hub, bert: Path) -> None:
    old = files(hub)
    weights = old.pop("model.safetensors")
    hub.repositories["models/org/bert"].commit(old | {"pytorch_model.bin": weights})
    _, stderr = run("push", bert, "--repo", "org/bert", code=1)
    assert "org/bert has its weights in pytorch_model.bin, which mergekit does not download where" in stderr
    assert "push to a repository of its own" in stderr


def test_the_sidecar_of_another_checkpoint_is_not_replaced(hub: Hub, bert: Path, tmp_path: Path) -> None:
    run("push", bert, "--repo", "org/sidecars")
    other = tiny.sibling(tmp_path / "other", bert, seed=3)
    measure(other, weights="11")
    before = files(hub, name="org/sidecars")
    _, stderr = run("push", other, "--repo", "org/sidecars", code=1)
    assert stderr == (
        "HubError: org/sidecars has the sidecar of another checkpoint, 'bert'; it was left as it is\n"
        "  push that of 'somebody/bert-sst2' (revision 95f0f6f) to a repository of its own\n"
    )
    assert files(hub, name="org/sidecars") == before
    measure(bert, seed=5, checkpoint="org/bert", revision=None, samples=7)
    run("push", bert, "--repo", "org/sidecars")
    assert files(hub, name="org/sidecars")[PATH] != before[PATH]
    hub.repositories["models/org/sidecars"].commit(before | {PATH: b"rubbish"})
    run("push", other, "--repo", "org/sidecars")
    assert run("pull", "org/sidecars")[0].split(": ")[1].startswith("9 samples")


def test_what_others_commit_meanwhile_is_not_lost(hub: Hub, bert: Path) -> None:
    repository = hub.repositories["models/org/bert"]
    batch = hub.fault

    def somebody_else(request: str) -> Fault | None:
        if "preupload" in request:
            repository.commit(files(hub) | {"README.md": b"theirs"})
        return batch(request)

    hub.fault = somebody_else  # type: ignore[method-assign]
    _, stderr = run("push", bert, "--repo", "org/bert", code=1)
    assert (
        stderr
        == "HubError: cannot push to org/bert: the repository was changed in the meantime; nothing was written\n  run it again\n"
    )
    assert files(hub)["README.md"] == b"theirs"
    assert PATH not in files(hub)


FAULTS = [
    (
        "POST .*preupload",
        HTTPStatus.FORBIDDEN,
        "your token may not do this\n  log in with one that may write",
    ),
    ("POST .*objects/batch", HTTPStatus.BAD_GATEWAY, "cannot be reached or has failed"),
    ("PUT ", HTTPStatus.SERVICE_UNAVAILABLE, "cannot be reached or has failed"),
    ("POST .*commit", HTTPStatus.TOO_MANY_REQUESTS, "too many requests from here\n  wait a while"),
    ("HEAD .*README.md", HTTPStatus.BAD_GATEWAY, "cannot be reached or has failed"),
    ("GET /api/models/org/bert$", HTTPStatus.UNAUTHORIZED, "or it takes a login\n  check its name"),
]


@pytest.mark.parametrize(("requests", "status", "message"), FAULTS)
def test_a_push_that_fails_writes_nothing(
    hub: Hub, bert: Path, requests: str, status: HTTPStatus, message: str
) -> None:
    before = files(hub)
    hub.faults = [Fault(requests, times=99, status=status)]
    _, stderr = run("push", bert, "--repo", "org/bert", code=1)
    assert stderr.startswith(
        ("HubError: cannot push to org/bert: ", "HubError: cannot read the card of org/bert: ")
    )
    assert message in stderr
    assert files(hub) == before


def test_pushes_that_cannot_begin(
    hub: Hub, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = tiny.checkpoint(tmp_path / "bare")
    assert (
        f"there is no sidecar of mask nodes for {bare}. Measure it:  mergekit-fisher compute"
        in run("push", bare, "--repo", "org/bert", code=1)[1]
    )
    full = bare / store.DIAGONAL_BESIDE
    model = tiny.classifier("bert")
    write_for(model, full, made_up(model))
    says = f"{full} is a full-size sidecar, as large as the weights: push takes those of mask nodes only"
    assert says in run("push", full, "--repo", "org/bert", code=1)[1]
    assert f"{bare} ({says}). Measure it" in run("push", bare, "--repo", "org/bert", code=1)[1]
    assert "there is no such repository" in run("push", bert, "--repo", "org/none", "--create-pr", code=1)[1]
    assert "models/org/none" not in hub.repositories
    assert "'bert' is no id of a repository" in run("push", bert, "--repo", "bert", code=1)[1]
    hub.repositories["models/org/bert"].commit(files(hub) | {"README.md": b"\xff"})
    assert "org/bert: README.md is not UTF-8" in run("push", bert, "--repo", "org/bert", code=1)[1]
    go_offline(monkeypatch)
    assert "HF_HUB_OFFLINE is set" in run("push", bert, "--repo", "org/bert", code=1)[1]


def test_a_hub_id_is_pushed_from_the_cache_before_what_is_published(hub: Hub, bert: Path) -> None:
    run("push", bert, "--repo", "org/bert")
    sha = hub.repositories["models/org/bert"].branches["main"]
    newer = measure(bert, seed=5, checkpoint="org/bert", revision=sha, samples=7)
    write(newer, store.cache_folder() / f"org--bert--{sha}" / store.BESIDE.name)
    assert run("push", "org/bert", "--repo", "org/bert")[1] == ""
    assert run("pull", "org/bert")[0].split(": ")[1].startswith("7 samples")


def test_pull_tells_what_it_cannot_take(hub: Hub, bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"{bert} is here already; pull takes a hub id" in run("pull", bert, code=1)[1]
    assert "'bert-base' is no id of a repository on the hub" in run("pull", "bert-base", code=1)[1]
    assert "has no such file at that revision" in run("pull", "org/bert", code=1)[1]
    run("push", bert, "--repo", "org/bert")
    (bert / "other").write_text("no sidecar")
    assert (
        "other exists and is no sidecar; it was left as it is"
        in run("pull", "org/bert", "--out", bert / "other", code=1)[1]
    )
    assert (bert / "other").read_text() == "no sidecar"
    assert "cannot write" in run("pull", "org/bert", "--out", bert / "other" / "s.safetensors", code=1)[1]
    hub.repositories["models/org/bert"].commit(files(hub) | {PATH: b"rubbish"})
    assert "SidecarError: " in run("pull", "org/bert", code=1)[1]
    go_offline(monkeypatch)
    assert "SidecarError: " in run("pull", "org/bert", code=1)[1]


def test_pull_offline_says_that_nothing_was_compared(
    hub: Hub, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", bert, "--repo", "org/bert")
    online = run("pull", "org/bert")[0]
    go_offline(monkeypatch)
    hub.requests.clear()
    stdout, stderr = run("pull", "org/bert")
    assert (stdout, hub.requests) == (online, [])
    assert "HF_HUB_OFFLINE is set: it was not compared" in stderr


LOCAL = [
    ("/home/me/bert", None, "org/bert", "bert"),
    ("C:\\Users\\me\\bert\\", None, "org/bert", "bert"),
    ("./bert", None, "org/bert", "bert"),
    ("acme-bank/complaints", None, "org/bert", "complaints"),
    ("org/base+/home/me/adapter", None, "org/bert", "base+adapter"),
    ("acme-bank/complaints+clients/a+b", None, "org/bert", "complaints+a+b"),
    ("org/other@v1", "2" * 40, "org/other@v1", "org/other@v1"),
]


@pytest.mark.parametrize(("name", "revision", "compared", "alone"), LOCAL)
def test_local_checkpoints_have_no_path_in_what_is_published(
    name: str, revision: str | None, compared: str, alone: str
) -> None:
    made = sidecar_for(tiny.classifier("bert"))
    metadata = made.metadata.model_copy(update={"checkpoint": name, "revision": revision})
    sidecar = Sidecar(metadata, made.fisher, made.values)
    there = public(sidecar, "org/bert", "1" * 40)[0].metadata
    assert (there.checkpoint, there.revision) == (compared, revision or "1" * 40)
    there = public(sidecar, "org/bert", None)[0].metadata
    assert (there.checkpoint, there.revision) == (alone, revision)


@pytest.mark.parametrize(
    ("data", "commit", "shown"),
    [
        ("/home/me/train.jsonl", None, "train.jsonl"),
        ("private/train.csv", None, "train.csv"),
        ("acme-bank/complaints", None, "complaints"),
        ("~/dumps/sst2::train", None, "sst2::train"),
        ("nyu-mll/glue:sst2:train@main", "1" * 40, "nyu-mll/glue:sst2:train@main"),
        ("imdb", None, "imdb"),
    ],
)
def test_local_data_has_no_path_in_what_is_published(data: str, commit: str | None, shown: str) -> None:
    made = sidecar_for(tiny.classifier("bert"))
    settings = made.metadata.settings.model_copy(update={"data": data})
    record = made.metadata.data.model_copy(update={"revision": commit})
    metadata = made.metadata.model_copy(update={"settings": settings, "data": record})
    sidecar = Sidecar(metadata, made.fisher, made.values)
    changed, notes = public(sidecar, "org/bert", None)
    assert changed.metadata.settings.data == shown
    assert notes == ((f"'{data}' is called '{shown}' in what is published",) if data != shown else ())


@pytest.fixture
def named(hub: Hub, pair: tuple[Path, Path], tmp_path: Path) -> Callable[..., Path]:
    """Makes a recipe whose sidecars are on the hub only."""
    for folder in pair:
        sidecar = folder / store.BESIDE
        content = sidecar.read_bytes()
        sidecar.unlink()
        hub.repositories[f"models/org/{folder.name}"] = Repository(f"org/{folder.name}")
        hub.repositories[f"models/org/{folder.name}"].commit({"a.safetensors": content})

    def make(revision: str = "", **changes: Any) -> Path:
        models = [
            {
                "model": str(folder),
                "fisher": {"data": str(tiny.write_data(tmp_path / "data.jsonl"))},
                "parameters": {"weight": 1.0, "sidecar": f"hub:org/{folder.name}/a.safetensors{revision}"},
            }
            for folder in pair
        ]
        return recipe_for(tmp_path, pair, models=models, **changes)

    return make


def test_check_and_inspect_use_what_a_recipe_names_on_the_hub(
    hub: Hub, named: Callable[..., Path], pair: tuple[Path, Path]
) -> None:
    stdout, _ = run("check", named(), "--json")
    assert {finding["level"] for finding in json.loads(stdout)["findings"]} <= {"warning"}
    assert "neurons of bert.encoder.layer.*.intermediate.dense" in run("inspect", named())[0]
    assert "somebody/bert-sst2" in run("inspect", "hub:org/one/a.safetensors")[0]
    stdout, _ = run("check", named("@none"), code=1)
    assert (
        "error: sidecar: cannot fetch hub:org/one/a.safetensors@none: the repository has no such revision\n"
        in stdout
    )
    assert (
        f"  change or remove  sidecar: hub:org/one/a.safetensors@none  first, then:  mergekit-fisher compute {named('@none')}\n"
        in stdout
    )
    stdout, _ = run("check", named(merge_method="fisher_diagonal"), code=1)
    assert "a full-size sidecar is a folder, not one file" in stdout


def test_tune_finds_what_a_recipe_names_on_the_hub(hub: Hub, named: Callable[..., Path]) -> None:
    for model in read_recipe(named()).models:
        path = sidecar_path(model)
        assert path is not None
        assert read(path).metadata.samples == 9


def test_compute_measures_nothing_that_is_on_the_hub(
    hub: Hub, named: Callable[..., Path], pair: tuple[Path, Path]
) -> None:
    stdout, stderr = run("compute", named("@main"))
    assert stdout == ""
    for folder in pair:
        assert (
            f"{folder}: the recipe names hub:org/{folder.name}/a.safetensors@main; its sidecar is " in stderr
        )
        assert not (folder / store.BESIDE).exists()
    assert "cannot fetch hub:org/one/a.safetensors@none" in run("compute", named("@none"), code=1)[1]


def test_a_merge_downloads_a_sidecar_once(
    hub: Hub, pair: tuple[Path, Path], named: Callable[..., Path]
) -> None:
    states = [load_file(folder / "model.safetensors") for folder in pair]
    references = [f"hub:org/{folder.name}/a.safetensors" for folder in pair]
    merged = merge_state_dicts(states, "fisher_mask", parameters={"sidecar": references})
    assert sum("GET " in request and "resolve" in request for request in hub.requests) == 2
    paths = [str(pair[0].parent / f"{folder.name}.safetensors") for folder in pair]
    for folder, path in zip(pair, paths, strict=True):
        Path(path).write_bytes(files(hub, name=f"org/{folder.name}")["a.safetensors"])
    assert_close(
        merged, merge_state_dicts(states, "fisher_mask", parameters={"sidecar": paths}), rtol=0, atol=0
    )
    missing = [references[0], "hub:org/two/none.safetensors"]
    with pytest.raises(
        MergeError, match=r"HubError at .*: cannot fetch hub:org/two/none\.safetensors: the repository"
    ):
        merge_state_dicts(states, "fisher_mask", parameters={"sidecar": missing})
