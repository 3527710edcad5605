"""A machine of round figures, a text's counts, and what is asked of both."""

from engram_ref.place.answer import Question, answer
from engram_ref.place.group import Group
from engram_ref.place.machine import Machine, Rate
from engram_ref.place.reads import Reads
from engram_ref.sharding.on_paper import LINKS

GB = 10**9
ROUND = Machine(80 * GB, 512 * GB, 2000 * GB).with_rates(
    {
        name: Rate(value, "given")
        for name, value in {
            **{"device": 1e9, "bus": 1e8, "gather": 1e6, "memory": 1e9, "reads": 1e4},
            **{"start_device": 1e-3, "start_host": 2e-3, "start_bus": 4e-3, "start_disk": 8e-3},
            **{"uva": 1e6, "start_staged": 7e-3},
            **{"beside_uva": 0.5, "beside_staged": 3e-3, "beside_hot": 5e-3, "beside_file": 6e-3},
        }.items()
    }
)
EIGHT = Group(8, 2, LINKS["ethernet"])  # on two machines


def counted(distinct=1.0, first=0.5, root=10.0, hits=0.25):
    steps = {1: distinct, 64: distinct, 512: distinct}
    return Reads("a text", 1000, steps, first, root, hits, {256: distinct, 4096: distinct})


def ask(model, machine=ROUND, **how):
    return answer(Question(model, machine, how.pop("reads", counted()), how.pop("batches", (1, 64, 512)), **how))


def placement(found, name):
    return next(p for p in found["placements"] if p["placement"] == name)
