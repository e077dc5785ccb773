"""The checksum of a sidecar: what was changed on the way, by whatever, is not merged with.

It proves that a file is whole, not who wrote it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fisher_mask_mergekit.errors import SidecarError

_FIELD = ',"checksum":"'


def digest(blocks: Iterable[Tensor]) -> str:
    """SHA-256 of a tensor's values as a safetensors file has them, given its blocks in row-major order."""
    whole = hashlib.sha256()
    for block in blocks:
        whole.update(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()


def seal(text: str, tensors: Mapping[str, Tensor]) -> str:
    """A JSON object with one more field, its last: SHA-256 over what is before it, and over the tensors.

    Args:
        text: The object, which has other fields.
        tensors: What belongs to it, on the CPU.
    """
    body = text.removesuffix("}")
    return body + _ending(body, tensors)


def unseal(text: str, tensors: Mapping[str, Tensor], path: Path) -> str:
    """The object without that field.

    Raises:
        SidecarError: If there is no checksum, or it is of something else.
    """
    body, mark, _ = text.rpartition(_FIELD)
    if not mark:
        raise SidecarError(f"{path} does not end its metadata with a checksum; measure the checkpoint again")
    if text != body + _ending(body, tensors):
        raise damaged(path)
    return body + "}"


def damaged(what: object) -> SidecarError:
    """The error of what does not have its checksum."""
    return SidecarError(
        f"{what} is damaged: its checksum is of something else; copy or download it again, or measure the checkpoint "
        "again, with --force"
    )


def _ending(body: str, tensors: Mapping[str, Tensor]) -> str:
    lines = (
        f"\n{name} {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} {digest([tensor])}"
        for name, tensor in sorted(tensors.items())
    )
    # Broken JSON can hold halves of a surrogate pair.
    whole = (body + "".join(lines)).encode("utf-8", "surrogatepass")
    return f'{_FIELD}{hashlib.sha256(whole).hexdigest()}"}}'
