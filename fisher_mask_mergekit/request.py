"""All that a measurement's numbers depend on, to their last bit."""

import hashlib
import json
import platform
from importlib.metadata import version
from typing import Any

import torch

from fisher_mask_mergekit.checkpoint import model_files
from fisher_mask_mergekit.encoding import EncodedSamples
from fisher_mask_mergekit.execution import Execution
from fisher_mask_mergekit.job import Inputs, Job
from fisher_mask_mergekit.store import file_digest

_LIBRARIES = ("fisher-mask-mergekit", "torch", "transformers", "tokenizers", "datasets", "numpy")
DECISIVE = _LIBRARIES[:4]
"""The libraries that numbers are computed by; what the others give is compared itself."""


def versions() -> dict[str, str]:
    """Of the libraries that take part."""
    return {library: version(library) for library in _LIBRARIES} | {"python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """A GPU's own name, others' type."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def request_of(job: Job, inputs: Inputs, device: torch.device, execution: Execution) -> dict[str, Any]:
    """Everything that two runs must have in common to give the same numbers, by what it is called.

    That is more than a sidecar is known again by: also each file of the checkpoint, whole, the very tokens, and what
    changes rounding alone, such as the device and how batches are composed. Left out is how many threads a CPU adds up
    with: another machine may go on.

    Args:
        job: The request.
        inputs: Its samples.
        device: Where it runs.
        execution: How.
    """
    installed = versions()
    files = sorted(model_files(job.checkpoint))
    return {
        **{f"the checkpoint's {file.name}": file_digest(file) for file in files},
        **job.settings.definition(),
        "batch_size": job.settings.rows,
        "batch_tokens": execution.batch_tokens,
        "recompute": execution.recompute,
        "the drawn rows": job.data.digest,
        "their tokens": _digest_of_tokens(inputs.encoded),
        "device": device_name(device),
        "trust_remote_code": job.trust_remote_code,
        **{library: installed[library] for library in DECISIVE},
    }


def _digest_of_tokens(encoded: EncodedSamples) -> str:
    whole = hashlib.sha256()
    for index, sample in encoded.samples.items():
        whole.update(json.dumps([index, sample.inputs, sample.labels]).encode())
    return whole.hexdigest()
