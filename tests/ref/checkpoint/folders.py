"""Folders of checkpoints for tests: the published configuration, and how a file in a folder is spoilt.

What a test replaces stands in a folder of links, so that nothing is copied that it leaves alone.
"""

import copy
import json

import pytest

from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.files.header import DTYPE_BITS, read_header

# As published, Engram's part of it; a few of the other fields stand for the rest.
PUBLISHED = {
    "architectures": ["DeepseekV41ForCausalLM"],
    "model_type": "deepseek_v41",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [32, 32],
    },
    "text_config": {
        "vocab_size": 129280,
        "hidden_size": 5120,
        "num_hidden_layers": 40,
        "num_attention_heads": 64,
        "rms_norm_eps": 1e-20,
        "hc_mult": 4,
        "hc_eps": 1e-6,
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682],
        "engram_max_ngram_size": 4,
        "engram_vocab_size": 16000000,
        "engram_n_heads": 8,
        "engram_head_dim": 256,
        "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 99092,
    },
}
NEEDED = [name for name in PUBLISHED["text_config"] if name not in ("num_attention_heads", "hc_eps")]
SECOND, THIRD = "model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"
# layer 1, layer 14: bytes as published
PUBLISHED_BYTES = {
    "embed.weight": (98_305_579_008, 98_308_270_592),
    "embed.scale": (3_072_049_344, 3_072_133_456),
    "wkv.weight": (157_286_400, 157_286_400),
    "wkv.scale": (153_600, 153_600),
    "q_weight": (40_960, 40_960),
    "k_weight": (40_960, 40_960),
}


def put(path, content):
    """In place of a link, what the test wants there."""
    path.unlink(missing_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def load(path):
    return json.loads(path.read_bytes())


def published(**text):
    config = copy.deepcopy(PUBLISHED)
    config["text_config"] |= text
    return config


def refuse(folder, *messages):
    with pytest.raises(ValueError) as refused:
        ModelFolder.open(folder)
    for message in messages:
        assert message in str(refused.value)
    said = str(refused.value)
    assert str(folder) in said and len(said) < 600 + 2 * len(str(folder)) and said.isprintable()


def content_of(entry):
    with open(entry.path, "rb") as file:
        file.seek(entry.offset)
        return file.read(entry.nbytes)


def rewrite(path, drop=(), rename=None, **given):
    """The file again: without some tensors, others renamed, others with another dtype or shape of the same bytes."""
    header, data = {}, b""
    for entry in read_header(path).values():
        if entry.name in drop:
            continue
        piece = content_of(entry)
        dtype, shape = given.get(entry.name.rsplit("engram.")[-1].replace(".", "_"), (entry.dtype, list(entry.shape)))
        piece = (piece * 2)[: DTYPE_BITS[dtype] // 8 * shape[0] * (shape[1] if len(shape) > 1 else 1)]
        name = (rename or {}).get(entry.name, entry.name)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    text = json.dumps(header).encode()
    put(path, len(text).to_bytes(8, "little") + text + data)
