"""Models of Hugging Face transformers give its plain PyTorch path's answers over our packages.

transformers takes an installed `mamba_ssm` and `causal_conv1d` on every device, CPU included, when
a model's file is imported, and falls back without an error. So each test also counts the calls of
our operations.
"""

import collections
import json

import pytest
import torch
from harness import compare

import mamba_ssm
import transformers_models as models

pytest.importorskip("transformers", minversion="5.17")

FULLGRAPH = [  # the families that claim torch.compile(fullgraph=True) and can
    *("jamba", "mamba2", "bamba", "nemotron_h", "granitemoehybrid", "lfm2", "lfm2_moe"),
    *("qwen3_next", "qwen3_5", "qwen3_5_moe", "olmo_hybrid", "kimi_linear", "glm5_next"),
]
CANNOT = {"qwen4_exp"}  # claims it too, but its sparse attention branches on data


def _questions():
    for name, family in models.FAMILIES.items():
        for cell in models.CELLS:
            if cell == "packed" and family.packs is None:
                continue
            yield pytest.param(name, cell, False, torch.float32, id=f"{name}-{cell}")
            yield pytest.param(name, cell, True, torch.float32, id=f"{name}-{cell}-odd")
            if cell != "generate":  # in 16 bits the best token is too close to call
                yield pytest.param(name, cell, False, torch.bfloat16, id=f"{name}-{cell}-bfloat16")


class Watch(torch.overrides.TorchFunctionMode):
    """Counts the calls of our operations, and spoils the results of one of them."""

    def __init__(self, spoil=None):
        self.calls = collections.Counter()
        self._spoil = spoil

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        name = _our_operation(function)
        if name is None:
            return result
        self.calls[name] += 1
        if name != self._spoil:
            return result
        return tuple(map(_spoiled, result)) if isinstance(result, tuple) else _spoiled(result)


def _our_operation(function):
    """The name of an operation, or of one of its overloads; None if it is none of ours."""
    name = getattr(function, "_qualified_op_name", None) or getattr(function, "name", str)()
    namespace, _, name = name.partition("::")
    return name if namespace == "mamba_ssm" else None


def _spoiled(result):
    """Wrong by up to a hundredth, differently everywhere, so that no norm takes it out again."""
    return result * torch.linspace(1, 1.01, result.numel()).view(result.shape).to(result)


def _expected_calls(name, cell):
    family = models.FAMILIES[name]
    return {
        "evaluate": family.evaluate,
        "train": family.train,
        "packed": family.evaluate | family.train,
    }.get(cell, family.evaluate | family.decode)


def _check(name, cell, answers, judges):
    exact, plain, blurred = judges
    assert answers.keys() == plain.keys()
    for key, answer in answers.items():
        if answer.is_floating_point():
            judgement = exact[key], plain[key], blurred[key]
            compare.check_close(f"{name} {cell}", key, answer, *judgement)
        else:
            assert torch.equal(exact[key], blurred[key]), "too close to call: change the weights"
            assert torch.equal(answer, exact[key]), f"{name} {cell}: wrong {key}"


@pytest.fixture(scope="module")
def reference(request):
    process = models.Reference()
    for item in request.session.items:  # it answers while the tests ask
        asked = getattr(item, "callspec", None) and item.callspec.params
        if asked and {"cell", "odd"} <= asked.keys():
            process.ask(*(asked[key] for key in ("name", "cell", "odd", "dtype", "device")))
    yield process
    process.close()


@pytest.mark.parametrize("name, cell, odd, dtype", list(_questions()))
def test_answers(reference, count_in_matrix, device, name, cell, odd, dtype):
    count_in_matrix(name, cell)
    with Watch() as watch:
        answers = models.ask(name, cell, odd, dtype, device)
    assert watch.calls.keys() == _expected_calls(name, cell)
    _check(name, cell, answers, reference.judges(name, cell, odd, dtype, device))


@pytest.mark.parametrize("name", models.FAMILIES)
def test_planted_errors_are_found(reference, count_in_matrix, device, name):
    count_in_matrix(name, "planted")
    for cell in ("evaluate", "train", "decode"):
        question = (name, cell, False, torch.float32, device)
        for operation in _expected_calls(name, cell):
            with Watch(spoil=operation):
                answers = models.ask(*question)
            with pytest.raises(AssertionError, match="error"):
                _check(name, cell, answers, reference.judges(*question))


class _Compiler:
    """A torch.compile backend that notes which of our operations its graphs call."""

    def __init__(self, backend):
        self.calls = set()
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph, inputs):
        for part in graph.modules():  # a graph may hold others
            if isinstance(part, torch.fx.GraphModule):
                self.calls |= {_our_operation(node.target) for node in part.graph.nodes} - {None}
        return self._compile(graph, inputs)


def _compiling_counts_as_exporting():
    """Of torch at hand (2.11 does); transformers takes its plain path in what it exports."""
    return torch.compile(lambda x: x + torch.compiler.is_exporting(), backend="eager")(0) == 1


@pytest.mark.parametrize("cell", ["train", "decode"])
@pytest.mark.parametrize("name", FULLGRAPH)
def test_compiles_to_one_graph(reference, count_in_matrix, device, name, cell):
    torch._dynamo.reset()
    if _compiling_counts_as_exporting():
        pytest.skip("on this torch transformers takes its plain path in every compiled graph")
    count_in_matrix(name, f"compiled-{cell}")
    # The backward of the delta rule fails in aot_eager with a stride of softplus_backward, also
    # on transformers' plain path.
    delta = cell == "train" and models.FAMILIES[name].packs == "convolution"
    compiler = _Compiler("eager" if delta else "aot_eager")
    question = (name, cell, False, torch.float32, device)
    answers = models.ask(*question, compiler=compiler)
    assert compiler.calls == _expected_calls(name, cell)
    _check(name, cell, answers, reference.judges(*question))


def test_who_claims_full_graphs():
    claims = {name for name in models.FAMILIES if models.claims_full_graphs(name)}
    assert claims == set(FULLGRAPH) | CANNOT


@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_checkpoint_converts(count_in_matrix, tmp_path, device, name):
    """transformers' conversion of our checkpoints: weights by name, sizes from config.json.

    Its scripts are not installed with it. They take pytorch_model.bin as torch.save writes it, with
    both names of a tied matrix, and let the model's load hook rename the embedding.
    """
    count_in_matrix(name, "checkpoint")
    from mamba_ssm.models.config_mamba import MambaConfig

    layer = {"mamba": "Mamba1", "mamba2": "Mamba2"}[name]
    config = MambaConfig(
        d_model=32, n_layer=2, vocab_size=models.VOCABULARY, ssm_cfg=dict(layer=layer)
    )
    ours = mamba_ssm.MambaLMHeadModel(config, device=device).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    ours.save_pretrained(tmp_path)
    torch.save(ours.state_dict(), tmp_path / "pytorch_model.bin")

    written = json.loads((tmp_path / "config.json").read_text())
    multiple = written["pad_vocab_size_multiple"]
    sizes = dict(
        hidden_size=written["d_model"],
        num_hidden_layers=written["n_layer"],
        vocab_size=-(-written["vocab_size"] // multiple) * multiple,
        residual_in_fp32=written["residual_in_fp32"],
        tie_word_embeddings=written["tie_embeddings"],
    )
    if name == "mamba2":
        sizes |= dict(n_groups=1, num_heads=2 * written["d_model"] // 64)
    theirs = models.new_model(name, **sizes).to(device).eval()
    theirs.load_state_dict(torch.load(tmp_path / "pytorch_model.bin", weights_only=True))
    tokens = torch.randint(models.VOCABULARY, (2, 11), device=device)
    with Watch() as watch:
        logits = theirs(tokens).logits
    assert watch.calls.keys() == models.FAMILIES[name].evaluate
    torch.testing.assert_close(logits, ours(tokens).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("odd", [False, True], ids=["", "odd"])
@pytest.mark.parametrize("name", ["mamba", "mamba2"])
def test_convert(count_in_matrix, tmp_path, capsys, name, odd):
    """`mamba-ssm convert`: what transformers saves is our model, and its own again."""
    count_in_matrix(name, "convert")
    from mamba_ssm.__main__ import main
    from transformers import AutoModelForCausalLM

    family = models.FAMILIES[name]
    sizes = family.config | (family.odd if odd else {})
    tied = odd != (name == "mamba")  # the default of the family, and the other one
    model = models.new_model(
        name, vocab_size=models.VOCABULARY, tie_word_embeddings=tied, **sizes
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "theirs")
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    arguments = [str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "transformers"]
    assert main(["convert", *arguments]) == 0
    tokens = torch.randint(models.VOCABULARY, (2, 11))
    ours = mamba_ssm.MambaLMHeadModel.from_pretrained(tmp_path / "ours").eval()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        logits = model(tokens).logits
        torch.testing.assert_close(ours(tokens).logits, logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(tokens).logits, logits, rtol=0, atol=0)
