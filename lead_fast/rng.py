"""Counter-based uniform random numbers: Philox4x32-10, bit-identical in PyTorch, C++, CUDA and NumPy.

A number depends on (seed, stream, round, counter) alone, never on the device, the number of threads or what was drawn
before, so every rank draws the same numbers and a resumed run continues where it stopped.

    key      = (seed low 32 bits, seed high 32 bits)
    counter  = (counter low 32 bits, counter high 32 bits, round, stream)
    uniform  = (x + 0.5) * 2^-32          x the first output word; exact in fp64, in (0, 1)

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import operator

import torch

from lead_fast import extension as _extension  # noqa: F401, its import loads the C++ and CUDA kernels

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_uniform(seed: int, stream: int, round: int, counters: torch.Tensor) -> torch.Tensor:
    """Uniform numbers in (0, 1), one for each counter.

    Args:
        seed: int64; its 64 bits are the key.
        stream: what the numbers are for, in [0, 2**32): two streams never share a number.
        round: in [0, 2**32).
        counters: int64, any shape and device: a row number, a draw's number.

    Returns:
        float64, shape and device of `counters`, contiguous. Deterministic: the same on every device.

    Raises:
        TypeError: `counters` is no int64 tensor, or another argument is no integer.
        ValueError: an integer is out of range.
    """
    seed = _integer("seed", seed, -(2**63), 2**63)
    stream, round = _words(stream, round)
    _check_counters(counters)
    return torch.ops.lead_fast.philox_uniform(seed, stream, round, counters)


def philox_uniform_reference(seed: int, stream: int, round: int, counters: torch.Tensor) -> torch.Tensor:
    """`philox_uniform` in plain PyTorch: the specification, and the kernel where no library is loaded."""
    stream, round = _words(stream, round)
    _check_counters(counters)
    counters = counters.contiguous()
    words = (
        counters & _WORD,
        (counters >> 32) & _WORD,
        torch.full_like(counters, round),
        torch.full_like(counters, stream),
    )
    first, *_ = philox4x32_10(words, (seed & _WORD, (seed >> 32) & _WORD))
    return (first.double() + 0.5) * 2.0**-32


def philox4x32_10(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Four output words per counter block; every word is an int64 tensor of one shape with values in [0, 2**32)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _multiply(multiplier: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a 32 by 32 bit product: int64 wraps modulo 2^64, and masking undoes the sign."""
    product = word * multiplier
    return (product >> 32) & _WORD, product & _WORD


def _words(stream: int, round: int) -> tuple[int, int]:
    return _integer("stream", stream, 0, 2**32), _integer("round", round, 0, 2**32)


def _integer(name: str, value: int, low: int, high: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"philox_uniform: `{name}` must be an integer, got {type(value).__name__}") from None
    if not low <= number < high:
        raise ValueError(f"philox_uniform: `{name}` must be in [{low}, {high}), got {number}")
    return number


def _check_counters(counters: torch.Tensor) -> None:
    if not isinstance(counters, torch.Tensor):
        raise TypeError(f"philox_uniform: `counters` must be an int64 tensor, got {type(counters).__name__}")
    if counters.dtype != torch.int64:
        raise TypeError(f"philox_uniform: `counters` must be int64, got {counters.dtype}")


def _philox_uniform_fake(seed: int, stream: int, round: int, counters: torch.Tensor) -> torch.Tensor:
    _words(stream, round)
    _check_counters(counters)
    return counters.new_empty(counters.shape, dtype=torch.float64)


_NAME = "lead_fast::philox_uniform"
torch.library.define(_NAME, "(int seed, int stream, int round, Tensor counters) -> Tensor")
# The catch-all below explicit CPU and CUDA kernels: whatever the libraries do not serve runs on the reference.
torch.library.impl(_NAME, "CompositeExplicitAutograd", philox_uniform_reference)
torch.library.register_fake(_NAME, _philox_uniform_fake)
