"""The merge method against its formula, through mergekit's own interface."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import click
import pytest
import torch
from mergekit.common import ModelReference
from mergekit.merge_methods import get, merge_state_dicts, merge_tensors
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from fisher_mask_mergekit import merging, recognition
from fisher_mask_mergekit.checkpoint import Checkpoint, tensor_shapes
from fisher_mask_mergekit.merging import MergeError, compute_command
from fisher_mask_mergekit.opening import AnySidecar, read_any
from fisher_mask_mergekit.recognition import probe
from fisher_mask_mergekit.settings import Kind
from fisher_mask_mergekit.sidecar import Sidecar, write
from fisher_mask_mergekit.sites import Node, name_template
from fisher_mask_mergekit.weighting import Normalize, merge_rows
from tests import tiny
from tests.test_sidecar import sidecar_for

QUERY = "bert.encoder.layer.0.attention.self.query.weight"


class Inputs:
    """Models of one architecture with made-up sidecars on disk."""

    def __init__(self, folder: Path, architecture: str = "bert", count: int = 2, scale: float = 1.0) -> None:
        self.states: list[dict[str, Tensor]] = []
        self.sidecars: list[Sidecar] = []
        self.paths: list[str] = []
        for index in range(count):
            model = tiny.classifier(architecture, seed=index)
            self.states.append({name: value.clone() for name, value in model.state_dict().items()})
            self.sidecars.append(sidecar_for(model, scale=scale, seed=index))
            self.paths.append(str(folder / f"{index}.safetensors"))
            write(self.sidecars[-1], Path(self.paths[-1]))

    def merge(self, **parameters: Any) -> dict[str, Tensor]:
        return merge_state_dicts(self.states, "fisher_mask", parameters={"sidecar": self.paths} | parameters)


@pytest.fixture
def inputs(tmp_path: Path) -> Inputs:
    return Inputs(tmp_path)


# Which rows (along axis 0) or columns (along axis 1) of these tensors belong to which nodes.
QUERIES, KEYS, VALUES = r"\.(query|q_lin|q_proj)\.", r"\.(key|k_lin|k_proj)\.", r"\.(value|v_lin|v_proj)\."
NEURONS, DOWN = (
    r"\.(intermediate\.dense|lin1|gate_proj|up_proj)\.",
    r"(\d\.output\.dense|lin2|down_proj)\.weight",
)
ATTENTION_OUT = r"\.(attention\.output\.dense|out_lin|o_proj)\.weight"
PAPER: dict[str, tuple[Node, int]] = {
    QUERIES: ("head_fisher", 0), KEYS: ("kv_head_fisher", 0), NEURONS: ("neuron_fisher", 0),
}  # fmt: skip
COLUMNS: dict[str, tuple[Node, int]] = {DOWN: ("neuron_fisher", 1)}
WITH_VALUES: dict[str, tuple[Node, int]] = {VALUES: ("kv_head_fisher", 0), ATTENTION_OUT: ("head_fisher", 1)}
SCHEMES: list[tuple[dict[str, Any], dict[str, tuple[Node, int]]]] = [
    ({}, PAPER),
    ({"nodes": "columns"}, PAPER | COLUMNS),
    ({"values": True}, PAPER | WITH_VALUES),
    ({"nodes": "columns", "values": True}, PAPER | COLUMNS | WITH_VALUES),
]


def by_hand(
    inputs: Inputs, name: str, weights: list[float], scheme: Mapping[str, tuple[Node, int]] = PAPER
) -> Tensor:
    """Equation 5 written out, element by element, in float64."""
    top, bottom = torch.zeros(()).double(), torch.zeros(()).double()
    for state, sidecar, weight in zip(inputs.states, inputs.sidecars, weights, strict=True):
        value = state[name].double()
        fisher = torch.ones_like(value)
        for pattern, (node, axis) in scheme.items():
            if re.search(pattern, name):
                site, _ = sidecar.governed[name]
                vector = sidecar.fisher[site.output][node].double()
                for place in range(value.shape[axis]):
                    own = vector[place * len(vector) // value.shape[axis]]
                    fisher.select(axis, place).fill_(own)
        top, bottom = top + weight * fisher * value, bottom + weight * fisher
    return top / bottom


@pytest.mark.parametrize("unmasked", ["layer", "universal"])
def test_old_names_are_weighed_like_new_ones(inputs: Inputs, unmasked: str) -> None:
    """mergekit-pytorch goes by what the files call them."""
    wanted = inputs.merge(unmasked=unmasked)
    old = {name: re.sub(r"(LayerNorm\.)weight$", r"\1gamma", name) for name in wanted}
    old = {name: re.sub(r"(LayerNorm\.)bias$", r"\1beta", given) for name, given in old.items()}
    inputs.states = [{old[name]: value for name, value in state.items()} for state in inputs.states]
    merged = inputs.merge(unmasked=unmasked)
    assert sum(name != given for name, given in old.items()) == 10
    assert_close({name: merged[given] for name, given in old.items()}, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("count", [2, 5])
def test_every_tensor_of_every_model_is_looked_at_once(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = Inputs(tmp_path, count=count)
    probes: list[Tensor] = []

    def counted(tensor: Tensor) -> Tensor:
        probes.append(tensor)
        return probe(tensor)

    monkeypatch.setattr(recognition, "probe", counted)
    inputs.merge()
    assert len(probes) == count * len(inputs.sidecars[0].governed)


@pytest.mark.parametrize(("parameters", "scheme"), SCHEMES)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_equals_the_formula(
    tmp_path: Path, architecture: str, parameters: dict[str, Any], scheme: dict[str, tuple[Node, int]]
) -> None:
    inputs = Inputs(tmp_path, architecture, count=3)
    weights = [1.0, 0.5, 2.0]
    merged = inputs.merge(weight=weights, **parameters)
    plain = merge_state_dicts(inputs.states, "linear", parameters={"weight": weights})
    moved = set()
    for name, value in merged.items():
        if not value.is_floating_point():
            continue
        assert_close(value.double(), by_hand(inputs, name, weights, scheme), rtol=1e-5, atol=1e-6)
        if float((value - plain[name]).abs().max()) > 1e-4:
            moved.add(name_template(name))
    assert moved == {name_template(name) for name in merged if re.search("|".join(scheme), name)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_it_computes_wide_and_rounds_once(tmp_path: Path, dtype: torch.dtype) -> None:
    inputs = Inputs(tmp_path)
    states = [{QUERY: state[QUERY].to(dtype)} for state in inputs.states]
    before = [state[QUERY].clone() for state in states]
    merged = merge_state_dicts(states, "fisher_mask", parameters={"sidecar": inputs.paths})[QUERY]
    assert merged.dtype == dtype
    inputs.states = [{QUERY: state[QUERY].double()} for state in states]
    wanted = by_hand(inputs, QUERY, [1.0, 1.0])
    precision = torch.finfo(dtype).eps if dtype.itemsize == 2 else 4 * torch.finfo(dtype).eps
    assert_close(merged.double(), wanted, rtol=precision, atol=precision * 1e-2)
    assert_close([state[QUERY] for state in states], before, rtol=0, atol=0)


@pytest.mark.parametrize(("architecture", "value", "output"), [
    ("llama", "model.layers.0.self_attn.v_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
    ("distilbert", "distilbert.transformer.layer.0.attention.v_lin.bias", "distilbert.transformer.layer.0.sa_layer_norm.weight"),
])  # fmt: skip
def test_the_rest_of_a_block_goes_by_the_mean_head(
    tmp_path: Path, architecture: str, value: str, output: str
) -> None:
    inputs = Inputs(tmp_path, architecture)
    merged = inputs.merge(unmasked="layer")
    for name in (value, output):
        means = [float(s.fisher[s.governed[name][0].output]["head_fisher"].mean()) for s in inputs.sidecars]
        wanted = sum(mean * state[name] for mean, state in zip(means, inputs.states, strict=True)) / sum(
            means
        )
        assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)


def test_scalars_and_huge_weights(tmp_path: Path) -> None:
    assert_close(merge_rows([torch.tensor(1.0), torch.tensor(4.0)], [2.0, 1.0]), torch.tensor(2.0))
    assert_close(merge_rows([torch.ones(2), torch.zeros(2)], [1e308, 1e308]), torch.full((2,), 0.5))


def test_sidecars_that_were_not_measured_alike_are_warned_of(
    inputs: Inputs, caplog: pytest.LogCaptureFixture
) -> None:
    inputs.merge()
    assert "not measured alike" not in caplog.text
    sidecar = inputs.sidecars[1]
    settings = sidecar.metadata.settings.model_copy(update={"estimator": "batch"})
    other = sidecar.metadata.model_copy(update={"settings": settings})
    write(Sidecar(other, sidecar.fisher, sidecar.values), Path(inputs.paths[1]))
    inputs.merge()
    assert caplog.text.count("batch, post, data, mean; sample, post, data, mean") == 1


def test_the_order_of_three_models_does_not_matter(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path, count=3)
    wanted = inputs.merge(weight=[1.0, 0.3, 2.0])
    inputs.states = [inputs.states[index] for index in (2, 0, 1)]
    inputs.paths = [inputs.paths[index] for index in (2, 0, 1)]
    assert_close(inputs.merge(weight=[2.0, 1.0, 0.3]), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("unmasked", ["average", "layer", "universal"])
@pytest.mark.parametrize("normalize", get_args(Normalize))
def test_only_ratios_of_fishers_matter(tmp_path: Path, unmasked: str, normalize: str) -> None:
    wanted = Inputs(tmp_path / "one").merge(unmasked=unmasked, normalize=normalize)
    tiny_values = Inputs(tmp_path / "two", scale=1e-12).merge(unmasked=unmasked, normalize=normalize)
    assert_close(tiny_values, wanted, rtol=1e-6, atol=1e-7)


def test_equal_fishers_give_the_mean_and_a_model_with_itself_gives_itself(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path)
    for path, sidecar in zip(inputs.paths, inputs.sidecars, strict=True):
        ones = {
            output: {node: torch.full_like(vector, 3.0) for node, vector in vectors.items()}
            for output, vectors in sidecar.fisher.items()
        }
        write(Sidecar(sidecar.metadata, ones, sidecar.values), Path(path))
    mean = merge_state_dicts(inputs.states, "linear", parameters={"weight": 1.0})
    assert_close(inputs.merge(), mean, rtol=1e-6, atol=1e-7)
    inputs.states[1], inputs.paths[1] = inputs.states[0], inputs.paths[0]
    assert_close(inputs.merge(), inputs.states[0], rtol=1e-6, atol=1e-7)


def test_zero_everywhere_is_the_weighted_mean_and_zero_in_one_model_takes_the_other() -> None:
    one, two = torch.randn(4, 3), torch.randn(4, 3)
    first = torch.tensor([0.0, 0.0, 1e-30, 1.0])[:, None]
    second = torch.tensor([0.0, 1e-30, 0.0, 1.0])[:, None]
    got = merge_rows([one, two], [1.0, 3.0], [first, second])
    assert_close(got[0], 0.25 * one[0] + 0.75 * two[0])
    assert_close(got[1], two[1])
    assert_close(got[2], one[2])
    assert_close(got[3], 0.25 * one[3] + 0.75 * two[3])


@pytest.mark.parametrize("normalize", ["model", "layer", "tensor"])
def test_normalize_takes_a_models_own_scale_out(tmp_path: Path, normalize: str) -> None:
    inputs = Inputs(tmp_path)
    all_of_it: dict[str, Any] = {"nodes": "columns", "values": True}
    wanted = inputs.merge(normalize=normalize, **all_of_it)
    plain = inputs.merge()
    louder = inputs.sidecars[1]
    scaled = {o: {node: 1000 * v for node, v in vectors.items()} for o, vectors in louder.fisher.items()}
    write(Sidecar(louder.metadata, scaled, louder.values), Path(inputs.paths[1]))
    assert_close(inputs.merge(normalize=normalize, **all_of_it), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        assert_close(inputs.merge(), plain, rtol=1e-5, atol=1e-6)


def test_normalize_divides_by_the_mean_of_the_same_kind_of_node(inputs: Inputs) -> None:
    for normalize in ("model", "layer"):
        shares = []
        for sidecar in inputs.sidecars:
            output = "bert.encoder.layer.0.attention.output.dense"
            heads = [v["head_fisher"] for o, v in sidecar.fisher.items() if "head_fisher" in v]
            mean = (
                torch.stack(heads).mean()
                if normalize == "model"
                else sidecar.fisher[output]["head_fisher"].mean()
            )
            shares.append((sidecar.fisher[output]["head_fisher"] / mean).repeat_interleave(8)[:, None])
        wanted = sum(share * state[QUERY] for share, state in zip(shares, inputs.states, strict=True)) / sum(
            shares
        )
        assert_close(inputs.merge(normalize=normalize)[QUERY], wanted, rtol=1e-5, atol=1e-6)


def test_the_base_counts_only_with_a_weight(inputs: Inputs, caplog: pytest.LogCaptureFixture) -> None:
    without = merge_state_dicts(
        dict(enumerate(inputs.states)), "fisher_mask", base=1, parameters={"sidecar": ["", ""]}
    )
    assert_close(without, inputs.states[0], rtol=0, atol=0)
    assert caplog.text.count("base_model 1 has no weight, so it does not count, and what remains is 0") == 1
    caplog.clear()
    counted = merge_state_dicts(
        dict(enumerate(inputs.states)),
        "fisher_mask",
        base=1,
        parameters={"sidecar": inputs.paths, "weight": [1.0, 1.0]},
    )
    assert_close(counted, inputs.merge(), rtol=0, atol=0)
    assert not caplog.text


def test_a_tensor_that_only_the_base_has_is_passed_through() -> None:
    value = torch.randn(3)
    assert merge_tensors([value], "fisher_mask", base_index=0, name="classifier.bias") is not None
    assert_close(
        merge_tensors([value], "fisher_mask", base_index=0, name="classifier.bias"), value, rtol=0, atol=0
    )


def test_a_moved_layer_gets_its_own_fisher(inputs: Inputs) -> None:
    """Layer 1 of both models lands in layer 0 of the output, and in a layer that neither has."""
    source = QUERY.replace("layer.0", "layer.1")
    for name in (QUERY, QUERY.replace("layer.0", "layer.9")):
        got = merge_tensors(
            [state[source] for state in inputs.states],
            "fisher_mask",
            name=name,
            parameters={"sidecar": inputs.paths},
        )
        assert_close(got.double(), by_hand(inputs, source, [1.0, 1.0]), rtol=1e-5, atol=1e-6)


def test_another_checkpoints_sidecar_is_an_error(inputs: Inputs) -> None:
    inputs.paths.reverse()
    with pytest.raises(
        MergeError, match=r"SidecarMismatchError at .* has other values\n  Measure this checkpoint: "
    ):
        inputs.merge()


WORDS = "bert.embeddings.word_embeddings.weight"


def merge_words(folders: list[Path], sidecars: list[Path], file: str = "") -> Tensor:
    """Of checkpoints on disk, a tensor that no mask node governs."""
    states = [load_file(folder / "model.safetensors") for folder in folders]
    return merge_tensors(
        [value for state in states for name, value in state.items() if WORDS.endswith(name)],
        get("fisher_mask"),
        ids=[ModelReference.parse(str(folder / file)) for folder in folders],
        name=WORDS,
        parameters={"sidecar": [str(path) for path in sidecars]},
    )


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    one = tiny.checkpoint(tmp_path / "one")
    return [one, tiny.sibling(tmp_path / "two", one, seed=1)]


def sidecars_beside(folders: list[Path], architecture: str) -> list[Path]:
    paths = [folder / f"{architecture}.safetensors" for folder in folders]
    for path in paths:
        write(sidecar_for(tiny.classifier(architecture)), path)
    return paths


@pytest.mark.parametrize("file", ["", "model.safetensors"])
def test_sidecars_of_another_architecture_are_an_error_even_if_all_are(
    folders: list[Path], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = r"one.*: sidecar '.*/distilbert.safetensors' was measured on .*, and governs none of the tensors here\n  Measure"
    with pytest.raises(MergeError, match=says):
        merge_words(folders, sidecars_beside(folders, "distilbert"), file)
    looked: list[Path] = []

    def counted(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
        looked.append(checkpoint.folder)
        return tensor_shapes(checkpoint)

    monkeypatch.setattr(merging, "tensor_shapes", counted)
    fitting = sidecars_beside(folders, "bert")
    for _ in range(3):
        merge_words(folders, fitting, file)
    assert looked == folders


def test_only_whole_checkpoints_must_have_tensors_that_the_sidecar_governs(folders: list[Path]) -> None:
    other = sidecars_beside(folders, "distilbert")
    wanted = merge_words(folders, sidecars_beside(folders, "bert"))
    for folder in folders:
        words = {WORDS: load_file(folder / "model.safetensors")[WORDS]}
        save_file(words, folder / "words.safetensors")
    assert_close(merge_words(folders, other, "words.safetensors"), wanted)


def test_names_may_have_more_or_less_in_front_of_them(folders: list[Path]) -> None:
    wanted = merge_words(folders, sidecars_beside(folders, "bert"))
    for folder in folders:
        state = load_file(folder / "model.safetensors")
        save_file({name.removeprefix("bert."): v for name, v in state.items()}, folder / "model.safetensors")
    assert_close(merge_words(folders, sidecars_beside(folders, "bert")), wanted)
    with pytest.raises(MergeError, match="governs none of the tensors here"):
        merge_words(folders, sidecars_beside(folders, "distilbert"))


def test_what_to_run_for_a_model_whose_sidecar_is_on_the_hub(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yml"
    published = {"model": "org/one", "parameters": {"sidecar": "hub:org/one/a.safetensors"}}
    recipe.write_text(
        json.dumps({"merge_method": "fisher_mask", "models": [published, {"model": "org/two"}]})
    )
    command = f"mergekit-fisher compute {recipe}"
    with click.Context(click.Command("mergekit-yaml")) as context:
        context.params = {"config_file": str(recipe)}
        assert compute_command("org/two") == command
        assert compute_command("org/one") == (
            f"change or remove  sidecar: hub:org/one/a.safetensors  first, then:  {command}"
        )
        recipe.write_text("[]")
        assert compute_command("org/one") == command


def sidecars_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Where the sidecars lie that merges read from here on, each time that one does."""
    paths: list[str] = []

    def counted(path: Path, kind: Kind) -> AnySidecar:
        paths.append(str(path))
        return read_any(path, kind)

    monkeypatch.setattr(merging, "read_any", counted)
    return paths


def test_a_sidecar_is_read_once_not_once_per_tensor(inputs: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sidecars_read(monkeypatch)
    inputs.merge()
    inputs.merge()
    assert sorted(paths) == inputs.paths


def test_a_stale_sidecar_is_an_error(inputs: Inputs) -> None:
    inputs.states[0] = {
        name: value * 1.01 if value.is_floating_point() else value for name, value in inputs.states[0].items()
    }
    with pytest.raises(MergeError, match="has other values"):
        inputs.merge()


def test_a_missing_sidecar_is_an_error_unless_averaging_was_asked_for(inputs: Inputs, tmp_path: Path) -> None:
    with pytest.raises(MergeError, match="there is no sidecar for 1"):
        inputs.merge(sidecar=[inputs.paths[0], ""])
    got = inputs.merge(sidecar=[inputs.paths[0], ""], missing="average")
    assert_close(got, merge_state_dicts(inputs.states, "linear", parameters={"weight": 1.0}))
    with pytest.raises(MergeError, match="cannot read sidecar"):
        inputs.merge(sidecar=[inputs.paths[0], str(tmp_path / "none")], missing="average")


def test_sidecars_that_disagree_about_a_tensor_are_an_error(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path)
    sidecar = inputs.sidecars[1]
    fewer = tuple(site for site in sidecar.metadata.sites if site.kind == "ffn")
    fisher = {site.output: sidecar.fisher[site.output] for site in fewer}
    values = {tensor.name: sidecar.values[tensor.name] for site in fewer for tensor in site.tensors}
    write(
        Sidecar(sidecar.metadata.model_copy(update={"sites": fewer}), fisher, values), Path(inputs.paths[1])
    )
    for unmasked in ("average", "universal"):
        with pytest.raises(MergeError, match="disagree about which mask nodes"):
            inputs.merge(unmasked=unmasked)


def test_heads_of_another_number_in_tensors_of_the_same_shape_are_an_error(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path)
    other = tiny.classifier("bert", num_attention_heads=8, seed=1)
    inputs.states[1] = dict(other.state_dict())
    write(sidecar_for(other), Path(inputs.paths[1]))
    with pytest.raises(MergeError, match=r"head \[4\].* in layout '[qk]' and head \[8\]"):
        inputs.merge()


def test_rows_of_one_sidecar_that_are_columns_of_another_are_an_error(inputs: Inputs) -> None:
    sidecar = inputs.sidecars[1]
    document = sidecar.metadata.model_dump()
    for site in document["sites"]:
        for tensor in site["tensors"]:
            tensor["axis"] = len(tensor["shape"]) - 1 if tensor["layout"] == "q" else tensor["axis"]
    metadata = type(sidecar.metadata).model_validate(document)
    write(Sidecar(metadata, sidecar.fisher, sidecar.values), Path(inputs.paths[1]))
    with pytest.raises(
        MergeError, match=r"disagree about .* along axis 0 in layout 'q' and .* along axis 1 in layout 'q'"
    ):
        inputs.merge()


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_cannot_be_is_an_error(inputs: Inputs, weight: float) -> None:
    with pytest.raises(MergeError, match="weight of 0 is"):
        inputs.merge(weight=[weight, 1.0])


def test_all_weights_zero_is_an_error(inputs: Inputs) -> None:
    with pytest.raises(MergeError, match="every model has weight 0"):
        inputs.merge(weight=0.0)


def test_one_model_that_counts_is_taken_as_it_is_and_needs_no_sidecar(inputs: Inputs) -> None:
    got = inputs.merge(weight=[0.0, 0.7], sidecar=["", ""])
    assert_close(got, inputs.states[1], rtol=0, atol=0)


def test_unknown_choices_are_errors(inputs: Inputs) -> None:
    for parameter in ("nodes", "values", "normalize", "unmasked", "missing"):
        with pytest.raises(MergeError, match=f"RecipeError: {parameter}: Input should be .*, got 'other'"):
            inputs.merge(**{parameter: "other"})


def test_the_sidecar_is_looked_for_beside_the_checkpoint_then_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FISHER_MASK_CACHE", str(tmp_path / "cache"))
    from fisher_mask_mergekit import store

    inputs = Inputs(tmp_path)
    folder = tmp_path / "model"
    folder.mkdir()
    beside, cached = folder / store.BESIDE, store.cached(Checkpoint(str(folder), folder, None))
    reference = ModelReference.parse(str(folder))

    def merged() -> Tensor:
        return merge_tensors(
            [state[QUERY] for state in inputs.states], get("fisher_mask"), ids=[reference, 1], name=QUERY,
            parameters={"sidecar": ["", inputs.paths[1]]},
        )  # fmt: skip

    with pytest.raises(MergeError, match=f"Measure it:  mergekit-fisher compute {folder} --data"):
        merged()
    write(inputs.sidecars[0], cached)
    assert_close(merged().double(), by_hand(inputs, QUERY, [1.0, 1.0]), rtol=1e-5, atol=1e-6)
    write(inputs.sidecars[1], beside)
    with pytest.raises(MergeError, match="has other values"):
        merged()
