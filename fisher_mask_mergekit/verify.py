"""Whether a sidecar is whole, and whether a checkpoint is the one that it was measured on."""

import math
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from fisher_mask_mergekit import hub, store
from fisher_mask_mergekit.checkpoint import Checkpoint, locate, read_tensors, tensor_shapes
from fisher_mask_mergekit.opening import AnySidecar, is_diagonal, open_sidecar
from fisher_mask_mergekit.parameter_records import ParameterSidecar
from fisher_mask_mergekit.provenance import checkpoint_of
from fisher_mask_mergekit.recognition import probe
from fisher_mask_mergekit.sidecar import Sidecar, digest_of

Verdict = Literal["ok", "plausible", "not checked", "failed"]

_MEAN_TOLERANCE = 1e-4
"""Of the mean over all parameters, which is kept beside them: means over large tensors are rounded."""


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: ``file``, ``values``, ``weights``, ``data``, ``request`` or ``numbers``.
        verdict: ``ok`` if it is as it must be; ``plausible`` if nothing refutes it, but something could be wrong all the
            same; ``not checked``; ``failed`` if the sidecar, or what it is compared with, is another.
        detail: What was found.
    """

    what: str
    verdict: Verdict
    detail: str


def find(target: str) -> tuple[AnySidecar, str | None]:
    """A sidecar of any kind, and the checkpoint's folder that it was asked for by or lies in, if there is one.

    Args:
        target: The sidecar, on the hub (``hub:``) or here, or the folder of the checkpoint that it belongs to.

    Raises:
        SidecarError: If there is none, or it is not whole.
    """
    sidecar = open_sidecar(target)
    if target.startswith(hub.PREFIX):
        return sidecar, None
    place = Path(target)
    if place.is_dir() and not is_diagonal(place):
        return sidecar, target
    path = place.absolute()
    # Beside a share may lie others, and what was kept.
    lies_in_one = path.parent.name == store.BESIDE.parent.name and (path.parents[1] / "config.json").is_file()
    return sidecar, str(path.parents[1]) if lies_in_one else None


def check_file(sidecar: AnySidecar) -> Check:
    """What was not looked at when the file was read.

    Raises:
        SidecarError: If a number is negative or not finite, or a shard cannot be read.
    """
    metadata = sidecar.metadata
    whole = f"{sidecar.source} is whole: {metadata.samples} samples, {metadata.described_checkpoint}"
    if isinstance(sidecar, Sidecar):
        return Check("file", "ok", whole)
    sizes = {record: math.prod(record.shape) for record in sidecar.metadata.tensors}
    mean = math.fsum(sidecar.mean_of(one) * size for one, size in sizes.items()) / max(1, sum(sizes.values()))
    if not math.isclose(mean, sidecar.metadata.mean, rel_tol=_MEAN_TOLERANCE):
        stored = f"its metadata says that it is {sidecar.metadata.mean:.6e}"
        return Check("file", "failed", f"{sidecar.source}: the mean over all numbers is {mean:.6e}, {stored}")
    return Check("file", "ok", whole)


def check_weights(sidecar: AnySidecar, name: str) -> tuple[Check, Check]:
    """The stored values, and the digest over all tensors, against a checkpoint's; nothing is run.

    Args:
        sidecar: The sidecar.
        name: The checkpoint: local folder or hub id.

    Raises:
        CheckpointError: If there is no such checkpoint, or it cannot be read.
    """
    checkpoint = locate(name)
    shapes = tensor_shapes(checkpoint)
    known = kept_values(sidecar)
    wrong, found = [], 0

    def tensors() -> Iterator[tuple[str, Tensor]]:
        nonlocal found
        for name, tensor in read_tensors(checkpoint, shapes):
            if name in known:
                found += 1
                if not same_values(known[name], probe(tensor)):
                    wrong.append(name)
            yield name, tensor

    digest = digest_of(tensors())
    values = _values(checkpoint, wrong, found, len(known) - found)
    return values, _weights(sidecar, checkpoint, len(shapes), digest)


def _values(checkpoint: Checkpoint, wrong: list[str], found: int, rest: int) -> Check:
    if wrong:
        detail = f"{len(wrong)} of {found} tensors have other values than were stored, '{min(wrong)}' for one"
    elif not found:
        detail = "it has none of the tensors that values were stored of"
    else:
        others = f"; {rest} more are in the loaded model only: compare them with --recompute" if rest else ""
        return Check("values", "ok", f"{checkpoint.name} has the stored values in {found} tensors{others}")
    return Check("values", "failed", f"{checkpoint.name}: {detail}")


def _weights(sidecar: AnySidecar, checkpoint: Checkpoint, count: int, digest: str) -> Check:
    metadata = sidecar.metadata
    if digest == metadata.weights:
        detail = f"names, shapes and sixteen values of all {count} tensors have the stored digest"
        return Check("weights", "ok", detail)
    remedy = ["mergekit-fisher", "compute", checkpoint.name, "--kind", metadata.settings.kind]
    return Check(
        "weights", "failed",
        f"the digest over all {count} tensors of {checkpoint.name} is {digest:.12}, the sidecar has {metadata.weights:.12}: a "
        "tensor has other values, another shape or another name, or was saved in another dtype. It was measured on "
        f"{metadata.described_checkpoint}; measure this one:  {shlex.join(remedy)} --data DATASET",
    )  # fmt: skip


def no_checkpoint(sidecar: AnySidecar) -> Check:
    """That there is nothing to compare with."""
    name = shlex.quote(checkpoint_of(sidecar.metadata))
    detail = f"the sidecar lies in no checkpoint's folder; compare it with one:  --model {name}"
    return Check("values", "not checked", detail)


def kept_values(sidecar: AnySidecar) -> Mapping[str, Tensor]:
    """By tensor name, the values that it is recognised by; short ones may be filled with zeros."""
    if isinstance(sidecar, ParameterSidecar):
        return {
            name: torch.tensor(record.values, dtype=torch.float64) for name, record in sidecar.records.items()
        }
    return {name: sidecar.values[name] for name in sidecar.governed}


def same_values(kept: Tensor, got: Tensor) -> bool:
    """Whether a tensor's probed values are those that were kept, in the tensor's dtype."""
    return torch.equal(kept[: len(got)].to(got.dtype), got)
