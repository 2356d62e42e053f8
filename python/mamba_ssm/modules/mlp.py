"""The gated MLP (SwiGLU, arXiv 2002.05202)."""

import torch.nn as nn
import torch.nn.functional as F


class GatedMLP(nn.Module):
    """fc2(y * activation(gate)) with y, gate = fc1(x); (..., in_features) to (..., out_features).

    Arguments:
        in_features, out_features: widths; out_features is in_features when None.
        hidden_features: width between, int(8 * in_features / 3) when None; rounded up to a multiple
            of multiple_of.
        activation: function of the gate.
        bias: biases of fc1 and fc2.
    """

    def __init__(
        self,
        in_features,
        hidden_features=None,
        out_features=None,
        activation=F.silu,
        bias=False,
        multiple_of=128,
        device=None,
        dtype=None,
    ):
        factory_kwargs = {"device": device, "dtype": dtype}
        super().__init__()
        out_features = in_features if out_features is None else out_features
        hidden_features = int(8 * in_features / 3) if hidden_features is None else hidden_features
        hidden_features = -(-hidden_features // multiple_of) * multiple_of
        self.fc1 = nn.Linear(in_features, 2 * hidden_features, bias=bias, **factory_kwargs)
        self.activation = activation
        self.fc2 = nn.Linear(hidden_features, out_features, bias=bias, **factory_kwargs)

    def forward(self, x):
        y, gate = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(y * self.activation(gate))
