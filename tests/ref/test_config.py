"""The configuration: what it costs per token, by hand-computed numbers, and what it refuses."""

import dataclasses
import re

import pytest

from engram_ref.config import PRESETS, EngramConfig

# Per preset: rows and bytes per token over all layers, bytes of one row, columns and values gathered per layer.
COSTS = {
    "demo": (32, 4_096, 128, 16, 1024),
    "paper-27b": (32, 5_120, 160, 16, 1280),
    "paper-40b": (32, 5_120, 160, 16, 1280),
    "v41-flash": (48, 12_672, 264, 24, 6144),
    "qwen38-flash-next": (16, 5_120, 320, 16, 2560),
    "tiny": (16, 256, 16, 16, 64),
}


@pytest.fixture
def tiny():
    return EngramConfig.preset("tiny")


def test_every_preset_has_its_costs():
    assert COSTS.keys() == PRESETS.keys()


@pytest.mark.parametrize("preset", COSTS)
def test_lookup_cost(preset):
    config = EngramConfig.preset(preset)
    rows, total, row, columns, width = COSTS[preset]
    assert config.rows_per_token() == rows
    assert config.bytes_per_token() == total
    assert config.row_bytes() == row
    assert config.columns == columns
    assert config.embedding_width == width


@pytest.mark.parametrize(
    ("row_dtype", "total"), [("float8_e4m3fn", 12_672), ("bfloat16", 24_576), ("float16", 24_576), ("float32", 49_152)]
)
def test_v41_in_other_row_types(row_dtype, total):
    assert EngramConfig.preset("v41-flash").replace(row_dtype=row_dtype).bytes_per_token() == total


def test_projection_macs():
    assert EngramConfig.preset("v41-flash").projection_macs() == 157_286_400  # 5 * 5120 wide, 6144 in
    assert EngramConfig.preset("demo").projection_macs() == 5_242_880  # 5 * 1024 wide, 1024 in


def test_flops_per_token(tiny):
    # Per layer: 2 * 64 * 64 projections, 64 inner products, 4 taps * 64; a multiply-add counts as two.
    assert tiny.flops_per_token() == 2 * (8192 + 64 + 256)
    assert tiny.replace(layer_ids=(1, 5)).flops_per_token() == 4 * (8192 + 64 + 256)
    # Two layers, no convolution: 157,286,400 and 4 * 5120 inner products.
    assert EngramConfig.preset("v41-flash").flops_per_token() == 629_227_520


def test_orders(tiny):
    assert tiny.orders == (2, 3)
    assert EngramConfig.preset("v41-flash").orders == (2, 3, 4)


def test_bigrams_alone(tiny):
    config = tiny.replace(max_ngram=2, table_size_per_order=(1000,))
    assert (config.orders, config.columns, config.rows_per_token()) == ((2,), 8, 8)


def test_replace_changes_a_copy(tiny):
    changed = tiny.replace(heads=3, row_width=32)
    assert (changed.heads, changed.row_width, changed.hidden) == (3, 32, tiny.hidden)
    assert tiny == EngramConfig.preset("tiny")
    assert tiny.replace() == tiny


def test_replace_refuses_an_unknown_field(tiny):
    with pytest.raises(ValueError, match="no field head, width"):
        tiny.replace(width=1, head=3)


def test_replace_validates(tiny):
    with pytest.raises(ValueError, match=r"2 sizes; max_ngram=4 has 3 orders"):
        tiny.replace(max_ngram=4)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(
        ValueError, match="no preset 'v41': use one of demo, paper-27b, paper-40b, v41-flash, qwen38-flash-next, tiny"
    ):
        EngramConfig.preset("v41")


BAD_VALUES = [
    ("layer_ids", 1, "layer_ids=1: must be a tuple of integers"),
    ("layer_ids", "12", "layer_ids='12': must be a tuple of integers"),
    ("layer_ids", (), "layer_ids=(): give at least one layer, each once"),
    ("layer_ids", (1, 2, 1), "layer_ids=(1, 2, 1): give at least one layer, each once"),
    ("layer_ids", (-1,), "layer_ids=-1: must be an integer of at least 0"),
    ("layer_ids", (1.0,), "layer_ids=1.0: must be an integer of at least 0"),
    ("layer_ids", (True,), "layer_ids=True: must be an integer of at least 0"),
    ("table_size_per_order", 1000, "table_size_per_order=1000: must be a tuple of integers"),
    ("table_size_per_order", (1000, 1), "table_size_per_order=1: must be an integer of at least 2"),
    ("table_size_per_order", (1000, 1e3), "table_size_per_order=1000.0: must be an integer of at least 2"),
    ("table_size_per_order", (1000,), "has 1 sizes; max_ngram=3 has 2 orders: give one size per order"),
    ("table_size_per_order", (9, 9, 9), "has 3 sizes; max_ngram=3 has 2 orders: give one size per order"),
    ("row_dtype", "int8", "row_dtype='int8': use one of float32, float16, bfloat16, float8_e4m3fn"),
    ("row_dtype", "float8_e4m3fn", "row_width=4: float8 rows need a multiple of 32, one scale per block"),
    ("form", "v4", "form='v4': use one of demo, v41, qwen"),
    ("form", "qwen", "norm_eps=None: form qwen needs a number above 0 and below 1"),
    ("norm_eps", 1e-6, "norm_eps=1e-06: form demo has norms with an eps of their own, use None"),
    ("form", "v41", "kernel_size=4: form v41 has no convolution, use 0"),
    ("compressed_size", 0, "compressed_size=0: must be an integer of at least 1"),
    ("compressed_size", 9.0, "compressed_size=9.0: must be an integer of at least 1"),
]
LEAST = {
    "max_ngram": 2,
    "heads": 1,
    "row_width": 1,
    "hidden": 1,
    "hc_mult": 1,
    "kernel_size": 0,
    "pad_id": 0,
    "seed": 0,
    "rows_multiple": 1,
}
BAD_VALUES += [
    (name, bad, f"{name}={bad!r}: must be an integer of at least {least}")
    for name, least in LEAST.items()
    for bad in (least - 1, float(least + 1), True, "3", None)
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_VALUES, ids=lambda v: None if len(str(v)) > 30 else str(v))
def test_bad_value_is_refused(tiny, field, value, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tiny.replace(**{field: value})


MOST = {
    "max_ngram": 64,
    "heads": 1024,
    "row_width": 1 << 20,
    "hidden": 1 << 20,
    "hc_mult": 256,
    "kernel_size": 1024,
    "pad_id": 2**31 - 2,
    "seed": 2**63 - 1,
    "compressed_size": 2**31 - 1,
    "rows_multiple": 1 << 20,
}


@pytest.mark.parametrize("field", MOST)
@pytest.mark.parametrize("excess", [1, 10**6, 10**18, 10**5000], ids=["1", "10^6", "10^18", "5,000 digits"])
def test_a_number_of_a_damaged_file_is_refused_before_it_is_used(tiny, field, excess):
    changes = {"max_ngram": {"table_size_per_order": (1000,) * 63}}.get(field, {})
    assert getattr(tiny.replace(**{field: MOST[field]}, **changes), field) == MOST[field]
    with pytest.raises(ValueError, match=rf"^{field}=.*: must be at most {MOST[field]}$") as caught:
        tiny.replace(**{field: MOST[field] + excess})
    assert len(str(caught.value)) < 150


def test_layers_and_sizes_have_bounds_too(tiny):
    for field, least_refused in (("layer_ids", 1 << 16), ("table_size_per_order", 2**31 + 1)):
        for value in (least_refused, 10**9 * 10, 10**5000):
            with pytest.raises(ValueError, match=f"{field}=.*: must be at most {least_refused - 1}"):
                tiny.replace(**{field: (value,) * 2})
    assert tiny.replace(layer_ids=tuple(range(1024))).rows_per_token() == 1 << 14
    with pytest.raises(
        ValueError, match="1025 layers of 16 columns, orders times heads: must be at most 16384 together"
    ):
        tiny.replace(layer_ids=tuple(range(1025)))


@pytest.mark.parametrize(
    "junk", [[], {}, {"a": [1] * 10**6}, "x" * 10**6, "\x1b[31m\n", float("nan"), b"float32"], ids=range(7)
)
def test_junk_is_quoted_and_short(tiny, junk):
    for field in (field.name for field in dataclasses.fields(EngramConfig)):
        with pytest.raises(ValueError, match=f"^(no preset|{field}=|layer_ids|table_size)") as caught:
            tiny.replace(**{field: junk})
        assert len(str(caught.value)) < 250 and str(caught.value).isprintable()


@pytest.mark.parametrize(("field", "least"), LEAST.items())
def test_least_value_is_accepted(tiny, field, least):
    changes = {field: least}
    if field == "max_ngram":
        changes["table_size_per_order"] = (2,)
    assert getattr(tiny.replace(**changes), field) == least


def test_every_field_has_a_bad_value():
    assert {field for field, _, _ in BAD_VALUES} == {field.name for field in dataclasses.fields(EngramConfig)}


def test_float8_rows_take_whole_blocks(tiny):
    assert tiny.replace(row_dtype="float8_e4m3fn", row_width=96).row_bytes() == 96 + 3


def test_lists_become_tuples(tiny):
    config = tiny.replace(layer_ids=[1], table_size_per_order=[1000, 1000])
    assert config == tiny and hash(config) == hash(tiny)
    assert isinstance(config.layer_ids, tuple) and isinstance(config.table_size_per_order, tuple)


def test_frozen(tiny):
    with pytest.raises(dataclasses.FrozenInstanceError):
        tiny.heads = 4
    assert tiny.heads == 8


def test_defaults_are_those_of_the_demo():
    fields = dict(layer_ids=(1, 15), max_ngram=3, heads=8, row_width=64, hidden=1024)
    assert EngramConfig(**fields, table_size_per_order=(129_280 * 5,) * 2) == EngramConfig.preset("demo")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm_eps": 0}, "norm_eps=0: form qwen needs a number above 0 and below 1"),
        ({"norm_eps": float("nan")}, "norm_eps=nan: form qwen needs"),
        ({"norm_eps": True}, "norm_eps=True: form qwen needs"),
        ({"norm_eps": "1e-6"}, "norm_eps='1e-6': form qwen needs"),
        ({"layer_ids": (3, 1)}, "layer_ids=(3, 1): form qwen numbers its layers upward, sort them"),
        ({"table_size_per_order": (1000, 1001)}, "table_size_per_order=(1000, 1001): form qwen takes all primes from"),
    ],
)
def test_what_the_form_qwen_demands(changes, message):
    qwen = EngramConfig.preset("qwen38-flash-next")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        qwen.replace(**changes)


def test_qwen_costs_by_hand():
    qwen = EngramConfig.preset("qwen38-flash-next")
    assert qwen.projection_macs() == 5 * 2560 * 2560  # four keys and a value, 2560 in
    assert qwen.replace(row_dtype="float8_e4m3fn").row_bytes() == 160 + 5
