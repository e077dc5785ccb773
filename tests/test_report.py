"""The picture shows what the sidecars hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from matplotlib.image import imread

from fisher_mask_mergekit import report
from fisher_mask_mergekit.errors import FisherMaskError
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
    monkeypatch.setattr(report, "_write", lambda figure, path: drawn.append(figure))
    return drawn


def test_writes_a_png_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "map.png"
    path.write_text("an older picture")
    report.head_fisher_map({"one": sidecar_for(tiny.classifier("bert"))}, path)
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
    report.head_fisher_map(sidecars, tmp_path / "map.png")
    scales = []
    for axis, (title, sidecar) in zip(figures[0].axes[:2], sidecars.items(), strict=True):
        assert axis.get_title() == f"{title} (9 samples)"
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
    report.head_fisher_map({"one": sidecar}, tmp_path / "map.png")
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
    report.head_fisher_map({"one": sidecar}, tmp_path / "map.png")
    (image,) = figures[0].axes[0].images
    assert image.get_array().mask[0].tolist() == [True, False, False, False]


def test_checkpoints_of_different_size_and_all_zero(figures: list[Any], tmp_path: Path) -> None:
    wide = sidecar_for(tiny.classifier("bert", num_attention_heads=8, num_hidden_layers=3))
    report.head_fisher_map(
        {"wide": wide, "zero": _zeroed(sidecar_for(tiny.classifier("bert")))}, tmp_path / "a.png"
    )
    wide_axis, zero_axis, _, zero_neurons = figures[0].axes[:4]
    assert wide_axis.images[0].get_array().shape == (3, 8)
    assert zero_axis.images[0].get_array().mask.all()
    assert [len(axis.get_yticks()) for axis in (wide_axis, zero_axis)] == [3, 2]
    assert zero_neurons.get_title() == "96 of 96 neurons have exactly 0"


def test_all_zero_is_written_too(tmp_path: Path) -> None:
    report.head_fisher_map({"zero": _zeroed(sidecar_for(tiny.classifier("bert")))}, tmp_path / "map.png")
    assert (tmp_path / "map.png").is_file()


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(FisherMaskError, match="there is no sidecar to draw"):
        report.head_fisher_map({}, tmp_path / "map.png")


def test_cannot_be_written(tmp_path: Path) -> None:
    sidecar = sidecar_for(tiny.classifier("bert"))
    with pytest.raises(FisherMaskError, match=r"cannot write .*nowhere/map\.png: No such file"):
        report.head_fisher_map({"one": sidecar}, tmp_path / "nowhere" / "map.png")
