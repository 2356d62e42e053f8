"""Finds the C++ examples that the build made."""

import os
from pathlib import Path

import pytest

BUILT = Path(__file__).parents[2] / "build" / "scripts" / "examples" / "cpp"
FOLDER = Path(os.environ.get("MAMBA_SSM_EXAMPLES_DIR", BUILT))


def program(name):
    """The path of an example; skips where it is not built."""
    path = FOLDER / f"mamba_{name}"
    if not path.is_file():
        pytest.skip(f"{path} is not built: MAMBA_SSM_EXAMPLES=ON, MAMBA_SSM_TESTS=ON")
    return path
