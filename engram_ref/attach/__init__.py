"""Engram in a model of transformers: attach it, use the model as before, detach it.

    with attach(model, {1: engram}, plan, vocab) as attached:       # engram: an `Engram`, e.g. from `build_engram`
        model.generate(input_ids, max_new_tokens=20)

`model` is any decoder that has a list of blocks (Llama, Qwen3, ...) and one residual stream (hc_mult=1). Where the
decoder begins, token ids are compressed and hashed, once for all Engram layers, and every fetch starts; before block L
the rows of layer L are joined and its gated update is added to the residual stream. `detach` removes all of it. The
layers' parameters stay outside the model: to train them, give `engram.parameters()` to the optimizer; on several ranks,
put the layers into the model before it is wrapped, so that their gradients are reduced, too.

Schedule. `background=True` fetches while the blocks before L compute; `False` waits at the decoder's entry for what it
started there (the naive schedule). `prefetcher=` takes another source of rows, anything with the Prefetcher's `start`,
for instance an `OnHand` (no lookup at all). `observer` is told how long hash, gather and wait took; an `ExposedTime`
measures how long the blocks waited, on the accelerator's own clock where there is one; anything with its `around` does.

Padding, the positions that the attention mask masks. In the demo's form they are the compressed pad id, as everything
before a sequence is, and nothing of them enters the convolution; in the form v41 they are DEAD, and the stream passes
them bit for bit. So a row that is padded on the left gives what it gives alone.

Caches. The history (the last compressed ids, and the convolution's past) is kept in the transformers cache and
compared with its length before each step: see `engram_ref.histories`. Of a cache that was filled elsewhere, or
before Engram was attached this time, `remember` says what is in it. A server whose sequences come and go in the places
of one cache, each at a position of its own, gives it `Places` by `seat`.

Graphs. A CUDA graph, or a forward compiled as one graph, cannot hash on the CPU. Inside `staging()` a forward starts
nothing: it reads rows from buffers that stay where they are, which `stage` fills before the forward, or before the
replay of a captured one:

    with attached.staging():
        attached.stage(ids, cache)                                  # and so before every replay
        with torch.cuda.graph(graph):
            logits = model(ids, past_key_values=cache).logits

`stage` is `begin` and `lay_down`; what is launched between the two computes while rows are fetched. So a graph may be
cut where the first layer reads: `staging(between=...)` is told in the capture, and `lay_down` comes between the replays
of the two pieces. Graphs that outlive an attachment read buffers of the caller's: `staging(staged=Staged(device))`.

Threads. Each has a step of its own; a thread waits where as many forwards as there are buffers are in progress.

What is in this package:

attached        attach, detach, and what a forward does
blocks          the decoder and its blocks, found in a model
hooks           what a model, its copies and its wrappers know of it
padding         which positions are padding
packing         several sequences in one row
lookup          token ids in, a started fetch out
staging         forwards that start nothing, and what is laid down for them
graphs          rows in buffers that stay where they are
step            one forward of the decoder
checkpointing   gradient checkpointing that runs hooks a second time
exposed         how long the model waited for rows
on_hand         rows that are there already
offload         the n-gram table that a model of transformers has by itself, behind any placement
own_table       where such a model has it, and what is put in its place
versions        releases that are newer than the tested ones
"""

import engram_ref.needs_torch  # noqa: F401

from engram_ref.attach.attached import Attached, attach
from engram_ref.attach.exposed import ExposedTime
from engram_ref.attach.graphs import Staged
from engram_ref.attach.offload import OffloadedTable, offload_table
from engram_ref.attach.own_table import without_table
from engram_ref.histories.places import Places

__all__ = ["Attached", "ExposedTime", "OffloadedTable", "Places", "Staged", "attach", "offload_table", "without_table"]
