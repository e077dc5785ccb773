"""The text of `mergekit-fisher sites` and `mergekit-fisher inspect`, line by line."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from math import prod

from fisher_mask_mergekit.opening import AnySidecar
from fisher_mask_mergekit.preview.inspection import NodeStatistics, ShareStatistics, node_statistics
from fisher_mask_mergekit.preview.survey import Survey
from fisher_mask_mergekit.provenance import reproducing_command
from fisher_mask_mergekit.shown import one_line
from fisher_mask_mergekit.sidecar import Measurement, Sidecar
from fisher_mask_mergekit.sites import GovernedTensor, Site, layer_of, name_template
from fisher_mask_mergekit.weighting import ASKED_FOR

_WEIGHTED: Mapping[str, str] = {
    "q": "query rows", "k": "key rows", "v": "value rows", "q k v": "query and key rows",
    "(q k v)": "query and key rows", "(k v)": "key rows", "n": "neurons", "n n": "neurons", "(n n)": "neurons",
    "columns h": "head columns", "columns n": "neuron columns", "mean": "rest of the block",
}  # fmt: skip
_WITH_VALUES: Mapping[str, str] = {
    "q k v": "query, key and value rows", "(q k v)": "query, key and value rows", "(k v)": "key and value rows",
}  # fmt: skip


def survey_lines(found: Survey) -> Iterator[str]:
    """A checkpoint's sites, those that differ only in numbers as one block, and what is averaged."""
    yield f"{found.checkpoint}: {found.architecture}, {len(found.sites)} sites"
    if not found.is_checked:
        yield "transformers has no such class: found by the tensors' names alone, not checked on the model"
    if not found.sites:
        yield "no mask node is known for it: a merge averages all of it"
    blocks: dict[tuple[object, ...], list[Site]] = {}
    for site in found.sites:
        blocks.setdefault(_alike(site), []).append(site)
    for sites in blocks.values():
        yield ""
        yield from _site_lines(sites, found.stored)
    yield ""
    yield f"averaged ({len(found.averaged)} tensors):"
    yield from _by_template(found.averaged.items())


def _alike(site: Site) -> tuple[object, ...]:
    tensors = {(name_template(t.name), t.layout, t.shape, t.axis) for t in site.tensors}
    counts = site.heads, site.kv_heads, site.head_dim, site.neurons, site.experts
    return name_template(site.output), counts, frozenset(tensors)


def _site_lines(sites: Sequence[Site], stored: frozenset[str]) -> Iterator[str]:
    first = sites[0]
    yield f"{name_template(first.output)}{_layers(site.output for site in sites)}"
    if first.kind == "attention":
        yield f"  {first.heads} heads of {first.head_dim}, {first.kv_heads} key-value heads"
    else:
        yield f"  {first.neurons} neurons" + (f" in each of {first.experts} experts" if first.experts else "")
    groups: dict[tuple[object, ...], list[GovernedTensor]] = {}
    for tensor in first.tensors:
        if tensor.layout != "mean":
            key = name_template(tensor.name), tensor.layout, tensor.shape, tensor.axis
            groups.setdefault(key, []).append(tensor)
    for tensors in groups.values():
        yield f"  {_governed_line(first, tensors, tensors[0].name in stored)}"


def _governed_line(site: Site, tensors: Sequence[GovernedTensor], is_stored: bool) -> str:
    tensor = tensors[0]
    times = f" x {len(tensors)}" if len(tensors) > 1 else ""
    lines = f"{name_template(tensor.name)} {list(tensor.shape)}{times}: {_rows(site, tensor)}"
    if tensor.layout in ASKED_FOR:
        parameter, value = ASKED_FOR[tensor.layout]
        lines += f"; averaged unless {parameter}: {str(value).lower()}"
    return lines + ("" if is_stored else "; this name only in the loaded model")


def _rows(site: Site, tensor: GovernedTensor) -> str:
    """What the rows or columns of a governed tensor belong to."""
    rows = tensor.shape[tensor.axis]
    usual = len(tensor.shape) - 1 if tensor.layout.startswith("columns") else 0
    along = f", along axis {tensor.axis}" if tensor.axis != usual else ""
    if site.kind == "ffn":
        what = {
            "n": "1 row per neuron",
            "columns n": "1 column per neuron",
            "n n": "2 rows per neuron, all first ones before all second ones",
        }
        return what.get(tensor.layout, "2 rows per neuron, one after the other") + along
    per_key = rows // site.kv_heads
    fused = rows // (site.heads + 2 * site.kv_heads)
    values = f"of {'its value' if tensor.layout[0] == '(' else 'values'} averaged unless values: true"
    what = {
        "q": f"{rows // site.heads} rows per query head",
        "k": f"{per_key} rows per key-value head",
        "v": f"{per_key} rows per key-value head",
        "columns h": f"{site.head_dim} columns per query head",
        "(k v)": f"{per_key} rows per head, the last {site.head_dim} {values}",
        "q k v": f"{fused} rows per query head, then {fused} per key head; those {values}",
        "(q k v)": f"per key-value head {fused} rows of each query head and {fused} of its key; those {values}",
    }
    return what[tensor.layout] + along


def _by_template(tensors: Iterable[tuple[str, tuple[int, ...]]]) -> Iterator[str]:
    groups: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for name, shape in tensors:
        groups.setdefault((name_template(name), shape), []).append(name)
    for (template, shape), names in groups.items():
        yield f"  {template} {list(shape)}{_layers(names)}"


def _layers(names: Iterable[str]) -> str:
    """The first numbers of names that are otherwise alike, in ranges: ``, layers 0-3, 7``."""
    numbers = sorted({int(layer) for name in names if (layer := layer_of(name))})
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    ranges = [f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return f", layer{'s' if len(numbers) > 1 else ''} {', '.join(ranges)}" if ranges else ""


def sidecar_lines(sidecar: AnySidecar) -> Iterator[str]:
    """What was measured and how, then the Fisher information of every layer's mask nodes; else how much there is."""
    yield sidecar.source
    for name, value in metadata_fields(sidecar.metadata).items():
        yield f"  {name:<12}{value}"
    if not isinstance(sidecar, Sidecar):
        tensors = sidecar.metadata.tensors
        numbers = sum(prod(tensor.shape) for tensor in tensors)
        yield ""
        by = ", by rows and columns" if sidecar.metadata.settings.kind == "factored" else ""
        yield f"every parameter{by}: {numbers:,} in {len(tensors)} tensors, mean {sidecar.metadata.mean:.3e} nats squared"
        return
    found = sorted(node_statistics(sidecar), key=lambda one: (name_template(one.output), one.nodes))
    for (template, nodes), group in groupby(found, key=lambda one: (name_template(one.output), one.nodes)):
        yield ""
        yield from _node_table(f"{nodes} before {template}", list(group))


def metadata_fields(metadata: Measurement) -> dict[str, str]:
    """What was measured and how, for people."""
    settings, data = metadata.settings, metadata.data
    accuracy = "" if metadata.accuracy is None else f"; accuracy {metadata.accuracy:.3f}"
    share = f" (share {settings.share} of those drawn)" if settings.share else ""
    fields = {
        "checkpoint": metadata.checkpoint + (f" at {metadata.revision[:7]}" if metadata.revision else ""),
        "class": metadata.architecture,
        "task": metadata.task,
        "data": metadata.described_data,
        "samples": f"{metadata.samples}{share}, seed {settings.seed}, at most {metadata.max_length} tokens each "
        f"({metadata.truncated} were longer)",
        "estimator": f"{settings.estimator}, labels {settings.labels}, neuron masks {settings.mask_placement}",
        "loss": f"{metadata.loss:.4f} nats, {settings.loss} over a sample's predictions{accuracy}",
        "measured": f"{metadata.date} on {metadata.device}, weights in {settings.dtype}",
        "versions": ", ".join(f"{library} {version}" for library, version in metadata.versions.items()),
        "digests": f"weights {metadata.weights:.12}, drawn rows {data.digest:.12}",
        "measure": reproducing_command(metadata)
        + (
            "  (then with --trust-remote-code: if you trust the checkpoint's own)"
            * metadata.trust_remote_code
        ),
    }
    return {name: one_line(value) for name, value in fields.items()}


def _node_table(title: str, found: Sequence[NodeStatistics]) -> Iterator[str]:
    experts = " unreached experts" if found[0].experts else ""
    yield f"{title} (mean in nats squared; spread is standard deviation over mean)"
    yield f"  {'layer':>8} {'count':>8} {'mean':>10} {'spread':>8} {'zeros':>7}{experts}"
    for one in found:
        layer = ".".join(part for part in one.output.split(".") if part.isdigit())
        spread = "-" if one.variation is None else f"{one.variation:.2f}"
        unreached = f" {one.unreached:>9} of {one.experts}" if one.experts else ""
        yield f"  {layer:>8} {one.count:>8} {one.mean:>10.3e} {spread:>8} {one.zeros:>7.1%}{unreached}"


def share_lines(found: Sequence[ShareStatistics], models: Sequence[str]) -> Iterator[str]:
    """Each model's share of every governed tensor, layer by layer, then what weight alone decides."""
    yield "each model's share of the merge: mean (smallest-largest) over rows or columns"
    for index, model in enumerate(models, 1):
        yield f"  [{index}] {model}"
    for title, rows in share_groups(found):
        yield ""
        yield title
        yield f"  {'layer':>8}" + "".join(f"{f'[{index}]':>20}" for index in range(1, len(models) + 1))
        for one in rows:
            yield f"  {layer_of(one.tensors[0]):>8}" + "".join(f"{_cell(one, model):>20}" for model in models)
    for one in found:
        if not one.output:
            yield ""
            yield others_title(one)
            yield f"  {'':>8}" + "".join(f"{_cell(one, model):>20}" for model in models)


def share_groups(found: Iterable[ShareStatistics]) -> Iterator[tuple[str, list[ShareStatistics]]]:
    """Governed tensors of the same kind, layer by layer, and what they are."""
    governed = [one for one in found if one.output]
    for (_output, layout, values), group in groupby(
        governed, key=lambda one: (name_template(one.output), one.layout, one.values)
    ):
        rows = list(group)
        names = sorted({name_template(name.rpartition(".")[0]) for one in rows for name in one.tensors})
        what = (values and _WITH_VALUES.get(layout)) or _WEIGHTED[layout]
        yield f"{what} of {', '.join(names)}", rows


def others_title(one: ShareStatistics) -> str:
    """What tensors are called that weight alone decides on."""
    return f"other tensors ({len(one.tensors)}): {_shortened(one.tensors)}"


def _cell(one: ShareStatistics, model: str) -> str:
    mean, low, high = one.shares.get(model, (0.0, 0.0, 0.0))
    return f"{mean:.3f} ({low:.2f}-{high:.2f})" if one.output else f"{mean:.3f}"


def _shortened(names: Iterable[str], limit: int = 6) -> str:
    templates = list(dict.fromkeys(name_template(name) for name in names))
    more = f" and {len(templates) - limit} more" if len(templates) > limit else ""
    return ", ".join(templates[:limit]) + more
