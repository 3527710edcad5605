"""Every placement gives the same bits, and refuses the same.

Tables are compared byte by byte with NumPy's indexing. Without a GPU the uva kernel runs in Triton's interpreter.
"""

import threading
import time

import pytest
import torch

from engram_ref.rows.memory import HostMemory
from engram_ref.tables import PLACEMENTS
from engram_ref.tables.base import check_rows
from tests.ref.tables.placements import (
    CASES,
    ROWS,
    D,
    R,
    assert_same_bits,
    every_case,
    fetch,
    random_rows,
    random_values,
)
from tests.ref.threads.together import in_threads

# --- the same bits from everywhere ----------------------------------------------------------------


def test_every_placement_is_tested():
    assert {case.split(",")[0] for case in CASES} == set(PLACEMENTS)


@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_equal_bits_from_every_placement(case, dtype, placed):
    values = random_values(dtype)
    table, rows = placed(case, values), random_rows(500)
    assert_same_bits(fetch(table, rows), values, rows)


@every_case
def test_all_kinds_of_row_numbers(case, placed):
    values = random_values()
    table = placed(case, values)
    for rows in ROWS.values():
        assert_same_bits(fetch(table, rows), values, rows)


@every_case
def test_another_default_device_changes_nothing(case, placed):
    """What is meant to be on the CPU is asked for there; meta, like CUDA, gives no number without being asked."""
    values, rows = random_values(), random_rows(500)
    with torch.device("meta"):
        table = placed(case, values)
        assert_same_bits(fetch(table, rows), values, rows)


WRONG = {
    "the next row": lambda values, rows: values[(rows + 1) % len(values)],
    "sorted": lambda values, rows: values[rows.sort().values],
    "NaN made plain": lambda values, rows: values[rows].nan_to_num(),
    "+0.0 for -0.0": lambda values, rows: values[rows] + 0.0,
    "one bit": lambda values, rows: flip_a_bit(values[rows]),
    "one row missing": lambda values, rows: values[rows][:-1],
    "another dtype": lambda values, rows: values[rows].double(),
}


def flip_a_bit(values: torch.Tensor) -> torch.Tensor:
    values.view(torch.uint8)[-1, 0] ^= 1
    return values


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_candidate_is_caught(wrong):
    values, rows = random_values(), random_rows(500)
    values[rows[0], 0] = -0.0
    assert_same_bits(values[rows], values, rows)
    with pytest.raises(AssertionError):
        assert_same_bits(WRONG[wrong](values, rows), values, rows)


@every_case
def test_a_buffer_of_the_callers_is_filled_again_and_again(case, placed):
    values = random_values()
    table = placed(case, values)
    out = torch.full((40, D), float("nan"), device=table.device)
    for seed in range(3):
        rows = (random_rows(40) + seed) % R
        got = fetch(table, rows, out)
        assert got.data_ptr() == out.data_ptr()
        assert_same_bits(out, values, rows)


@every_case
def test_a_backward_that_needs_the_rows_of_a_buffer_that_was_filled_again_is_refused(case, placed):
    table = placed(case, random_values())
    out, weight = torch.empty(3, D, device=table.device), torch.ones(D, device=table.device, requires_grad=True)
    product = fetch(table, torch.tensor([1, 2, 3]), out) * weight
    with torch.no_grad():
        fetch(table, torch.tensor([7, 8, 9]), out)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


@every_case
def test_a_fetch_is_not_changed_by_the_next_ones(case, placed):
    values = random_values()
    table = placed(case, values)
    asked = [(random_rows(50) + seed) % R for seed in range(4)]
    pending = [table.start(rows.to(table.index_device)) for rows in asked]
    for rows, fetched in zip(asked, pending):
        assert_same_bits(fetched.wait(), values, rows)


@every_case
def test_the_table_is_a_copy_and_survives_trimming(case, placed):
    values = random_values()
    before, table = values.clone(), placed(case, values)
    values.zero_()
    for _ in range(2):
        assert_same_bits(fetch(table, ROWS["all"]), before, ROWS["all"])
        table.trim()


# --- what a table refuses -------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("row", [-1, R])
def test_a_row_that_does_not_exist_is_refused(case, row, placed):
    values = random_values()
    table = placed(case, values)
    for dtype in (torch.int32, torch.int64):
        rows = torch.tensor([3, row, 4], dtype=dtype)
        with pytest.raises(ValueError) as caught:
            fetch(table, rows)
            fetch(table, rows)  # in-place reads on a GPU tell a little later
        assert str(caught.value).startswith(f"row {row} does not exist; the table has rows 0 .. {R - 1}")
        assert "\n" not in str(caught.value)
    assert_same_bits(fetch(table, ROWS["all"]), values, ROWS["all"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_the_ends_of_every_table_are_held_to_the_row(dtype):
    """Also where a table has more rows than an int32 can say: -2**31, read as unsigned, is one of its row numbers."""
    info = torch.iinfo(dtype)
    for count in (1, 300, 2**31 - 1, 2**31, 3_000_000_000, 2**33):
        for row in (info.min, info.min + 1, -1, 0, count - 1, count, info.max):
            if not info.min <= row <= info.max:
                continue
            rows = torch.tensor([0, row, 0], dtype=dtype)
            if 0 <= row < count:
                assert check_rows(rows, count).tolist() == [0, row, 0]
            else:
                with pytest.raises(
                    ValueError, match=rf"row {row} does not exist; the table has rows 0 \.\. {count - 1}$"
                ):
                    check_rows(rows, count)


@every_case
def test_what_is_no_vector_of_row_numbers_is_refused(case, placed):
    table = placed(case, random_values())
    for rows in (
        torch.tensor([1.0]),
        torch.tensor([[1]]),
        torch.tensor(1),
        torch.tensor([True]),
        torch.tensor([1]).short(),
    ):
        with pytest.raises(
            ValueError, match=r"^row numbers of shape \(.*\), torch\.\w+: give a vector of int32 or int64"
        ):
            fetch(table, rows)


@every_case
def test_a_buffer_that_does_not_fit_is_refused(case, placed):
    table = placed(case, random_values())
    for out in (torch.empty(4, D), torch.empty(3, D + 1), torch.empty(3, D).double(), torch.empty(D, 3).T):
        with pytest.raises(ValueError, match="3 rows need a contiguous"):
            fetch(table, torch.tensor([1, 2, 3]), out.to(table.device))


@every_case
def test_a_buffer_that_requires_gradients_is_refused_while_they_are_on(case, placed):
    values, rows = random_values(), torch.tensor([1, 2, 3])
    table = placed(case, values)
    out = torch.empty(3, D, device=table.device, requires_grad=True)
    with pytest.raises(ValueError, match="out requires gradients"):
        fetch(table, rows, out)
    with torch.no_grad():
        assert_same_bits(fetch(table, rows, out).detach(), values, rows)


# --- closing --------------------------------------------------------------------------------------


@every_case
def test_a_closed_table_says_so(case, placed):
    table = placed(case, random_values())
    table.close()
    with pytest.raises(ValueError, match="closed"):
        fetch(table, torch.tensor([1]))
    table.close()


@every_case
@pytest.mark.parametrize("use", ["start", "stored"])
def test_closing_waits_for_a_fetch_of_another_thread(case, use, placed, monkeypatch):
    values = random_values()
    table, rows = placed(case, values), random_rows(50)
    inside, go_on, given_back, got = threading.Event(), threading.Event(), [], []
    require_open, give_back = type(table)._require_open, type(table)._give_back

    def stop_once(table):
        require_open(table)  # it was open, and is used from here on
        if not inside.is_set():
            inside.set()
            assert go_on.wait(30)

    def work():
        got.append(fetch(table, rows).cpu() if use == "start" else table.stored(rows).view(values.dtype))

    monkeypatch.setattr(type(table), "_require_open", stop_once)
    monkeypatch.setattr(type(table), "_give_back", lambda table: given_back.append(1) or give_back(table))
    fetching, closing = threading.Thread(target=work), threading.Thread(target=table.close)
    fetching.start()
    assert inside.wait(30)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive() and not given_back
    go_on.set()
    fetching.join(30), closing.join(30)
    assert given_back
    assert_same_bits(got[0], values, rows)


@every_case
def test_a_table_that_is_closed_from_within_a_fetch_says_so(case, placed):
    table = placed(case, random_values())
    with table._users.here(), pytest.raises(RuntimeError, match="this table is closed from within a call of its own"):
        table.close()
    assert_same_bits(fetch(table, random_rows(9)), random_values(), random_rows(9))


@pytest.mark.parametrize("case", [case for case in CASES if "uva" not in case])
def test_closing_in_the_middle_of_many_fetches(case, placed):
    """Threads fetch all the time while one closes: each fetch has its rows, or says that the table is closed."""
    values = random_values()
    table, wrong, closed = placed(case, values), [], []

    def serve(number):
        if number == 3:
            time.sleep(0.03)
            return table.close()
        rows = random_rows(30 + number)
        while True:
            try:
                got = table.start(rows).wait()
            except ValueError as error:
                return closed.append(str(error))
            if not torch.equal(got.view(torch.uint8), values[rows].view(torch.uint8)):
                wrong.append(number)

    in_threads(serve)
    assert not wrong and len(closed) == 3 and all("closed" in message for message in closed)


@pytest.mark.parametrize("case", ["device", "host", "uva", "hot"])
def test_closing_a_table_closes_its_memory(case, placed, monkeypatch):
    closed, real = [], HostMemory.close
    monkeypatch.setattr(HostMemory, "close", lambda memory: closed.append(memory.nbytes) or real(memory))
    placed(case, random_values()).close()
    assert closed == [R * D * 4]


# --- bytes ----------------------------------------------------------------------------------------

TABLE_BYTES, MAP_BYTES = R * D * 4, R * 4  # a hot table also has one int32 per row
HELD = {
    "device": {"device": TABLE_BYTES, "host": 0, "disk": 0},
    "host": {"device": 0, "host": TABLE_BYTES, "disk": 0},
    "uva": {"device": 0, "host": TABLE_BYTES, "disk": 0},
    "file": {"device": 0, "host": 0, "disk": TABLE_BYTES},
    "hot": {"device": 101 * D * 4, "host": TABLE_BYTES + MAP_BYTES, "disk": 0},
    "hot, file behind": {"device": 43 * D * 4, "host": MAP_BYTES, "disk": TABLE_BYTES},
}


@pytest.mark.parametrize("case", HELD)
def test_the_bytes_of_the_table_are_told_by_place(case, placed):
    assert placed(case, random_values()).bytes_held() == HELD[case]
