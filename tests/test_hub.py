"""Hub ids: what a user meets who names models and data sets on the hub instead of folders."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit import store
from fisher_mask_mergekit.sidecar import read
from tests import commands, tiny
from tests.fake_hub import serve
from tests.hub_contents import Hub, Repository

pytestmark = pytest.mark.xdist_group("hub")  # What they share is made once.
RECIPE = """\
merge_method: fisher_mask
fisher: {data: 'org/words:short', samples: 20}
models:
  - model: org/bert-a
  - model: org/bert-b@main
dtype: float32
"""


@dataclass(frozen=True)
class User:
    """A user with an empty, or somebody's, home and working folder.

    Attributes:
        home: Where the commands run; the caches are in it.
        hub: The hub that the commands use.
        endpoint: Its address.
        shas: The first commit of every repository.
    """

    home: Path
    hub: Hub
    endpoint: str
    shas: Mapping[str, str]

    def run(self, *command: str, code: int = 0, **extra: str) -> subprocess.CompletedProcess[str]:
        """Run an installed command, with extra environment variables."""
        # The surroundings' own caches, tokens, proxies and offline switches stay out of it.
        foreign = re.compile(r"HF_|HUGGING|TRANSFORMERS_|FISHER_MASK_|.*_proxy$", re.IGNORECASE)
        environment = {name: value for name, value in os.environ.items() if not foreign.match(name)} | {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "FISHER_MASK_CACHE": str(self.home / "cache"),
        }
        done = commands.run(command, env=environment | extra, cwd=self.home)
        assert done.returncode == code, done.stderr
        return done

    def sidecar(self, name: str) -> Path:
        """Where the sidecar of a model's first commit belongs."""
        sha = self.shas[f"models/{name}"]
        return self.home / "cache" / f"{name.replace('/', '--')}--{sha}" / "mask_fisher.safetensors"

    def sidecars(self) -> set[Path]:
        return set(self.home.rglob("*mask_fisher*"))

    def downloads(self) -> list[str]:
        return [request for request in self.hub.requests if re.match("GET .*/resolve/", request)]


@contextmanager
def user_of(home: Path, folders: Path) -> Iterator[User]:
    """A user, and a hub of one's own with the same repositories."""
    hub = Hub()
    shas = {
        key: hub.push(key, folders / key.rpartition("/")[2])
        for key in ("models/org/bert-a", "models/org/bert-b", "datasets/org/words")
    }
    with serve(hub) as endpoint:
        yield User(home, hub, endpoint, shas)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the repositories hold."""
    folder = tmp_path_factory.mktemp("folders")
    tiny.sibling(folder / "bert-b", tiny.checkpoint(folder / "bert-a"), seed=1)
    (folder / "words" / "data").mkdir(parents=True)
    tiny.write_data(folder / "words" / "data" / "short.jsonl", rows=24)
    tiny.write_data(folder / "words" / "data" / "long.jsonl", rows=30, seed=1)
    (folder / "words" / "README.md").write_text(
        "---\nconfigs:\n- config_name: long\n  data_files: data/long.jsonl\n"
        "- config_name: short\n  data_files: data/short.jsonl\n---\n"
    )
    return folder


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory, folders: Path) -> Path:
    """The home of a user who has run ``compute`` on the recipe."""
    home = tmp_path_factory.mktemp("home")
    (home / "recipe.yml").write_text(RECIPE)
    with user_of(home, folders) as user:
        done = user.run("mergekit-fisher", "compute", "recipe.yml")
        assert [line.split(": ")[0] for line in done.stdout.splitlines()] == ["org/bert-a", "org/bert-b@main"]
    return home


@pytest.fixture
def newcomer(tmp_path: Path, folders: Path) -> Iterator[User]:
    (tmp_path / "home").mkdir()
    with user_of(tmp_path / "home", folders) as user:
        yield user


@pytest.fixture
def returning(tmp_path: Path, folders: Path, measured: Path) -> Iterator[User]:
    """A user who has run ``compute`` on the recipe, and whose home a test may change."""
    with user_of(shutil.copytree(measured, tmp_path / "home", symlinks=True), folders) as user:
        yield user


def by_hand(name: str, weights: list[Tensor], fishers: list[dict[str, Tensor]]) -> Tensor:
    """Equation 5 for one tensor, in float64, from the files' own names."""
    node = re.sub(r"attention\.self\.(query|key)\.\w+$", "attention.output.dense.head_fisher", name)
    node = re.sub(r"intermediate\.dense\.\w+$", "output.dense.neuron_fisher", node)
    top, bottom = torch.zeros(()).double(), torch.zeros(()).double()
    for weight, fisher in zip(weights, fishers, strict=True):
        rows = torch.ones(len(weight)).double()
        if node != name:
            rows = fisher[node].double().repeat_interleave(len(weight) // len(fisher[node]))
        rows = rows.reshape(-1, *[1] * (weight.ndim - 1))
        top, bottom = top + rows * weight.double(), bottom + rows
    return top / bottom


def assert_merged(user: User, out: str, folders: Path) -> None:
    """The merge of the first commits, by the measured sidecars."""
    merged = load_file(user.home / out / "model.safetensors")
    inputs = [load_file(folders / name / "model.safetensors") for name in ("bert-a", "bert-b")]
    fishers = [load_file(user.sidecar(name)) for name in ("org/bert-a", "org/bert-b")]
    assert merged.keys() == inputs[0].keys()
    moved = set()
    for name, value in merged.items():
        weights = [tensors[name] for tensors in inputs]
        assert_close(value.double(), by_hand(name, weights, fishers), rtol=1e-5, atol=1e-6)
        if float((value - torch.stack(weights).mean(0)).abs().max()) > 1e-4:
            moved.add(re.sub(r"layer\.\d+", "layer.N", name))
    governed = ("attention.self.query", "attention.self.key", "intermediate.dense")
    assert moved == {
        f"bert.encoder.layer.N.{path}.{kind}" for path in governed for kind in ("weight", "bias")
    }


def test_the_hub_here_answers_clients_as_the_hub_does(
    newcomer: User, folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    api = HfApi(endpoint=newcomer.endpoint, token=False)
    sha = newcomer.shas["datasets/org/words"]
    assert api.model_info("org/bert-a").sha == newcomer.shas["models/org/bert-a"]
    assert set(api.list_repo_files("org/words", repo_type="dataset", revision=sha)) == {
        "README.md",
        "data/short.jsonl",
        "data/long.jsonl",
    }
    top = api.list_repo_tree("org/words", repo_type="dataset")
    assert {entry.path for entry in top} == {"README.md", "data"}
    paths = api.get_paths_info("org/words", ["data", "README.md", "none"], repo_type="dataset")
    assert [entry.path for entry in paths] == ["data", "README.md"]
    assert api.repo_exists("org/words", repo_type="dataset")
    assert not api.repo_exists("org/words")
    with pytest.raises(RepositoryNotFoundError):
        api.dataset_info("org/bert-a")
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/bert-a", revision="nosuch")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/bert-a", "nosuch.json", cache_dir=newcomer.home)
    content = (folders / "words" / "data" / "long.jsonl").read_bytes()
    files = HfFileSystem(endpoint=newcomer.endpoint, token=False, skip_instance_cache=True)
    assert files.read_block("datasets/org/words/data/long.jsonl", 100, 50) == content[100:150]


def test_compute_writes_to_the_cache_and_records_the_commits(measured: Path, folders: Path) -> None:
    with user_of(measured, folders) as user:
        assert user.sidecars() == {user.sidecar("org/bert-a"), user.sidecar("org/bert-b")}
        for name, written in (("org/bert-a", "org/bert-a"), ("org/bert-b", "org/bert-b@main")):
            metadata = read(user.sidecar(name)).metadata
            assert (metadata.checkpoint, metadata.revision) == (written, user.shas[f"models/{name}"])
            assert (metadata.settings.data, metadata.samples) == ("org/words:short", 20)
            assert metadata.data.revision == user.shas["datasets/org/words"]
            assert metadata.data.rows == 24


def test_a_plain_merge_uses_the_cached_sidecars(returning: User, folders: Path) -> None:
    returning.run("mergekit-yaml", "recipe.yml", "out")
    assert_merged(returning, "out", folders)


def test_published_sidecars_need_no_data_and_no_compute(
    newcomer: User, measured: Path, folders: Path
) -> None:
    for name in ("bert-a", "bert-b"):
        folder = shutil.copytree(folders / name, newcomer.home / "upload" / name)
        (folder / store.BESIDE).parent.mkdir()
        with user_of(measured, folders) as author:
            shutil.copy(author.sidecar(f"org/{name}"), folder / store.BESIDE)
        newcomer.hub.push(f"models/org/published-{name}", folder)
    (newcomer.home / "recipe.yml").write_text(
        "merge_method: fisher_mask\n"
        "models: [{model: org/published-bert-a}, {model: org/published-bert-b}]\ndtype: float32\n"
    )
    newcomer.run("mergekit-yaml", "recipe.yml", "out")
    assert not any("/datasets/" in request for request in newcomer.hub.requests)
    with user_of(measured, folders) as author:
        shutil.copytree(author.home / "cache", newcomer.home / "cache")
    assert_merged(newcomer, "out", folders)


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        (
            "nosuch/model",
            "org/words:short",
            "CheckpointError: nosuch/model is .*: Repository Not Found for url",
        ),
        (
            "org/bert-a@nosuch",
            "org/words:short",
            "CheckpointError: .*@nosuch is .*: Revision Not Found for url",
        ),
        (
            "org/bert-a",
            "nosuch/words",
            "DataError: cannot load data 'nosuch/words' .* doesn't exist on the Hub",
        ),
        ("org/bert-a", "org/words@nosuch", "DataError: cannot load data .* Revision 'nosuch' doesn't exist"),
    ],
)
def test_what_the_hub_does_not_have_is_one_error_line(
    newcomer: User, model: str, data: str, message: str
) -> None:
    done = newcomer.run("mergekit-fisher", "compute", model, "--data", data, code=1)
    assert [line for line in done.stderr.splitlines() if not re.match(message, line)] == []
    assert done.stdout == ""
    assert newcomer.sidecars() == set()
    assert not (newcomer.home / "cache").exists()


def test_the_same_request_is_served_without_a_download(returning: User) -> None:
    lines = returning.run("mergekit-fisher", "compute", "recipe.yml").stdout.splitlines()
    assert [line.split(", ")[-2] for line in lines] == ["measured before"] * 2
    assert returning.downloads() == []


def test_offline_serves_what_was_measured_and_measures_what_was_downloaded(returning: User) -> None:
    before = read(returning.sidecar("org/bert-b"))
    returning.sidecar("org/bert-b").unlink()
    done = returning.run("mergekit-fisher", "compute", "recipe.yml", HF_HUB_OFFLINE="1")
    served, anew = done.stdout.splitlines()
    assert "measured before" in served
    assert "measured before" not in anew
    assert returning.hub.requests == []
    after = read(returning.sidecar("org/bert-b"))
    assert after.metadata.data == before.metadata.data
    assert after.metadata.revision == before.metadata.revision
    for output, vectors in before.fisher.items():
        assert_close(dict(after.fisher[output]), dict(vectors), rtol=1e-5, atol=0)


def test_a_moved_branch_needs_a_new_sidecar_and_the_old_commit_does_not(
    returning: User, folders: Path, tmp_path: Path
) -> None:
    old = returning.shas["models/org/bert-a"]
    new = returning.hub.push("models/org/bert-a", tiny.sibling(tmp_path / "new", folders / "bert-a", seed=2))
    assert new != old
    done = returning.run("mergekit-yaml", "recipe.yml", "moved", code=1)
    assert "there is no sidecar for org/bert-a. Measure it:  mergekit-fisher compute " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (returning.home / "moved" / "model.safetensors").exists()
    recipe = returning.home / "recipe.yml"
    recipe.write_text(RECIPE.replace("org/bert-a", f"org/bert-a@{old}"))
    returning.run("mergekit-yaml", "recipe.yml", "out")
    assert_merged(returning, "out", folders)


def test_moved_data_is_measured_anew_and_never_passed_off_as_the_old(
    returning: User, folders: Path, tmp_path: Path
) -> None:
    old = returning.shas["datasets/org/words"]
    words = shutil.copytree(folders / "words", tmp_path / "words")
    tiny.write_data(words / "data" / "short.jsonl", rows=22, seed=7)
    new = returning.hub.push("datasets/org/words", words)
    before = {path: read(path).metadata.data for path in returning.sidecars()}
    assert "measured before" not in returning.run("mergekit-fisher", "compute", "recipe.yml").stdout
    for path, data in before.items():
        after = read(path).metadata.data
        assert (data.revision, data.rows, after.revision, after.rows) == (old, 24, new, 22)
        assert after.digest != data.digest
    # The data sets library has the old commit too, but offline it loads the newest whatever is asked for.
    pinned = ("mergekit-fisher", "compute", "org/bert-a", "--data", f"org/words:short@{old}")
    done = returning.run(*pinned, "--out", "pinned.safetensors", code=1, HF_HUB_OFFLINE="1")
    assert f"revision {old} was asked for" in done.stderr
    assert not (returning.home / "pinned.safetensors").exists()


def publish(user: User, measured: Path) -> None:
    """Push the models' files again with the sidecars that were measured on the first commits."""
    for name in ("org/bert-a", "org/bert-b"):
        repository = user.hub.repositories[f"models/{name}"]
        sidecar = measured / user.sidecar(name).relative_to(user.home)
        repository.commit({**repository.at("main")[1], store.BESIDE.as_posix(): sidecar.read_bytes()})


def test_what_one_pushes_another_merges_with(newcomer: User, measured: Path, folders: Path) -> None:
    """By the installed commands: a recipe that names sidecars in a repository of their own, pinned."""
    recipe = RECIPE
    for name in ("org/bert-a", "org/bert-b"):
        repository = Repository(f"{name}-sidecar")
        newcomer.hub.repositories[f"models/{name}-sidecar"] = repository
        repository.commit({})
        done = newcomer.run(
            "mergekit-fisher",
            *(
                "push",
                str(measured / newcomer.sidecar(name).relative_to(newcomer.home)),
                "--repo",
                f"{name}-sidecar",
            ),
            HF_TOKEN=newcomer.hub.token,
        )
        url, reference = done.stdout.splitlines()
        assert url.startswith(f"{newcomer.endpoint}/{name}-sidecar/commit/")
        recipe = re.sub(rf"model: {name}.*", rf"\g<0>\n    parameters: {{sidecar: '{reference}'}}", recipe)
    (newcomer.home / "recipe.yml").write_text(recipe)
    newcomer.run("mergekit-yaml", "recipe.yml", "out")
    assert sum(store.BESIDE.name in request for request in newcomer.downloads()) == 2
    shutil.copytree(measured / "cache", newcomer.home / "cache")
    assert_merged(newcomer, "out", folders)


def test_a_walk_without_the_data(newcomer: User, measured: Path, folders: Path) -> None:
    """push -> pull -> verify -> mergekit-yaml, where the data that was measured on is nowhere to be had."""
    names = ("org/bert-a", "org/bert-b")
    for name in names:
        sidecar = measured / newcomer.sidecar(name).relative_to(newcomer.home)
        newcomer.run("mergekit-fisher", "push", str(sidecar), "--repo", name, HF_TOKEN=newcomer.hub.token)
    del newcomer.hub.repositories["datasets/org/words"]
    for name in names:
        newcomer.run("mergekit-fisher", "pull", name, "--out", "pulled.safetensors")
        done = newcomer.run("mergekit-fisher", "verify", "pulled.safetensors", "--model", name)
        verdicts = {line.split(": ")[1]: line.split(": ")[0] for line in done.stdout.splitlines()}
        assert verdicts["file"] == verdicts["values"] == verdicts["weights"] == "ok"
    again = ("verify", "pulled.safetensors", "--model", names[1], "--recompute", "4")
    assert "org/words" in newcomer.run("mergekit-fisher", *again, code=1).stderr
    wrong = newcomer.run("mergekit-fisher", "verify", "pulled.safetensors", "--model", names[0], code=1)
    assert "failed: values" in wrong.stdout
    models = "".join(f"  - model: {name}\n" for name in names)
    recipe = f"merge_method: fisher_mask\nmodels:\n{models}dtype: float32\n"
    (newcomer.home / "recipe.yml").write_text(recipe)
    newcomer.run("mergekit-yaml", "recipe.yml", "out")
    shutil.copytree(measured / "cache", newcomer.home / "cache")
    assert_merged(newcomer, "out", folders)


def test_check_inspect_and_sites_download_no_weights(newcomer: User, measured: Path) -> None:
    """The measured sidecars are published, so a newcomer needs configuration, sidecar and headers only."""
    publish(newcomer, measured)
    (newcomer.home / "recipe.yml").write_text(RECIPE.replace("dtype:", "base_model: org/bert-a\ndtype:"))
    done = newcomer.run("mergekit-fisher", "check", "recipe.yml")
    assert "warning: weight: org/bert-a is listed, but as the base model" in done.stdout
    assert "error" not in done.stdout
    (newcomer.home / "recipe.yml").write_text(RECIPE)
    shown = newcomer.run("mergekit-fisher", "inspect", "recipe.yml").stdout
    assert "neurons of bert.encoder.layer.*.intermediate.dense" in shown
    assert "4 heads of 8" in newcomer.run("mergekit-fisher", "sites", "org/bert-b").stdout
    kept = {path.name for path in (newcomer.home / "hf").rglob("*") if path.is_symlink() or path.suffix}
    assert "config.json" in kept
    assert "mask_fisher.safetensors" in kept
    assert not any(name.startswith(("model", "pytorch_model")) for name in kept)
    asked = [request for request in newcomer.hub.requests if "model.safetensors" in request]
    assert any(request.startswith("GET") for request in asked)  # The headers.


def test_check_knows_a_sidecar_of_other_weights_by_the_commits(
    newcomer: User, measured: Path, folders: Path, tmp_path: Path
) -> None:
    (newcomer.home / "recipe.yml").write_text(RECIPE.replace("dtype:", "base_model: org/bert-c\ndtype:"))
    newcomer.hub.push("models/org/bert-c", folders / "bert-a")
    other = tiny.sibling(tmp_path / "other", folders / "bert-b", seed=9)
    newcomer.hub.push("models/org/bert-b", other)
    publish(newcomer, measured)
    done = newcomer.run("mergekit-fisher", "check", "recipe.yml", code=1)
    assert "error: sidecar: " in done.stdout
    assert "org/bert-b@main is at " in done.stdout
    assert "which has other weights\n  mergekit-fisher compute recipe.yml\n" in done.stdout
    assert "org/bert-a is at" not in done.stdout


def test_check_offline_looks_at_what_was_downloaded(returning: User) -> None:
    done = returning.run("mergekit-fisher", "check", "recipe.yml", HF_HUB_OFFLINE="1")
    assert "warning: base model" in done.stdout
    assert "error" not in done.stdout


def test_check_without_the_tensors_says_so(newcomer: User) -> None:
    (newcomer.home / "recipe.yml").write_text(RECIPE)
    for repository in newcomer.hub.repositories.values():
        files = dict(repository.at("main")[1])
        if "model.safetensors" in files:
            files["pytorch_model.bin"] = files.pop("model.safetensors")
            repository.commit(files)
    done = newcomer.run("mergekit-fisher", "check", "recipe.yml", code=1)
    assert (
        "org/bert-a has no safetensors, or the hub cannot be reached: its tensors were not checked"
        in done.stdout
    )
    assert "there is none for org/bert-a\n  mergekit-fisher compute recipe.yml" in done.stdout
