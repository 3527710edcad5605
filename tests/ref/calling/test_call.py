"""A step calls the CPU while it runs, in Triton's interpreter: rows to the bit, and an end of waiting whatever happens.

The kernels look at memory that another thread writes meanwhile, so question and answer really are of two threads.
"""

import gc
import threading
import time
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need Triton (pip install 'engram-offload[test]' on Linux)")

from engram_ref import gpu
from engram_ref.calling.call import CallError, CpuCall

CPU = torch.device("cpu")
interpreted = pytest.mark.skipif(not gpu.INTERPRETED, reason="tests/cuda/test_call_cuda.py does this on a GPU")


def call_of(values=(2, 3, 8), dtype=torch.bfloat16, polls=100_000, shape=(3, 1), **more) -> CpuCall:
    return CpuCall(shape, values, dtype, CPU, polls, **more)


def rows_for(ids, like):
    """What is answered here: numbers that only these ids give."""
    count = torch.arange(like.numel()).view(like.shape)
    return (count + 100 * int(ids.sum())).to(like.dtype)


def answer(ids, values):
    values.copy_(rows_for(ids, values))


@interpreted
@pytest.mark.parametrize(
    ("values", "dtype"),
    [((2, 3, 8), torch.bfloat16), ((1, 5, 6), torch.float16), ((2, 900, 3), torch.float32)],
    ids=["whole units", "words", "several programs"],
)
def test_a_call_brings_what_the_cpu_wrote_for_these_ids(values, dtype):
    call = call_of(values, dtype, shape=(50, 3))
    out = torch.full(values, -7.0, dtype=dtype)
    for step in range(3):
        ids = torch.randint(0, 1000, (3, 50)).T  # strides of another order
        seen = []
        call.expect(lambda ids, values: (seen.append(ids.clone()), answer(ids, values)))  # noqa: B023
        call.make(ids, out)
        call.settle()
        assert torch.equal(seen[0], ids), step
        assert torch.equal(out.view(torch.uint8), rows_for(ids, out).view(torch.uint8))


@interpreted
def test_the_step_waits_until_the_answer_is_there_and_the_caller_does_not():
    call, out, go = call_of(), torch.zeros(2, 3, 8, dtype=torch.bfloat16), threading.Event()
    ids = torch.tensor([[1], [2], [3]])

    def late(ids, values):
        assert go.wait(10)
        answer(ids, values)

    call.expect(late)  # returns, though nobody has asked
    step = threading.Thread(target=call.make, args=(ids, out), daemon=True)
    step.start()
    time.sleep(0.05)
    assert step.is_alive(), "it did not wait"
    go.set()
    step.join(10)
    assert not step.is_alive() and torch.equal(out, rows_for(ids, out))
    call.settle()


def assert_nan(out):
    assert torch.isnan(out).all()


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_step_that_nobody_answers_ends_with_nan_and_an_error(dtype):
    call, out = call_of(dtype=dtype, polls=20), torch.zeros(2, 3, 8, dtype=dtype)
    call.make(torch.zeros(3, 1, dtype=torch.int64), out)
    assert_nan(out)
    with pytest.raises(CallError, match=r"^step 1 waited in vain for its rows, 20 looks long, and went on with NaN"):
        call.expect(answer)


@interpreted
def test_steps_queued_behind_one_that_waited_in_vain_wait_shorter_until_the_host_knows():
    call, out, ids = call_of(polls=1600), torch.zeros(2, 3, 8, dtype=torch.bfloat16), torch.ones(3, 1).long()

    def seconds():
        begin = time.perf_counter()
        call.make(ids, out)
        assert_nan(out)
        return time.perf_counter() - begin

    full, shorter = seconds(), min(seconds() for _ in range(3))
    assert 4 * shorter < full, "each looks 1,600 times"
    told = r"^step 1 waited in vain for its rows, 1,600 looks long \(and so did 3 queued behind it, not as long\), and"
    with pytest.raises(CallError, match=told):
        call.settle()
    assert seconds() > 4 * shorter, "as patient as before"
    with pytest.raises(CallError, match=r"^step 5 waited in vain for its rows, 1,600 looks long, and went on"):
        call.settle()


@interpreted
def test_a_step_waits_as_long_as_any_other_after_one_whose_rows_could_not_be_had():
    call, out, ids = call_of(polls=160), torch.zeros(2, 3, 8, dtype=torch.bfloat16), torch.ones(3, 1).long()
    call.expect(lambda ids, values: values.no_such_method())
    call.make(ids, out)
    with pytest.raises(CallError, match="failed"):
        call.settle()
    call.make(ids, out)
    with pytest.raises(CallError, match=r"^step 2 waited in vain for its rows, 160 looks long"):
        call.settle()


@interpreted
def test_an_answer_that_comes_too_late_is_not_taken_for_the_next():
    call, out, go = call_of(polls=200), torch.zeros(2, 3, 8, dtype=torch.bfloat16), threading.Event()

    def late(ids, values):
        assert go.wait(10)
        values.fill_(5.0)

    call.expect(late)
    call.make(torch.ones(3, 1, dtype=torch.int64), out)
    assert_nan(out)
    go.set()
    with pytest.raises(CallError, match="step 1 waited in vain"):
        call.settle()
    call.expect(answer)
    ids = torch.full((3, 1), 9)
    call._polls = 1_000_000
    call.make(ids, out)
    call.settle()
    assert torch.equal(out, rows_for(ids, out))


@interpreted
def test_what_goes_wrong_in_the_answer_is_told_and_the_step_has_nan_at_once():
    call, out = call_of(), torch.zeros(2, 3, 8, dtype=torch.bfloat16)

    def fails(ids, values):
        raise ValueError(f"token id {int(ids[0, 0])} of a vocabulary of 7")

    call.expect(fails)
    begin = time.perf_counter()
    call.make(torch.full((3, 1), 8), out)
    assert time.perf_counter() - begin < 5, "10^5 looks take some ten seconds here"
    assert_nan(out)
    with pytest.raises(CallError, match=r"looking up the rows of a captured step failed.*token id 8") as caught:
        call.settle()
    assert isinstance(caught.value.__cause__, ValueError)
    ids = torch.ones(3, 1, dtype=torch.int64)
    call.expect(answer)
    call.make(ids, out)
    call.settle()
    assert torch.equal(out, rows_for(ids, out)), "one that failed spoils none that follows"


@interpreted
def test_a_step_that_never_runs_and_one_that_nobody_expected_are_told():
    call, out = call_of(polls=20, patience=0.05), torch.zeros(2, 3, 8, dtype=torch.bfloat16)
    ids = torch.ones(3, 1, dtype=torch.int64)
    call.expect(answer)
    with pytest.raises(CallError, match=r"^no step asked for rows within 0.05 s"):
        call.settle()
    call.make(ids, out)
    with pytest.raises(CallError, match="step 1 waited in vain"):
        call.settle()
    call._polls, call._patience = 1_000_000, 60.0
    for number in (2, 3):  # the question that nobody answered is not taken for these
        call.expect(answer)
        time.sleep(0.1)  # whoever answers looks before the step asks
        call.make(number * ids, out)
        call.settle()
        assert torch.equal(out, rows_for(number * ids, out))


@interpreted
def test_a_call_of_a_step_that_was_not_made_is_called_off_and_does_not_answer_the_next():
    call, out, ids = call_of(), torch.zeros(2, 3, 8, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.int64)
    call.expect(answer)
    call.make(ids, out)
    for _ in range(2):
        call.expect(lambda ids, values: values.fill_(5.0))
    begin = time.perf_counter()
    call.call_off()
    call.settle()
    assert time.perf_counter() - begin < 10, "a question is waited for a minute long"
    call.expect(answer)
    call.make(2 * ids, out)
    call.settle()
    assert torch.equal(out, rows_for(2 * ids, out))


@interpreted
def test_closing_does_not_wait_for_a_question_that_never_comes():
    call = call_of()
    call.expect(answer)
    begin = time.perf_counter()
    call.close()
    assert time.perf_counter() - begin < 10


@interpreted
@pytest.mark.parametrize("closed", [True, False])
def test_its_thread_ends_with_it(closed):
    others = set(threading.enumerate())
    call = call_of()
    call.expect(answer)
    call.make(torch.ones(3, 1, dtype=torch.int64), torch.zeros(2, 3, 8, dtype=torch.bfloat16))
    call.settle()
    (thread,) = set(threading.enumerate()) - others
    gone = weakref.ref(call)
    if closed:
        call.close()
        assert not thread.is_alive()
    del call
    gc.collect()
    thread.join(5)
    assert gone() is None and not thread.is_alive()


def test_a_device_without_the_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(gpu, "INTERPRETED", False)
    with pytest.raises(ValueError, match="a step that calls the CPU runs on CUDA, not on cpu"):
        call_of()
