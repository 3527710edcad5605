"""Files that are complete or absent: the umask, links, devices, and what a killed process leaves."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from engram_ref.files.replacing import replacing, replacing_path

ROOT = Path(__file__).parents[3]

KILLED = """
import os, signal, sys
from pathlib import Path
from unittest import mock
from engram_ref.files.replacing import replacing, replacing_path
path = Path(sys.argv[1])
with replacing(path) as file, replacing_path(path) as part:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def write(path, way):
    if way is replacing:
        with replacing(path) as file:
            file.write(b"whole")
    else:
        with replacing_path(path) as part:
            part.write_bytes(b"whole")


@pytest.fixture(params=[replacing, replacing_path], ids=lambda way: way.__name__)
def way(request):
    return request.param


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_the_mode_is_the_umasks(tmp_path, way, mask):
    before = os.umask(mask)
    try:
        write(tmp_path / "results.json", way)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "results.json").stat().st_mode) == 0o666 & ~mask
    assert (tmp_path / "results.json").read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["n" * 251 + ".csv", "é" * 120 + ".json", "n." + "x" * 253])
def test_a_name_may_be_as_long_as_the_system_lets_it(tmp_path, way, name):
    write(tmp_path / name, way)
    assert os.listdir(tmp_path) == [name]
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / name)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 3
    write(tmp_path / name, way)
    assert os.listdir(tmp_path) == [name]


def test_what_a_killed_process_left_goes_with_the_next_write(tmp_path, way):
    path = tmp_path / "results.json"
    done = subprocess.run([sys.executable, "-c", KILLED, str(path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL and len(os.listdir(tmp_path)) == 2
    neighbours = [tmp_path / ".other.json-0123456789abcdef.part", tmp_path / ".results.json-notes.part"]
    for neighbour in neighbours:  # of another file, or of somebody else
        neighbour.touch()
    write(path, way)
    assert sorted(tmp_path.iterdir()) == sorted([*neighbours, path])


def test_what_another_still_writes_stays(tmp_path, way):
    path = tmp_path / "results.json"
    with replacing(path) as file:
        file.write(b"the first")
        write(path, way)
        assert path.read_bytes() == b"whole"
    assert path.read_bytes() == b"the first" and os.listdir(tmp_path) == ["results.json"]


def test_a_part_that_is_interrupted_as_it_is_made_goes_at_once(tmp_path, way):
    stopped = mock.patch("engram_ref.files.replacing.fcntl.flock", side_effect=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt), stopped, way(tmp_path / "f"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_name_that_was_guessed_is_not_followed(tmp_path, way, monkeypatch):
    """Even if the name of a part were known, a link that waits there is not written through."""
    target = tmp_path / "precious"
    target.write_bytes(b"precious")
    names = iter(["guessed", "free"])
    monkeypatch.setattr("secrets.token_hex", lambda count: next(names))
    for ending in ("", ".json"):
        (tmp_path / f".results.json-guessed.part{ending}").symlink_to(target)
    with pytest.raises(FileExistsError):
        write(tmp_path / "results.json", way)
    assert target.read_bytes() == b"precious"


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path, way):
    (tmp_path / "precious").write_bytes(b"precious")
    (tmp_path / "results.json").symlink_to(tmp_path / "precious")
    write(tmp_path / "results.json", way)
    assert not (tmp_path / "results.json").is_symlink() and (tmp_path / "results.json").read_bytes() == b"whole"
    assert (tmp_path / "precious").read_bytes() == b"precious"


def test_a_device_or_a_pipe_is_not_replaced(tmp_path, way):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ValueError, match="is not a regular file, and would be replaced by one: name another"):
            write(path, way)
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode) and os.listdir(tmp_path) == ["pipe"]


def test_a_folder_that_may_not_be_read_gets_its_file(tmp_path, way, monkeypatch):
    opened, real = [], os.open

    def refuse(path, *rest):
        opened.append(path)
        if path == tmp_path:
            raise PermissionError("a folder of mode 0300")
        return real(path, *rest)

    monkeypatch.setattr(os, "open", refuse)
    write(tmp_path / "results.json", way)
    assert (tmp_path / "results.json").read_bytes() == b"whole" and tmp_path in opened


def test_an_error_names_the_file_that_was_wanted(tmp_path, way):
    with pytest.raises(FileNotFoundError) as caught:
        write(tmp_path / "none" / "results.json", way)
    assert caught.value.filename == str(tmp_path / "none" / "results.json")
