"""Tables that are read in many places at once."""

import gc
import mmap
from pathlib import Path

import pytest
import torch

from lead_fast import device
from lead_fast.device import Parcel, copy_to_device, copy_to_host, scattered, scattered_zeros, to_fp32

CPU = torch.device("cpu")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int16, torch.uint8])
def test_zeros_hold_what_is_written(large, dtype, monkeypatch):
    monkeypatch.setattr(device, "_HUGE_FROM", 1 if large else 2**40)
    table = scattered_zeros(2, 1001, dtype=dtype, device=CPU)
    assert table.shape == (2, 1001) and table.dtype == dtype and not table.any() and table.is_contiguous()
    row = table[1]
    row[-1] = 7
    del table
    gc.collect()
    assert row.sum() == 7  # a view keeps the memory
    copy = scattered(row)
    row.zero_()
    assert copy[-1] == 7


def test_no_bytes_are_no_page(monkeypatch):
    monkeypatch.setattr(device, "_HUGE_FROM", 1)
    assert scattered_zeros(0, dtype=torch.int32, device=CPU).shape == (0,)


def huge_bytes_at(address):
    """Bytes in huge pages of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            begin, end = (int(bound, 16) for bound in head.split("-"))
            inside = begin <= address < end
        elif inside and head == "AnonHugePages:":
            return 1024 * int(line.split()[1])
    return 0


def test_a_table_of_a_hundred_megabytes_lies_in_huge_pages():
    control = mmap.mmap(-1, 10**8, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    control.madvise(mmap.MADV_HUGEPAGE)
    asked = torch.frombuffer(control, dtype=torch.uint8).fill_(1)
    if not huge_bytes_at(asked.data_ptr()):
        pytest.skip("this kernel gives no huge pages to who asks for them")
    table = scattered_zeros(4, 25_000_000 // 4, dtype=torch.float32, device=CPU).fill_(1.0)
    assert huge_bytes_at(table.data_ptr()) > 0.5 * table.nbytes


def test_fp32_is_left_as_it_is():
    ready = torch.rand(5)
    assert to_fp32(ready, CPU) is ready
    for other in (torch.rand(5).double(), torch.rand(10)[::2], torch.rand(5).bfloat16()):
        got = to_fp32(other, CPU)
        assert got.dtype == torch.float32 and got.is_contiguous() and torch.equal(got, other.float())


MANY = [
    torch.tensor([1.5, -torch.inf, torch.nan], dtype=torch.float64), torch.tensor(-0.1, dtype=torch.float32),
    torch.tensor([[True, False], [False, True]]), torch.tensor([-(2**63), 2**63 - 1]), torch.zeros(0, dtype=torch.int32),
    torch.arange(6, dtype=torch.int16).view(2, 3).T, torch.tensor([-0.7, 3.0], dtype=torch.bfloat16), torch.arange(6.0)[::2],
    torch.tensor(1.5).expand(3), torch.arange(4.0)[::2][:1], torch.arange(4.0)[::2][:0], torch.eye(3).diagonal(),
]  # fmt: skip


def same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(got, expected) if not got.is_floating_point() else torch.equal(got.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.parametrize("tensors", [MANY, [MANY[0], MANY[0][:1].view(()), MANY[0].repeat(2, 2).T]], ids=["many", "fp64"])
def test_a_parcel_keeps_every_bit_shape_and_dtype(tensors):
    parcel = Parcel(tensors)
    assert parcel.buffer.nbytes == sum(t.numel() * t.itemsize for t in tensors)
    for moved in (None, parcel.buffer.clone()):
        for got, expected in zip(parcel.opened(moved), tensors, strict=True):
            same(got, expected)
        parcel.buffer.zero_()  # the second is of what was moved
    assert Parcel([]).opened() == []


def test_a_parcel_holds_copies():
    given = torch.arange(3.0, requires_grad=True)
    parcel = Parcel([given])
    given.detach().zero_()
    assert parcel.opened()[0].tolist() == [0.0, 1.0, 2.0] and not parcel.buffer.requires_grad


def test_what_is_on_the_host_stays_as_it_is():
    assert copy_to_host() == [] and all(a is b for a, b in zip(copy_to_host(*MANY), MANY, strict=True))


def test_what_goes_to_the_cpu_is_there():
    assert all(a is b for a, b in zip(copy_to_device(MANY, CPU), MANY, strict=True))


@pytest.mark.cuda
def test_one_copy_brings_all(monkeypatch):
    there = [t.cuda() if i % 2 else t for i, t in enumerate(MANY)]
    copies, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: copies.append(tensor) or cpu(tensor))
    copy_to_host(*there)
    assert len(copies) == 1
    for got, expected in zip(copy_to_host(*there), MANY, strict=True):
        assert got.device == CPU
        same(got, expected)
    for got, expected in zip(copy_to_device(MANY, torch.device("cuda")), MANY, strict=True):
        assert got.device.type == "cuda"
        same(got.cpu(), expected)
