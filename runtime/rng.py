"""Normal noise that equals, bit for bit, that of torch's CPU generator for the same seed.

An image is a function of its initial latents, so a seed gives the same image with and without
torch only if the noise agrees. torch draws 32-bit words from MT19937 (Matsumoto & Nishimura
1998) and turns pairs of uniforms into pairs of normals by Box & Muller (1958),

    n1 = sqrt(-2 log u1) cos(2 pi u2)      n2 = sqrt(-2 log u1) sin(2 pi u2)

in one of two ways. Draws of fewer than 16 values use float64 and the C library, and keep the second
normal of a pair for the next such draw. Draws of 16 or more values use float32, on blocks of 8 + 8
uniforms, with the Cephes polynomials for log, sin and cos, in which the compiler of torch's
binaries contracts each product that is only used in a sum into a fused multiply-add.

torch uses this float32 kernel on x86-64 processors with AVX2, including those with AVX-512. On
older processors, on Arm, and under ATEN_CPU_CAPABILITY=default, it uses the C library instead, and
four values in ten differ from these in the last bits (by 2e-6 at most). Values of a torch that was
built with another compiler may differ as well.
"""

import math
from collections.abc import Sequence
from operator import index

import numpy as np
from numpy.typing import NDArray

from latentforge.runtime.errors import SettingsError

__all__ = ["Generator", "NoiseSource"]

_Floats = NDArray[np.float32]
_F32 = np.float32

_BLOCK = 16  # normals per block in torch: 8 cosines, then 8 sines
_CHUNK = 8192  # pairs per chunk, so that temporaries stay in cache

# Cephes' single precision polynomials, highest power first. _LOG is the remainder of log(1 + x)
# after x - x**2 / 2, for sqrt(1/2) <= 1 + x < sqrt(2); _SIN and _COS hold for |x| <= pi / 4.
_LOG = (
    *(7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1),
    *(-1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1),
)
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_LOG2 = (
    -2.12194440e-4,
    0.693359375,
)  # their sum is log 2; integer multiples of the second are exact
_PI_4 = (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8)  # likewise pi / 4


class Generator:
    """Random generator with the stream of ``torch.Generator("cpu").manual_seed(seed)``.

    It has state, as torch's has: the same sequence of shapes gives the same sequence of arrays.

    Args:
        seed: from -2**63 to 2**64 - 1.

    Raises:
        SettingsError: the seed is out of range.
    """

    def __init__(self, seed: int) -> None:
        seed = index(seed)
        if not -(2**63) <= seed < 2**64:
            raise SettingsError(f"seed {seed} is out of range: choose one from -2**63 to 2**64 - 1")
        # RandomState seeds MT19937 as torch does, which uses only the lowest 32 bits.
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._spare: float | None = None

    def randn(self, shape: Sequence[int]) -> _Floats:
        """Draw a float32 array of this shape from the standard normal distribution."""
        size = math.prod(shape)
        if size >= _BLOCK:
            return self._randn32(size).reshape(shape)
        values = [self._randn64() for _ in range(size)]
        return np.array(values, np.float64).astype(np.float32).reshape(shape)

    def _randn32(self, size: int) -> _Floats:
        """Draw blocks of 16; a partial last block is replaced by one over the last 16 values."""
        whole = size - size % _BLOCK
        uniforms = self._uniforms(size)
        normals = np.empty(size, np.float32)
        normals[:whole] = _box_muller(uniforms[:whole])
        if whole < size:
            normals[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return normals

    def _randn64(self) -> float:
        """Draw one normal in float64: the last pair's spare one, or the first of a new pair."""
        if self._spare is not None:
            value, self._spare = self._spare, None
            return value
        u1, u2 = self._uniform64(), self._uniform64()
        radius, theta = math.sqrt(-2.0 * math.log1p(-u2)), 2.0 * math.pi * u1
        self._spare = radius * math.sin(theta)
        return radius * math.cos(theta)

    def _uniforms(self, count: int) -> _Floats:
        """Draw multiples of 2**-24 in [0, 1), one word each."""
        words = np.frombuffer(self._words.bytes(4 * count), "<u4")
        return (words & 0xFFFFFF).astype(np.float32) * _F32(2.0**-24)

    def _uniform64(self) -> float:
        """Draw a multiple of 2**-53 in [0, 1) from two words, the higher first."""
        high, low = np.frombuffer(self._words.bytes(8), "<u4").tolist()
        return math.ldexp((high << 32 | low) & (1 << 53) - 1, -53)


class NoiseSource:
    """Source of noise for the images of a request, as of torch generators of its seeds.

    Args:
        seeds: one for all images, which are drawn together, or one for each image.

    Raises:
        SettingsError: a seed is out of range.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        self._generators = [Generator(seed) for seed in seeds]

    @property
    def rows(self) -> int | None:
        """Number of rows that every draw must have; None if there is one seed for any number."""
        return None if len(self._generators) == 1 else len(self._generators)

    def randn(self, shape: Sequence[int]) -> _Floats:
        """Draw a float32 array of this shape, each row with its own generator if there are some."""
        if self.rows is None:
            return self._generators[0].randn(shape)
        row = (1, *shape[1:])
        return np.concatenate([generator.randn(row) for generator in self._generators])


def _box_muller(uniforms: _Floats) -> _Floats:
    """Return normals from uniforms; both are flat and a whole number of blocks long."""
    blocks = uniforms.reshape(-1, 2, _BLOCK // 2)
    u1, u2 = _F32(1) - blocks[:, 0].ravel(), blocks[:, 1].ravel()
    normals = np.empty_like(blocks)
    rows = 2 * _CHUNK // _BLOCK
    for row in range(0, len(blocks), rows):
        pairs = slice(row * _BLOCK // 2, (row + rows) * _BLOCK // 2)
        radius = np.sqrt(_F32(-2) * _log(u1[pairs]))
        cos, sin = _cos_sin(_F32(2 * math.pi) * u2[pairs])
        # torch adds the mean, 0, which turns -0 into 0.
        normals[row : row + rows, 0] = (radius * cos + _F32(0)).reshape(-1, _BLOCK // 2)
        normals[row : row + rows, 1] = (radius * sin + _F32(0)).reshape(-1, _BLOCK // 2)
    return normals.reshape(-1)


def _log(u: _Floats) -> _Floats:
    """Return log u for u in [2**-24, 1] as Cephes' logf: exponent and mantissa separately."""
    mantissa, exponent = np.frexp(u)
    low = mantissa < _F32(math.sqrt(0.5))
    e = (exponent - low).astype(np.float32)
    x = np.where(low, mantissa + mantissa, mantissa) - _F32(1)
    square = x * x
    tail = _fma(_horner(_LOG, x) * x, square, e * _F32(_LOG2[0])) - square * _F32(0.5)
    return _fma(e, _F32(_LOG2[1]), x + tail)


def _cos_sin(theta: _Floats) -> tuple[_Floats, _Floats]:
    """Return cos and sin of theta in [0, 2 pi] as Cephes' cosf and sinf: reduced by octants."""
    octant = (theta * _F32(4 / math.pi)).astype(np.int32)
    octant += octant & 1
    x = theta
    for part in _PI_4:
        x = _fma(octant.astype(np.float32), _F32(-part), x)
    square = x * x
    sin = _fma(_horner(_SIN, square) * square, x, x)
    cos = _fma(_horner(_COS, square) * square, square, square * _F32(-0.5)) + _F32(1)
    quarter = (octant & 2) != 0
    cos, sin = np.where(quarter, sin, cos), np.where(quarter, cos, sin)
    np.negative(cos, out=cos, where=(octant + 2 & 4) != 0)
    np.negative(sin, out=sin, where=(octant & 4) != 0)
    return cos, sin


def _horner(coefficients: Sequence[float], x: _Floats) -> _Floats:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fma(value, x, _F32(coefficient))
    return value


def _fma(a: _Floats, b: _Floats | np.float32, c: _Floats | np.float32) -> _Floats:
    """Return a * b + c, rounded once to float32 (fused multiply-add).

    In float64 the product is exact and the sum is rounded. The second rounding, to float32, is
    wrong only if the rounded sum lies halfway between two float32 values and the exact sum does
    not.
    """
    product = np.multiply(a, b, dtype=np.float64)
    total = product + c
    halfway = np.flatnonzero((total.view(np.int64) & 0x1FFFFFFF) == 0x10000000)
    if halfway.size:
        addend = np.broadcast_to(c, total.shape)[halfway].astype(np.float64)
        total[halfway] = _toward_exact(product[halfway], addend)
    return total.astype(np.float32)


def _toward_exact(p: NDArray[np.float64], c: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return p + c, moved one float64 towards its rounding error (two-sum: Knuth, TAOCP 4.2.2)."""
    total = p + c
    virtual = total - p
    error = (p - (total - virtual)) + (c - virtual)
    return np.where(error == 0, total, np.nextafter(total, np.copysign(np.inf, error)))
