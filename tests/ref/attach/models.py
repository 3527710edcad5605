"""Small decoders with random weights, Engram layers for them, and what a forward of both is, written out by hand."""

from dataclasses import dataclass

import numpy as np
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from engram_ref.config import EngramConfig
from engram_ref.fusion.factory import make_fusion
from engram_ref.hashing import DEAD, HashPlan, NgramHasher
from engram_ref.layer import Engram
from engram_ref.tables.device import DeviceTable

KINDS = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
VOCAB, PAD = 97, 2  # compressed ids, and the compressed pad id
SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=None,
    attn_implementation="sdpa",
)


def make_model(kind="qwen3", dtype=torch.float64, **sizes):
    """A decoder in evaluation mode, its weights so large that every position matters to the output."""
    config, model = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = model(config(**SIZES | dict(initializer_range=0.2) | sizes))
    return made.to(dtype).eval()


# Of models that attend, or recur, in other ways: what their configurations need beside the sizes.
FAMILIES = {
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2, layer_types=["full_attention"] * 3),
    "OPT": dict(ffn_dim=64, word_embed_proj_dim=64, max_position_embeddings=64),
    "Lfm2": dict(layer_types=["conv", "full_attention", "conv"], conv_L_cache=3),
    "Qwen3Next": dict(
        layer_types=["linear_attention", "full_attention", "linear_attention"],
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        num_experts=2, num_experts_per_tok=1, moe_intermediate_size=32, shared_expert_intermediate_size=32,
    ),
}  # fmt: skip


def make_family(name):
    """A decoder of another family, as `make_model` makes one."""
    sizes = SIZES | dict(initializer_range=0.2, attn_implementation="eager") | FAMILIES[name]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))
    made.set_experts_implementation("eager")  # the others know no float64
    return made.double().eval()


@dataclass(frozen=True)
class Layers:
    """Engram layers, and the rows of their tables as plain tensors."""

    plan: HashPlan
    engrams: dict[int, Engram]
    weights: dict[int, torch.Tensor]


def make_layers(layer_ids=(1, 2), form="demo", dtype=torch.float64, trained=False):
    """Rows are bfloat16 where the layers are, else float32."""
    row_dtype = "bfloat16" if dtype == torch.bfloat16 else "float32"
    config = EngramConfig.preset("tiny").replace(
        layer_ids=layer_ids,
        form=form,
        kernel_size=0 if form == "v41" else 4,
        table_size_per_order=(300, 300),
        row_dtype=row_dtype,
    )
    plan = HashPlan.build(config, VOCAB, PAD)
    engrams, weights = {}, {}
    for layer_id in layer_ids:
        generator = torch.Generator().manual_seed(layer_id)
        fusion = make_fusion(config)
        fusion.reset_parameters(generator)
        rows = torch.randn(plan.layer(layer_id).rows, config.row_width, generator=generator)
        weights[layer_id] = rows.to(getattr(torch, row_dtype)).requires_grad_(trained)
        engrams[layer_id] = Engram(fusion.to(dtype), DeviceTable(weights[layer_id]))
    return Layers(plan, engrams, weights)


def make_ids(batch=2, length=9, seed=0):
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_batch(sequences, width, side="left"):
    """Sequences of several lengths, filled up with token 0 to a width: ids, attention mask and position ids."""
    ids, mask = (
        torch.zeros(len(sequences), width, dtype=torch.long),
        torch.zeros(len(sequences), width, dtype=torch.long),
    )
    for row, sequence in enumerate(sequences):
        place = slice(width - len(sequence), width) if side == "left" else slice(len(sequence))
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask, (mask.cumsum(1) - 1).clamp_min(0)


def by_hand(model, layers, ids, mask=None, positions=None, after=False, hashed_as=None, compressed=None):
    """The logits, without a hook: the blocks one after the other, with the update added before a block.

    Args:
        mask: 0 where padding is, [B, T].
        positions: of the tokens, if not 0, 1, 2, ...
        after: wrong, the update is added after the block.
        hashed_as: wrong, another layer's rows are added.
        compressed: compressed ids instead of the token ids.
    """
    base = model.model
    hidden = base.embed_tokens(ids)
    positions = torch.arange(ids.shape[1])[None] if positions is None else positions
    rotary = base.rotary_emb(hidden, positions)
    allowed, padding = None, None
    if mask is not None:
        padding = mask == 0
        causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        allowed = causal & ~padding[:, None, None, :]  # [B, 1, T, T]
    for number, block in enumerate(base.layers):
        if number in layers.engrams and not after:
            hidden = add_by_hand(layers, number, hidden, ids if compressed is None else compressed, padding, hashed_as)
        hidden = block(hidden, attention_mask=allowed, position_embeddings=rotary, position_ids=positions)
        if number in layers.engrams and after:
            hidden = add_by_hand(layers, number, hidden, ids, padding, hashed_as)
    return model.lm_head(base.norm(hidden))


def add_by_hand(layers, number, hidden, ids, padding=None, hashed_as=None):
    """The stream after the Engram layer of a block."""
    fusion = layers.engrams[number].fusion
    demo = fusion.config.form == "demo"
    ids = np.array(ids.numpy())
    if padding is not None:
        ids[padding.numpy()] = PAD if demo else DEAD
    rows = NgramHasher(layers.plan, "numpy")(ids, hashed_as or number)  # [B, T, C]
    e = layers.weights[number][torch.from_numpy(rows).long()].flatten(2).to(fusion.dtype)
    stream = hidden[:, :, None]
    stream = stream + fusion(e, stream, padding=padding) if demo else fusion(e, stream, padding)
    return stream[:, :, 0]


class Block(torch.nn.Module):
    """Something that a decoder could have for a block, and that compiles in no time."""

    def __init__(self):
        super().__init__()
        self.mix = torch.nn.Linear(SIZES["hidden_size"], SIZES["hidden_size"])

    def forward(self, hidden_states):
        return hidden_states + self.mix(hidden_states).tanh()


class Plainest(torch.nn.Module):
    """As little as can be attached to: a configuration, a list of blocks and a forward that takes token ids."""

    def __init__(self, blocks=2):
        super().__init__()
        self.config = LlamaConfig(**SIZES | dict(num_hidden_layers=blocks), use_cache=False)
        self.embedded = torch.nn.Embedding(VOCAB, SIZES["hidden_size"])
        self.h = torch.nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embedded(input_ids)
        for block in self.h:
            hidden = block(hidden)
        return hidden
