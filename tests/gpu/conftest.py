"""Tests that need a GPU; they are skipped without one."""

import pytest

from latentforge.runtime.backends import cuda
from latentforge.runtime.errors import DeviceError


@pytest.fixture(scope="session", autouse=True)
def gpu() -> cuda.Gpu:
    """Return the GPU of this machine."""
    try:
        return cuda.require_gpu()
    except DeviceError as error:
        pytest.skip(str(error))
