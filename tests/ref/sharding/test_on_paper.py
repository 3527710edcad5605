"""The exchange on paper: bytes as the plan gives them beforehand, sums by hand, and what must only grow."""

import pytest

from engram_ref.sharding.on_paper import BASE_S, LINKS, PER_PEER_S, Received, exchange_bytes, exchange_seconds
from engram_ref.sharding.plan import COUNT_BYTES, NOTICE_BYTES, ShardPlan

V41 = (24, 264)  # rows a token of one layer, bytes of a row


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8, 24])
def test_bytes_are_the_plans(plans, ranks):
    """Of whole columns to the byte, whatever the number of tokens; a rank alone receives nothing."""
    columns, row_bytes = V41
    plan = ShardPlan.of_layer(plans["v41-flash"].layers[0], ranks)
    for tokens in (0, 1, 64, 4095):
        told = plan.bytes_received(0, [tokens] * ranks, row_bytes)
        found = exchange_bytes(tokens * columns, ranks, row_bytes)
        assert (found.ids, found.rows) == (told.ids, told.rows)
        assert found.control == (ranks - 1) * (COUNT_BYTES + NOTICE_BYTES)


def test_seconds_by_hand():
    link = LINKS["pcie"]
    took = exchange_seconds(link, 3, Received(1e6, 62e6, 1e6))
    assert took == pytest.approx(3 * (BASE_S + 5.7e-6 + 2 * PER_PEER_S) + 1e-3)
    assert exchange_seconds(link, 1, exchange_bytes(1000, 1, 264)) == 0.0
    assert BASE_S + LINKS["nvlink"].hop_s + 7 * PER_PEER_S == pytest.approx(41e-6)  # the published small all-to-all


@pytest.mark.parametrize("link", LINKS.values(), ids=list(LINKS))
def test_more_of_anything_takes_longer(link):
    columns, row_bytes = V41

    def took(tokens, ranks):
        return exchange_seconds(link, ranks, exchange_bytes(tokens * columns, ranks, row_bytes))

    for tokens in (1, 64, 4096):
        times = [took(tokens, ranks) for ranks in range(1, 1025, 31)]
        assert times == sorted(times) and times[0] == 0
    assert took(64, 8) < took(4096, 8)
