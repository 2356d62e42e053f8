"""Linear layers and embeddings whose weights are split over the ranks of a process group.

A column-parallel layer splits its output features, a row-parallel one its input features; one
behind the other, with anything channel-wise between them, they need a single reduction (arXiv
1909.08053, section 3). With sequence_parallel every rank holds outside of the pair only its part of
the tokens, split along the first dimension: the first layer gathers them, and the reduction leaves
each rank its part of the sum (arXiv 2205.05198, section 4).
"""

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from mamba_ssm.distributed.distributed_utils import (
    all_gather_raw,
    all_reduce,
    all_reduce_raw,
    get_dim_for_local_rank,
    reduce_scatter,
    reduce_scatter_raw,
)


def _autocast(tensor):
    """What autocast makes of an argument of F.linear."""
    if tensor is None or tensor.dtype == torch.float64:
        return tensor
    kind = tensor.device.type
    return tensor.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else tensor


def _overlap():
    """Whether collectives are asynchronous. torch.compile traces only those that are not, and then
    places what they overlap with itself."""
    return not torch.compiler.is_compiling()


def _wait(handle):
    if handle is not None:
        handle.wait()


class ParallelLinearFunc(torch.autograd.Function):
    """parallel_linear_func, for callers of its `apply`.

    Keeps this rank's x and not the gathered one, which backward gathers again. The collectives run
    while the matrix products that do not depend on them do.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, process_group=None, sequence_parallel=True):
        ctx.process_group = process_group
        ctx.gathers = process_group is not None and sequence_parallel
        x, handle = _autocast(x), None
        total_x = x
        if ctx.gathers:
            total_x, handle = all_gather_raw(x, process_group, async_op=_overlap())
        weight, bias = _autocast(weight), _autocast(bias)
        x_needs_grad, weight_needs_grad = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if weight_needs_grad else None, weight if x_needs_grad else None)
        _wait(handle)
        return F.linear(total_x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        with torch.autocast(grad_output.device.type, enabled=False):
            return *ParallelLinearFunc._gradients(ctx, grad_output), None, None

    @staticmethod
    def _gradients(ctx, grad_output):
        x, weight = ctx.saved_tensors
        group = ctx.process_group
        grad_x = grad_weight = grad_bias = x_handle = grad_x_handle = None
        if ctx.needs_input_grad[1] and ctx.gathers:
            x, x_handle = all_gather_raw(x, group, async_op=_overlap())
        if ctx.needs_input_grad[0]:
            grad_x = grad_output @ weight
            if group is not None:
                reduce_raw = reduce_scatter_raw if ctx.gathers else all_reduce_raw
                grad_x, grad_x_handle = reduce_raw(grad_x, group, async_op=_overlap())
        grad_output = grad_output.reshape(-1, grad_output.shape[-1])
        if ctx.needs_input_grad[2]:
            grad_bias = grad_output.sum(0)
        if ctx.needs_input_grad[1]:
            _wait(x_handle)
            grad_weight = grad_output.T @ x.reshape(-1, x.shape[-1])
        _wait(grad_x_handle)
        return grad_x, grad_weight, grad_bias


def parallel_linear_func(x, weight, bias=None, process_group=None, sequence_parallel=True):
    """F.linear of tokens that the ranks share, with this rank's rows of the weight.

    x: (n, ..., in_features); with a process group and sequence_parallel this rank's part along the
        first dimension, and the result is of all ranks' parts, (world_size * n, ..., out_features);
        with a process group alone x is the same on every rank.
    weight: (out_features, in_features), bias: (out_features), of this rank.

    The gradient of x is summed over the ranks of the group. Casts as F.linear does under autocast.
    """
    return ParallelLinearFunc.apply(x, weight, bias, process_group, sequence_parallel)


def _local_features(name, features, process_group, multiple_of):
    if features % multiple_of != 0:
        raise ValueError(f"{name} ({features}) must be a multiple of {multiple_of}")
    world_size, rank = dist.get_world_size(process_group), dist.get_rank(process_group)
    return get_dim_for_local_rank(features, world_size, rank, multiple_of)


class ColumnParallelLinear(nn.Linear):
    """Linear layer with this rank's share of the output features.

    (n, ..., in_features) to (n, ..., local out_features), or with sequence_parallel, which gathers
    the tokens, to (world_size * n, ..., local out_features).

    Arguments:
        in_features, out_features: of all ranks together.
        process_group: the ranks that share the layer.
        bias: each rank has the bias of its output features.
        sequence_parallel: the input is this rank's part of the tokens.
        multiple_of: ranks get multiples of this, the first ranks one more where they do not divide
            evenly; it divides out_features (ValueError).
    """

    def __init__(
        self,
        in_features,
        out_features,
        process_group,
        bias=True,
        sequence_parallel=True,
        multiple_of=1,
        device=None,
        dtype=None,
    ):
        local = _local_features("out_features", out_features, process_group, multiple_of)
        super().__init__(in_features, local, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x):
        return parallel_linear_func(
            x, self.weight, self.bias, self.process_group, self.sequence_parallel
        )


class RowParallelLinear(nn.Linear):
    """Linear layer with this rank's share of the input features, summed over the ranks.

    (n, ..., local in_features) to (n, ..., out_features), or with sequence_parallel to this rank's
    (n / world_size, ..., out_features).

    Arguments as those of ColumnParallelLinear, but
        bias: rank 0 has it, the others have none.
        multiple_of: divides in_features.
    """

    def __init__(
        self,
        in_features,
        out_features,
        process_group,
        bias=True,
        sequence_parallel=True,
        multiple_of=1,
        device=None,
        dtype=None,
    ):
        local = _local_features("in_features", in_features, process_group, multiple_of)
        bias = bias and dist.get_rank(process_group) == 0  # the sum over the ranks has it once
        super().__init__(local, out_features, bias=bias, device=device, dtype=dtype)
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel

    def forward(self, x):
        return self.reduce(parallel_linear_func(x, self.weight, self.bias))

    def reduce(self, partial):
        """The sum over the ranks of what each computed from its features."""
        reduce = reduce_scatter if self.sequence_parallel else all_reduce
        return reduce(partial, self.process_group)


def _share(name, size, process_group):
    world_size = 1 if process_group is None else dist.get_world_size(process_group)
    if size % world_size != 0:
        raise ValueError(f"{name} ({size}) must be a multiple of the number of ranks, {world_size}")
    return size // world_size


class VocabParallelEmbedding(nn.Embedding):
    """Embedding with this rank's share of the vocabulary: rank r has the r-th part of the rows.

    Ids of other ranks' rows give zeros, so that the sum over the ranks is the embedding. Arguments
    as those of nn.Embedding, num_embeddings of all ranks together; without a process_group it is
    one. Raises RuntimeError for a padding_idx with several ranks.
    """

    def __init__(self, num_embeddings, *args, process_group=None, padding_idx=None, **kwargs):
        local = _share("num_embeddings", num_embeddings, process_group)
        if local < num_embeddings and padding_idx is not None:
            raise RuntimeError("VocabParallelEmbedding: several ranks support no padding_idx")
        super().__init__(local, *args, padding_idx=padding_idx, **kwargs)
        self.process_group = process_group

    def forward(self, input):
        if self.process_group is None:
            return super().forward(input)
        local = input - dist.get_rank(self.process_group) * self.num_embeddings
        elsewhere = (local < 0) | (local >= self.num_embeddings)
        embeddings = super().forward(local.masked_fill(elsewhere, 0))
        return embeddings.masked_fill(elsewhere[..., None], 0)


class ColumnParallelEmbedding(nn.Embedding):
    """Embedding with this rank's share of the columns: its output is the r-th part on rank r.

    Arguments as those of nn.Embedding, embedding_dim of all ranks together; without a process_group
    it is one.
    """

    def __init__(self, num_embeddings, embedding_dim, *args, process_group=None, **kwargs):
        local = _share("embedding_dim", embedding_dim, process_group)
        super().__init__(num_embeddings, local, *args, **kwargs)
        self.process_group = process_group


class ParallelEmbeddings(nn.Module):
    """Sum of a VocabParallelEmbedding of ids and a ColumnParallelEmbedding of positions.

    Arguments:
        embed_dim: width of the result.
        vocab_size: ids there are.
        max_position_embeddings: positions there are; none are embedded if it is 0 or less.
        process_group: the ranks that share the embeddings; None: no others.
        padding_idx: as in VocabParallelEmbedding.
        sequence_parallel: each rank gets its part of the result along the first dimension.
    """

    def __init__(
        self,
        embed_dim,
        vocab_size,
        max_position_embeddings,
        process_group,
        padding_idx=None,
        sequence_parallel=True,
        device=None,
        dtype=None,
    ):
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        self.process_group = process_group
        self.sequence_parallel = sequence_parallel
        self.word_embeddings = VocabParallelEmbedding(
            vocab_size,
            embed_dim,
            process_group=process_group,
            padding_idx=padding_idx,
            **factory_kwargs,
        )
        self.max_position_embeddings = max_position_embeddings
        if max_position_embeddings > 0:
            self.position_embeddings = ColumnParallelEmbedding(
                max_position_embeddings, embed_dim, process_group=process_group, **factory_kwargs
            )

    def forward(self, input_ids, position_ids=None, combine_batch_seqlen_dim=False):
        """Ids and positions (batch, seqlen) to (batch, seqlen, embed_dim).

        position_ids None: 0 to seqlen - 1. combine_batch_seqlen_dim: the result is (batch * seqlen,
        embed_dim), so that sequence_parallel splits the tokens and not the batch.
        """
        embeddings = self.word_embeddings(input_ids)
        if self.max_position_embeddings > 0:
            if position_ids is None:
                position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)
            positions = self.position_embeddings(position_ids)
            before = 0
            if self.process_group is not None:
                before = dist.get_rank(self.process_group) * positions.shape[-1]
            after = embeddings.shape[-1] - before - positions.shape[-1]
            embeddings = embeddings + F.pad(positions, (before, after))
        if combine_batch_seqlen_dim:
            embeddings = embeddings.flatten(0, 1)
        if self.process_group is None:
            return embeddings
        reduce = reduce_scatter if self.sequence_parallel else all_reduce
        return reduce(embeddings, self.process_group)
