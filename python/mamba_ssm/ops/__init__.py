"""Operations as Python functions, over ``torch.ops.mamba_ssm``."""
