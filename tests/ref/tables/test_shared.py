"""One copy of a table per machine: leader, followers, errors, deaths, and nothing left behind."""

import errno
import multiprocessing
import os
import re
import resource
import signal
import socket
import time
from pathlib import Path

import pytest
import torch

from engram_ref.files.stored_rows import StoredRows
from engram_ref.files.writing import save_rows
from engram_ref.rows.rows import Rows
from engram_ref.tables import laid as laid_module
from engram_ref.tables import make_table
from engram_ref.tables import shared as shared_module
from engram_ref.tables.laid import lay
from tests.ref.ranks import Rank
from tests.ref.rows.fp8_pairs import random_rows as random_fp8_rows

R, D = 1009, 16
VALUES = torch.arange(R * D, dtype=torch.float32).view(R, D)
FP8 = random_fp8_rows(R, 64)


def copies(name, maps):
    """Inodes of the copies of this name that a process has mapped."""
    what = shared_module._address(name)[1:].decode()
    try:
        return sorted(set(re.findall(rf" 00:\S+ (\d+) +/memfd:{what}", maps.read_text())))
    except OSError:
        return []


@pytest.fixture
def name(request):
    """A name of its own for each test; afterwards nothing of it is left in shared memory."""
    own = f"{request.node.name}-{os.getpid()}"
    yield own
    assert not [maps for maps in Path("/proc").glob("[0-9]*/maps") if copies(own, maps)]
    assert not [file for file in os.listdir("/dev/shm") if "engram" in file]


def placed(name, rows, placement="host", **options):
    return make_table(placement, rows, shared=name, **options)


def same(fd):
    """For contents that nothing is said of: that which is there is taken for the same."""


def member(name, path, connection):
    """A process that maps the copy, says what it has, and holds it until it is told to end."""
    with placed(name, StoredRows.find(path)) as table:
        numbers = torch.arange(0, R, 7)
        good = torch.equal(table.start(numbers).wait(), VALUES[numbers])
        connection.send((good, copies(name, Path("/proc/self/maps"))))
        connection.recv()
    return copies(name, Path("/proc/self/maps"))


def start_member(name, path):
    mine, its = shared_connection()
    return Rank(member, name, path, its), mine


def shared_connection():
    return multiprocessing.Pipe()


@pytest.fixture
def path(tmp_path):
    save_rows(tmp_path / "rows.safetensors", VALUES)
    return tmp_path / "rows.safetensors"


def hear(mine):
    assert mine.poll(60), "a process says nothing"
    return mine.recv()


def test_four_processes_have_one_copy_whoever_dies(name, path):
    """The first is killed, a newcomer is served by another one, and in the end nothing is left."""
    members = [start_member(name, path) for _ in range(3)]
    said = [hear(mine) for _, mine in members]
    assert all(good for good, _ in said) and len({tuple(copy) for _, copy in said}) == 1 and said[0][1]
    os.kill(members[0][0].process.pid, signal.SIGKILL)
    os.kill(members[1][0].process.pid, signal.SIGKILL)
    for rank, _ in members[:2]:
        rank.process.join()
    time.sleep(0.2)  # for the third to notice; a newcomer that is quicker has a copy of its own
    late = start_member(name, path)
    assert hear(late[1]) == said[2]
    for rank, mine in (members[2], late):
        mine.send("end")
        rank.result()


def dies_while_laying(name, path, connection):
    def die(*_, **__):
        connection.send("laying")
        connection.recv()

    stored = StoredRows.find(path)
    head = shared_module.describe(stored, [D * 4])
    shared_module.shared_memory(name, stored.nbytes, head, die, same)


def test_a_leader_that_dies_while_it_lays_is_followed_by_another(name, path):
    mine, its = shared_connection()
    leader = Rank(dies_while_laying, name, path, its)
    assert hear(mine) == "laying"
    members = [start_member(name, path) for _ in range(2)]
    assert not members[0][1].poll(0.5)  # they wait
    os.kill(leader.process.pid, signal.SIGKILL)
    said = [hear(end) for _, end in members]
    assert said[0] == said[1] and said[0][0]
    for rank, end in members:
        end.send("end")
        rank.result()


def fails_while_laying(name, path, connection):
    def fail(*_):
        connection.send("laying")
        connection.recv()
        raise ValueError("row 7 has a code or a scale that is NaN: not fp8 rows")

    stored = StoredRows.find(path)
    try:
        shared_module.shared_memory(name, stored.nbytes, shared_module.describe(stored, [D * 4]), fail, same)
    except ValueError as error:
        return str(error)


def follows(name, path, connection):
    """Says when it has asked the leader, and is about to wait for the answer."""
    receive = shared_module._receive
    shared_module._receive = lambda *arguments: (connection.send("waiting"), receive(*arguments))[1]  # in this process
    try:
        placed(name, StoredRows.find(path))
    except ValueError as error:
        return str(error)


def test_the_error_of_the_leader_is_everybodys(name, path):
    mine, its = shared_connection()
    leader = Rank(fails_while_laying, name, path, its)
    assert hear(mine) == "laying"
    lines = [shared_connection() for _ in range(2)]
    followers = [Rank(follows, name, path, end) for _, end in lines]
    assert [hear(line) for line, _ in lines] == ["waiting"] * 2
    mine.send("go on")
    error = leader.result()
    assert error.startswith("row 7 has")
    for follower in followers:
        said = follower.result()
        assert said.startswith(error) and "which laid down shared=" in said and "\n" not in said


# --- in one process, which may be leader and follower, too ---------------------------------------------------


@pytest.mark.parametrize("packed", [None, True, False])
def test_fp8_rows_are_shared_as_they_are_laid(name, packed, tmp_path):
    save_rows(tmp_path / "t.safetensors", Rows.from_packed(FP8).split())
    stored = StoredRows.find(tmp_path / "t.safetensors")
    with (
        placed(name, stored, packed=packed) as first,
        placed(name, Rows.from_packed(FP8).split(), packed=packed) as two,
    ):
        numbers = torch.arange(R).flip(0)
        assert torch.equal(first.stored(numbers), FP8[numbers]) and torch.equal(two.stored(numbers), FP8[numbers])
        assert first.bytes_held()["host"] == R * 66
        assert len(copies(name, Path("/proc/self/maps"))) == 1


def test_values_whose_columns_lie_one_after_the_other_are_shared(name):
    with placed(name, VALUES.t().contiguous().t()) as table:
        assert torch.equal(table.start(torch.arange(R)).wait(), VALUES)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (VALUES[:-1], "rows 1009; this one has 1008"),
        (VALUES.double(), "format"),
        (VALUES + 1, "sample of rows"),
        (VALUES.view(torch.int32).view(torch.float32)[:, :8].contiguous(), "format"),
    ],
    ids=["rows", "dtype", "content", "width"],
)
def test_a_stranger_is_refused(name, other, what):
    with placed(name, VALUES):
        with pytest.raises(ValueError, match=what) as caught:
            placed(name, other)
        assert "give another table another name" in str(caught.value) and "\n" not in str(caught.value)


def test_the_name_is_free_again_when_all_have_closed(name):
    for content in (VALUES, VALUES + 1):
        with placed(name, content) as table:
            assert torch.equal(table.start(torch.tensor([R - 1])).wait(), content[[R - 1]])


@pytest.mark.parametrize("character", ["x", "é", "字", "😀", "\\"])
def test_an_error_of_any_characters_is_told_whole(name, character):
    lines, words = [], character * 400

    def lay(memory):
        lines.append(shared_module._connect(shared_module._address(name)))
        raise ValueError(words)

    with pytest.raises(ValueError):
        shared_module.shared_memory(name, 4096, {}, lay, same)
    with lines[0], pytest.raises(ValueError) as told:
        shared_module._receive(lines[0], name, time.monotonic() + 30)
    assert str(told.value).startswith(f"{words} (in process {os.getpid()}, ")


def test_a_long_description_is_compared_whole(name):
    head = {"parts": list(range(2000))}
    with shared_module.shared_memory(name, 4096, head, lambda memory: None, same):
        shared_module.shared_memory(name, 4096, head, refuses_to_lay, same, patience=30).close()
        with pytest.raises(ValueError, match="names a table with parts"):
            shared_module.shared_memory(name, 4096, {"parts": [1]}, refuses_to_lay, same, patience=30)


def test_what_failed_leaves_the_name_free(name):
    poisoned = FP8.clone()
    poisoned[5, 65] = 0xFF
    with pytest.raises(ValueError, match="row 5 has"):
        placed(name, Rows(Rows.from_packed(FP8).format, (poisoned,)))
    with placed(name, VALUES) as table:
        assert len(table.start(torch.arange(3)).wait()) == 3


def test_who_is_interrupted_before_the_rows_are_laid_down_leaves_the_name_free(name, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(shared_module, "_Keeper", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        placed(name, VALUES)
    assert caught.tb  # it holds the frames, and what was in them
    shared_module.shared_memory(name, 4096, {}, lambda memory: None, same, patience=5).close()


def test_who_is_interrupted_while_the_name_is_taken_leaves_it_free(name, monkeypatch):
    class Interrupted(socket.socket):
        def listen(self, *given):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(shared_module.socket, "socket", Interrupted)
        placed(name, VALUES)
    assert caught.tb  # as above
    shared_module.shared_memory(name, 4096, {}, lambda memory: None, same, patience=5).close()


@pytest.mark.parametrize("placement", ["device", "file", "hot"])
def test_other_placements_have_nothing_to_share(name, placement):
    with pytest.raises(ValueError, match=r"shared=.*use host or uva|needs hot="):
        make_table(placement, VALUES, shared=name)


@pytest.mark.parametrize("wrong", ["", "x" * 201, 7])
def test_a_name_is_a_text(wrong):
    with pytest.raises(ValueError, match=r"give a name of 1 \.\. 200 characters"):
        placed(wrong, VALUES)


def test_behind_a_hot_tier(name):
    with make_table("hot", VALUES, hot=torch.tensor([3, 4]), shared=name) as table, placed(name, VALUES) as other:
        assert torch.equal(table.start(torch.arange(9)).wait(), other.start(torch.arange(9)).wait())


def test_a_wait_has_an_end(name):
    listener = shared_module._bind(shared_module._address(name))
    try:
        with pytest.raises(TimeoutError, match=r"process \d+ has not laid the rows down in time"):
            shared_module.shared_memory(name, 8, {}, lambda memory: None, same, patience=0.1)
    finally:
        listener.close()


@pytest.fixture
def many_open_files():
    """As a server with a thousand clients has them: whatever is opened next has a larger number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard if hard == resource.RLIM_INFINITY else min(hard, 4096), hard))
    files = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while files[-1] < 1100:  # the sets of select() end at 1023
            files.append(os.dup(files[0]))
        yield
    finally:
        for file in files:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def wait_for_successor(name):
    """Until another process, or thread, serves under the name."""
    until = time.monotonic() + 5
    while (line := shared_module._connect(shared_module._address(name))) is None:
        assert time.monotonic() < until, "nobody takes its place"
    line.close()


@pytest.mark.usefixtures("many_open_files")
def test_descriptors_beyond_a_thousand(name):
    first = shared_module.shared_memory(name, 8, {}, lambda memory: memory.bytes.fill_(7), same)
    with shared_module.shared_memory(name, 8, {}, refuses_to_lay, same, patience=5) as second:
        first.close()
        wait_for_successor(name)
        with shared_module.shared_memory(name, 8, {}, refuses_to_lay, same, patience=5) as third:
            assert second.bytes.tolist() == third.bytes.tolist() == [7] * 8


def test_a_successor_without_a_descriptor_tries_again(name, monkeypatch):
    first = shared_module.shared_memory(name, 8, {}, lambda memory: None, same)
    with shared_module.shared_memory(name, 8, {}, refuses_to_lay, same, patience=5):
        failures = [OSError(errno.EMFILE, "Too many open files")]
        bind = shared_module._bind

        def bind_later(address):
            if failures:
                raise failures.pop()
            return bind(address)

        monkeypatch.setattr(shared_module, "_bind", bind_later)
        first.close()
        wait_for_successor(name)
        assert not failures


def refuses_to_lay(memory):
    raise AssertionError("the rows are there already")


def test_another_users_copy_is_refused(name, monkeypatch):
    with placed(name, VALUES):
        monkeypatch.setattr(shared_module, "_peer", lambda line: (1, os.getuid() + 1, 0))
        with pytest.raises(PermissionError, match="has taken this name"):
            placed(name, VALUES)


def test_a_forked_child_does_not_hold_the_name(name):
    with placed(name, VALUES) as table:
        child = os.fork()
        if not child:
            os._exit(0 if torch.equal(table.start(torch.tensor([8])).wait(), VALUES[[8]]) else 1)
        assert os.waitpid(child, 0)[1] == 0
        with placed(name, VALUES) as again:  # the parent still serves
            assert len(again.start(torch.arange(2)).wait()) == 2
    with placed(name, VALUES + 1):
        pass


def test_a_program_started_meanwhile_does_not_keep_the_memory(name):
    what = f"/memfd:{shared_module._address(name)[1:].decode()}"
    with placed(name, VALUES), placed(name, VALUES):
        numbers = [int(fd.name) for fd in Path("/proc/self/fd").iterdir() if os.path.realpath(fd).startswith(what)]
        assert len(numbers) >= 2 and not any(map(os.get_inheritable, numbers))


@pytest.fixture
def fork():
    """Makes a child, as a data loader does, that lives until the end of the test."""
    go_on, go = os.pipe()
    children = []

    def make(*_):
        children.append(os.fork())
        if not children[-1]:
            os.close(go)
            os.read(go_on, 1)
            os._exit(0)

    yield make
    os.close(go)
    os.close(go_on)
    for child in children:
        os.waitpid(child, 0)


def test_a_child_forked_while_rows_are_laid_down_does_not_hold_the_name(name, fork):
    shared_module.shared_memory(name, 8, {}, fork, same).close()
    laid = []
    shared_module.shared_memory(name, 8, {}, laid.append, same, patience=5).close()
    assert laid


def test_a_child_forked_while_its_parent_waits_for_rows_does_not_wait(name, fork, monkeypatch):
    listener = shared_module._bind(shared_module._address(name))

    def fork_and_end(*_):
        fork()
        raise TimeoutError("waited long enough")

    monkeypatch.setattr(shared_module, "_receive", fork_and_end)
    with pytest.raises(TimeoutError, match="long enough"):
        shared_module.shared_memory(name, 8, {}, refuses_to_lay, same)
    with listener, listener.accept()[0] as line:
        assert shared_module._ready(line, seconds=5), "the child keeps the parent's line"


def test_the_rows_are_laid_down_once(name, monkeypatch):
    laid = []
    monkeypatch.setattr("engram_ref.tables.factory.lay", lambda *given: laid.append(1) or lay(*given))
    with placed(name, VALUES), placed(name, VALUES), placed(name, VALUES):
        assert laid == [1]


# --- the same content, all of it -----------------------------------------------------------------------------

SAMPLED = torch.linspace(0, R - 1, 64, dtype=torch.float64).long().tolist()


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Rows are compared in many pieces, the last of them a shorter one."""
    monkeypatch.setattr(laid_module, "_PIECE", 10_000)


def changed(rows, row, column):
    """The same rows but for one bit of one value, code or scale."""
    other = rows.clone()
    other.view(torch.uint8)[row, column] ^= 1
    return other


def from_file(folder, rows):
    """Rows that lie in a file of their own."""
    path = folder / f"{len(os.listdir(folder))}.safetensors"
    save_rows(path, rows)
    return StoredRows.find(path)


@pytest.fixture
def reads(monkeypatch):
    """A line for each time that rows of a file are read to be laid down."""
    found = []
    read_into = StoredRows.read_into
    monkeypatch.setattr(StoredRows, "read_into", lambda rows, parts: found.append(rows.rows) or read_into(rows, parts))
    return found


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a file"])
@pytest.mark.parametrize("row", [0, 1, 500, R - 2, R - 1])
def test_a_table_that_differs_in_one_value_is_refused(name, row, stored, tmp_path):
    other = changed(VALUES, row, D * 4 - 1)
    with placed(name, VALUES):
        with pytest.raises(ValueError) as caught:
            placed(name, from_file(tmp_path, other) if stored else other)
        if row in SAMPLED:
            assert "names a table with sample of rows" in str(caught.value)
        else:
            assert f"names a table whose row {row} has other bytes" in str(caught.value)
        assert "give another table another name" in str(caught.value) and "\n" not in str(caught.value)
        placed(name, VALUES).close()  # who was refused has disturbed nobody


@pytest.mark.parametrize("stored", [False, True], ids=["in memory", "in a file"])
@pytest.mark.parametrize("packed", [None, True, False])
@pytest.mark.parametrize("given", ["packed", "split"])
@pytest.mark.parametrize("column", [63, 64], ids=["last code", "first scale"])
def test_fp8_rows_that_differ_in_one_code_or_scale_are_refused(name, column, given, packed, stored, tmp_path):
    def rows(raw):
        found = getattr(Rows.from_packed(raw), given)()
        return from_file(tmp_path, found) if stored else found

    other = FP8.clone()
    other[[700, 900], column] = FP8[[701, 901], column] ^ 1  # no NaN: a code or a scale of another row, or beside it
    assert (other[[700, 900], column] != FP8[[700, 900], column]).all() and not {700, 900} & set(SAMPLED)
    with placed(name, rows(FP8), packed=packed):
        placed(name, rows(FP8), packed=packed).close()
        with pytest.raises(ValueError, match="names a table whose row 700 has other bytes"):
            placed(name, rows(other), packed=packed)


def test_equal_rows_are_accepted_wherever_they_come_from(name, tmp_path):
    halves = [from_file(tmp_path, part) for part in VALUES.split(600)]
    columns_first = VALUES.t().contiguous().t()
    same_rows = [VALUES, from_file(tmp_path, VALUES), StoredRows.together(halves), columns_first]
    for first in same_rows:
        with placed(name, first):
            for other in same_rows:
                with placed(name, other) as table:
                    assert torch.equal(table.start(torch.arange(R)).wait(), VALUES)


def test_rows_of_the_same_file_are_read_once(name, path, reads):
    with placed(name, StoredRows.find(path)):
        assert reads == [R]
        with placed(name, StoredRows.find(path)), placed(name, StoredRows.find(path)):
            assert reads == [R]


def test_other_rows_of_the_same_file_are_compared(name, tmp_path, reads):
    stored = from_file(tmp_path, torch.cat([VALUES, changed(VALUES, 500, 0)]))
    with (
        placed(name, stored.between(0, R)),
        pytest.raises(ValueError, match=f"names a table whose row {R + 500} has other bytes"),
    ):
        placed(name, stored.between(R, 2 * R))


@pytest.mark.parametrize("row", [None, 500])
def test_a_file_that_was_replaced_is_compared(name, path, row, tmp_path, reads):
    """A restart one by one, with a newer checkpoint in the same place."""
    with placed(name, StoredRows.find(path)):
        os.replace(from_file(tmp_path, VALUES if row is None else changed(VALUES, row, 0)).path, path)
        reads.clear()
        if row is None:
            placed(name, StoredRows.find(path)).close()
            assert sum(reads) == R
        else:
            with pytest.raises(ValueError, match=f"names a table whose row {row} has other bytes"):
                placed(name, StoredRows.find(path))


def test_a_file_that_was_written_to_is_compared(name, path):
    with placed(name, StoredRows.find(path)):
        with open(path, "r+b") as file:
            file.seek(StoredRows.find(path).parts[0].offset + 500 * D * 4)
            file.write(b"\x55")
        with pytest.raises(ValueError, match="names a table whose row 500 has other bytes"):
            placed(name, StoredRows.find(path))


def refused(name, path):
    """The error of a process that brings rows of this file."""
    try:
        placed(name, StoredRows.find(path)).close()
    except ValueError as error:
        return str(error)


def test_another_process_with_other_rows_is_refused_also_by_a_successor(name, path, tmp_path):
    other = from_file(tmp_path, changed(VALUES, 500, 0)).path
    first = start_member(name, path)
    assert hear(first[1])[0]
    assert "row 500 has other bytes" in Rank(refused, name, other).result()
    with placed(name, VALUES):
        os.kill(first[0].process.pid, signal.SIGKILL)
        first[0].process.join()
        wait_for_successor(name)
        assert "row 500 has other bytes" in Rank(refused, name, other).result()
        assert Rank(refused, name, path).result() is None


def test_who_is_interrupted_while_rows_are_compared_has_taken_nothing(name, path, monkeypatch):
    def taken():
        return len(os.listdir("/proc/self/fd")), copies(name, Path("/proc/self/maps"))

    def interrupted(*given):
        compared.append(given)
        if len(compared) == 3:
            raise KeyboardInterrupt
        return read_whole(*given)

    read_whole, compared = laid_module.read_whole, []
    leader, mine = start_member(name, path)
    assert hear(mine)[0]
    before = taken()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(laid_module, "read_whole", interrupted)
        placed(name, VALUES)
    assert caught.tb  # it holds the frames, and what was in them
    assert taken() == before
    placed(name, VALUES).close()
    mine.send("end")
    leader.result()
    with placed(name, VALUES + 1):
        pass


def test_others_are_served_while_one_compares(name):
    def compare(fd):
        placed(name, VALUES).close()
        return None

    head = shared_module.describe(VALUES, [D * 4])
    with placed(name, VALUES):
        shared_module.shared_memory(name, VALUES.nbytes, head, refuses_to_lay, compare, patience=5).close()


def test_rows_are_compared_in_bounded_memory(monkeypatch):
    """And in as many pieces as that takes; 1009 rows of 64 B are 6.5 pieces of 10,000 B."""
    laid_bytes = []
    monkeypatch.setattr(
        laid_module, "lay", lambda rows, memory, packed: laid_bytes.append(len(memory)) or lay(rows, memory, packed)
    )
    with open(os.memfd_create("compared"), "w+b") as file:
        file.write(VALUES.numpy().tobytes())
        file.flush()
        assert laid_module.first_other_row(VALUES, file.fileno(), None) is None
    assert laid_bytes == [156 * 64] * 6 + [(R - 6 * 156) * 64]


def test_an_empty_table_is_the_same_as_another(name):
    with placed(name, VALUES[:0]), placed(name, VALUES[:0]) as table:
        assert table.rows == 0
