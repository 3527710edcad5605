"""Small programs on the ByteDMD stack, step by step: what the page "How ByteDMD works" shows.

The tracer of `engram_toy` runs each program and logs what it read; here the log is walked on a real list, so that the
whole stack can be shown before and after every instruction. Depths and prices must be those that the tracer finds, and
a test compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.instruments.words import markdown
from engram_toy.functional import copy
from engram_toy.tracer import stack
from engram_toy.tracer.recorder import Recorder
from engram_toy.tracer.tracked import Tracked
from engram_toy.tracer.wrapping import Wrapper, leaves

PADDING = 12
_BANK = ("r0", "r1", "r2", "r3")
_ROWS = (10, 11, 12, 13)
_PAD = tuple(f"p{number}" for number in range(PADDING))
_NAMES = (("x",), _PAD, _BANK)
_SUMS = ("x + r0", "… + r2", "… + r0")
_BURIED = (1, (0,) * PADDING, _ROWS)


@dataclass(frozen=True)
class Story:
    """One program, and the words to tell it with.

    Attributes:
        name: short, for links and data.
        title, moral: before the first step, and after the last.
        function, arguments: what is traced.
        inputs: a name per argument value, argument by argument.
        results: per instruction, what it computes; the last word of the caption.
    """

    name: str
    title: str
    moral: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = _BURIED
    inputs: tuple[tuple[str, ...], ...] = _NAMES
    results: tuple[str, ...] = _SUMS


@dataclass(frozen=True)
class Read:
    """One read: the value's number, its depth (1 is the top) and ceil(sqrt(depth))."""

    value: int
    depth: int
    price: int


@dataclass(frozen=True)
class Step:
    """One instruction: its reads, and the stack when it is done, top first, as numbers of values."""

    result: int
    reads: tuple[Read, ...]
    stack: tuple[int, ...]


@dataclass(frozen=True)
class Telling:
    """A story run: names of all values, the stack at the start, the steps, and the total price."""

    story: Story
    names: tuple[str, ...]
    start: tuple[int, ...]
    steps: tuple[Step, ...]
    price: int


def _lookups(x: Any, bank: Sequence[Any]) -> Any:
    """Two rows of the bank, then the first of them again, folded into x."""
    return ((x + bank[0]) + bank[2]) + bank[0]


def _prefetched(x: Any, bank: Sequence[Any]) -> Any:
    """The same, from copies that are made first."""
    first, second = copy([bank[0], bank[2]])
    return ((x + first) + second) + first


def _padded(body: Callable[..., Any], hold: bool = True) -> Callable[..., Any]:
    def function(x: Any, pad: Sequence[Any], bank: Sequence[Any]) -> Any:
        out = (body(x, bank), bank)  # returned, so that a row stays on the stack behind its last read
        return (*out, pad) if hold else out

    return function


def _above(x: Any, bank: Sequence[Any], pad: Sequence[Any]) -> Any:
    return _lookups(x, bank), bank, pad


STORIES = (
    Story(
        "sum",
        "(a + b) + c",
        "Each sum reads two values. What is not needed again leaves the stack, and what lay under it moves up.",
        lambda a, b, c: (a + b) + c,
        (1, 2, 3),
        (("a",), ("b",), ("c",)),
        ("a + b", "(a + b) + c"),
    ),
    Story(
        "resident",
        "Bank above the padding",
        "The rows start near the top: the resident table. The padding below is never passed.",
        _above,
        (1, _ROWS, (0,) * PADDING),
        (("x",), _BANK, _PAD),
    ),
    Story(
        "offloaded",
        "Bank below the padding",
        "The first read of a row is deep and dear. The row then lies on top, so reading it again soon is cheap.",
        _padded(_lookups),
    ),
    Story(
        "prefetched",
        "Bank below the padding, copied first",
        "A copy is a read as deep as the one it was to spare, and then has to be read itself: dearer, not cheaper.",
        _padded(_prefetched),
        results=("copy of r0", "copy of r2", "x + copy of r0", "… + copy of r2", "… + copy of r0"),
    ),
    Story(
        "unheld",
        "Padding that nobody returns",
        "What is never read and not returned is dead from the start: it takes no room, and buries nothing.",
        _padded(_lookups, hold=False),
    ),
)


def traced_log(function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[stack.Log, list[list[int]]]:
    """What one run reads and stores, and the numbers of every argument's values."""
    recorder = Recorder()
    wrapper = Wrapper(recorder)
    # The last argument is laid down first, so that argument 0 ends on top.
    wrapped: list[Any] = [wrapper.wrap(argument) for argument in reversed(arguments)][::-1]
    recorder.start(wrapper.inputs)
    returned = function(*wrapped)
    recorder.flush()
    live = list(dict.fromkeys(part.id for part in leaves(returned) if isinstance(part, Tracked)))
    numbers = [[leaf.id for leaf in leaves(argument)] for argument in wrapped]
    return stack.Log(wrapper.inputs, recorder.left, recorder.right, recorder.third, live), numbers


def tell(story: Story) -> Telling:
    """Run a story and walk its log on a list, the top of the stack first."""
    log, numbers = traced_log(story.function, story.arguments)
    names = dict(zip((n for argument in numbers for n in argument), (n for names in story.inputs for n in names)))
    names |= {log.inputs + k: result for k, result in enumerate(story.results)}
    last = _last_uses(log)
    lying = [value for value in reversed(range(log.inputs)) if value in last]  # the newest on top; the unused are dead
    start, steps = tuple(lying), []
    for k in range(len(log.left)):
        operands = [value for value in (log.left[k], log.right[k], log.third.get(k, -1)) if value >= 0]
        # Quadratic, and meant for a dozen values.
        depths = [lying.index(value) + 1 for value in operands]
        lying = _after(lying, operands, log.inputs + k, k, last)
        reads = tuple(Read(v, depth, stack.read_price(depth)) for v, depth in zip(operands, depths))
        steps.append(Step(log.inputs + k, reads, tuple(lying)))
    price = sum(read.price for step in steps for read in step.reads)
    return Telling(
        story, tuple(names[value] for value in range(log.inputs + len(log.left))), start, tuple(steps), price
    )


def _last_uses(log: stack.Log) -> dict[int, float]:
    """The instruction of every value's last read; what is returned lives for ever, what is neither is missing."""
    last: dict[int, float] = {}
    for k in range(len(log.left)):
        last |= {value: k for value in (log.left[k], log.right[k], log.third.get(k, -1)) if value >= 0}
    return last | {value: float("inf") for value in log.returned}


def _after(lying: list[int], operands: list[int], result: int, k: int, last: dict[int, float]) -> list[int]:
    """The stack after instruction k: operands to the top in the order read, the dead gone, the result on top."""
    for value in operands:
        lying = [value, *(other for other in lying if other != value)]
    lying = [value for value in lying if last[value] > k]
    return [result, *lying] if result in last else lying


def story_tables() -> str:
    """Every story as a table in Markdown: what a reader without scripts sees, and what a search finds."""
    return "\n\n".join(_table(tell(story)) for story in STORIES)


def _table(told: Telling) -> str:
    rows = [["start", "", "", "", _stack_text(told, told.start)]]
    for step in told.steps:
        reads = ", ".join(told.names[read.value] for read in step.reads)
        depths = ", ".join(str(read.depth) for read in step.reads)
        price = str(sum(read.price for read in step.reads))
        rows.append([told.names[step.result], reads, depths, price, _stack_text(told, step.stack)])
    table = markdown(["step", "reads", "depths", "price", "then on the stack"], rows, right={3})
    return f"**{told.story.title}**: price {told.price}\n\n{table}\n\n{told.story.moral}"


def _stack_text(told: Telling, lying: Sequence[int]) -> str:
    """Names from the top down; neighbouring padding is counted, not listed."""
    parts: list[str] = []
    for value in lying:
        name = told.names[value]
        if name not in _PAD:
            parts.append(name)
        elif parts and parts[-1].endswith("padding"):
            parts[-1] = f"{int(parts[-1].split()[0]) + 1} padding"
        else:
            parts.append("1 padding")
    return " · ".join(parts)


def as_data() -> list[dict[str, Any]]:
    """Every story as plain data for the page's script."""
    return [
        {
            "name": told.story.name,
            "title": told.story.title,
            "moral": told.story.moral,
            "values": [{"name": name, "padding": name in _PAD} for name in told.names],
            "start": list(told.start),
            "steps": [asdict(step) for step in told.steps],
            "price": told.price,
        }
        for told in map(tell, STORIES)
    ]
