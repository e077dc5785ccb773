"""A merge in memory is the merge that mergekit-yaml writes."""

from pathlib import Path

import pytest
import torch
import yaml
from mergekit.common import ModelReference
from mergekit.io.tasks import LoaderCache
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fisher_mask_mergekit.errors import FisherMaskError, RecipeError
from fisher_mask_mergekit.in_memory import merge_in_memory
from tests.test_end_to_end import quickly, two_classifiers


@pytest.fixture
def drafted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A measured recipe of two classifiers with unlike heads: slices, an empty one among them."""
    monkeypatch.chdir(tmp_path)
    work, two, three = two_classifiers(tmp_path)
    data = [word for folder in (two, three) for word in ("--data", f"{folder}.jsonl")]
    recipe = work / "recipe.yml"
    recipe.write_text(quickly("mergekit-fisher", "init", two, three, *data))
    quickly("mergekit-fisher", "compute", recipe)
    return recipe


@pytest.mark.parametrize("method", ["fisher_mask", "linear", "task_arithmetic", "ties"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_what_mergekit_writes(drafted: Path, method: str, dtype: str) -> None:
    text = drafted.read_text().replace("merge_method: fisher_mask", f"merge_method: {method}")
    drafted.write_text(text.replace("dtype: float32", f"dtype: {dtype}"))
    before = {path: path.stat().st_mtime_ns for path in drafted.parent.rglob("*")}
    encoder, config = merge_in_memory(yaml.safe_load(drafted.read_text()), "trial")
    assert {path: path.stat().st_mtime_ns for path in drafted.parent.rglob("*")} == before
    quickly("mergekit-yaml", drafted, drafted.parent / "merged")
    written = load_file(drafted.parent / "merged" / "model.safetensors")
    assert encoder.shapes == {name: tuple(tensor.shape) for name, tensor in written.items()}
    found = dict(encoder.read(written))
    torch.testing.assert_close(found, written, rtol=0, atol=0)
    stored = AutoConfig.from_pretrained(drafted.parent / "merged")
    assert (config.num_hidden_layers, config.num_labels) == (stored.num_hidden_layers, stored.num_labels)


def test_a_checkpoint_that_was_rewritten_is_read_again(drafted: Path) -> None:
    document = yaml.safe_load(drafted.read_text()) | {"merge_method": "linear"}
    cache, name = LoaderCache(), "bert.encoder.layer.1.output.dense.weight"
    kept = ModelReference.model_validate(document["slices"][0]["sources"][0]["model"])
    cache.get(kept)
    held, before, trusted = cache.loaders, dict(cache.loaders), cache.trust_remote_code
    first, _ = merge_in_memory(document, "first")
    file = drafted.parent / "two" / "model.safetensors"
    state = load_file(file)
    # Another file under the name, as whoever writes whole files does; the old one may still be open.
    save_file({**state, name: state[name] + 1}, file.with_name("new"), {"format": "pt"})
    file.with_name("new").replace(file)
    second, _ = merge_in_memory(document, "second", trust_remote_code=True)
    difference = dict(second.read([name]))[name] - dict(first.read([name]))[name]
    torch.testing.assert_close(difference, torch.full_like(difference, 0.5))
    # What the process holds otherwise is as it was.
    assert cache.loaders is held
    assert held == before
    assert cache.trust_remote_code == trusted


def test_what_mergekit_refuses_is_one_error(drafted: Path) -> None:
    document = yaml.safe_load(drafted.read_text())
    with pytest.raises(RecipeError, match=r"trial: mergekit cannot merge it: .*no_such_method"):
        merge_in_memory(document | {"merge_method": "no_such_method"}, "trial")


def test_what_the_method_refuses_is_its_own_error(drafted: Path) -> None:
    document = yaml.safe_load(drafted.read_text())
    (drafted.parent / "two" / "fisher" / "mask_fisher.safetensors").unlink()
    with pytest.raises(FisherMaskError, match=r"there is no sidecar for .*two"):
        merge_in_memory(document, "trial")
