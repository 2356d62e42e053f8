"""Collectives with gradients, for tensor and sequence parallelism.

Every function works with any backend of torch.distributed that has the collective: gloo for CPU
tensors, NCCL for CUDA tensors. process_group None is the default group. Every rank of the group has
to call, in the same order, with the same dtype and the same shape.
"""

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable


def _collective(name, former_name):
    """A function of torch.distributed, also of a torch that knows it by its former name."""
    return getattr(dist, name, None) or getattr(dist, former_name)


# Raw collectives: no gradients, but possibly asynchronous -----------------------------------------


def all_gather_raw(input_, process_group, async_op=False):
    """The inputs of all ranks one behind another: (n, ...) to (world_size * n, ...).

    Returns (output, handle). The handle is None unless async_op; then the output is to be read
    after handle.wait().
    """
    world_size = dist.get_world_size(process_group)
    output = input_.new_empty(world_size * input_.shape[0], *input_.shape[1:])
    gather = _collective("all_gather_single", "all_gather_into_tensor")
    handle = gather(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def reduce_scatter_raw(input_, process_group, async_op=False):
    """This rank's part of the sum of all ranks' inputs: (world_size * n, ...) to (n, ...).

    Returns (output, handle) as all_gather_raw. Raises ValueError if the ranks do not divide the
    first dimension.
    """
    world_size = dist.get_world_size(process_group)
    if input_.shape[0] % world_size != 0:
        raise ValueError(
            f"reduce_scatter: the first dimension must be a multiple of the {world_size} ranks, "
            f"got an input of shape {tuple(input_.shape)}"
        )
    output = input_.new_empty(input_.shape[0] // world_size, *input_.shape[1:])
    scatter = _collective("reduce_scatter_single", "reduce_scatter_tensor")
    handle = scatter(output, input_.contiguous(), group=process_group, async_op=async_op)
    return output, handle


def all_reduce_raw(input_, process_group, async_op=False):
    """The sum of all ranks' inputs, of their shape. A contiguous input is overwritten with it.

    Returns (output, handle) as all_gather_raw.
    """
    output = input_.contiguous()
    handle = dist.all_reduce(output, group=process_group, async_op=async_op)
    return output, handle


# Collectives with gradients -----------------------------------------------------------------------


class AllGatherFunc(torch.autograd.Function):
    """all_gather(input_, process_group): (n, ...) to (world_size * n, ...), rank after rank.

    A rank's gradient is the sum of what all ranks hold for its part.
    """

    @staticmethod
    def forward(ctx, input_, process_group):
        ctx.process_group = process_group
        return all_gather_raw(input_, process_group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return reduce_scatter_raw(grad_output, ctx.process_group)[0], None


class ReduceScatterFunc(torch.autograd.Function):
    """reduce_scatter(input_, process_group): (world_size * n, ...) to (n, ...) of the sum.

    The gradient is all ranks' gradients, rank after rank.
    """

    @staticmethod
    def forward(ctx, input_, process_group):
        ctx.process_group = process_group
        return reduce_scatter_raw(input_, process_group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return all_gather_raw(grad_output, ctx.process_group)[0], None


class AllReduceFunc(torch.autograd.Function):
    """all_reduce(input_, process_group): the sum of all ranks' inputs, which stay as they are.

    The gradient is the output's: every rank goes on to compute the same loss from the sum.
    """

    @staticmethod
    def forward(ctx, input_, process_group):
        return all_reduce_raw(input_.clone(), process_group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return grad_output, None


all_gather = AllGatherFunc.apply
reduce_scatter = ReduceScatterFunc.apply
all_reduce = AllReduceFunc.apply


# Parameters that several ranks hold ---------------------------------------------------------------


def _marked_parameters(model, mark):
    """Parameters with a true attribute `mark`, in the order of their names: ranks may hold further
    ones, and in another order."""
    marked = {n: p for n, p in model.named_parameters() if getattr(p, mark, False)}
    return [marked[name] for name in sorted(marked)]


@torch.no_grad()
def sync_shared_params(model, process_group):
    """Gives the parameters marked `_shared_params` = True the values of the group's rank 0."""
    for parameter in _marked_parameters(model, "_shared_params"):
        dist.broadcast(parameter.detach(), group=process_group, group_src=0)


@torch.no_grad()
def allreduce_sequence_parallel_grad(model, process_group):
    """Adds up, over the group, the gradients of the parameters marked `_sequence_parallel` = True.

    These are parameters that every rank holds whole and applies to its part of the tokens. A
    gradient that a rank lacks counts as zero. One collective carries all of them.
    """
    parameters = [p for p in _marked_parameters(model, "_sequence_parallel") if p.requires_grad]
    if not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    total = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(total, group=process_group)
    for parameter, part in zip(parameters, total.split([p.numel() for p in parameters])):
        parameter.grad.copy_(part.view_as(parameter))


def get_dim_for_local_rank(dim, world_size, local_rank, multiple_of=1):
    """Share of `dim` that rank local_rank of world_size holds, in multiples of multiple_of.

    Where the ranks do not divide the number of multiples, the first ranks hold one more.
    """
    share, rest = divmod(dim // multiple_of, world_size)
    return (share + (local_rank < rest)) * multiple_of
