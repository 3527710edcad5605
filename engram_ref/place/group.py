"""The processes that run a model together, an accelerator each, and the wire between them.

    Group(ranks=8, machines=1, link=LINKS["nvlink"])

One copy of a table serves all ranks of a machine (`shared=` of `make_table`), whatever memory it is in but their own;
with `sharded` each rank owns a part of the rows, and asks the others for theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram_ref.sharding.on_paper import LINKS, Link


@dataclass(frozen=True)
class Group:
    """Ranks, and where they run.

    Attributes:
        ranks: processes, each with an accelerator and tokens of its own.
        machines: that they run on, equally many on each.
        link: from a rank to the others, the slowest on the way.

    Raises:
        ValueError: ranks that do not divide, or more than the link connects.
    """

    ranks: int = 1
    machines: int = 1
    link: Link = LINKS["nvlink"]

    def __post_init__(self) -> None:
        if self.ranks % self.machines:
            raise ValueError(f"{self.ranks} ranks on {self.machines} machines: give equally many to each")
        if self.ranks > self.link.most_ranks:
            raise ValueError(f"{self.ranks} ranks: {self.link.name} connects {self.link.most_ranks}, use another link")

    @property
    def per_machine(self) -> int:
        """Ranks of each machine."""
        return self.ranks // self.machines


ALONE = Group()
