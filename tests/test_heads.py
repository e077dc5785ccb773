"""What a checkpoint per task takes from its own model, and what from the merge."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, GPT2Config

from fisher_mask_mergekit.draft import draft_recipe
from fisher_mask_mergekit.heads import is_head, write_heads
from fisher_mask_mergekit.recipe import read_recipe
from tests import tiny
from tests.families import FAMILIES, Family

# Only what tensors are called is asked, so one family of a configuration class will do.
CLASSIFIED = {
    kind: family
    for family in FAMILIES
    if (kind := getattr(transformers, family.cls).config_class)
    in AutoModelForSequenceClassification._model_mapping
}


@pytest.mark.parametrize("family", CLASSIFIED.values(), ids=str)
def test_a_head_has_the_classifier_and_no_embedding(family: Family) -> None:
    config = getattr(transformers, family.cls).config_class(**family.config)
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    embeddings = {
        f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)
    }
    beside = {name for name in model.state_dict() if not name.startswith(f"{model.base_model_prefix}.")}
    assert embeddings
    assert beside
    assert not {name for name in embeddings if is_head(name)}
    assert all(is_head(name) for name in beside)


def gpt2(folder: Path) -> Path:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=40, pad_token_id=0,
                        num_labels=2)  # fmt: skip
    return tiny.save(AutoModelForSequenceClassification.from_config(config), folder)


def test_gpt2_gets_the_merged_embeddings(tmp_path: Path) -> None:
    one = gpt2(tmp_path / "one")
    two = tiny.sibling(tmp_path / "two", one, seed=1)
    parent = tiny.sibling(tmp_path / "parent", one, seed=2)
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(draft_recipe([str(one), str(two)], parent=str(parent)))
    # What a merge is does not matter here.
    for folder in write_heads(read_recipe(recipe), str(parent), tmp_path / "tasks"):
        own, merged, got = (load_file(one / "model.safetensors")
                            for one in (tmp_path / folder.name, parent, folder))  # fmt: skip
        assert_close(got["transformer.wte.weight"], merged["transformer.wte.weight"], rtol=0, atol=0)
        assert_close(got["score.weight"], own["score.weight"], rtol=0, atol=0)
