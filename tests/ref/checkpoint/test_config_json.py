"""The `config.json` of a checkpoint: the published one is the preset, and whatever can be wrong in one is named."""

import pytest

from engram_ref.checkpoint.config_json import config_fields, read_config, table_rows
from engram_ref.config import EngramConfig
from tests.ref.checkpoint.folders import NEEDED, PUBLISHED, published, put, refuse


def test_the_published_configuration_is_the_preset(tmp_path):
    put(tmp_path / "config.json", PUBLISHED)
    assert read_config(tmp_path) == EngramConfig.preset("v41-flash")
    flat = {**PUBLISHED, **PUBLISHED["text_config"]}
    del flat["text_config"]
    put(tmp_path / "config.json", flat)
    assert read_config(str(tmp_path)) == EngramConfig.preset("v41-flash")


def test_our_own_fields_are_the_published_ones(tmp_path):
    config = EngramConfig.preset("v41-flash")
    fields = config_fields(config, table_rows(config), 129280, 40)
    assert {**fields, "text_config": None} == {**PUBLISHED, "text_config": None}
    assert fields["text_config"] == {name: PUBLISHED["text_config"][name] for name in NEEDED}
    other = config.replace(
        layer_ids=(0, 3, 7),
        hidden=96,
        hc_mult=2,
        heads=3,
        max_ngram=3,
        row_width=64,
        pad_id=5,
        table_size_per_order=(100, 100),
        compressed_size=5403,
    )
    put(tmp_path / "config.json", config_fields(other, table_rows(other), 8182, 8))
    assert read_config(tmp_path) == other


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_field_is_named(tmp_path, name):
    config = published()
    del config["text_config"][name]
    put(tmp_path / "config.json", config)
    refuse(tmp_path, f"config.json: {name} is missing: take the config.json that came with the weights")


def changed(changes):
    """The published configuration with other values: in text_config, or after a slash from the top."""
    config = published()
    for path, value in changes.items():
        *keys, last = path[1:].split("/") if path.startswith("/") else ("text_config", path)
        place = config
        for key in keys:
            place = place[key]
        place[last] = value
    return config


CONTRADICTIONS = {
    "another model": ({"/model_type": "deepseek_v3"}, "model_type='deepseek_v3', not 'deepseek_v41'"),
    "no model": ({"/model_type": None}, "model_type=None"),
    "text no object": ({"/text_config": [1]}, "text_config=[1] is not an object"),
    "no quantisation": ({"/quantization_config": None}, "quantization_config=None is not an object"),
    "larger blocks": (
        {"/quantization_config/weight_block_size": [128, 128]},
        "weight_block_size=[128, 128]; the rows are stored with [32, 32], and with anything else they decode to wrong",
    ),
    "other scales": (
        {"/quantization_config/scale_fmt": "float32"},
        "scale_fmt='float32'; the rows are stored with 'ue8m0'",
    ),
    "another method": ({"/quantization_config/quant_method": "awq"}, "quant_method='awq'"),
    "another eps": ({"rms_norm_eps": 1e-6}, "rms_norm_eps=1e-06; the gate of this model computes with 1e-20"),
    "eps no number": ({"rms_norm_eps": "1e-20"}, "rms_norm_eps='1e-20'"),
    "two meanings": ({"/hidden_size": 1024}, "hidden_size is 1024 at the top level and 5120 in text_config"),
    "hidden real": ({"hidden_size": 5120.0}, "hidden_size=5120.0: must be an integer of at least 1"),
    "hidden text": ({"hidden_size": "5120"}, "hidden_size='5120': must be an integer of at least 1"),
    "heads 0": ({"engram_n_heads": 0}, "engram_n_heads=0: must be an integer of at least 1"),
    "copies true": ({"hc_mult": True}, "hc_mult=True: must be an integer"),
    "unigrams": ({"engram_max_ngram_size": 1}, "engram_max_ngram_size=1: must be an integer of at least 2"),
    "negative pad": ({"engram_pad_token_id": -1}, "engram_pad_token_id=-1"),
    "pad no token": ({"engram_pad_token_id": 129280}, "engram_pad_token_id=129280 does not fit vocab_size=129280"),
    "more compressed than tokens": ({"vocab_size": 99091}, "engram_compressed_vocab_size=99092 does not fit"),
    "layer too deep": ({"num_hidden_layers": 14}, "engram_layer_ids=[1, 14] does not fit num_hidden_layers=14"),
    "layers no list": ({"engram_layer_ids": 1}, "engram_layer_ids=1: must be a list of integers"),
    "layer real": ({"engram_layer_ids": [1, 14.0]}, "engram_layer_ids=[1, 14.0]: must be a list of integers"),
    "layer twice": ({"engram_layer_ids": [1, 1]}, "give at least one layer, each once"),
    "no layer": ({"engram_layer_ids": []}, "give at least one layer, each once"),
    "negative layer": ({"engram_layer_ids": [-1, 14]}, "must be an integer of at least 0"),
    "a width of no whole blocks": ({"engram_head_dim": 250}, "float8 rows need a multiple of 32"),
    "projection of no whole blocks": ({"hidden_size": 5121}, "(hc_mult + 1) * hidden_size = 25605"),
    "three tables": (
        {"engram_num_embeddings": [384006168, 384016682, 1]},
        "engram_num_embeddings has 3 entries and engram_layer_ids 2",
    ),
    "tables exchanged": (
        {"engram_num_embeddings": [384016682, 384006168]},
        "gives layer 1 384016682 rows; the 24 primes from engram_vocab_size=16000000 up give 384006168",
    ),
    "a row more": (
        {"engram_num_embeddings": [384006168, 384016683]},
        "gives layer 14 384016683 rows; the 24 primes from engram_vocab_size=16000000 up give 384016682",
    ),
    "other primes": (
        {"engram_vocab_size": 16000058},
        "gives layer 1 384006168 rows; the 24 primes from engram_vocab_size=16000058 up give 384006588",
    ),
    "fewer heads": ({"engram_n_heads": 7}, "the 21 primes from"),
    # Numbers that would take memory or for ever, and texts that would fill a terminal.
    "a million heads": ({"engram_n_heads": 10**6}, "columns, orders times heads: must be at most"),
    "orders": ({"engram_max_ngram_size": 10**5}, "columns, orders times heads: must be at most"),
    "more orders": ({"engram_max_ngram_size": 10**9}, "columns, orders times heads: must be at most"),
    "most orders": ({"engram_max_ngram_size": 10**12}, "engram_max_ngram_size=1000000000000: must be at most"),
    "wide rows": ({"engram_head_dim": 2**31 - 1}, "row_width=2147483647: must be at most"),
    "a deep layer": (
        {"engram_layer_ids": [10**9], "num_hidden_layers": 2**31 - 1},
        "layer_ids=1000000000: must be at most",
    ),
    "many layers": (
        {"engram_layer_ids": list(range(10**5)), "num_hidden_layers": 10**6},
        "100000 layers of 24 columns",
    ),
    "a large prime": ({"engram_vocab_size": 10**18}, "engram_vocab_size=1000000000000000000: must be at most"),
    "400 digits": ({"engram_vocab_size": 10**400}, "engram_vocab_size=<an integer of some 400 digits>: must be"),
    "no number": ({"engram_n_heads": float("nan")}, "engram_n_heads=nan: must be an integer"),
    "a long list": ({"engram_n_heads": [[[8]]] * 10**5}, "engram_n_heads=[["),
    "for the terminal": ({"engram_layer_ids": {"1": "\x1b[2J"}}, "engram_layer_ids={'1': '\\x1b[2J'}: must be a list"),
    "a long text": ({"rms_norm_eps": "x" * 10**6}, "the gate of this model computes with"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_is_named(tmp_path, case):
    changes, message = CONTRADICTIONS[case]
    put(tmp_path / "config.json", changed(changes))
    refuse(tmp_path, "config.json: ", message)


def test_a_configuration_that_is_none_is_refused(tmp_path):
    refuse(tmp_path, "no config.json in ")
    put(tmp_path / "config.json", b'{"model_type": ')
    refuse(tmp_path, "config.json is damaged: Expecting value: line 1 column 16 (char 15); download it again")
    put(tmp_path / "config.json", b"[1]")
    refuse(tmp_path, "config.json is damaged: it holds a list, not a JSON object")
    put(tmp_path / "config.json", b"\xff\xfe{}")
    refuse(tmp_path, "config.json is damaged")
    put(tmp_path / "config.json", b'{"model_type": "deepseek_v41", "model_type": "deepseek_v41"}')
    refuse(tmp_path, "the name 'model_type' stands there twice")
    refuse(tmp_path / "nowhere", "is not a folder: give the folder of a checkpoint")
