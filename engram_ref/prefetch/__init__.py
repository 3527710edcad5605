"""When rows are fetched: as soon as the token ids are known, joined just before they are used.

    with Prefetcher(NgramHasher(plan), {1: table_1, 15: table_15}) as prefetcher:
        with prefetcher.start(compressed_ids, history) as fetch:     # [B, T]; hashing and gathering begin
            hidden = first_block(hidden)
            hidden = engram_1(hidden, fetch[1])                      # the layer joins: fetch[1].wait()

Tables that the CPU gathers from are served by one worker thread, which also hashes; tables that the accelerator
reads by itself by a side stream, with hashing on the device. A few rows are asked for by whoever starts the fetch, and
so are rows that the caller waits for before he does anything else (`waited_for`), on his own stream.
Waiting at once (`background=False`) is the synchronous schedule: the same code, nothing overlapped. At most `buffers`
fetches are in flight. An error in the background is raised at the join.

    prefetcher  which rows are asked for, by whom and when
    fetch       what was started: waited for layer by layer, released once
    slots       whose buffers are whose, among fetches in flight
"""

from engram_ref.prefetch.fetch import Fetch, FetchError
from engram_ref.prefetch.prefetcher import LEAST_BUFFERS, Prefetcher

__all__ = ["LEAST_BUFFERS", "Fetch", "FetchError", "Prefetcher"]
