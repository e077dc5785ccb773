"""Growth curves, whole, on their smallest points."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from tests.benchmarks import benchmark
from tests.test_benchmarks import record_of

POINT = {"samples": 5, "length": 8, "layers": 2, "hidden": 16, "heads": 2, "batch": 16}


def test_a_point_is_timed_and_weighed() -> None:
    growth_point = benchmark("growth_point")
    point = growth_point.Point(**POINT, device="cpu")
    timed = growth_point.measure("time", point, 2)
    assert len(timed["wall"]) == len(timed["processor"]) == 2
    assert timed["flops"] == point.flops > 0
    assert growth_point.measure("memory", point, 1)["of"] == "process"
    batches = list(growth_point.random_batches(point, torch.device("cpu")))
    assert [batch.index for batch in batches] == [(0, 1), (2, 3), (4,)]
    assert all(batch.inputs["input_ids"].shape == (len(batch.index), 8) for batch in batches)


@pytest.mark.parametrize("changed", ["samples", "layers"])
def test_flops_are_as_many_times_as_there_are_samples_and_nearly_layers(changed: str) -> None:
    point = benchmark("growth_point").Point(**POINT)
    more = dataclasses.replace(point, **{changed: 8 * getattr(point, changed)})
    # The first layer's attention has no backward pass.
    assert_close(more.flops / point.flops, 8.0, rtol=0.3 if changed == "layers" else 0, atol=0)


def test_layers_that_run_again_are_counted() -> None:
    growth_point, scaling = benchmark("growth_point"), benchmark("scaling")
    point = growth_point.Point(**POINT)
    again = dataclasses.replace(point, recompute=True).flops - point.flops
    assert again == scaling.forward_flops(point.shape, 5 * 8, 8) // 2  # One of two layers.


def curves() -> dict[str, list[dict[str, Any]]]:
    straight = [
        {"x": x, "wall": [3.0 * x, 3.0 * x, 99.0], "processor": [x], "memory": 4e6, "flops": 1e9 * x**2}
        for x in (1, 2, 4)
    ]
    merged = [
        {"x": 2, "wall": [1.0], "processor": [1.0], "memory": 5e6, "linear_wall": [2.0], "linear_memory": 5e6}
    ]
    return {"samples": straight, "heads": straight, "models merged": merged}


def test_exponents_are_the_slopes_of_the_medians() -> None:
    growth = benchmark("growth")
    found = {(name, what): (value, aim) for name, what, value, aim in growth.exponents(curves())}
    assert_close(found["samples", "time"][0], 1.0)
    assert_close(found["samples", "time by FLOPs"][0], 0.5)
    assert_close(found["samples", "memory"][0], 0.0)
    assert found["samples", "memory"][1] == 0.05
    assert ("heads", "time by FLOPs") not in found
    assert growth.AIMS.keys() <= {
        (name, what)
        for name in (*growth.CURVES, growth.COMPUTED, *growth.MERGED)
        for what in ("time", "memory", "time by FLOPs")
    }


def test_a_merge_may_grow_as_linear_does() -> None:
    growth = benchmark("growth")
    points = [{"x": x, "wall": [x**1.1], "memory": 1, "linear_wall": [x**1.2]} for x in (1, 2, 4)]
    found = {what: (value, aim) for _, what, value, aim in growth.exponents({"layers merged": points})}
    assert_close(found["linear's time"][0], 1.2)
    assert_close(found["time"], (1.1, 1.2))
    points = [{**point, "linear_wall": [1.0]} for point in points]
    (time,) = (aim for _, what, _, aim in growth.exponents({"models merged": points}) if what == "time")
    assert time == growth.LINEAR


def test_the_curves_become_tables_and_a_picture(tmp_path: Path) -> None:
    growth = benchmark("growth")
    record = {"environment": record_of("cpu")["environment"], "device": "cpu", "curves": curves()}
    tables = growth.markdown(json.loads(json.dumps(record)))
    assert [title.split(" (")[0] for title in tables] == [
        "Exponents",
        "By samples",
        "By heads",
        "By models merged",
    ]
    assert "GFLOP per second" in tables["By samples (Intel Xeon @ 2.50GHz, 2 threads)"]
    assert "linear, seconds" in tables["By models merged (Intel Xeon @ 2.50GHz, 2 threads)"]
    growth.draw(record, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_every_point_can_be_made() -> None:
    growth, growth_point = benchmark("growth"), benchmark("growth_point")
    for grows, points in growth.CURVES.values():
        made = [growth_point.Point(**point) for point in points]
        assert [getattr(point, grows) for point in made] == sorted({point[grows] for point in points})
        assert all(point.hidden % point.heads == 0 for point in made)
