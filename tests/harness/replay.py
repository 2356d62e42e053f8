"""CUDA graphs, emulated on a CPU: what a capture records, a replay does again in the same memory.

What happens outside of torch's operations, numbers and branches of Python, is baked in, as in a
real graph.
"""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Graph(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
            results = _tensors(func(*args, **kwargs))
            for old, new in zip(_tensors(out), results, strict=True):
                if old.untyped_storage().data_ptr() not in inputs:  # neither a view nor in place
                    old.copy_(new)


class _Stream:
    def wait_stream(self, stream):
        pass


def patch(monkeypatch):
    """torch.cuda's names that a capture calls. Returns the list of captured graphs."""
    graphs = []

    @contextlib.contextmanager
    def capture(graph, pool=None):
        graphs.append(graph)
        with graph:
            yield

    def context(_):
        return contextlib.nullcontext()

    for name, value in {
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "Stream": _Stream,
        "current_stream": _Stream,
        "stream": context,
        "device": context,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return graphs
