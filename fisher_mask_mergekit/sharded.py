"""A model in parts, one in every process of a run: layers whose weights are gathered from all while they run."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fisher_mask_mergekit.processes import Processes
from fisher_mask_mergekit.recompute import layer_path
from fisher_mask_mergekit.sites import Site


def shard(
    whole: nn.Module | None,
    bare: nn.Module,
    sites: Iterable[Site],
    processes: Processes,
    device: torch.device,
    *,
    offload: bool,
) -> nn.Module:
    """Hand out a model's weights by torch's FSDP2; tensor by tensor, so that no GPU ever holds them all.

    Args:
        whole: The loaded model, on the processor: the first process's. None in the others.
        bare: The same model on the meta device; it becomes this process's part.
        sites: Its mask nodes: the layers that they are in are gathered one at a time.
        processes: Which share the model.
        device: Where this one runs it.
        offload: Whether parts stay in the processor's memory while they are not needed.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    _take_dtypes(bare, processes.told(None if whole is None else _dtypes(whole)))
    mesh = init_device_mesh(device.type, (processes.count,))
    policy = CPUOffloadPolicy(pin_memory=device.type != "cpu") if offload else OffloadPolicy()
    # A path without a number is no layer's, but that of a single matrix.
    layers = {path for site in sites if (path := layer_path(site.output)) != site.output}
    for module in (*map(bare.get_submodule, sorted(layers)), bare):
        fully_shard(module, mesh=mesh, offload_policy=policy)
    bare.to_empty(device="cpu" if offload else device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    state = {} if whole is None else dict(whole.state_dict())
    set_model_state_dict(bare, state, options=options)
    _take_buffers(bare, whole, device)
    return bare


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _take_dtypes(bare: nn.Module, dtypes: Any) -> None:
    """Frozen, in the dtypes that the loaded model has."""
    for name, tensor in (*bare.named_parameters(), *bare.named_buffers()):
        tensor.requires_grad_(False).data = tensor.data.to(dtypes[name])


def _take_buffers(bare: nn.Module, whole: nn.Module | None, device: torch.device) -> None:
    """The first process's: no state has those that are not saved, such as rotary frequencies."""
    for path, module in bare.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if whole is not None:
                buffer.copy_(whole.get_submodule(path).get_buffer(name))
            dist.broadcast(buffer, src=0)
            module.register_buffer(name, buffer.to(device), name not in module._non_persistent_buffers_set)
