"""How rows reach a device: the ring of staging buffers, on a stand-in for a GPU whose copies run as late as they may.

Every safeguard is taken away once, and rows must come out wrong. The same on a real GPU: tests/cuda.
"""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engram_ref.rows.format import RowFormat
from engram_ref.rows.memory import HUGE_PAGE, PIN_PIECE, HostMemory
from engram_ref.rows.rows import Rows
from engram_ref.tables import make_table
from engram_ref.tables import staging as module
from engram_ref.tables.staging import Delivery, Once, crossing_bytes
from tests.ref.rows.fp8_pairs import assert_bits, random_rows, rows_of
from tests.ref.tables.fake_cuda import FakeStream, install_gpu

FORMAT = RowFormat(torch.float32, 4)


class Gpu:
    """A delivery to the stand-in, and what can be observed."""

    def __init__(self, monkeypatch, buffers=2):
        self.side, self.current, self.runtime = install_gpu(monkeypatch)
        self.delivery = Delivery(torch.device("cuda"), FORMAT, buffers)

    def send(self, number, count=50, out=None, beside=True):
        """Start the delivery of `count` rows that are all `number`."""
        return self.delivery.send(count, lambda staged: staged.view(torch.float32).fill_(number), out, beside)

    def steps(self, count=8):
        """Send some fetches, each before the last one is used; which of them came out right."""
        right, before = [], self.send(0)
        for number in range(1, count + 1):
            after = self.send(number)
            right.append(bool((before.wait() == number - 1).all()))
            before = after
        return right


@pytest.fixture
def gpu(request, monkeypatch):
    """With two staging buffers, or as many as the test says."""
    made = Gpu(monkeypatch, getattr(request, "param", 2))
    yield made
    made.delivery.trim()


@pytest.mark.parametrize("gpu", [2, 3], indirect=True)
def test_rows_are_right_however_late_the_copies_run(gpu):
    assert all(gpu.steps())


def test_a_buffer_serves_both_in_and_outside_of_inference_mode(gpu):
    """A model under `inference_mode` makes the buffers, and a fetch outside of it writes into them with torch."""
    raw = torch.arange(50 * FORMAT.row_bytes, dtype=torch.uint8).view(50, -1)
    with torch.inference_mode():
        assert (gpu.send(1).wait() == 1).all() and (gpu.send(2).wait() == 2).all()
    for _ in range(2):
        values = gpu.delivery.send(50, lambda staged: staged.copy_(raw)).wait()
        assert torch.equal(values.view(torch.uint8), raw)


def test_fetches_that_nobody_has_waited_for_are_right_too(gpu):
    pending = [gpu.send(number) for number in range(7)]
    for number, fetch in reversed(list(enumerate(pending))):
        assert (fetch.wait() == number).all()


def test_a_buffer_is_filled_again_only_after_its_copy(gpu, monkeypatch):
    monkeypatch.setattr(module._Slot, "finish", lambda slot: None)
    pending = [gpu.send(number) for number in range(4)]
    assert [int(fetch.wait()[0, 0]) for fetch in pending] == [2, 3, 2, 3]


def test_two_buffers_are_needed(gpu, monkeypatch):
    monkeypatch.setattr(Delivery, "_next_slot", lambda delivery: delivery._slots[0])
    assert not any(gpu.steps())


def test_rows_are_used_only_after_their_copy(gpu):
    gpu.current.wait_event = lambda event: None
    fetch = gpu.send(5)
    assert fetch.wait().isnan().all()
    fetch.arrived.synchronize()
    assert (fetch.wait() == 5).all()


def test_the_stream_that_uses_rows_keeps_their_memory(gpu):
    values = gpu.send(1).wait()
    assert gpu.current.recorded == [values.data_ptr()]
    assert gpu.side.recorded == []


def test_the_copy_keeps_the_memory_of_the_callers_buffer(gpu):
    out = gpu.delivery.empty(50)
    fetch = gpu.send(3, out=out)
    assert gpu.side.recorded == [out.data_ptr()]
    assert fetch.wait().data_ptr() == out.data_ptr()
    assert (out == 3).all()


def test_what_is_waited_for_at_once_is_copied_behind_what_the_current_stream_has(gpu, monkeypatch):
    """Nothing on the side stream, and nothing to wait for or to keep; a buffer is filled again only after its copy."""
    gpu.current.wait_event = None
    pending = [gpu.send(number, beside=False) for number in range(7)]
    out = gpu.delivery.empty(50)
    pending.append(gpu.send(7, out=out, beside=False))
    rows = [fetch.wait() for fetch in pending]
    gpu.current.synchronize()
    assert all((values == number).all() for number, values in enumerate(rows)) and (out == 7).all()
    assert (gpu.side.copies, gpu.side.recorded, gpu.current.recorded) == ([], [], [])


def test_another_stream_waits_for_what_was_copied_on_the_then_current_one(gpu, monkeypatch):
    fetch, other = gpu.send(4, beside=False), FakeStream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: other)
    assert (fetch.wait() == 4).all()
    assert other.recorded == [fetch.values.data_ptr()]


@pytest.mark.parametrize("split", [False, True])
def test_a_few_fp8_rows_are_decoded_while_they_are_gathered(gpu, monkeypatch, split):
    """No kernel is launched for them. From one row more on they are copied as they are stored, half as many bytes."""
    raw = random_rows(100, 64)
    table = rows_of(raw, split)
    decoded = []
    like, empty_like = type(gpu.delivery.empty(1)), torch.empty_like
    monkeypatch.setattr(RowFormat, "decode", lambda *given: decoded.append(len(given[1])))
    monkeypatch.setattr(torch, "empty_like", lambda staged, device: empty_like(staged).as_subclass(like))
    delivery = Delivery(torch.device("cuda"), table.format)
    few = module.CPU_DECODED_BYTES // table.format.row_bytes
    for count in (0, 1, few):
        numbers = torch.from_numpy(np.random.default_rng(count).integers(0, 100, count))
        for beside in (True, False):
            before = delivery.bytes_copied
            values = delivery.take(table, numbers, None, beside).wait()
            gpu.current.synchronize()
            assert_bits(values.as_subclass(torch.Tensor), raw[numbers])
            assert delivery.bytes_copied - before == count * 2 * 64 == crossing_bytes(table.format, count)
    assert decoded == []
    numbers, before = torch.zeros(few + 1, dtype=torch.int32), delivery.bytes_copied
    delivery.take(table, numbers).wait()
    target, staged = gpu.side.copies[-1]
    assert torch.equal(target, raw[numbers]) and torch.equal(staged, target)
    assert delivery.bytes_copied - before == (few + 1) * 66 == crossing_bytes(table.format, few + 1)
    assert decoded == [few + 1] and crossing_bytes(RowFormat(torch.float32, 64), 5) == 5 * 256
    delivery.trim()


def test_no_rows_at_all(gpu):
    assert gpu.send(1, count=0).wait().shape == (0, 4)


def test_staging_grows_by_doubling_and_is_locked_in_one_piece(gpu):
    pages, rows = [], HUGE_PAGE // FORMAT.row_bytes
    for count in (1, rows + 1, 2 * rows, 2 * rows + 1, 5 * rows):
        gpu.send(1, count), gpu.send(1, count)  # both buffers
        pages.append(sorted(nbytes // HUGE_PAGE for nbytes in gpu.runtime.registered.values()))
    assert pages == [[1, 1], [2, 2], [2, 2], [4, 4], [8, 8]]


def test_a_buffer_above_the_usual_piece_is_one_piece_too(gpu):
    slot = gpu.delivery._slots[0]
    slot.room(PIN_PIECE + 1, 1)
    assert list(gpu.runtime.registered.values()) == [PIN_PIECE + HUGE_PAGE]
    slot.free()


def test_trimming_waits_for_the_copies_and_unlocks_everything(gpu):
    fetches = [gpu.send(1), gpu.send(2)]
    gpu.delivery.trim()
    assert gpu.runtime.registered == {}
    assert [int(fetch.values[0, 0]) for fetch in fetches] == [1, 2]
    assert (gpu.send(3).wait() == 3).all()


def test_a_failure_to_fill_is_raised_and_the_next_fetch_works(gpu):
    def fail(staged):
        raise OSError("the disk has gone")

    pending = gpu.send(1)
    for _ in range(3):
        with pytest.raises(OSError, match="the disk has gone"):
            gpu.delivery.send(5, fail)
    assert (pending.wait() == 1).all()
    assert all(gpu.steps())


def test_an_interrupted_copy_is_waited_for_before_its_buffer_is_filled_again(gpu, monkeypatch):
    outs = [gpu.delivery.empty(50) for _ in range(2)]
    for number, out in enumerate(outs):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(torch.cuda.Event, "record", lambda event, stream: (_ for _ in ()).throw(KeyboardInterrupt))
            gpu.send(number, out=out)
    later = [gpu.send(number) for number in (7, 8)]
    assert [int(fetch.wait()[0, 0]) for fetch in later] == [7, 8]
    assert [int(out[0, 0]) for out in outs] == [0, 1]


def test_fp8_rows_are_copied_as_they_are_stored_and_decoded_behind_their_copy(gpu, monkeypatch):
    """On the side stream: a decoding that does not wait for the copy would read what is not there yet."""
    raw = random_rows(50, 64)
    wanted = RowFormat(torch.bfloat16, 64, scaled=True)

    class Decoded:
        """A target of the stand-in's stream: what is decoded when its turn comes."""

        def __init__(self, target):
            self.target = target

        def copy_(self, source):
            wanted.decode(source, self.target)

    def decode(source, values):
        gpu.side.copies.append((Decoded(values.as_subclass(torch.Tensor)), source.as_subclass(torch.Tensor)))

    names = {name: getattr(wanted, name) for name in ("dtype", "width", "row_bytes")}
    like = type(gpu.delivery.empty(1))  # a tensor on the stand-in
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda staged, device: empty_like(staged).fill_(0xFF).as_subclass(like))
    delivery = Delivery(torch.device("cuda"), SimpleNamespace(**names, scaled=True, decode=decode))
    pending = [delivery.send(50, lambda staged, n=n: staged.copy_(raw.roll(n, 0))) for n in range(4)]
    for n, fetch in enumerate(pending):
        assert_bits(fetch.wait().as_subclass(torch.Tensor), raw.roll(n, 0))
    assert delivery.bytes_copied == 4 * 50 * 66
    delivery.trim()


def test_bytes_that_were_copied_are_counted(gpu):
    assert gpu.delivery.bytes_copied == 0
    gpu.send(1), gpu.send(1, count=7)
    assert gpu.delivery.bytes_copied == 57 * FORMAT.row_bytes


def test_threads_take_turns_with_the_staging_buffers(gpu):
    """One is filling a buffer; another one may neither take it nor trim it away."""
    filling, go_on, got = threading.Event(), threading.Event(), []

    def fill(staged):
        filling.set()
        assert go_on.wait(30)
        staged.view(torch.float32).fill_(5)

    first = threading.Thread(target=lambda: got.append(gpu.delivery.send(50, fill)))
    first.start()
    assert filling.wait(30)
    others = [threading.Thread(target=lambda: got.append(gpu.send(6))), threading.Thread(target=gpu.delivery.trim)]
    for other in others:
        other.start()
        other.join(0.03)
        assert other.is_alive()
    go_on.set()
    for thread in (first, *others):
        thread.join(30)
    assert sorted(int(fetch.wait()[0, 0]) for fetch in got) == [5, 6]


def test_one_buffer_is_refused():
    with pytest.raises(ValueError, match="buffers=1: with fewer than 2 nothing overlaps"):
        Delivery(torch.device("cpu"), FORMAT, buffers=1)


def test_a_table_in_host_memory_serves_the_gpu(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    values = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    asked = [torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    with make_table("host", values, "cuda") as table:
        assert list(gpu.runtime.registered.values()) == [values.nbytes]  # the table itself
        pending = [table.start(rows) for rows in asked]
        for rows, fetch in zip(asked, pending):
            assert (fetch.wait() == values[rows]).all()
        assert len(gpu.runtime.registered) == 3
        table.trim()
        assert list(gpu.runtime.registered.values()) == [values.nbytes]
    assert gpu.runtime.registered == {}


# --- on a CPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fresh", [1 << 30, 0], ids=["small", "on huge pages"])
def test_on_a_cpu_rows_are_written_where_they_are_used(fresh, monkeypatch):
    monkeypatch.setattr(module, "_FRESH_BYTES", fresh)
    to_cpu = Delivery(torch.device("cpu"), FORMAT)
    for count in (3, 0):
        first = to_cpu.send(count, lambda raw: raw.fill_(1)).wait()
        second = to_cpu.send(count, lambda raw: raw.fill_(2)).wait()
        assert first.shape == second.shape == (count, 4) and first.dtype == torch.float32
        assert (first.view(torch.uint8) == 1).all() and (second.view(torch.uint8) == 2).all()
    out = torch.empty(3, 4)
    assert to_cpu.send(3, lambda raw: raw.fill_(3), out).wait() is out
    assert (out.view(torch.uint8) == 3).all()


def test_fp8_rows_are_decoded_where_they_are_used():
    raw = random_rows(30, 64)
    to_cpu = Delivery(torch.device("cpu"), RowFormat(torch.bfloat16, 64, scaled=True))
    out = torch.empty(30, 64, dtype=torch.bfloat16)
    assert to_cpu.send(30, lambda staged: staged.copy_(raw), out).wait() is out
    assert_bits(out, raw)
    assert_bits(to_cpu.send(30, lambda staged: staged.copy_(raw)).wait(), raw)


def test_rows_in_memory_are_gathered_where_they_are_used():
    rows = torch.tensor([3, 0, 29, 3])
    values, raw = torch.randn(30, 4, generator=torch.Generator().manual_seed(0)), random_rows(30, 64)
    plain = Delivery(torch.device("cpu"), FORMAT)
    scaled = Delivery(torch.device("cpu"), RowFormat(torch.bfloat16, 64, scaled=True))
    out = torch.empty(4, 4)
    assert plain.take(Rows.of(values), rows, out).wait() is out
    assert torch.equal(out, values[rows]) and torch.equal(plain.take(Rows.of(values), rows).wait(), out)
    for table in (rows_of(raw), rows_of(raw, split=True)):
        out = torch.empty(4, 64, dtype=torch.bfloat16)
        assert scaled.take(table, rows, out).wait() is out
        assert_bits(out, raw[rows])
        assert_bits(scaled.take(table, rows).wait(), raw[rows])


def test_a_buffer_that_does_not_fit_is_refused():
    to_cpu = Delivery(torch.device("cpu"), FORMAT)
    with pytest.raises(ValueError, match="3 rows need a contiguous"):
        to_cpu.send(3, lambda raw: raw.fill_(1), torch.empty(2, 4))
    with pytest.raises(ValueError, match="2 rows need a contiguous"):
        to_cpu.take(Rows.of(torch.zeros(5, 4)), torch.tensor([1, 2]), torch.empty(3, 4))


def test_large_fetches_lie_on_huge_pages_on_a_cpu_only(monkeypatch):
    made = []
    monkeypatch.setattr(module, "HostMemory", lambda nbytes: made.append(nbytes) or HostMemory(nbytes))
    rows = (32 << 20) // FORMAT.row_bytes
    to_cpu, elsewhere = Delivery(torch.device("cpu"), FORMAT), Delivery(torch.device("meta"), FORMAT)
    for count in (1, rows - 1, rows, rows + 1):
        assert to_cpu.empty(count).shape == elsewhere.empty(count).shape == (count, 4)
    assert made == [32 << 20, (32 << 20) + FORMAT.row_bytes]


def test_rows_that_are_put_together_once():
    """Whoever waits next gets the same; what goes wrong is raised to whoever waits, and tried again."""

    class Pending:
        waits = 0

        def wait(self):
            self.waits += 1
            if self.waits == 1:
                raise OSError("the disk has gone")
            return torch.arange(self.waits)

    pending = Pending()
    once = Once(pending)
    with pytest.raises(OSError, match="the disk has gone"):
        once.wait()
    assert once.wait() is once.wait() and pending.waits == 2
