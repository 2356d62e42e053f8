"""Two ranks against one process: collectives, parallel layers, Mamba2 over a process group, and the
modules under DDP and FSDP2. Ranks are processes with gloo, and with NCCL where two GPUs are."""

import copy
import datetime
import multiprocessing
import multiprocessing.connection
import os
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from harness import modules

from mamba_ssm import Mamba2
from mamba_ssm.distributed import distributed_utils as utils
from mamba_ssm.distributed import tensor_parallel as parallel
from mamba_ssm.utils.generation import InferenceParams

WORLD_SIZE = 2
SECONDS = 120  # until a check counts as hung

# Ranks -------------------------------------------------------------------------------------------


def serve(rank, device, store, connection):
    """A rank: runs the checks that the connection names, and answers None or what went wrong."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    torch.set_default_device(device)
    for name, options in iter(connection.recv, None):
        torch.manual_seed(0)
        try:
            globals()[name](**options)
        except Exception:
            connection.send(traceback.format_exc())
        else:
            connection.send(None)
    dist.destroy_process_group()


class Ranks:
    """The processes of one device type. They serve many checks, and are replaced when one fails."""

    def __init__(self, device, folder):
        self.device, self.folder, self.runs, self.processes = device, folder, 0, []

    def start(self):
        context = multiprocessing.get_context("spawn")
        self.runs += 1
        store = self.folder / f"store{self.runs}"
        self.connections, self.processes = [], []
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            arguments = (rank, self.device, store, theirs)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def check(self, function, **options):
        if not self.processes:
            self.start()
        for connection in self.connections:
            connection.send((function.__name__, options))
        waiting = list(self.connections)
        while waiting:
            ready = multiprocessing.connection.wait(waiting, SECONDS)
            if not ready:
                self.stop()
                pytest.fail(f"{len(waiting)} ranks hang")
            for connection in ready:
                waiting.remove(connection)
                try:
                    error = connection.recv()
                except EOFError:
                    error = "the process ended"
                if error:
                    rank = self.connections.index(connection)
                    self.stop()  # the others may wait for this one
                    pytest.fail(f"rank {rank}: {error}", pytrace=False)

    def stop(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.processes = []


@pytest.fixture(scope="module", params=["cpu"] + ["cuda"] * (torch.cuda.device_count() > 1))
def ranks(request, tmp_path_factory):
    ranks = Ranks(request.param, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.stop()


def group():
    return dist.group.WORLD


def part(tensor, dim=0):
    """This rank's equal part of a tensor."""
    return tensor.chunk(WORLD_SIZE, dim)[dist.get_rank()]


def randn(*shape):
    """The same on all ranks."""
    return torch.randn(shape, dtype=torch.float64)


def leaf(tensor):
    return tensor.detach().clone().requires_grad_()


def assert_equal(got, expected, what=None):
    torch.testing.assert_close(
        got, expected, rtol=1e-10, atol=1e-10, msg=what and (lambda text: f"{what}: {text}")
    )


# Collectives -------------------------------------------------------------------------------------


def check_collectives(dtype):
    whole = torch.arange(24, dtype=dtype).view(2, 4, 3)  # one (4, 3) per rank
    weight = torch.arange(-12, 12, dtype=dtype).view(8, 3)
    for strided in (False, True):
        mine = whole[dist.get_rank()]
        mine = leaf(mine.T.contiguous().T if strided else mine)

        gathered = utils.all_gather(mine, group())
        assert_equal(gathered, whole.flatten(0, 1))
        (gathered * weight).sum().backward()
        assert_equal(mine.grad, WORLD_SIZE * part(weight))

        mine.grad = None
        reduced = utils.reduce_scatter(mine, group())
        assert_equal(reduced, part(whole.sum(0)))
        (reduced * part(weight[:4])).sum().backward()
        assert_equal(mine.grad, weight[:4])

        mine.grad = None
        total = utils.all_reduce(mine, group())
        assert_equal(total, whole.sum(0))
        assert_equal(mine, whole[dist.get_rank()])
        (total * weight[:4]).sum().backward()
        assert_equal(mine.grad, weight[:4])

        mine = mine.detach()
        for raw, expected in (
            (utils.all_gather_raw, whole.flatten(0, 1)),
            (utils.reduce_scatter_raw, part(whole.sum(0))),
            (utils.all_reduce_raw, whole.sum(0)),
        ):
            output, handle = raw(mine.clone(), group(), async_op=True)
            handle.wait()
            assert_equal(output, expected)
            output, handle = raw(mine.clone(), group())
            assert handle is None
            assert_equal(output, expected)

    with pytest.raises(ValueError, match=r"multiple of the 2 ranks, got an input of shape \(3,\)"):
        utils.reduce_scatter(torch.ones(3), group())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_collectives(ranks, dtype):
    ranks.check(check_collectives, dtype=dtype)


def check_shared_parameters():
    """In another order on each rank."""
    rank = dist.get_rank()
    model = nn.ParameterDict()
    for name, value in sorted({"a": 1.0, "b": 2.0, "c": 3.0}.items(), reverse=rank == 1):
        model[name] = nn.Parameter(torch.full((2, 3), value + 10 * rank))
    model.a._shared_params = model.b._shared_params = True
    model.a._sequence_parallel = model.c._sequence_parallel = True
    utils.sync_shared_params(model, group())
    assert [model[name][0, 0].item() for name in "abc"] == [1, 2, 3 + 10 * rank]

    model.a.grad, model.b.grad = (torch.full((2, 3), value + rank) for value in (10.0, 20.0))
    if rank == 0:
        model.c.grad = torch.full((2, 3), 5.0)
    utils.allreduce_sequence_parallel_grad(model, group())
    assert [model[name].grad[1, 2].item() for name in "abc"] == [21, 20 + rank, 5]
    utils.allreduce_sequence_parallel_grad(nn.Linear(2, 2), group())  # nothing is marked


def test_shared_parameters(ranks):
    ranks.check(check_shared_parameters)


def test_dim_for_local_rank():
    assert [utils.get_dim_for_local_rank(10, 4, rank) for rank in range(4)] == [3, 3, 2, 2]
    assert [utils.get_dim_for_local_rank(15, 2, rank, 3) for rank in range(2)] == [9, 6]


# Layers ------------------------------------------------------------------------------------------


def check_linear(sequence_parallel, bias, frozen):
    """Uneven shares of features in multiples of 3: 9 and 6."""
    options = {"process_group": group(), "sequence_parallel": sequence_parallel, "bias": bias}
    tokens = part if sequence_parallel else (lambda tensor: tensor)
    for cls, dim, sizes in (
        (parallel.ColumnParallelLinear, 0, (4, 15)),
        (parallel.RowParallelLinear, 1, (15, 4)),
    ):
        torch.manual_seed(0)  # ranks draw different numbers of weights
        whole = nn.Linear(*sizes, bias=bias, dtype=torch.float64)
        x, dout = randn(4, 3, sizes[0]), randn(4, 3, sizes[1])
        layer = cls(*sizes, multiple_of=3, dtype=torch.float64, **options)
        assert layer.weight.shape[dim] == [9, 6][dist.get_rank()]
        is_column = dim == 0

        def mine(tensor, dim):
            return tensor.split([9, 6], dim)[dist.get_rank()]

        parameters = {"weight": mine(whole.weight, dim)}
        if bias and is_column:
            parameters["bias"] = mine(whole.bias, 0)
        elif bias and dist.get_rank() == 0:
            parameters["bias"] = whole.bias
        layer.load_state_dict(parameters)
        layer.weight.requires_grad_("weight" not in frozen)

        whole_x = leaf(x)
        expected = whole(whole_x)
        expected.backward(dout)
        x = leaf(tokens(x) if is_column else mine(x, 2)).requires_grad_("x" not in frozen)
        out = layer(x)
        assert_equal(out, mine(expected, 2) if is_column else tokens(expected))
        out.backward(mine(dout, 2) if is_column else tokens(dout))
        if "x" not in frozen:
            dx = whole_x.grad
            assert_equal(x.grad, tokens(dx) if is_column else mine(dx, 2), "dx")
        if "weight" not in frozen:
            assert_equal(layer.weight.grad, mine(whole.weight.grad, dim), "dweight")
        if layer.bias is not None:
            dbias = whole.bias.grad
            assert_equal(layer.bias.grad, mine(dbias, 0) if is_column else dbias, "dbias")


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("bias, frozen", [(True, ""), (False, ""), (True, "weight"), (True, "x")])
def test_linear(ranks, sequence_parallel, bias, frozen):
    ranks.check(check_linear, sequence_parallel=sequence_parallel, bias=bias, frozen=frozen)


def check_autocast():
    """Forward and gradients as those of F.linear, which autocast runs in bfloat16."""
    x, weight, bias = randn(4, 8).float(), randn(6, 8).float(), randn(6).float()
    device = x.device.type
    for dtype in (torch.float32, torch.float64):
        expected_leaves = [leaf(tensor.to(dtype)) for tensor in (x, weight, bias)]
        leaves = [leaf(part(expected_leaves[0])), *map(leaf, expected_leaves[1:])]
        with torch.autocast(device, dtype=torch.bfloat16):
            expected = F.linear(*expected_leaves)
            got = parallel.parallel_linear_func(*leaves, group())
            assert torch.equal(got, expected)
            expected.backward(torch.ones_like(expected))
            got.backward(torch.ones_like(got))
        for mine, whole in zip(leaves[1:], expected_leaves[1:]):
            torch.testing.assert_close(mine.grad, whole.grad, rtol=0.02, atol=0.02)
        dx = WORLD_SIZE * part(expected_leaves[0].grad)
        torch.testing.assert_close(leaves[0].grad, dx, rtol=0.02, atol=0.02)


def test_autocast(ranks):
    ranks.check(check_autocast)


def check_embeddings(sequence_parallel, positions, combine):
    words, places = (nn.Embedding(n, 6, dtype=torch.float64) for n in (10, 7))
    layer = parallel.ParallelEmbeddings(
        6, 10, 7 if positions else 0, group(), None, sequence_parallel, dtype=torch.float64
    )
    state = {"word_embeddings.weight": part(words.weight)}
    if positions:
        state["position_embeddings.weight"] = part(places.weight, 1)
    layer.load_state_dict(state)
    ids = torch.tensor([[0, 4, 5, 9, 1, 8, 5], [5, 5, 3, 2, 9, 0, 6]])
    for position_ids in [None] + [ids % 7] * positions:
        expected = words(ids)
        if positions:
            expected = expected + places(torch.arange(7) if position_ids is None else position_ids)
        expected = expected.flatten(0, 1) if combine else expected
        out = layer(ids, position_ids, combine)
        dout = randn(*expected.shape)
        tokens = part if sequence_parallel else (lambda tensor: tensor)
        assert_equal(out, tokens(expected))
        words.zero_grad(), places.zero_grad(), layer.zero_grad()
        expected.backward(dout)
        out.backward(tokens(dout))
        assert_equal(layer.word_embeddings.weight.grad, part(words.weight.grad))
        if positions:
            assert_equal(layer.position_embeddings.weight.grad, part(places.weight.grad, 1))


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("positions, combine", [(False, False), (True, False), (True, True)])
def test_embeddings(ranks, sequence_parallel, positions, combine):
    ranks.check(
        check_embeddings,
        sequence_parallel=sequence_parallel,
        positions=positions,
        combine=combine,
    )


def test_embeddings_without_a_group():
    layer = parallel.ParallelEmbeddings(6, 10, 7, None, padding_idx=3)
    ids = torch.tensor([[3, 9], [0, 3]])
    expected = layer.word_embeddings.weight[ids] + layer.position_embeddings.weight[:2]
    assert torch.equal(layer(ids), expected)
    assert layer.word_embeddings.weight[3].count_nonzero() == 0


def check_refusals():
    with pytest.raises(ValueError, match=r"out_features \(10\) must be a multiple of 3"):
        parallel.ColumnParallelLinear(4, 10, group(), multiple_of=3)
    with pytest.raises(ValueError, match=r"in_features \(10\) must be a multiple of 3"):
        parallel.RowParallelLinear(10, 4, group(), multiple_of=3)
    with pytest.raises(ValueError, match=r"num_embeddings \(5\) .* number of ranks, 2"):
        parallel.VocabParallelEmbedding(5, 4, process_group=group())
    with pytest.raises(ValueError, match=r"embedding_dim \(5\) .* number of ranks, 2"):
        parallel.ColumnParallelEmbedding(4, 5, process_group=group())
    with pytest.raises(RuntimeError, match="padding_idx"):
        parallel.VocabParallelEmbedding(4, 4, process_group=group(), padding_idx=0)
    block = make_parallel(make(), sequence_parallel=True)
    with pytest.raises(ValueError, match="seqlen = 4 must divide the 6 tokens of u, on all ranks"):
        block(randn(3, 16), seqlen=4)


def test_refusals(ranks):
    ranks.check(check_refusals)


# Mamba2 over a process group ----------------------------------------------------------------------

KINDS = {
    "base": {},
    "groups": {"ngroups": 4},
    "part by part": {"use_mem_eff_path": False, "bias": True},
    "no norm": {"rmsnorm": False},
    "norm before gate": {"norm_before_gate": True, "bias": True},
    "MLP": {"d_ssm": 16},
    "MLP, part by part": {"d_ssm": 16, "rmsnorm": False, "use_mem_eff_path": False},
    "D per channel": {"D_has_hdim": True, "dt_limit": (0.02, 0.05)},
}
kinds = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS.keys())
sequence_parallel = pytest.mark.parametrize("sequence_parallel", [False, True])


def make(**options):
    """Block of one process, the same on every rank."""
    torch.manual_seed(0)
    options = {"d_model": 16, "d_state": 5, "headdim": 4, "ngroups": 2, "layer_idx": 0, **options}
    block = Mamba2(**options, dtype=torch.float64)
    block.options = options
    with torch.no_grad():  # what starts as ones
        block.D.uniform_(0.5, 1.5)
        if block.rmsnorm:
            block.norm.weight.uniform_(0.5, 1.5)
    return block


def parts(block, tensors):
    """This rank's parts of parameters of block, or of their gradients, by name."""
    d_mlp, d_bc = block.d_inner - block.d_ssm, block.ngroups * block.d_state
    xBC = [block.d_ssm, d_bc, d_bc]
    sections = {
        "in_proj": (0, [d_mlp, d_mlp, block.d_ssm, *xBC, block.nheads]),
        "conv1d": (0, xBC),
        "out_proj": (1, [d_mlp, block.d_ssm]),
    }
    mine = {}
    for name, tensor in tensors.items():
        if name == "out_proj.bias":
            if dist.get_rank() == 0:
                mine[name] = tensor
            continue
        dim, sizes = sections.get(name.split(".")[0], (0, [tensor.shape[0]]))
        mine[name] = torch.cat([part(section, dim) for section in tensor.split(sizes, dim)], dim)
    return mine


def make_parallel(block, sequence_parallel):
    mine = Mamba2(
        **block.options,
        process_group=group(),
        sequence_parallel=sequence_parallel,
        dtype=torch.float64,
    )
    assert mine.world_size == WORLD_SIZE and mine.local_rank == dist.get_rank()
    mine.load_state_dict(parts(block, block.state_dict()))
    torch.manual_seed(1)  # rank 0 drew a bias more
    return mine


def compare_training(block, mine, u, tokens, flat=False, **packing):
    """Output and all gradients. tokens: a rank's part of the tokens."""
    whole_u, u = leaf(u), leaf(tokens(u.flatten(0, 1) if flat else u))
    expected = block(whole_u, **packing)
    dout = randn(*expected.shape)
    expected.backward(dout)
    du = whole_u.grad
    if flat:
        expected, dout, du = (tensor.flatten(0, 1) for tensor in (expected, dout, du))
        packing["seqlen"] = whole_u.shape[1]
    default_device = torch.get_default_device()
    torch.set_default_device(None)  # a mode that torch.compile does not trace
    out = mine(u, **packing)
    torch.set_default_device(default_device)
    assert_equal(out, tokens(expected))
    out.backward(tokens(dout))
    assert_equal(u.grad, tokens(du), "du")
    expected = parts(block, {name: p.grad for name, p in block.named_parameters()})
    assert expected.keys() == dict(mine.named_parameters()).keys()
    for name, parameter in mine.named_parameters():
        assert_equal(parameter.grad, expected[name], name)
    block.zero_grad()
    mine.zero_grad()


def check_training(options, sequence_parallel):
    block = make(**options)
    mine = make_parallel(block, sequence_parallel)
    tokens = part if sequence_parallel else (lambda tensor: tensor)
    # A rank's part ends inside of a sequence, or is a part of the batch.
    compare_training(block, mine, randn(3, 6, 16), tokens, flat=True)
    compare_training(block, mine, randn(4, 7, 16), tokens)


@kinds
@sequence_parallel
def test_training(ranks, options, sequence_parallel):
    ranks.check(check_training, options=options, sequence_parallel=sequence_parallel)


def check_packed(options):
    block = make(**options)
    mine = make_parallel(block, sequence_parallel=True)
    seq_idx = torch.tensor([[0, 0, 0, 2, 2, 5], [1, 1, 1, 1, 1, 1]])
    compare_training(block, mine, randn(2, 6, 16), part, flat=True, seq_idx=seq_idx)
    offsets = torch.tensor([0, 5, 5, 8, 12])
    compare_training(block, mine, randn(1, 12, 16), part, flat=True, cu_seqlens=offsets)


def check_compile(sequence_parallel):
    block = make()
    mine = make_parallel(block, sequence_parallel)
    mine.compile(fullgraph=True, backend="aot_eager")
    tokens = part if sequence_parallel else (lambda tensor: tensor)
    compare_training(block, mine, randn(3, 6, 16), tokens, flat=True)


@pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="Dynamo does not trace asynchronous collectives yet"
)
@sequence_parallel
def test_compile(ranks, sequence_parallel):
    ranks.check(check_compile, sequence_parallel=sequence_parallel)


@pytest.mark.parametrize("use_mem_eff_path", [False, True])
def test_packed(ranks, use_mem_eff_path):
    ranks.check(check_packed, options={"use_mem_eff_path": use_mem_eff_path})


@torch.no_grad()
def check_cache(options, sequence_parallel):
    """A prefill and steps, through forward and through step, give what the whole sequence does."""
    block = make(**options)
    mine = make_parallel(block, sequence_parallel)
    tokens = part if sequence_parallel else (lambda tensor: tensor)
    u = randn(4, 8, 16)
    expected = block(u)
    for flat in (False, True):
        params = InferenceParams(max_seqlen=8, max_batch_size=4)
        for begin, end in ((0, 4), (4, 6), (6, 7), (7, 8)):
            piece, expected_piece = u[:, begin:end], tokens(expected[:, begin:end])
            if flat:
                out = mine(tokens(piece).flatten(0, 1), seqlen=end - begin, inference_params=params)
                expected_piece = expected_piece.flatten(0, 1)
            else:
                out = mine(tokens(piece), inference_params=params)
            assert_equal(out, expected_piece)
            params.seqlen_offset = end
        conv_state, ssm_state = params.key_value_memory_dict[0]
        assert conv_state.shape[0] == ssm_state.shape[0] == 4

    conv_state, ssm_state = mine.allocate_inference_cache(4, 8)
    for t in range(8):
        out, *_ = mine.step(tokens(u[:, t : t + 1]), conv_state, ssm_state)
        assert_equal(out, tokens(expected[:, t : t + 1]))


@kinds
@sequence_parallel
def test_cache(ranks, options, sequence_parallel):
    ranks.check(check_cache, options=options, sequence_parallel=sequence_parallel)


# Data parallelism --------------------------------------------------------------------------------


def check_data_parallel(name, wrapper):
    """Two steps of an optimizer, each rank with its part of the batch."""
    module = modules.make(name, torch.get_default_device())
    wrapped = copy.deepcopy(module)
    if wrapper == "DDP":
        wrapped = nn.parallel.DistributedDataParallel(wrapped)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(torch.get_default_device().type, (WORLD_SIZE,))
        blocks = wrapped.backbone.layers if hasattr(wrapped, "backbone") else []
        for part_of_model in (*blocks, wrapped):
            fully_shard(part_of_model, mesh=mesh)

    def train(module, batch):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        for x, target in batch:
            optimizer.zero_grad()
            F.mse_loss(modules.run(module, x), target).backward()
            optimizer.step()

    x = modules.inputs(module, torch.get_default_device(), batch=4)
    batches = [(x, torch.randn_like(modules.run(module, x))) for _ in range(2)]
    before = copy.deepcopy(module.state_dict())
    train(module, batches)
    train(wrapped, [(part(x), part(target)) for x, target in batches])
    trained = wrapped.module if wrapper == "DDP" else wrapped
    for (name, expected), parameter in zip(
        module.named_parameters(), trained.parameters(), strict=True
    ):
        parameter = parameter if wrapper == "DDP" else parameter.full_tensor()
        assert_equal(parameter, expected, name)
        assert not torch.equal(expected, before[name]), name


@pytest.mark.parametrize("wrapper", ["DDP", "FSDP2"])
@pytest.mark.parametrize("name", modules.MODULES)
def test_data_parallel(ranks, name, wrapper):
    ranks.check(check_data_parallel, name=name, wrapper=wrapper)
