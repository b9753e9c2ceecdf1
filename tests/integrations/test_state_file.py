"""States as safetensors with a JSON header."""

import math

import pytest
import torch

from lead_fast.integrations.state_file import load_state, save_state


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else:
        assert a == b


def test_a_state_comes_back_as_it_was(tmp_path):
    base = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    state = {
        "views": [base.t(), base[1], base],  # of one storage, not contiguous
        "empty": torch.zeros(0, 3, dtype=torch.int64),
        "scalar": torch.tensor(7, dtype=torch.int32),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "flags": torch.tensor([True, False]),
        "nested": {"a.b": {"c": torch.zeros(1)}, "a": {"b.c": torch.ones(1)}, "leaves": [1, 2.5, "x", None, True, []]},
        "nothing": {},
    }
    save_state(tmp_path / "state", state)
    assert_same(load_state(tmp_path / "state"), state)


def test_tuples_become_lists(tmp_path):
    save_state(tmp_path / "state", {"pair": (1, torch.ones(2))})
    pair = load_state(tmp_path / "state")["pair"]
    assert isinstance(pair, list) and pair[0] == 1 and torch.equal(pair[1], torch.ones(2))


@pytest.mark.parametrize(
    ("state", "error"),
    [
        ({"a": {1: 2}}, TypeError),
        ({"a": {"$tensor": 1}}, TypeError),
        ({"a": object()}, TypeError),
        ({"a": [math.nan]}, ValueError),
    ],
    ids=["key", "reserved key", "leaf", "NaN"],
)
def test_what_cannot_be_written_is_refused_and_leaves_no_file(state, error, tmp_path):
    with pytest.raises(error):
        save_state(tmp_path / "state", state)
    assert not list(tmp_path.iterdir())


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a file"):
        load_state(tmp_path / "none")
    save_state(tmp_path / "state", {"a": torch.ones(1000)})
    data = (tmp_path / "state").read_bytes()
    (tmp_path / "cut").write_bytes(data[:-100])
    with pytest.raises(ValueError, match="whole safetensors file"):
        load_state(tmp_path / "cut")
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="hold a state"):
        load_state(tmp_path / "other")
