"""What all Python tests share: devices, seeds, and CUDA errors that stay where they happen."""

import os
import pathlib
import sys
import tempfile

# Read when torch loads OpenMP: threads that wait sleep, so that small operations stay fast on a
# machine that has other things to do.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# What Inductor keeps of a program does not depend on the build of our libraries that it was made
# with: it is never that of another run.
_compiled = tempfile.TemporaryDirectory(prefix="mamba_ssm-tests-")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = _compiled.name

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # the harness


def devices():
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices())


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _device_survives(request):
    """A CUDA error belongs to the test that caused it."""
    yield
    callspec = getattr(request.node, "callspec", None)
    if callspec and callspec.params.get("device") == "cuda":
        torch.cuda.synchronize()
