"""What a new process waits for: the import, and the first call of generate.

`python -m mamba_ssm._startup DEVICE LAYER` prints the second: LAYER FIRST STEADY, in seconds.
"""

import statistics
import subprocess
import sys
import time

import torch

from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig

IMPORT = """
import time
import torch
start = time.perf_counter()
import mamba_ssm
print(time.perf_counter() - start)
"""
LAYERS = ("Mamba1", "Mamba2")
STEADY_CALLS = 7


def import_time(processes=5):
    """Seconds that `import mamba_ssm` takes after `import torch`, the least of some processes."""
    return min(float(_output("-c", IMPORT)) for _ in range(processes))


def first_calls(device):
    """(layer, seconds of the first call of generate, median of later ones), in new processes."""
    lines = [_output("-m", __name__, device, layer).split() for layer in LAYERS]
    return [(layer, float(first), float(steady)) for layer, first, steady in lines]


def _output(*arguments):
    command = [sys.executable, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def _generate(device, layer):
    torch.manual_seed(0)
    config = MambaConfig(d_model=256, n_layer=4, vocab_size=1000, ssm_cfg={"layer": layer})
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = MambaLMHeadModel(config, device=device, dtype=dtype).eval()
    prompt = torch.randint(1000, (1, 64), device=device)
    seconds = []
    for _ in range(1 + STEADY_CALLS):
        start = time.perf_counter()
        model.generate(prompt, 96)[0, -1].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return seconds[0], statistics.median(seconds[1:])


if __name__ == "__main__":
    print(sys.argv[2], *_generate(*sys.argv[1:]))
