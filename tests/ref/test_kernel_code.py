"""The code that Triton makes of the kernels: which accesses they make and in which order, that they compile at all.

The interpreter, which runs the kernels in all other tests here, shows none of it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels need Triton (pip install 'engram-offload[test]' on Linux)")

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What `kernel_code` prints, from a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")), "TRITON_DUMP_PTXAS_LOG": "1"}
    command = [sys.executable, "-m", "tests.ref.kernel_code"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def compiled(made):
    return made["accesses"]


@pytest.fixture(scope="module")
def calls(made):
    return made["calls"]


@pytest.mark.parametrize(
    "width", ["160", "256", "look up 256", *(f"layers {width}" for width in (160, 256, 512, 1024))]
)
def test_rows_cross_the_bus_in_16_byte_words(width, compiled):
    assert "ld.global.v2.b64" in compiled[width] and "st.global.v2.b64" in compiled[width]


def test_rows_that_no_16_divides_cross_in_8_byte_words(compiled):
    for gather in ("264", "layers 264", "layers 128"):  # of 128 B, a program's two rows are 8 bytes for each thread
        assert "ld.global.b64" in compiled[gather] and "ld.global.b8" not in compiled[gather]


@pytest.mark.parametrize("way", ["packed", "split", "in order", "layers packed", "layers split", "look up 264"])
def test_fp8_rows_are_read_8_bytes_and_written_16_bytes_a_lane(way, compiled):
    assert "ld.global.v2.b32" in compiled[way] and "st.global.v4.b32" in compiled[way]
    shared = [op for op in compiled[way] if "shared" in op]  # the lane that reads a code writes its value
    assert shared == (["st.shared.b32", "ld.shared.b32"] if way == "look up 264" else [])  # the count's answer


@pytest.mark.parametrize(
    ("way", "load", "hint"),
    [
        *((way, "v2.b32", "") for way in ("few", "many", "sorted", "pieces")),
        ("lines", "v2.b64", ""),
        ("past_l1", "v2.b32", "cg."),
        ("evict_first", "v2.b32", "L1::evict_first.L2::cache_hint."),
    ],
)
def test_ways_to_read_that_are_timed_beside_the_library_ask_for_what_they_say(way, load, hint, compiled):
    """A hint that Triton dropped would make a way another one."""
    found = compiled[f"read {way}"]
    assert f"ld.global.{hint}{load}" in found and "st.global.v4.b32" in found
    assert hint or not any(other in op for op in found for other in (".cg", "evict"))


@pytest.mark.parametrize("form", ["demo", "v41"])
def test_the_stream_is_read_and_written_16_bytes_at_once(form, compiled):
    assert "ld.global.v4.b32" in compiled[f"fusion {form}"]
    assert any(op.startswith(("st.global.v4.b32", "st.global.v2.b32")) for op in compiled[f"fusion {form}"])


@pytest.mark.parametrize("way", ["packed", "split", "in order", "layers packed", "layers split", "look up 264"])
def test_a_warp_asks_for_the_codes_of_one_row_at_once(way, compiled):
    """In pieces of 64 bytes, of four rows, each piece is a request, or two: 9.75 lines of 128 B a row, not 3.94."""
    laid = "sizePerThread = [1, 8], threadsPerWarp = [1, 32]"
    assert [op for op in compiled[way] if "threadsPerWarp" in op] == [f"load {laid}", f"store {laid}"]


def units_touched(stride: int, unit: int) -> set[int]:
    """How many aligned stretches of `unit` bytes a row of 256 codes and 8 scales lies in, over all rows of a table."""
    return {((row * stride) % unit + 264 - 1) // unit + 1 for row in range(unit)}


@pytest.mark.parametrize("stride", [272, 288])
def test_padding_rows_of_264_bytes_would_save_nothing(stride):
    """A row is nine sectors of 32 B and three lines of 128 B wherever it begins, 8 bytes aligned or 16 or 32.

    Its codes are one load of a warp either way: 32 lanes of 8 bytes, or 16 of 16. So rows are read as they are, and a
    padded table would take 3 or 9 % more memory for it. What other strides and parts cost: `bench/reads`.
    """
    assert units_touched(264, 32) == units_touched(stride, 32) == {9}
    assert units_touched(264, 128) == units_touched(stride, 128) == {3}


def test_no_kernel_flushes_subnormal_numbers(compiled):
    """But for roots in the fusion, of no less than 1e-20."""
    flushing = {name: {op for op in ops if "ftz" in op} for name, ops in compiled.items()}
    roots = {name: flushing.pop(name) for name in ("fusion demo", "fusion v41")}
    assert not any(flushing.values())
    assert all("sqrt.approx.ftz.f32" in op for ops in roots.values() for op in ops), roots


def test_no_kernel_needs_more_registers_than_there_are(compiled):
    assert [name for name, ops in compiled.items() if "spill" in ops] == []


@pytest.mark.parametrize("length", [1, 100])
def test_the_history_is_overwritten_after_all_threads_have_read_it(length, compiled):
    """A barrier stands before the last store, and nothing is read behind it."""
    ops = compiled[f"hash {length}"]
    behind = ops[ops.index("bar.sync") + 1 :]
    assert behind and all(op.startswith("st.global") for op in behind)


def test_a_lookup_waits_three_times_for_memory(compiled):
    """For ids, for their compressed ids, for rows: behind the first store only the second and the third are asked for.

    No load moves before a store: one that waits for nothing and stands behind one is another round trip in every step.
    While rows are on their way the history is advanced: what is read of it stands behind the barrier, as rows do not.
    """
    ops = compiled["look up 264"]
    stored, barrier = (next(i for i, op in enumerate(ops) if op.startswith(of)) for of in ("st.global", "bar.sync"))
    asked = [op for op in ops[stored:barrier] if op.startswith("ld.global")]
    assert sorted(asked) == ["ld.global.b64", *["ld.global.b8"] * 2, *["ld.global.v2.b32"] * 2]
    assert "st.global.v4.b32" not in ops[:barrier]


def test_no_kernel_divides_64_bit_numbers(compiled):
    assert "st.global.v4.b32" in compiled["hash 100"]  # indices leave together
    assert [op for ops in compiled.values() for op in ops if op.startswith(("div", "rem"))] == []


# --- a step that calls the CPU ----------------------------------------------------------------------


def in_order(code):
    """Loads, stores and barriers of global memory in the order of the text, and the borders of blocks."""
    found = re.findall(r"(?:ld|st)(?:\.\w+)*\.global\S*|bar\.sync|\$L__BB\d+_\d+:|bra \t?\$L__BB\d+_\d+", code)
    return [word.replace("\t", "") for word in found]


def test_words_cross_the_bus_in_order_and_nothing_is_read_and_written_back(calls):
    found = in_order(calls["ask"])
    posted = found.index("st.release.sys.global.s64")
    assert found[posted - 1] == "bar.sync", "all threads have written their ids before one of them says so"
    assert "st.global.b64" in found[: posted - 1], "the ids"
    looks = [at for at, word in enumerate(found) if word == "ld.acquire.sys.global.s64"]
    assert len(looks) == 3 and looks[0] > posted
    assert found[looks[0] - 1].startswith("bra $L__BB"), "what the host knows is looked at only after waiting in vain"
    expired = found.index("st.release.sys.global.s64", looks[2])
    assert found[expired - 2 : expired] == ["st.global.b64", "bar.sync"], "the first step before the last one"
    assert found.count("st.release.sys.global.s64") == 2
    begin = found[looks[2] - 1].rstrip(":")  # the loop: it looks anew each time, and at nothing else
    assert begin.startswith("$L__BB") and found[looks[2] + 1] == f"bra {begin}"
    assert "atom" not in calls["ask"] and "red." not in calls["ask"]


def test_an_answer_is_read_past_the_caches_as_widely_as_can_be(calls):
    found = in_order(calls["take"])
    sent = [word for word in found if word.startswith("ld.volatile")]  # of system scope, says PTX
    assert sent and set(sent) == {"ld.volatile.global.v4.b32"} == {word for word in found if ".v4" in word} - {
        "st.global.v4.b32"
    }
