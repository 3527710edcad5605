"""One copy of a table per machine: leader, followers, errors, deaths, and nothing left behind."""

from __future__ import annotations

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
from engram_ref.tables import make_table
from engram_ref.tables import shared as shared_module
from engram_ref.tables.factory import _copy_to_host
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
    shared_module.shared_memory(name, stored.nbytes, head, die)


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
        shared_module.shared_memory(name, stored.nbytes, shared_module.describe(stored, [D * 4]), fail)
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
        shared_module.shared_memory(name, 4096, {}, lay)
    with lines[0], pytest.raises(ValueError) as told:
        shared_module._receive(lines[0], name, time.monotonic() + 30)
    assert str(told.value).startswith(f"{words} (in process {os.getpid()}, ")


def test_a_long_description_is_compared_whole(name):
    head = {"parts": list(range(2000))}
    with shared_module.shared_memory(name, 4096, head, lambda memory: None):
        shared_module.shared_memory(name, 4096, head, refuses_to_lay, patience=30).close()
        with pytest.raises(ValueError, match="names a table with parts"):
            shared_module.shared_memory(name, 4096, {"parts": [1]}, refuses_to_lay, patience=30)


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
    shared_module.shared_memory(name, 4096, {}, lambda memory: None, patience=5).close()


def test_who_is_interrupted_while_the_name_is_taken_leaves_it_free(name, monkeypatch):
    class Interrupted(socket.socket):
        def listen(self, *given):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt) as caught:
        patch.setattr(shared_module.socket, "socket", Interrupted)
        placed(name, VALUES)
    assert caught.tb  # as above
    shared_module.shared_memory(name, 4096, {}, lambda memory: None, patience=5).close()


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
            shared_module.shared_memory(name, 8, {}, lambda memory: None, patience=0.1)
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
    first = shared_module.shared_memory(name, 8, {}, lambda memory: memory.bytes.fill_(7))
    with shared_module.shared_memory(name, 8, {}, refuses_to_lay, patience=5) as second:
        first.close()
        wait_for_successor(name)
        with shared_module.shared_memory(name, 8, {}, refuses_to_lay, patience=5) as third:
            assert second.bytes.tolist() == third.bytes.tolist() == [7] * 8


def test_a_successor_without_a_descriptor_tries_again(name, monkeypatch):
    first = shared_module.shared_memory(name, 8, {}, lambda memory: None)
    with shared_module.shared_memory(name, 8, {}, refuses_to_lay, patience=5):
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
    shared_module.shared_memory(name, 8, {}, fork).close()
    laid = []
    shared_module.shared_memory(name, 8, {}, laid.append, patience=5).close()
    assert laid


def test_a_child_forked_while_its_parent_waits_for_rows_does_not_wait(name, fork, monkeypatch):
    listener = shared_module._bind(shared_module._address(name))

    def fork_and_end(*_):
        fork()
        raise TimeoutError("waited long enough")

    monkeypatch.setattr(shared_module, "_receive", fork_and_end)
    with pytest.raises(TimeoutError, match="long enough"):
        shared_module.shared_memory(name, 8, {}, refuses_to_lay)
    with listener, listener.accept()[0] as line:
        assert shared_module._ready(line, seconds=5), "the child keeps the parent's line"


def test_the_rows_are_laid_down_once(name, monkeypatch):
    laid = []
    monkeypatch.setattr(
        "engram_ref.tables.factory._copy_to_host", lambda *a, **k: laid.append(1) or _copy_to_host(*a, **k)
    )
    with placed(name, VALUES), placed(name, VALUES), placed(name, VALUES):
        assert laid == [1]
