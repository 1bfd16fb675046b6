"""Seeded noise equals literal values, and torch's bit for bit where torch is installed."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from latentforge.runtime.errors import SettingsError
from latentforge.runtime.rng import Generator, _box_muller, _fma

SEEDS = [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 42, 2**63, 2**64 - 1, -1, -123456789, -(2**63)]


@pytest.fixture(scope="module")
def torch() -> Any:
    """torch, if it uses the kernel that the module reproduces."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    if torch.backends.cpu.get_cpu_capability() not in {"AVX2", "AVX512"}:
        pytest.skip("this torch draws float32 normals through the C library")
    return torch


def differences(torch: Any, seed: int, sizes: list[int]) -> int:
    """Return the number of values that differ in any bit over one sequence of draws."""
    generator, reference = Generator(seed), torch.Generator("cpu").manual_seed(seed)
    count = 0
    for size in sizes:
        expected = torch.randn((size,), generator=reference).numpy()
        count += int((generator.randn((size,)).view(np.int32) != expected.view(np.int32)).sum())
    return count


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_torch_at_every_size(torch: Any, seed: int) -> None:
    for size in [*range(41), 16384, 16384 + 7, 65536]:
        assert differences(torch, seed, [size]) == 0, size


@pytest.mark.parametrize("seed", range(20))
def test_equals_torch_over_a_sequence_of_draws(torch: Any, seed: int) -> None:
    sizes = np.random.default_rng(seed).integers(0, 40, 100).tolist()
    assert differences(torch, seed, [*sizes, 65536 + seed, 1, 16384]) == 0


def test_equals_torch_over_millions_of_values(torch: Any) -> None:
    assert differences(torch, 20260101, [2_000_003]) == 0


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (1, 4, 8, 8), (2, 0, 4), (4, 3, 9)])
def test_shapes_fill_in_row_order(torch: Any, shape: tuple[int, ...]) -> None:
    noise = Generator(7).randn(shape)
    expected = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(7)).numpy()
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(noise, expected, strict=True)


def test_literal_values() -> None:
    """Seed 0: half a pair, a block, the other half, then a partial block and two more."""
    generator = Generator(0)
    drawn = [generator.randn((1,)), generator.randn((16,)), generator.randn((1,))]
    drawn += [generator.randn((19,)), generator.randn((2,))]
    assert [float(values[-1]).hex() for values in drawn] == [
        "0x1.8a7eb80000000p+0",
        "0x1.fc55320000000p-1",
        "-0x1.2c78a00000000p-2",
        "-0x1.94bc040000000p+0",
        "-0x1.b07f5c0000000p+0",
    ]
    assert math.fsum(np.concatenate(drawn).tolist()).hex() == "-0x1.5ea10a4700000p+2"


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**64])
def test_refuses_a_seed_torch_refuses(seed: int) -> None:
    with pytest.raises(SettingsError, match="is out of range"):
        Generator(seed)


def test_fma_rounds_once() -> None:
    """Sums next to the middle between two floats, which float64 alone would round to the middle."""

    def floats(*values: float) -> NDArray[np.float32]:
        return np.array(values, np.float32)

    middle, tiny = 1 + 2.0**-12, 2.0**-60  # middle**2 = 1 + 2**-11 + 2**-24
    a = floats(middle, middle, -middle, 2**-24, 2**-24, 1.5)
    b = floats(middle, middle, middle, 1 + 2**-23, 1 - 2**-24, 1.5)
    c = floats(tiny, -tiny, -tiny, 1, 1, -0.25)
    below, above = 1 + 2**-11, 1 + 2**-11 + 2**-23
    assert _fma(a, b, c).tolist() == [above, below, -above, 1 + 2**-23, 1, 2]


def test_no_negative_zeros() -> None:
    """A uniform of 0 gives a radius of -0; torch adds the mean, 0, to the result."""
    normals = _box_muller(np.zeros(16, np.float32))
    assert not normals.any()
    assert not np.signbit(normals).any()
