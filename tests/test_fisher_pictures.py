"""The picture shows what the sidecars hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from matplotlib.image import imread

from fisher_mask_mergekit.errors import FisherMaskError
from fisher_mask_mergekit.pages import fisher_pictures
from fisher_mask_mergekit.pages.canvas import Powers
from fisher_mask_mergekit.pages.fisher_numbers import layer_names
from fisher_mask_mergekit.sidecar import Metadata, Sidecar
from tests import tiny


def sidecar_for(model: Any, scale: float = 1.0, seed: int = 0) -> Sidecar:
    """A sidecar with made-up Fisher information, and of the metadata only what is drawn."""
    sites = tiny.sites_of(model)
    generator = torch.Generator().manual_seed(seed)
    fisher: Any = {
        site.output: {
            node: scale * torch.rand(length, generator=generator) for node, length in site.nodes().items()
        }
        for site in sites
    }
    return Sidecar(Metadata.model_construct(samples=9, sites=sites), fisher, {})


def _zeroed(sidecar: Sidecar) -> Sidecar:
    fisher: Any = {
        output: {node: torch.zeros_like(vector) for node, vector in vectors.items()}
        for output, vectors in sidecar.fisher.items()
    }
    return replace(sidecar, fisher=fisher)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures drawn, which are then not written."""
    drawn: list[Any] = []
    draw = fisher_pictures._columns

    def kept(sidecars: Any) -> Any:
        drawn.append(draw(sidecars))
        return drawn[-1]

    monkeypatch.setattr(fisher_pictures, "_columns", kept)
    monkeypatch.setattr(fisher_pictures, "write_result", lambda path, content: None)
    return drawn


def test_writes_a_png_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.write_text("an older picture")
    fisher_pictures.head_fisher_map({"one": sidecar_for(tiny.classifier("bert"))}, path)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["map.png"]
    pixels = imread(path)
    assert min(pixels.shape[:2]) > 400
    assert pixels.std() > 0.05


@pytest.mark.parametrize("architecture", ["bert", "distilbert", "llama"])
def test_heads_are_where_the_sidecar_has_them(architecture: str, figures: list[Any], tmp_path: Path) -> None:
    sidecars = {
        title: sidecar_for(tiny.classifier(architecture), scale=scale, seed=seed)
        for seed, (title, scale) in enumerate((("small", 1e-9), ("large", 1.0)))
    }
    fisher_pictures.head_fisher_map(sidecars, tmp_path / "map.png")
    scales = []
    for axis, (title, sidecar) in zip(figures[0].axes[:2], sidecars.items(), strict=True):
        assert axis.get_title() == f"{title}\n9 samples"
        (image,) = axis.images
        wanted = [
            sidecar.fisher[site.output]["head_fisher"].numpy()
            for site in sidecar.metadata.sites
            if site.kind == "attention"
        ]
        numpy.testing.assert_allclose(image.get_array().filled(numpy.nan), numpy.stack(wanted))
        assert [label.get_text() for label in axis.get_yticklabels()] == ["0", "1"]
        assert axis.yaxis_inverted()
        scales.append((image.norm.vmin, image.norm.vmax))
    assert scales[0] == scales[1]
    assert figures[0].axes[2].get_ylim() == figures[0].axes[3].get_ylim()
    low, high = figures[0].axes[2].get_ylim()
    assert low < 1e-9 < 0.5 < high
    assert scales[0][0] < 1e-8 < 0.1 < scales[0][1]


def test_median_of_each_layer_is_drawn(figures: list[Any], tmp_path: Path) -> None:
    sidecar = sidecar_for(tiny.classifier("bert"))
    fisher_pictures.head_fisher_map({"one": sidecar}, tmp_path / "map.png")
    lower = figures[0].axes[1]
    levels = {float(line.get_ydata()[0]) for line in lower.lines}
    for site in sidecar.metadata.sites:
        if site.kind == "ffn":
            median = float(numpy.median(sidecar.fisher[site.output]["neuron_fisher"].numpy()))
            assert min(abs(level - median) for level in levels) < 1e-6
    assert lower.get_yscale() == "log"


def test_zeros_are_told_from_small_values(figures: list[Any], tmp_path: Path) -> None:
    sidecar = sidecar_for(tiny.classifier("bert"))
    site = next(site for site in sidecar.metadata.sites if site.kind == "attention")
    vector = sidecar.fisher[site.output]["head_fisher"]
    vector[0], vector[1] = 0, 1e-20
    fisher_pictures.head_fisher_map({"one": sidecar}, tmp_path / "map.png")
    (image,) = figures[0].axes[0].images
    assert image.get_array().mask[0].tolist() == [True, False, False, False]


def test_checkpoints_of_different_size_and_all_zero(figures: list[Any], tmp_path: Path) -> None:
    wide = sidecar_for(tiny.classifier("bert", num_attention_heads=8, num_hidden_layers=3))
    fisher_pictures.head_fisher_map(
        {"wide": wide, "zero": _zeroed(sidecar_for(tiny.classifier("bert")))}, tmp_path / "a.png"
    )
    wide_axis, zero_axis, _, zero_neurons = figures[0].axes[:4]
    assert wide_axis.images[0].get_array().shape == (3, 8)
    assert zero_axis.images[0].get_array().mask.all()
    assert [len(axis.get_yticks()) for axis in (wide_axis, zero_axis)] == [3, 2]
    assert zero_neurons.get_title() == "96 of 96 neurons have exactly 0"


def test_all_zero_is_written_too(tmp_path: Path) -> None:
    fisher_pictures.head_fisher_map(
        {"zero": _zeroed(sidecar_for(tiny.classifier("bert")))}, tmp_path / "map.png"
    )
    assert (tmp_path / "map.png").is_file()


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(FisherMaskError, match="there is no sidecar to draw"):
        fisher_pictures.head_fisher_map({}, tmp_path / "map.png")


def test_cannot_be_written(tmp_path: Path) -> None:
    sidecar = sidecar_for(tiny.classifier("bert"))
    with pytest.raises(FisherMaskError, match=r"cannot write .*nowhere/map\.png: its folder does not exist"):
        fisher_pictures.head_fisher_map({"one": sidecar}, tmp_path / "nowhere" / "map.png")


def test_hostile_titles_are_drawn_as_they_are(figures: list[Any], tmp_path: Path) -> None:
    names = ["$\\frac$", "<script>", "line\nbreak\x00", "\u202e\u200b", "n" * 900]
    sidecars = {name: sidecar_for(tiny.classifier("bert")) for name in names}
    fisher_pictures.head_fisher_map(sidecars, tmp_path / "map.png")
    titles = [axis.get_title().split("\n")[0] for axis in figures[0].axes[:5]]
    assert titles[:4] == [
        "$\\frac$",
        "<script>",
        "line break\N{REPLACEMENT CHARACTER}",
        "\N{REPLACEMENT CHARACTER}" * 2,
    ]
    assert len(titles[4]) < 30


def test_many_wide_models_make_no_picture_that_nothing_can_open(tmp_path: Path) -> None:
    wide = sidecar_for(tiny.classifier("bert", num_attention_heads=32, num_hidden_layers=1))
    fisher_pictures.head_fisher_map({str(place): wide for place in range(24)}, tmp_path / "map.png")
    assert imread(tmp_path / "map.png").shape[1] <= 20_000


@pytest.mark.parametrize(
    ("outputs", "names"),
    [
        (["a.0.o", "a.1.o"], ["0", "1"]),
        (["a.0.experts.0.o", "a.0.experts.1.o"], ["0.0", "0.1"]),
        (["encoder.0.attention.o", "decoder.0.attention.o", "decoder.0.cross.o"],
         ["encoder.0.attention", "decoder.0.attention", "decoder.0.cross"]),
        (["o"], ["o"]),
        (["a.0.b.c", "a.0.c.b"], ["a.0.b.c", "a.0.c.b"]),
        ([], []),
    ],
)  # fmt: skip
def test_layers_have_the_shortest_names_that_tell_them_apart(outputs: list[str], names: list[str]) -> None:
    assert layer_names(outputs) == names


@pytest.mark.parametrize(
    ("low", "high", "value", "text"),
    [
        (1e-9, 1e-2, 1e-7, "10⁻⁷"), (1e-9, 1e-2, 2e-7, ""), (1e-6, 5e-6, 2e-6, "2·10⁻⁶"),
        (0.45, 0.55, 0.475, "0.475"),
        (0.1, 0.9, 0.3, ""),
        (0.1, 0.9, 0.5, "0.5"),
        (4e-9, 5e-9, 4.75e-9, "4.75·10⁻⁹"), (1e-3, 1e6, 1e5, "10⁵"), (0.1, 10, 1.0, "1"),
    ],
)  # fmt: skip
def test_ticks_are_plain_text_and_tell_values_apart(low: float, high: float, value: float, text: str) -> None:
    formatter: Any = Powers()
    formatter.create_dummy_axis()
    formatter.axis.set_view_interval(low, high)
    formatter.set_locs([low, value, high])
    assert formatter(value) == text
