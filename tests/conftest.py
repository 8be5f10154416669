"""What tests of every kind share."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("AGFT_RAY_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def conversation_trace():
    """The Azure 2023 conversation trace (github.com/Azure/AzurePublicDataset, CC-BY 4.0)."""
    path = DATA / "traces" / "azure2023_conv.csv"
    if not path.exists():
        pytest.skip(f"no trace at {path}; set AGFT_RAY_DATA to the folder that holds traces/")
    return path
