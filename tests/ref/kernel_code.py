"""What Triton makes of the kernels for GPUs that are not here: a V100 (gather of fp8 rows), an A100 (of plain ones) and
an H100 (all others). Prints JSON by kernel; in a process of its own, for Triton's interpreter makes no code.

    env -u TRITON_INTERPRET TRITON_DUMP_PTXAS_LOG=1 TRITON_CACHE_DIR=EMPTY python -m tests.ref.kernel_code
"""

import contextlib
import io
import json
import re

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.reads import kernels as reading
from bench.reads.methods import METHODS
from engram_ref.calling import kernels as calling
from engram_ref.fusion import kernels as fusing
from engram_ref.hashing import kernels as hashing
from engram_ref.lookup import kernels as looking_up
from engram_ref.rows import kernels as gathering

PACKED, SPLIT = [264], [256, 8]  # bytes of an fp8 row of 256 values, by part
OUT = torch.empty(4, 256, dtype=torch.bfloat16)


def compiled(kernel, types, constants, aligned=(), capability=90):
    """The stages of a kernel, and what the assembler says; `aligned` are the arguments that 16 divides."""
    constants = dict(constants)
    options = {"num_warps": constants.pop("num_warps", 4)}
    number = kernel.arg_names.index
    source = ASTSource(
        kernel,
        {**types, **dict.fromkeys(constants, "constexpr")},
        {(number(name),): value for name, value in constants.items()},
        {(number(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    with contextlib.redirect_stdout(io.StringIO()) as said:
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm, said.getvalue()


def accesses(*given):
    """Accesses to memory, barriers, divisions, flushing operations and layouts of tiles; "spill" if registers do."""
    made, said = compiled(*given)
    found = re.findall(r"(?:ld|st)\.(?:global|shared)\S*|(?:div|rem)\.[us]64|bar\.sync|\S*ftz\S*", made["ptx"])
    amounts = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", said)
    assert len(amounts) == 3, f"set TRITON_DUMP_PTXAS_LOG, and an empty TRITON_CACHE_DIR: {said}"
    return found + spread(made["ttgir"]) + ["spill"] * any(map(int, amounts))


def spread(text):
    """How the values of a tile are laid over a warp, where codes are loaded and values stored."""
    layouts = dict(re.findall(r"^(#blocked\d*) = #ttg.blocked<{(sizePerThread = .*?), warpsPerCTA", text, re.M))
    of_rows = re.findall(r"tt\.(load|store) .*tensor<[0-9x]+x(?:256|8x32)x!tt.ptr<i(?:8|16)>, (#blocked\d*)>", text)
    return [f"{what} {layouts[name]}" for what, name in of_rows]


def scaled_shape(widths):
    return gathering._scaled_shape([torch.empty(4, width, dtype=torch.uint8) for width in widths], OUT)


def gathers():
    """Of one table and of all layers' tables, plain and fp8."""
    numbers = dict(rows="*i32", count="i32")
    one, layers = dict(table="*i64", bad_row="*i64", table_rows="i64"), dict(addresses="*i64")
    for width in (160, 256, 264):
        shape = gathering._gather_shape(width // 8, width)
        yield str(width), accesses(gathering._gather, numbers | one | dict(out="*i64"), shape, ["table", "out"], 80)
    for width in (128, 160, 256, 264, 512, 1024):
        shape = {**gathering._gather_shape(width // 8, width), "ALIGNED": 16 if width % 16 == 0 else 8}
        yield f"layers {width}", accesses(gathering._gather_layers, numbers | layers | dict(out="*i64"), shape)
    del one["table"]
    codes, out = dict(codes="*i8", scales="*u8"), dict(out="*i16")
    for name, widths in dict(packed=PACKED, split=SPLIT).items():
        shape = scaled_shape(widths)
        yield name, accesses(gathering._gather_scaled, numbers | one | codes | out, shape, [], 70)
        yield f"layers {name}", accesses(gathering._gather_scaled_layers, numbers | layers | out, shape)
    yield "in order", accesses(gathering._dequantise, codes | out | dict(count="i32"), scaled_shape(PACKED))


def hashes_and_lookups():
    """The hash of two layers, and the lookup in one kernel."""
    given, made = ["ids", "vocab", "before", "constants"], ["compressed", "after", "met_tokens", "met_ids"]
    tensors = dict.fromkeys([*given, *made], "*i64")
    strides, sizes = ["ids_b", "ids_t", "mask_b", "mask_t", "before_b"], ["length", "tokens", "size", "past", "kept"]
    numbers = [*strides, *sizes, "pad", "stand_in"]
    types = tensors | dict.fromkeys(numbers, "i32") | {"rows": "*i32"}
    usual = dict(N=4, HEADS=8, COLUMNS=24, WINDOW=4, mask=None)
    hash_types = types | dict.fromkeys(["tiles", "known", "segment_end"], "i32")
    for length in (1, 100):
        constants = usual | dict(LAYERS=2, **hashing._shape(4, 48, length))
        yield f"hash {length}", accesses(hashing._hash, hash_types, constants, ["constants", "rows", "compressed"])
    unused = dict.fromkeys(["WORDS", "CODE_STRIDE", "SCALE_STRIDE", "BLOCKS", "OUT_ALIGNED"], 0)
    shapes = {256: {**gathering._gather_shape(32, 256), "ALIGNED": 16}, 264: scaled_shape(PACKED)}
    for width, shape in shapes.items():
        of_rows = dict(addresses="*i64", done="*i32", out="*i16" if width == 264 else "*i64", known="i32")
        constants = usual | dict(SPAN=4, SCALED=width == 264) | unused | shape
        yield f"look up {width}", accesses(looking_up._look_up, types | of_rows, constants, ["constants", "rows"])


def other_ways_to_read():
    """Those of `bench` that are timed beside the library's."""
    types = dict(codes="*i8", scales="*u8", rows="*i64", out="*i16", count="i32")
    shape = dict(CODE_STRIDE=264, SCALE_STRIDE=264, TILE=reading.TILE, num_warps=reading.WARPS)
    hints = dict(CACHED="", EVICTED="")
    for name in ("few", "many", "past_l1", "evict_first"):
        options = METHODS[name].options.items()
        changed = {"num_warps" if key == "warps" else key.upper(): value for key, value in options}
        yield f"read {name}", accesses(reading._read, types, shape | hints | dict(places=None) | changed)
    yield "read sorted", accesses(reading._read, types | {"places": "*i64"}, shape | hints)
    yield "read pieces", accesses(reading._read_pieces, types, shape)
    words = reading.lines_of(264, 264) * 16
    types = dict(table="*i64", rows="*i64", out="*i16", count="i32", end="i32")
    shape = dict(STRIDE=264, TILE=reading.TILE, WORDS=words, LANES=triton.next_power_of_2(words))
    yield "read lines", accesses(reading._read_lines, types, shape | dict(num_warps=reading.WARPS))


def fusions():
    """All that follows the projection, of both forms."""
    weights = ["key_gain", "query_gain", "conv_gain", "taps"]
    strides = ["packed_b", "packed_t", "hidden_b", "hidden_t", "hidden_g", "out_b", "out_t"]
    types = dict.fromkeys(["packed", "hidden", "out", *weights], "*bf16") | {"past": "*fp32"}
    types |= dict.fromkeys([*strides, "padding_b", "padding_t", "length", "tiles"], "i32")
    constants = dict(COPIES=1, HIDDEN=2560, TAPS=4, DILATION=3, REACH=9, ALONE=True, ADDS=True, padding=None)
    aligned = ["packed", "hidden", "out", "past", *weights, *strides]
    yield "fusion demo", accesses(fusing._demo, types, constants | fusing._demo_shape(2560, 9, 1), aligned)
    types = dict.fromkeys(["packed", "hidden", "out", "q_weight", "k_weight"], "*bf16") | {"dead": "*u8"}
    types |= dict.fromkeys(["hidden_n", "hidden_g", "dead_n"], "i32")
    constants = dict(COPIES=4, HIDDEN=4096, LANES=4096, num_warps=fusing._warps(4096))
    aligned = ["packed", "hidden", "hidden_n", "hidden_g", "out", "q_weight", "k_weight"]
    yield "fusion v41", accesses(fusing._v41, types, constants, aligned)


def calls():
    """A step's question to the CPU and the answer that it takes, as PTX."""
    types = dict(ids="*i64", mailbox="*i64", turn="*i64", answered="*i32")
    types |= dict.fromkeys(["ids_b", "ids_t", "length", "count", "polls"], "i32")
    yield "ask", compiled(calling._ask, types, dict(LANES=calling.IDS_AT_ONCE, num_warps=1))[0]["ptx"]
    types = dict(sent="*i32", answered="*i32", out="*i32", units="i32")
    shape = dict(UNITS=calling.UNITS_PER_PROGRAM, WORDS=4, num_warps=4)
    yield "take", compiled(calling._take, types, shape, ["sent", "out"])[0]["ptx"]


if __name__ == "__main__":
    found = {**dict(gathers()), **dict(hashes_and_lookups()), **dict(other_ways_to_read()), **dict(fusions())}
    print(json.dumps({"accesses": found, "calls": dict(calls())}))
