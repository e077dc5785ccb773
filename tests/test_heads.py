"""What a checkpoint per task takes from its own model, and what from the merge."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import nn
from torch.testing import assert_close
from transformers import (
    AutoModelForSequenceClassification,
    GPT2Config,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForSequenceClassification,
)

from fisher_mask_mergekit.checkpoint import locate, tensor_shapes
from fisher_mask_mergekit.draft import draft_recipe
from fisher_mask_mergekit.errors import CheckpointError
from fisher_mask_mergekit.evaluation.plan import Options, plan
from fisher_mask_mergekit.heads import average_pooler, is_head, write_heads
from fisher_mask_mergekit.recipe import read_recipe
from tests import tiny
from tests.families import FAMILIES, Family
from tests.test_end_to_end import quickly

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


def reordered(folder: Path, merged: Path, order: list[int], extra: Sequence[str] = ()) -> Path:
    """The same model with its words in another order, and more tokens."""
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    words = {index: word for word, index in tiny.tokenizer().get_vocab().items()}
    vocabulary = {words[old]: new for new, old in enumerate(order)}
    vocabulary |= {word: len(order) + place for place, word in enumerate(extra)}
    moved = model.get_input_embeddings().weight[torch.tensor(order)].detach()
    model.resize_token_embeddings(len(vocabulary), mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[: len(order)] = moved
    model.save_pretrained(folder)
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_a_model_s_own_code_comes_along(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    for name in ("modeling_own.py", "generation_config.json"):
        (one / name).write_text("{}")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {one}}}]\n")
    (folder,) = write_heads(read_recipe(recipe), str(one), tmp_path / "tasks")
    assert {file.name for file in folder.iterdir()} == {file.name for file in one.iterdir()}


def test_a_merge_of_another_vocabulary_is_refused(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    two = tiny.sibling(tmp_path / "two", one, seed=1)
    data = tiny.write_data(tmp_path / "data.jsonl")
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(
        "merge_method: linear\nmodels:\n"
        + "".join(
            f"  - {{model: {folder}, fisher: {{eval: {data}}}, parameters: {{weight: 1}}}}\n"
            for folder in (one, two)
        )
    )
    same = list(range(tiny.VOCABULARY))
    cases = {
        "moved": ((same[:5] + same[:4:-1], ()), "'w5' is token 5 of the model and token 63 of the merge"),
        "more": ((same, ["new"]), "the merge has 65 tokens, the model 64"),
        "fewer": ((same[:-1], ()), "'w63' is token 63 of the model and none of the merge"),
        "renamed": ((same[:-1], ["new"]), "'w63' is token 63 of the model and none of the merge"),
    }
    for name, (given, said) in cases.items():
        merged = reordered(tmp_path / name, one, *given)
        message = f"{name} has another vocabulary than {one}: {said}. .* with neither tokenizer nor"
        with pytest.raises(CheckpointError, match=message):
            write_heads(read_recipe(recipe), str(merged), tmp_path / "tasks")
        with pytest.raises(CheckpointError, match=message):
            plan(read_recipe(recipe), [str(merged)], Options())
        assert not (tmp_path / "tasks").exists()
    merged = reordered(tmp_path / "same", one, same)
    write_heads(read_recipe(recipe), str(merged), tmp_path / "tasks")
    # A word more, where there was room for it, moves none of the others.
    smaller = reordered(tmp_path / "smaller", one, same[:-1])
    (smaller / "tokenizer.json").rename(merged / "tokenizer.json")
    write_heads(read_recipe(recipe), str(merged), tmp_path / "again")


def test_a_vocabulary_without_the_whole_tokenizer_s_file(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    for file in one.glob("tokenizer*"):
        file.unlink()
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(f"merge_method: linear\nmodels: [{{model: {one}, parameters: {{weight: 1}}}}]\n")
    merged = reordered(tmp_path / "moved", one, [*range(5), *range(63, 4, -1)])
    write_heads(read_recipe(recipe), str(merged), tmp_path / "none")
    words = tiny.tokenizer().get_vocab()
    (one / "vocab.txt").write_text("\n".join(sorted(words, key=words.__getitem__)) + "\n")
    with pytest.raises(CheckpointError, match="'w5' is token 5 of the model and token 63 of the merge"):
        write_heads(read_recipe(recipe), str(merged), tmp_path / "tasks")


def test_a_pooler_counts_as_the_merge_has_its_model(tmp_path: Path) -> None:
    one = tiny.checkpoint(tmp_path / "one")
    folders = [one, *(tiny.sibling(tmp_path / name, one, seed) for seed, name in enumerate(("two", "three")))]
    recipe = tmp_path / "recipe.yml"
    name = "bert.pooler.dense.weight"
    poolers = [load_file(folder / "model.safetensors")[name] for folder in folders]

    def averaged(weights: Sequence[str]) -> torch.Tensor:
        listed = "".join(
            f"  - {{model: {folder}, fisher: {{data: d}}{f', parameters: {{weight: {weight}}}' if weight else ''}}}\n"
            for folder, weight in zip(folders, weights, strict=True)
        )
        recipe.write_text(f"merge_method: fisher_mask\nbase_model: {one}\nmodels:\n{listed}")
        models = read_recipe(recipe).models
        return average_pooler(models, [locate(model.name) for model in models])[name]

    # A base model without a weight does not count, and what YAML 1.1 has as text is a number.
    assert_close(averaged(["", "", ""]), (poolers[1] + poolers[2]).double() / 2)
    assert_close(averaged(["", "1e-1", "0.3"]), (0.1 * poolers[1] + 0.3 * poolers[2]).double() / 0.4)


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


def test_experts_that_mergekit_wrote_in_one_tensor_are_taken_apart(tmp_path: Path) -> None:
    """As the checkpoints have them: the merge's layers under each one's own head, and their scores the merge's."""
    folders = []
    for seed in range(2):
        torch.manual_seed(seed)
        config = Qwen3MoeConfig(
            vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, intermediate_size=48, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2,
            num_labels=2, pad_token_id=0, max_position_embeddings=40,
        )  # fmt: skip
        folders.append(tiny.save(Qwen3MoeForSequenceClassification(config), tmp_path / f"model{seed}"))
    data = tiny.write_data(tmp_path / "data.jsonl")
    path = tmp_path / "recipe.yml"
    path.write_text(
        draft_recipe([str(folder) for folder in folders], [str(data)] * 2).replace("fisher_mask", "linear")
    )
    merged = tmp_path / "merged"
    quickly("mergekit-yaml", path, merged, "--no-write-model-card")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensor_shapes(locate(str(merged)))
    write_heads(read_recipe(path), str(merged), tmp_path / "tasks")
    batch = tiny.batches(tiny.samples(3), 3)[0].inputs
    whole = Qwen3MoeForSequenceClassification.from_pretrained(merged).eval()
    for folder in folders:
        own = Qwen3MoeForSequenceClassification.from_pretrained(folder).eval()
        headed = Qwen3MoeForSequenceClassification.from_pretrained(tmp_path / "tasks" / folder.name)
        for name, value in headed.state_dict().items():
            assert_close(value, (own if is_head(name) else whole).state_dict()[name], rtol=0, atol=0)
        assert headed.eval()(**batch).logits.isfinite().all()
