"""Two processes that generate text, each with half of the tables: one command, on a CPU, nothing to download.

    torchrun --standalone --nproc-per-node 2 examples/sharded_generate.py
    torchrun --standalone --nproc-per-node 4 examples/sharded_generate.py --tokens 24

A small checkpoint in DeepSeek-V4.1-Flash's layout is written, with fp8 rows, 24 columns and its tokenizer; a tiny Qwen3
with random weights stands around its layers, so the text means nothing. Every process reads its own rows of the
checkpoint and no others, has a prompt of its own, generates more tokens than the one before it, and serves the others
when it is done. Then each does the same alone, with whole tables, and compares: logits to the bit, tokens, bytes.
"""

from __future__ import annotations

import os
import sys
import tempfile
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from engram_ref import cli
from engram_ref.attach import attach
from engram_ref.checkpoint.folder import ModelFolder
from engram_ref.checkpoint.sample import sample_config, write_sample
from engram_ref.checkpoint.v41 import load_layer_v41
from engram_ref.layer import Engram
from engram_ref.prefetch import FetchError
from engram_ref.sharding.plan import Traffic
from engram_ref.tables.sharded import ShardedTable, serve_others
from engram_ref.vocab import load_tokenizer

PROG = "sharded_generate"
RUN = "torchrun --standalone --nproc-per-node 2 examples/sharded_generate.py"
PROMPTS = (
    "The addresses are known before the forward pass,",
    "A table of 189 GiB does not fit",
    "Every rank owns whole columns, so",
    "Rows travel as they are stored:",
)
LAYERS, HIDDEN = (1, 2), 64


def write_checkpoint(folder: Path) -> None:
    """A small one, whose layers stand in a decoder with one residual stream."""
    write_sample(folder, sample_config(hidden=HIDDEN).replace(layer_ids=LAYERS, hc_mult=1))


def tiny_model(token_ids: int) -> nn.Module:
    """A Qwen3 with the same random weights in every process."""
    config = Qwen3Config(
        vocab_size=token_ids,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).double().eval()


def load_layers(folder: ModelFolder, placement: str) -> dict[int, Engram]:
    """The layers, their tables where the placement says; every rank calls it for "sharded"."""
    return {i: load_layer_v41(folder, i, placement, dtype=torch.float64) for i in folder.config.layer_ids}


@torch.no_grad()
def generate(model: nn.Module, folder: ModelFolder, engrams: dict[int, Engram], ids: Tensor, tokens: int) -> Any:
    """Logits of the prompt, and the tokens that follow it."""
    with attach(model, engrams, folder.plan, folder.vocab):
        logits = model(ids).logits
        written = model.generate(ids, max_new_tokens=tokens, do_sample=False)  # type: ignore[operator]
        serve_others(engram.table for engram in engrams.values())
    return logits, written[0, ids.shape[1] :].tolist()


def bytes_expected(tables: list[ShardedTable], asked: list[int]) -> int:
    """What the plans say that this rank receives for so many tokens of each rank."""
    rank = dist.get_rank()
    return sum(t.plan.bytes_received(rank, asked, t.format.row_bytes).payload for t in tables)


def report(folder: ModelFolder, tokens: int) -> str:
    """What this rank did, in a line, once it has been compared."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    tokenizer = load_tokenizer(folder.tokenizer_path)
    ids = torch.tensor([tokenizer.encode(PROMPTS[rank % len(PROMPTS)], add_special_tokens=False).ids])
    model, mine = tiny_model(len(folder.vocab.ids)), tokens + 4 * rank
    engrams = load_layers(folder, "sharded")
    logits, written = generate(model, folder, engrams, ids, mine)
    tables = [engram.table for engram in engrams.values() if isinstance(engram.table, ShardedTable)]
    alone = load_layers(folder, "host")
    expected, expected_written = generate(model, folder, alone, ids, mine)
    lengths: list[int] = [0] * ranks
    dist.all_gather_object(lengths, 2 * ids.shape[1] + mine - 1)  # twice the prompt; the last token is not run
    moved = sum((table.report() for table in tables), Traffic()).payload
    if not torch.equal(logits, expected) or written != expected_written:
        raise ValueError(f"rank {rank}: logits or tokens are not those of one process: do not use these tables")
    if tables and all(table.plan.columns for table in tables) and moved != bytes_expected(tables, lengths):
        raise ValueError(f"rank {rank} received {moved:,} B; the plan says {bytes_expected(tables, lengths):,} B")
    owned, whole = (sum(sum(e.table.bytes_held().values()) for e in layers.values()) for layers in (engrams, alone))
    for engram in (*engrams.values(), *alone.values()):
        engram.table.close()
    return (
        f"rank {rank} of {ranks}: {ids.shape[1]} + {mine} tokens, holds {owned:,} of {whole:,} B, received {moved:,}, "
        f"as the plan says; logits and tokens of one process, to the bit: {tokenizer.decode(written)!r}"
    )


def run(tokens: int) -> None:
    """All of it, on every rank; rank 0 prints."""
    with ExitStack() as undo:
        paths: list[Any] = [None]
        if dist.get_rank() == 0:
            paths = [undo.enter_context(tempfile.TemporaryDirectory()) + "/model"]
            write_checkpoint(Path(paths[0]))
        dist.broadcast_object_list(paths)
        lines: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(lines, report(ModelFolder.open(paths[0]), tokens))
        if dist.get_rank() == 0:
            print("\n".join(lines))


def main() -> None:
    """The command."""
    parser = cli.Parser(prog=PROG, description=__doc__)
    parser.add_argument("--tokens", type=cli.at_least(1, 1000), default=12, help="that rank 0 generates (default: 12)")
    options = parser.parse_args()
    with cli.one_line_errors(PROG):
        if "RANK" not in os.environ:
            raise ValueError(f"this is run by several processes: {RUN}")
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        try:
            run(options.tokens)
        except FetchError as error:  # of a rank that is gone, say
            raise OSError(str(error)) from error
        dist.destroy_process_group()


if __name__ == "__main__":
    cli.run(main, PROG)
