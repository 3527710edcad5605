"""Rows that are trained: gradients reach them, they are used as they are now; a table that cannot learn takes none."""

import numpy as np
import pytest
import torch
from torch.autograd import forward_ad

from engram_ref.rows.rows import Rows
from engram_ref.tables import make_table
from engram_ref.tables.device import DeviceTable
from engram_ref.tables.host import HostTable
from engram_ref.tables.hot import HotTable
from tests.ref.tables.placements import D, R, assert_same_bits, fetch, random_rows, random_values


def test_gradients_reach_the_rows():
    weight = torch.nn.Parameter(torch.randn(R, D, generator=torch.Generator().manual_seed(0)))
    rows = random_rows(400, torch.int32)
    with DeviceTable(weight) as table:
        (fetch(table, rows) * 2).sum().backward()
        assert weight.grad is not None
        times = np.bincount(rows.numpy(), minlength=R)
        assert (weight.grad == 2.0 * torch.from_numpy(times)[:, None]).all()
        with pytest.raises(ValueError, match="does not exist"):
            fetch(table, torch.tensor([R]))
        with pytest.raises(ValueError, match="leave it out, or use"):
            fetch(table, rows, torch.empty(400, D))


def test_row_numbers_may_be_written_over_before_gradients_are_asked_for():
    weight, numbers = torch.nn.Parameter(torch.zeros(R, D)), np.array([1, 2])
    with DeviceTable(weight) as table:
        got = fetch(table, torch.from_numpy(numbers))
        numbers[:] = 5
        got.sum().backward()
    assert weight.grad is not None and weight.grad[:6, 0].tolist() == [0, 1, 1, 0, 0, 0]


def test_rows_are_used_as_they_are_now():
    weight = torch.nn.Parameter(torch.zeros(R, D))
    with DeviceTable(weight) as table, torch.no_grad():
        out = torch.empty(R, D)
        for step in range(3):
            weight += step
            assert not fetch(table, torch.arange(R), out).requires_grad
            assert_same_bits(out, weight.detach(), torch.arange(R))


@pytest.mark.parametrize("gathered", [True, False], ids=["compiled gather", "kernel"])
def test_rows_that_were_exchanged_for_others_are_followed(gathered, monkeypatch):
    """As an average of weights is swapped in, and out again; whether gradients are on or off."""
    if not gathered:
        monkeypatch.setattr("engram_ref.tables.device.kernels_for", lambda device: Kernels())
    weight = torch.nn.Parameter(random_values())
    own, average = weight.data, random_values().flip(0)
    numbers = torch.arange(R)
    with DeviceTable(weight) as table:
        for values in (average, own, own.roll(1)):
            weight.data = values
            assert_same_bits(fetch(table, numbers).detach(), values, numbers)
            with torch.no_grad():
                assert_same_bits(fetch(table, numbers), values, numbers)
            assert_same_bits(table.stored(numbers).view(values.dtype), values, numbers)
        for values, message in (
            (own[:-1].clone(), f"made of {R} rows on cpu, its weight has {R - 1} on cpu now: make a new DeviceTable"),
            (own.double(), "torch.float64: this table has"),
        ):
            weight.data = values
            with pytest.raises(ValueError, match=message), torch.no_grad():
                fetch(table, numbers)


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "none"])
def test_tangents_of_forward_differentiation_come_with_their_rows(grad):
    weight = torch.zeros(R, D, requires_grad=True)
    tangents = torch.arange(R * D).view(R, D).float()
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        table = DeviceTable(forward_ad.make_dual(weight, tangents))
        got = forward_ad.unpack_dual(fetch(table, torch.tensor([7, 2]))).tangent
    assert got is not None and torch.equal(got, tangents[[7, 2]])


@pytest.mark.parametrize("grad", [True, False], ids=["gradients", "none"])
def test_other_rows_at_the_same_address_are_seen(grad):
    weight = torch.nn.Parameter(torch.randn(6, 6))
    own = weight.data
    with DeviceTable(weight) as table, torch.set_grad_enabled(grad):
        for values, message in (
            (own.t(), "one after the other"),
            (own[:3], "made of 6 rows"),
            (own.view(12, 3)[:6], r"this table has \[rows, 6\]"),
            (own.view(torch.float16), "float16"),
        ):
            weight.data = values
            with pytest.raises(ValueError, match=message):
                fetch(table, torch.tensor([5]))
        weight.data = own
        assert torch.equal(fetch(table, torch.tensor([5])), own[5:])


@pytest.mark.parametrize("first", [0, 4], ids=["whole", "a part of a flat parameter"])
@pytest.mark.parametrize("left", [0, 16])
def test_rows_whose_memory_was_given_back_are_refused_until_it_is_there_again(first, left):
    weight = torch.nn.Parameter(torch.zeros(first + 24)[first:].view(6, 4))
    with DeviceTable(weight) as table, torch.no_grad():
        weight.untyped_storage().resize_(left)
        for refused in (lambda: fetch(table, torch.tensor([5])), lambda: DeviceTable(weight)):
            with pytest.raises(ValueError, match="memory was given back"):
                refused()
        weight.untyped_storage().resize_(96 + 4 * first)
        weight.fill_(7)
        assert torch.equal(fetch(table, torch.tensor([5])), torch.full((1, 4), 7.0))


@pytest.mark.parametrize(
    "take",
    [
        lambda weight: HostTable(weight, "cpu"),
        lambda weight: HotTable(DeviceTable(weight), torch.arange(5)),
        lambda weight: DeviceTable(Rows.of(weight)),
        lambda weight: make_table("device", weight),
        lambda weight: make_table("host", weight),
        lambda weight: make_table("hot", weight, hot=torch.arange(5)),
        lambda weight: make_table("uva", weight),
    ],
    ids=["HostTable", "HotTable", "Rows", "device", "host", "hot", "uva"],
)
def test_rows_that_would_not_learn_are_refused(take):
    weight = torch.nn.Parameter(random_values())
    with pytest.raises(ValueError, match=r"^rows that .*DeviceTable\(.*weight\.detach\(\)"):
        take(weight)


class Kernels:
    """In place of those that run on an accelerator."""

    @staticmethod
    def gather_rows(raw, numbers, out, bad_row):
        out.copy_(raw[numbers.long()])
