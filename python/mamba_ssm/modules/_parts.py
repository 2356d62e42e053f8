"""What the modules share: which submodules may be bypassed, and inference caches."""

import torch
import torch.nn as nn


def is_plain(module, kind):
    """Whether module is exactly a `kind`, so that using its weight equals calling its forward."""
    return (
        type(module) is kind  # a parametrized module has a type of its own
        and type(module.weight) in (nn.Parameter, torch.Tensor)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not module._backward_hooks
        and not module._backward_pre_hooks
        and "forward" not in module.__dict__
    )


def upcast(tensor):
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def read_cache(cache, dtype):
    """Contents of a cache as an argument that autograd may keep while the cache changes."""
    values = cache.detach().to(dtype)
    return values.clone() if torch.is_grad_enabled() and dtype == cache.dtype else values


def states_from_cache(module, inference_params, batch_size, initialize_states=False):
    """The states of layer module.layer_idx, made where there are none; zeros on request."""
    name = type(module).__name__
    if module.layer_idx is None:
        raise ValueError(f"{name}: an inference cache needs a module made with layer_idx=...")
    cache = inference_params.key_value_memory_dict
    states = cache.get(module.layer_idx)
    if states is None or (
        states[0].shape[0] != batch_size and inference_params.seqlen_offset == 0
    ):
        states = module.allocate_inference_cache(batch_size, inference_params.max_seqlen)
        cache[module.layer_idx] = states
    elif states[0].shape[0] != batch_size:
        raise ValueError(
            f"{name}: layer {module.layer_idx} has cached states of batch size "
            f"{states[0].shape[0]}, but hidden_states have batch size {batch_size}"
        )
    if initialize_states:
        for state in states:
            state.zero_()
    return states
