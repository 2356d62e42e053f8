"""State of a generation."""

from dataclasses import dataclass, field
from typing import Optional

from torch import Tensor


@dataclass
class InferenceParams:
    """Caches of all layers, filled by the first call of a model and advanced by later ones."""

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0  # tokens already in the caches
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)  # layer_idx -> states
    lengths_per_sample: Optional[Tensor] = None

    def reset(self, max_seqlen, max_batch_size):
        """Starts a new sequence in the same caches."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
