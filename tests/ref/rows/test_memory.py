"""Host memory: where it lies, what closing gives back, what is refused, and the bookkeeping of page-locking.

There is no CUDA here: a stand-in for its runtime notes what is registered and unregistered, and refuses on demand.
"""

import functools
import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engram_ref import free_memory
from engram_ref.rows import memory as module
from engram_ref.rows.memory import (
    HUGE_PAGE,
    PIN_PIECE,
    HostMemory,
    free_device_bytes,
    free_host_bytes,
    require_bytes,
    require_host_bytes,
)
from tests.ref.tables.fake_cuda import install_runtime

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def is_mapped(address: int) -> bool:
    return any(low <= address < high for low, high, _ in module._mappings())


@pytest.fixture
def runtime(monkeypatch):
    """Puts a stand-in for CUDA's runtime in place and gives it back."""
    return functools.partial(install_runtime, monkeypatch)


# --- the memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [0, 1, 4097, HUGE_PAGE, 5 * MIB + 3])
def test_memory_is_zeroed_aligned_and_writable(nbytes):
    with HostMemory(nbytes) as memory:
        assert memory.bytes.shape == (nbytes,) and memory.bytes.dtype == torch.uint8
        assert not memory.bytes.any()
        if nbytes:
            assert memory.bytes.data_ptr() % HUGE_PAGE == 0
            assert memory.bytes.untyped_storage().data_ptr() == memory.bytes.data_ptr()
        memory.bytes.fill_(7)
        assert int(memory.bytes.sum(dtype=torch.int64)) == 7 * nbytes


def test_closing_gives_the_memory_back_and_leaves_no_mapping():
    memory = HostMemory(64 * MIB)
    address = memory.bytes.data_ptr()
    memory.bytes.fill_(1)
    before = resident()
    assert is_mapped(address)
    memory.close()
    assert before - resident() > 60 * MIB
    assert memory.bytes.numel() == 0
    del memory
    assert not is_mapped(address)


def test_a_tensor_left_over_reads_zeros_and_the_memory_is_given_back_all_the_same():
    memory = HostMemory(64 * MIB)
    rows = memory.bytes.view(-1, 256)
    rows.fill_(1)
    before = resident()
    memory.close()
    assert before - resident() > 60 * MIB
    assert not rows[::1000].any()
    memory.close()


def test_memory_lives_as_long_as_its_last_tensor():
    rows = HostMemory(4 * MIB).bytes.view(-1, 256)
    rows.fill_(9)
    assert (rows == 9).all()


def test_the_share_of_huge_pages_counts_what_was_touched(monkeypatch):
    with HostMemory(8 * MIB) as memory:
        low = memory.bytes.data_ptr()
        smaps = (
            f"{low - 4096:x}-{low:x} rw-p 0 00:00 0\nRss: 4 kB\nAnonHugePages: 0 kB\n"
            f"{low:x}-{low + 4 * MIB:x} rw-p 0 00:00 0 \nRss:    4096 kB\nAnonHugePages:  2048 kB\n"
            f"{low + 4 * MIB:x}-{low + 8 * MIB:x} rw-p 0 00:00 0 \nRss:    4096 kB\nAnonHugePages:  4096 kB\n"
        )
        monkeypatch.setattr(module, "text_of", lambda path: smaps)
        assert memory.huge_page_share() == 0.75
        monkeypatch.setattr(module, "text_of", lambda path: "")
        assert memory.huge_page_share() == 0.0


# --- what does not fit ------------------------------------------------------------------------------------


def test_too_much_is_refused_in_one_line_with_both_numbers():
    with pytest.raises(ValueError) as caught:
        HostMemory(1 << 50)
    text = str(caught.value)
    assert re.match(
        r"1048576\.00 GiB do not fit into host memory, of which \d+\.\d\d GiB are free \(MemTotal .*\): take a ", text
    )
    assert "\n" not in text


def test_the_limit_leaves_something_to_everybody_else(monkeypatch):
    monkeypatch.setattr(module, "free_host_bytes", lambda: 1 << 30)
    require_host_bytes((1 << 30) - (1 << 28))
    with pytest.raises(ValueError, match=r"0\.75 GiB do not fit into host memory, of which 1\.00 GiB are free"):
        require_host_bytes((1 << 30) - (1 << 28) + 1)
    monkeypatch.setattr(module, "free_host_bytes", lambda: None)
    require_host_bytes(1 << 60)  # a system that does not say


def test_a_devices_own_memory_is_counted(monkeypatch):
    gpu = torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 30, 80 << 30) if device is gpu else None)
    assert free_device_bytes(gpu) == 3 << 30
    with pytest.raises(ValueError, match=r"4\.00 GiB do not fit into cuda:1 memory, of which 3\.00 GiB are free"):
        require_bytes(4 << 30, gpu)


MEMINFO = "MemTotal: 64000000 kB\nMemAvailable: 8388608 kB\n"  # 8 GiB
SYSTEMS = {
    "no container": ({"/proc/meminfo": MEMINFO}, 8 << 30),
    "no limit": ({"/proc/meminfo": MEMINFO, "memory.max": "max\n", "memory.current": "99\n"}, 8 << 30),
    "version 2": ({"/proc/meminfo": MEMINFO, "memory.max": f"{4 << 30}\n", "memory.current": f"{3 << 30}\n"}, 1 << 30),
    "version 2, files in memory": (
        {
            "/proc/meminfo": MEMINFO,
            "memory.max": f"{4 << 30}\n",
            "memory.current": f"{3 << 30}\n",
            "memory.stat": f"anon 5\ninactive_file {2 << 30}\nactive_file 7\n",
        },
        3 << 30,
    ),
    "version 1": (
        {
            "/proc/meminfo": MEMINFO,
            "memory/memory.limit_in_bytes": f"{4 << 30}\n",
            "memory/memory.usage_in_bytes": f"{5 << 30}\n",
        },
        0,
    ),
    "another system": ({}, None),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_containers_limit_counts(system, monkeypatch):
    files, free = SYSTEMS[system]
    monkeypatch.setattr(free_memory, "text_of", lambda path: files.get(str(path).removeprefix("/sys/fs/cgroup/"), ""))
    assert free_host_bytes() == free


def test_this_system_says_how_much_is_free():
    free = free_host_bytes()
    assert free is not None and MIB < free < 1 << 50


# --- page-locking -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, PIN_PIECE, PIN_PIECE + 1, 3 * PIN_PIECE + 4096])
def test_pieces_cover_the_memory_exactly(nbytes, runtime):
    fake = runtime()
    with HostMemory(nbytes, pinned=True) as memory:
        assert memory.pinned
        at = memory.bytes.data_ptr()
        for address, piece in sorted(fake.registered.items()):
            assert address == at and piece <= PIN_PIECE
            at += piece
        assert at == memory.bytes.data_ptr() + nbytes
    assert fake.registered == {} and not memory.pinned
    pieces = -(-nbytes // PIN_PIECE)
    assert fake.calls == ["register"] * pieces + ["synchronize"] + ["unregister"] * pieces


def test_memory_that_is_copied_as_a_whole_is_locked_as_a_whole(runtime):
    fake = runtime()
    with HostMemory(2 * PIN_PIECE) as memory:
        memory.pin(piece=memory.nbytes)
        assert fake.registered == {memory.bytes.data_ptr(): 2 * PIN_PIECE}
    assert fake.registered == {}


@pytest.mark.parametrize("refuse", [0, 1, 2])
def test_a_refusal_half_way_unlocks_what_was_locked(refuse, runtime):
    fake = runtime(refuse)
    with pytest.raises(ValueError, match=r"^CUDA refused to page-lock 3,221,225,472 B of host memory \(error 2\)$"):
        HostMemory(3 * PIN_PIECE, pinned=True)
    assert fake.registered == {}
    assert fake.calls == ["register"] * refuse + ["forget", "synchronize"] + ["unregister"] * refuse


def test_memory_that_is_dropped_is_unlocked_before_it_is_unmapped(runtime):
    """Its addresses are given to the next mapping, which CUDA would refuse to lock, or read as what was there."""
    fake = runtime()
    for _ in range(3):
        memory = HostMemory(MIB, pinned=True)
        rows = memory.bytes.view(-1, 256)[7:]
        address = memory.bytes.data_ptr()
        fake.cudaHostUnregister = lambda at, fake=fake, address=address: (
            fake.calls.append(is_mapped(address)),
            fake.registered.pop(at),
        )
        del memory
        assert fake.registered and fake.calls[-1] == "register"  # a tensor still looks at it
        del rows
        assert fake.registered == {} and fake.calls[-2:] == ["synchronize", True]
        assert not is_mapped(address)


def test_the_end_of_a_test_is_the_end_of_its_stand_in(runtime, monkeypatch):
    """Memory is unlocked by the runtime that locked it, whatever is called so by then."""
    fake = runtime()
    memory = HostMemory(MIB, pinned=True)
    monkeypatch.undo()
    del memory
    assert fake.registered == {}


def test_a_device_that_failed_does_not_keep_memory_locked(runtime, monkeypatch):
    fake = runtime()

    def failed():
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch.cuda, "synchronize", failed)
    memory = HostMemory(MIB, pinned=True)
    with pytest.raises(RuntimeError, match="device-side assert"):
        memory.close()
    assert fake.registered == {}
    memory.close()


def test_a_forked_child_leaves_the_lock_to_its_parent(runtime):
    """CUDA does not work there, and what it would unlock is in use."""
    fake = runtime()
    closed, dropped = HostMemory(MIB, pinned=True), HostMemory(MIB, pinned=True)
    child = os.fork()
    if child == 0:
        closed.close()
        del dropped
        os._exit(fake.calls != ["register"] * 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    closed.close()


AT_EXIT = """
import sys, torch
from engram_ref.rows import memory
class Runtime:
    def cudaHostRegister(self, address, nbytes, flags): return 0
    def cudaHostUnregister(self, address): print("unlocked")
torch.cuda.cudart = Runtime
torch.cuda.synchronize = lambda: print("waited")
kept = memory.HostMemory(4096, pinned=True)
cycle = [memory.HostMemory(4096, pinned=True)]; cycle.append(cycle)
dropped = memory.HostMemory(4096, pinned=True); del dropped
sys.modules["kept"] = kept
"""


@pytest.mark.slow
def test_the_end_of_the_process_is_silent():
    """CUDA may be down by then; the system takes the locks back."""
    done = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "waited\nunlocked\n", "")


def test_the_stand_in_refuses_what_cuda_refuses(runtime):
    fake = runtime()
    with HostMemory(MIB, pinned=True) as memory:
        start = memory.bytes.data_ptr()
        for address, nbytes in ((start, 1), (start + MIB - 1, 9), (start - 1, 2), (start - 1, 2 * MIB)):
            assert fake.cudaHostRegister(address, nbytes, 0) == 712
        with pytest.raises(ValueError, match=r"CUDA refused to page-lock 1,048,576 B of host memory \(error 712\)"):
            memory.pin()
        assert fake.registered == {}


def test_a_refused_call_does_not_fail_the_next_kernel(monkeypatch):
    started = []

    def first_kernel(*shape, device):
        started.append(device)
        raise RuntimeError("CUDA error: out of memory")  # the error of the refused call, told once more

    monkeypatch.setattr(torch, "ones", first_kernel)
    module._forget_cuda_error()
    assert started == ["cuda"]


def test_unlocked_memory_is_closed_without_cuda(monkeypatch):
    def unexpected():
        raise AssertionError("nothing was page-locked")

    monkeypatch.setattr(torch.cuda, "synchronize", unexpected)
    HostMemory(MIB).close()


def test_what_the_system_says_in_no_encoding_is_read(tmp_path):
    """A mapped file may have any name."""
    path = tmp_path / "smaps"
    path.write_bytes(b"7f00-7f01 r--p 0 0:0 1  /home/jos\xff/lib.so\nAnonHugePages:  2048 kB\n")
    assert free_memory.kilobytes(free_memory.text_of(path), "AnonHugePages") == 2048
