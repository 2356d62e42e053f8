"""Files of tensors by name, through the package safetensors or else our own reader and writer."""


def save_safetensors(tensors, path):
    """Writes contiguous tensors that share no memory."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        _own().save_safetensors(str(path), tensors, {"format": "pt"})
    else:
        save_file(tensors, path, metadata={"format": "pt"})


def load_safetensors(path):
    """CPU tensors by name. Raises ValueError that names a malformed file and its fault."""
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError:
        own = _own()
        try:
            return own.load_safetensors(str(path))
        except RuntimeError as error:  # "load_safetensors: PATH: FAULT"
            raise ValueError(str(error).partition(": ")[2]) from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error


def _own():
    try:
        from mamba_ssm import _C
    except ImportError as error:
        raise ImportError(f"{error} For files of tensors, `pip install safetensors`.") from None
    return _C
