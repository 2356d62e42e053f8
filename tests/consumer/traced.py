"""Writes, for traced.cpp: a traced language model with an input and what it makes of it."""

import sys
import warnings

import torch
from mamba_ssm import MambaLMHeadModel
from mamba_ssm.models.config_mamba import MambaConfig


class Example(torch.nn.Module):
    def __init__(self):
        super().__init__()
        ssm_cfg = {"layer": "Mamba2", "d_state": 16, "headdim": 8}
        config = MambaConfig(d_model=32, n_layer=2, vocab_size=100, ssm_cfg=ssm_cfg)
        self.model = MambaLMHeadModel(config)
        self.register_buffer("input_ids", torch.randint(100, (3, 40)))
        with torch.no_grad():
            self.register_buffer("logits", self.model(self.input_ids).logits)

    def forward(self, input_ids):
        return self.model(input_ids).logits


example = Example().eval()
warnings.simplefilter("ignore")  # that sizes are compared, and that TorchScript is old
torch.jit.trace(example, torch.randint(100, (2, 7))).save(sys.argv[1])
