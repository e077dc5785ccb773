"""Sidecars of all shares of one request, added up to the sidecar of the whole."""

import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from fisher_mask_mergekit import store
from fisher_mask_mergekit.blocks import CPU_BYTES, blocks
from fisher_mask_mergekit.diagonal_sidecar import (
    DiagonalSidecar,
    may_replace_diagonal,
    write_diagonal,
)
from fisher_mask_mergekit.errors import SidecarError
from fisher_mask_mergekit.factored_sidecar import FactoredSidecar, write_factored
from fisher_mask_mergekit.opening import AnySidecar, read_any
from fisher_mask_mergekit.request import DECISIVE
from fisher_mask_mergekit.shown import one_line
from fisher_mask_mergekit.sidecar import Measurement, Sidecar, fisher_dtype, may_replace, write

AnyMetadata = TypeVar("AnyMetadata", bound=Measurement)

_FACTS = {"architecture", "task", "weights", "trust_remote_code", "max_length"}


def combine(paths: Sequence[Path], out: Path) -> AnySidecar:
    r"""Add up what was measured on all N shares of one request.

    .. math:: I = \frac{1}{\sum_k n_k} \sum_{k=1}^{N} n_k I_k

    with :math:`I_k` the mean over the :math:`n_k` samples of share k; the plain sum with ``estimator: batch``, which has no
    mean. That is what one run over all samples measures, since its mean runs over the same samples: shares have no sample in
    common, and all have been drawn alike.

    Args:
        paths: The shares' sidecars, in any order; all of one kind.
        out: Where the whole one goes.

    Returns:
        It. Its settings are those of the request, without a share.

    Raises:
        SidecarError: If one cannot be read or is not a share, one is missing or given twice, they are not of one
            request and checkpoint (names what differs), they do not add up to a sidecar, or it cannot be written.
    """
    shares = _in_order([read_any(path) for path in paths])
    if out.resolve() in [path.resolve() for path in paths]:
        raise SidecarError(f"{out} is one of the shares; write the whole to another place")
    if not (may_replace_diagonal(out) if isinstance(shares[0], DiagonalSidecar) else may_replace(out)):
        raise SidecarError(f"{out} exists and is no sidecar; it was left as it is")
    facts = _facts([share.metadata for share in shares])
    try:
        with store.alone(out):
            masks = [share for share in shares if isinstance(share, Sidecar)]
            if masks:
                return _write_mask(masks, facts, out)
            factored = [share for share in shares if isinstance(share, FactoredSidecar)]
            if factored:
                return _write_factored(factored, facts, out)
            return _write_diagonal([s for s in shares if isinstance(s, DiagonalSidecar)], facts, out)
    except OSError as error:
        raise SidecarError(f"cannot write {out}: {error.strerror or error}; nothing was written") from error


def _in_order(sidecars: Sequence[AnySidecar]) -> list[AnySidecar]:
    """The first to the last share; refuses what is not all of them, once each and of one request."""
    first = sidecars[0]
    known: dict[int, AnySidecar] = {}
    for sidecar in sidecars:
        settings = sidecar.metadata.settings
        if settings.share is None:
            raise SidecarError(
                f"{sidecar.source} was measured on all samples that its request draws, and whether others are among them "
                "cannot be told; only shares of one request add up:  mergekit-fisher compute --share K/N"
            )
        _check_alike(first, sidecar)
        number, _ = settings.share_of
        if number in known:
            raise SidecarError(
                f"share {settings.share} is given twice: {known[number].source} and {sidecar.source}"
            )
        known[number] = sidecar
    _, of = first.metadata.settings.share_of
    if (missing := next((number for number in range(1, of + 1) if number not in known), None)) is not None:
        raise SidecarError(f"share {missing}/{of} is missing: {len(known)} of {of} are given")
    total = sum(sidecar.metadata.samples for sidecar in sidecars)
    for sidecar in sidecars:
        expected = sidecar.metadata.settings.share_size(total)
        if sidecar.metadata.samples != expected:
            raise SidecarError(
                f"{sidecar.source} is of {sidecar.metadata.samples} samples; as share {sidecar.metadata.settings.share} of "
                f"{total} it would be of {expected}"
            )
    return [known[number] for number in sorted(known)]


def _check_alike(first: AnySidecar, other: AnySidecar) -> None:
    one, two = dict(_compared(first)), dict(_compared(other))
    for name, value in one.items():
        if value != two.get(name):
            raise SidecarError(
                f"{first.source} and {other.source} do not add up: {name} is {_shown(value)} there, {_shown(two.get(name))} "
                "here"
            )


def _shown(value: Any) -> str:
    return one_line(reprlib.repr(value))


def _compared(sidecar: AnySidecar) -> Iterator[tuple[str, Any]]:
    """What the shares of one request have in common. What files are called where each was measured is not among it."""
    metadata = sidecar.metadata
    yield from metadata.model_dump(mode="json", include=_FACTS).items()
    settings = metadata.settings.definition()
    settings["share"] = f"one of {metadata.settings.share_of[1]}"
    del settings["data"]
    yield from ((f"settings.{name}", value) for name, value in settings.items())
    yield from ((f"data.{name}", value) for name, value in metadata.data)
    yield from ((f"versions.{library}", metadata.versions.get(library)) for library in DECISIVE)
    if isinstance(sidecar, Sidecar):
        yield "sites", sidecar.metadata.sites
        yield "values", {name: value.tolist() for name, value in sidecar.values.items()}
    else:
        yield "tensors", [one.model_dump(mode="json", exclude={"sha256"}) for one in sidecar.metadata.tensors]
        yield "views", sidecar.metadata.views
        yield "others", sidecar.metadata.others


def _facts(shares: Sequence[Measurement]) -> dict[str, Any]:
    """What a run over all samples would say of itself; of names that differ, that of the first share."""
    total = sum(share.samples for share in shares)

    def mean(value: Callable[[Measurement], float]) -> float:
        return math.fsum(share.samples / total * value(share) for share in shares)

    first = shares[0]
    accuracies = [share.accuracy for share in shares if share.accuracy is not None]
    return {
        "settings": first.settings.model_copy(update={"share": None}),
        "samples": total,
        "truncated": sum(share.truncated for share in shares),
        "accuracy": min(1.0, mean(lambda share: share.accuracy or 0.0)) if accuracies else None,
        "loss": mean(lambda share: share.loss),
        "versions": {
            library: _listed(share.versions.get(library, "unknown") for share in shares)
            for library in first.versions
        },
        "device": _listed(share.device for share in shares),
        "date": max(share.date for share in shares),
    }


def _listed(values: Iterator[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _whole(first: AnyMetadata, facts: Mapping[str, Any]) -> AnyMetadata:
    """A share's metadata with what the whole says of itself; checked, since no share is trusted.

    Raises:
        SidecarError: If that is none that could be read again.
    """
    try:
        return type(first).model_validate({**first.model_dump(), **facts})
    except ValidationError as error:
        what = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in what["loc"])
        raise SidecarError(
            f"the shares do not add up: '{where:.80}': {what['msg']:.200}; nothing was written"
        ) from error


def _write_mask(shares: Sequence[Sidecar], facts: Mapping[str, Any], out: Path) -> Sidecar:
    metadata = _whole(shares[0].metadata, facts)
    factors = _factors(shares)
    dtype = fisher_dtype(metadata.settings)
    fisher = {
        output: {
            node: _sum(
                [share.fisher[output][node] for share in shares],
                factors,
                vector.shape,
                dtype,
                f"{output}.{node}",
            )
            for node, vector in vectors.items()
        }
        for output, vectors in shares[0].fisher.items()
    }
    whole = Sidecar(metadata, fisher, shares[0].values, str(out))
    write(whole, out)
    return whole


def _write_factored(
    shares: Sequence[FactoredSidecar], facts: Mapping[str, Any], out: Path
) -> FactoredSidecar:
    factors = _factors(shares)
    metadata = _whole(shares[0].metadata, {**facts, "mean": _mean(shares, factors)})
    packed = {
        name: _sum([share.packed[name] for share in shares], factors, whole.shape, torch.float32, name)
        for name, whole in shares[0].packed.items()
    }
    whole = FactoredSidecar(metadata, packed, str(out))
    write_factored(whole, out)
    return whole


def _write_diagonal(
    shares: Sequence[DiagonalSidecar], facts: Mapping[str, Any], out: Path
) -> DiagonalSidecar:
    factors = _factors(shares)
    metadata = _whole(shares[0].metadata, {**facts, "mean": _mean(shares, factors)})

    def fisher(name: str) -> Tensor:
        shape = shares[0].records[name].shape
        return _sum(_one_by_one(shares, name), factors, shape, torch.float32, name)

    return write_diagonal(metadata, fisher, out)


def _one_by_one(shares: Sequence[DiagonalSidecar], name: str) -> Iterator[Tensor]:
    """A parameter's numbers in each; however many there are, few files are open at once."""
    for share in shares:
        yield share.fisher(share.records[name])
        share.close()


def _mean(shares: Sequence[FactoredSidecar | DiagonalSidecar], factors: Sequence[float]) -> float:
    """Over all parameters."""
    return math.fsum(factor * share.metadata.mean for factor, share in zip(factors, shares, strict=True))


def _factors(shares: Sequence[AnySidecar]) -> list[float]:
    """What each share's numbers count by."""
    if shares[0].metadata.settings.estimator == "batch":
        return [1.0] * len(shares)
    total = sum(share.metadata.samples for share in shares)
    return [share.metadata.samples / total for share in shares]


def _sum(
    parts: Iterable[Tensor], factors: Sequence[float], shape: Sequence[int], dtype: torch.dtype, name: str
) -> Tensor:
    """Added in float64, one share after the other from the first to the last, and rounded once.

    Raises:
        SidecarError: If it is too large for the dtype (names what it is of).
    """
    wide = torch.zeros(tuple(shape), dtype=torch.float64)
    for part, factor in zip(parts, factors, strict=True):
        for index in blocks(shape, CPU_BYTES // 8):
            wide[index] += part[index].double() * factor
    total = wide.to(dtype)
    if not bool(total.isfinite().all()):
        raise SidecarError(
            f"the shares do not add up: {name:.100} would be more than {dtype} holds; nothing was written"
        )
    return total
