"""Tests that run on a GPU, and are skipped where there is none."""

import pytest

from latentforge.runtime.backends import cuda
from latentforge.runtime.errors import DeviceError


@pytest.fixture(scope="session", autouse=True)
def gpu() -> cuda.Gpu:
    """The GPU that is here."""
    try:
        return cuda.require_gpu()
    except DeviceError as error:
        pytest.skip(str(error))
