"""Counter-based random numbers and arm draws: published vectors, and one truth in PyTorch, C++ and NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lead_fast import extension
from lead_fast.rng import philox4x32_10, philox_uniform, philox_uniform_reference

needs_core = pytest.mark.skipif(not extension.available()["_C"], reason="installed without the compiled extension")

# Known answers for Philox4x32-10 from the Random123 distribution: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

int64s = st.integers(-(2**63), 2**63 - 1)
words = st.integers(0, 2**32 - 1)


def as_int64(low: int, high: int) -> int:
    value = high << 32 | low
    return value - 2**64 if value >= 2**63 else value


def core():
    from lead_fast import _C

    return _C


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_reference_gives_the_published_words(counter, key, expected):
    blocks = philox4x32_10(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in blocks) == expected


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_operator_gives_the_published_first_word(counter, key, expected):
    counters = torch.tensor([as_int64(counter[0], counter[1])])
    uniform = philox_uniform(as_int64(*key), counter[3], counter[2], counters)
    assert uniform.item() == (expected[0] + 0.5) * 2.0**-32


@needs_core
@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_numpy_core_gives_the_published_first_word(counter, key, expected):
    counters = np.array([as_int64(counter[0], counter[1])])
    uniform = core().philox_uniform(as_int64(*key), counter[3], counter[2], counters)
    assert uniform[0] == (expected[0] + 0.5) * 2.0**-32


@given(seed=int64s, stream=words, round=words, counters=st.lists(int64s, max_size=20))
def test_operator_equals_reference(seed, stream, round, counters):
    tensor = torch.tensor(counters, dtype=torch.int64)
    uniforms = philox_uniform(seed, stream, round, tensor)
    assert torch.equal(uniforms, philox_uniform_reference(seed, stream, round, tensor))
    if extension.available()["_C"]:
        assert np.array_equal(uniforms.numpy(), core().philox_uniform(seed, stream, round, tensor.numpy()))


@pytest.mark.parametrize(
    "counters",
    [
        pytest.param(torch.tensor(5), id="scalar"),
        pytest.param(torch.empty(0, 3, dtype=torch.int64), id="empty"),
        pytest.param(torch.arange(30_000).view(100, 300)[:, ::3], id="strided, several threads"),
        pytest.param(torch.arange(12).view(3, 4).T, id="transposed"),
        pytest.param(torch.arange(3).expand(4, 3), id="expanded"),
    ],
)
def test_any_layout(counters):
    uniforms = philox_uniform(1, 2, 3, counters)
    assert uniforms.shape == counters.shape and uniforms.dtype == torch.float64 and uniforms.is_contiguous()
    assert torch.equal(uniforms, philox_uniform_reference(1, 2, 3, counters))
    torch.library.opcheck(torch.ops.lead_fast.philox_uniform.default, (1, 2, 3, counters))


def test_same_numbers_on_any_number_of_threads():
    counters = torch.arange(50_000)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = philox_uniform(0, 0, 0, counters)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone, philox_uniform(0, 0, 0, counters))


def test_uniform_and_unrelated_across_seed_stream_and_round():
    counters = torch.arange(100_000)
    numbers = [philox_uniform(*where, counters) for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]]
    for uniforms in numbers:
        assert uniforms.min() > 0.0 and uniforms.max() < 1.0
        shares = torch.histc(uniforms, bins=10, min=0.0, max=1.0) / len(counters)
        assert torch.allclose(shares, torch.full((10,), 0.1, dtype=torch.float64), atol=0.005)  # 5 standard errors
    correlation = torch.corrcoef(torch.stack(numbers)) - torch.eye(4)
    assert correlation.abs().max() < 5 / len(counters) ** 0.5


def test_one_operator_under_compile():
    compiled = torch.compile(lambda x: philox_uniform(7, 1, 2, x) * 2, fullgraph=True, backend="aot_eager")
    counters = torch.arange(100)
    assert torch.equal(compiled(counters), philox_uniform_reference(7, 1, 2, counters) * 2)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(0,), (1,), (1000, 1001)])
def test_cuda_gives_the_same_numbers(shape):
    counters = torch.randint(-(2**63), 2**63 - 1, shape)
    assert torch.equal(philox_uniform(3, 4, 5, counters.cuda()).cpu(), philox_uniform_reference(3, 4, 5, counters))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((2**63, 0, 0, torch.tensor([0])), ValueError, "`seed` must be in"),
        ((0, -1, 0, torch.tensor([0])), ValueError, "`stream` must be in"),
        ((0, 0, 2**32, torch.tensor([0])), ValueError, "`round` must be in"),
        ((0, 0.5, 0, torch.tensor([0])), TypeError, "`stream` must be an integer, got float"),
        ((0, 0, 0, torch.tensor([0.0])), TypeError, "`counters` must be int64, got torch.float32"),
        ((0, 0, 0, [0]), TypeError, "`counters` must be an int64 tensor, got list"),
    ],
)
def test_wrong_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=f"philox_uniform: {message}"):
        philox_uniform(*arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((-1, 0, torch.tensor([0])), "stream"),
        ((0, 2**32, torch.tensor([0])), "round"),
        ((0, 0, torch.ones(1)), "counters"),
    ],
)
def test_operator_called_directly_checks_too(arguments, name):
    with pytest.raises((RuntimeError, ValueError, TypeError), match=f"philox_uniform: `{name}` must be"):
        torch.ops.lead_fast.philox_uniform(0, *arguments)


def test_numpy_integers_are_integers():
    counters = torch.tensor([0])
    assert philox_uniform(np.int64(1), np.int32(2), np.uint8(3), counters) == philox_uniform(1, 2, 3, counters)


@needs_core
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c: c.philox_uniform(0, -1, 0, np.zeros(1, np.int64)), ValueError, "philox_uniform: `stream` must be"),
        (lambda c: c.philox_uniform(0, 0, 2**32, np.zeros(1, np.int64)), ValueError, "philox_uniform: `round` must be"),
        (
            lambda c: c.philox_uniform(0, 0, 0, np.zeros(2, np.int32)),
            TypeError,
            r"`counters` must be int64, got int32 \[2\]",
        ),
        (
            lambda c: c.philox_uniform(0, 0, 0, np.zeros(4, np.int64)[::2]),
            ValueError,
            "`counters` must be C-contiguous",
        ),
        (lambda c: c.exp3_probs(np.zeros(2, np.float32), np.ones(2, bool), 0.1), TypeError, "`log_w` must be float64"),
        (lambda c: c.exp3_probs(np.zeros(2), np.ones(3, bool), 0.1), ValueError, r"`mask` must be bool \[2\]"),
        (lambda c: c.exp3_probs(np.full(2, -np.inf), np.ones(2, bool), 0.1), ValueError, "`log_w` must be above -inf"),
        (lambda c: c.exp3_probs(np.array([0, np.nan]), np.ones(2, bool), 0.1), ValueError, "`log_w` must be below inf"),
        (
            lambda c: c.exp3_probs(np.zeros(2), np.ones(2, bool), 1.5),
            ValueError,
            r"`gamma` must be in \[0, 1\], got 1.5",
        ),
        (
            lambda c: c.exp3_draw(np.array([0.5, np.nan]), np.array([0.5])),
            ValueError,
            r"`probs` must be in \[0, 1\], got nan",
        ),
        (lambda c: c.exp3_draw(np.ones(1), np.array([1.5])), ValueError, "`uniforms` must be in"),
    ],
)
def test_numpy_core_names_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call(core())


@st.composite
def arms(draw):
    """Log weights, some of them huge, and a mask that holds at least one arm."""
    size = draw(st.integers(1, 12))
    log_w = draw(st.lists(st.floats(-800, 800), min_size=size, max_size=size))
    mask = draw(st.lists(st.booleans(), min_size=size, max_size=size).filter(any))
    return np.array(log_w), np.array(mask)


@needs_core
@given(arms=arms(), gamma=st.floats(0, 1))
def test_exp3_probs_follow_the_formula(arms, gamma):
    log_w, mask = arms
    weights = np.where(mask, np.exp(np.where(mask, log_w - log_w[mask].max(), 0.0)), 0.0)
    expected = np.where(mask, (1.0 - gamma) * weights / weights.sum() + gamma / mask.sum(), 0.0)
    probs = core().exp3_probs(log_w, mask, gamma)
    np.testing.assert_allclose(probs, expected, rtol=1e-14, atol=1e-300)  # exp differs by an ulp between libraries
    assert (probs[~mask] == 0).all() and abs(probs.sum() - 1.0) < 1e-14


@needs_core
@given(arms=arms(), gamma=st.floats(0, 1), uniform=st.one_of(st.floats(0, 1), st.just(1.0 - 2.0**-33)))
def test_draw_inverts_the_cumulative_sum(arms, gamma, uniform):
    probs = core().exp3_probs(*arms, gamma)
    (arm,) = core().exp3_draw(probs, np.array([uniform]))
    cumulative = np.cumsum(probs)
    first_above = np.searchsorted(cumulative, uniform * cumulative[-1], side="right")
    assert probs[arm] > 0
    assert arm == min(first_above, np.flatnonzero(probs)[-1])


@needs_core
def test_retired_arm_with_a_huge_weight_does_not_underflow_the_others():
    probs = core().exp3_probs(np.array([1e5, 0.0, 0.0]), np.array([False, True, True]), 0.0)
    assert probs.tolist() == [0.0, 0.5, 0.5]


@needs_core
def test_probs_of_no_arm_are_0_and_draw_none():
    probs = core().exp3_probs(np.array([0.0, np.nan]), np.zeros(2, bool), 0.1)
    assert probs.tolist() == [0.0, 0.0]
    assert core().exp3_draw(probs, np.array([0.0, 0.5])).tolist() == [-1, -1]


@needs_core
@pytest.mark.parametrize(("uniform", "arm"), [(0.0, 1), (0.49, 1), (0.5, 3), (1.0 - 2.0**-53, 3), (1.0, 3)])
def test_draw_never_takes_an_arm_of_probability_zero(uniform, arm):
    assert core().exp3_draw(np.array([0.0, 0.5, 0.0, 0.5, 0.0]), np.array([uniform])) == [arm]


@needs_core
def test_draw_when_the_sum_rounds_below_one():
    probs = np.array([0.1] * 10 + [0.0])
    assert np.cumsum(probs)[-1] < 1.0
    assert core().exp3_draw(probs, np.array([1.0])) == [9]
