"""Whether a sidecar is that of a repository's weights, without downloading them."""

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import NotASafetensorsRepoError
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff
from torch import Tensor

from fisher_mask_mergekit.checkpoint import modern
from fisher_mask_mergekit.errors import SidecarMismatchError
from fisher_mask_mergekit.hub_errors import hub_errors
from fisher_mask_mergekit.recognition import probed_positions
from fisher_mask_mergekit.sidecar import Sidecar

_COMPARED = 128
"""Tensors of which a value is compared, at most: a request of a few bytes each."""

_THREADS = 8
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class _Stored:
    """A tensor in a weight file on the hub; ``start`` counts from the end of the file's header."""

    url: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int

    def read(self, position: int, header: int) -> Tensor:
        """One element, by its position in row-major order."""
        size = self.dtype.itemsize
        content = _read(self.url, header + self.start + position * size, size)
        return torch.frombuffer(bytearray(content), dtype=self.dtype)[0]


def compare_with_hub(sidecar: Sidecar, repo: str, revision: str) -> int | None:
    """Compare one of the kept values of every governed tensor, of at most 128, with the weights in a repository.

    Returns:
        How many were compared; None if the repository has no weights in safetensors.

    Raises:
        SidecarMismatchError: If one differs, or there is none to compare.
        HubError: If the weights cannot be read.
    """
    with hub_errors(f"cannot compare the sidecar with the weights in {repo}"):
        stored = _tensors(repo, revision)
        if stored is None:
            return None
        names = [name for name in sidecar.governed if name in stored]
        names = names[:: math.ceil(len(names) / _COMPARED) or 1]
        other = next((name for name in names if sidecar.governed[name][1].shape != stored[name].shape), None)
        if other is None:
            other = _other_value(sidecar, {name: stored[name] for name in names})
    if other is not None or not names:
        what = f"tensor '{other}' has other values there" if names else "it governs none of its tensors"
        raise SidecarMismatchError(
            f"the sidecar was measured on {sidecar.metadata.described_checkpoint}, not on the weights in {repo} "
            f"(revision {revision[:7]}): {what}\n  Measure these:  mergekit-fisher compute {repo} --data DATASET"
        )
    return len(names)


def _tensors(repo: str, revision: str) -> dict[str, _Stored] | None:
    """The tensors by their names, from the weight files' headers; None if there are no safetensors."""
    try:
        files = HfApi().get_safetensors_metadata(repo, revision=revision).files_metadata
    except NotASafetensorsRepoError:
        return None
    return {
        modern(name): _Stored(
            hf_hub_url(repo, file, revision=revision),
            tuple(tensor.shape),
            _DTYPES[tensor.dtype],
            tensor.data_offsets[0],
        )
        for file, header in files.items()
        for name, tensor in header.tensors.items()
        if tensor.dtype in _DTYPES
    }


def _other_value(sidecar: Sidecar, stored: dict[str, _Stored]) -> str | None:
    """A tensor with another value there than here; of each, another one of the kept values is compared."""
    positions = {name: probed_positions(math.prod(one.shape)) for name, one in stored.items()}
    kept = {name: index % len(positions[name]) for index, name in enumerate(stored)}
    with ThreadPoolExecutor(_THREADS) as threads:
        urls = sorted({one.url for one in stored.values()})
        headers = dict(zip(urls, threads.map(_header_size, urls), strict=True))
        found = {
            name: threads.submit(one.read, positions[name][kept[name]], headers[one.url])
            for name, one in stored.items()
        }
    for name, value in found.items():
        if sidecar.values[name][kept[name]].to(stored[name].dtype) != value.result():
            return name
    return None


def _header_size(url: str) -> int:
    """Where in a safetensors file the data begins: behind a header, and eight bytes that say how long that is."""
    return 8 + int.from_bytes(_read(url, 0, 8), "little")


def _read(url: str, start: int, count: int) -> bytes:
    headers = {**build_hf_headers(), "Range": f"bytes={start}-{start + count - 1}"}
    response = http_backoff("GET", url, headers=headers)
    hf_raise_for_status(response)
    if len(response.content) != count:
        raise ValueError(f"asked {url} for {count} bytes, got {len(response.content)}")
    return bytes(response.content)
