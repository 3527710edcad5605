"""What the pages say of the runs on a GPU: single values by name, and the blocks that show them.

    python bench/fill_docs.py           fills the pages with them

Every value is computed from committed samples: medians, and ratios of one run.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

from bench.energy.tiers import rows_energy, tiers, weights_energy
from bench.evidence import published
from bench.evidence.lookup_table import report as lookup_report
from bench.instruments.reading import read_results
from bench.instruments.timing import paired_ratio
from bench.instruments.words import markdown, short, signed_percent
from bench.served import numbers
from bench.served.classes import added_s, classify, offloaded_labels
from bench.served.numbers import Json
from bench.wall.numbers import overhead
from bench.wall.table import wall_table

HUNDRED, SERVED, LOOKUP, PREFILL = "end_to_end_h200_100b", "end_to_end_h200", "lookup_speed_h200", "gpu_wall_h200"
_FEW = 16  # tokens
_NAMED = (("resident", 1), ("resident", 256), ("uva", 1), ("uva", 64), ("uva", 256))  # lookups, by tokens
_PLACES = {"resident": "resident", "uva": "offload_uva", "graph": "offload_uva in graph", "staged": "offload_prefetch"}


def _window(case: Json) -> float:
    """Median seconds that the CPU's prefetched rows have before they are joined."""
    return statistics.median(numbers.per_step(numbers.row_of(case, "offload_prefetch"), "window_s"))


def _by_distinct_rows(case: Json, label: str) -> str:
    """What a row adds to a mean decode step, us, in the rounds with the fewest and the most distinct rows."""
    distinct = {entry["round"]: entry["rows_unique"] for entry in case["rounds"]}
    own, base = (_mean_steps(numbers.row_of(case, name)) for name in (label, "no_engram"))
    ends = (pick(distinct, key=lambda number: distinct[number]) for pick in (min, max))
    return " and ".join(f"{1e6 * (own[number] - base[number]):.0f}" for number in ends)


def _mean_steps(row: Json) -> dict[int, float]:
    return {sample["round"]: statistics.mean(sample["decode_s"]) for sample in row["rounds"]}


class OnGpu:
    """The runs on a GPU.

    Args:
        folder: of the committed results.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Json:
        return read_results(self._folder / f"{name}.json")

    @property
    def hundred(self) -> Json:
        """The one case with 100 B parameters."""
        (case,) = self[HUNDRED]["cases"]
        return case

    def values(self) -> dict[str, str]:
        """Name -> text."""
        served = {**self._hundred_billion(), **self._batches(), **self._by_batch(), **self._served_prompts()}
        return {**served, **self._lookups(), **self._prompts()}

    def _hundred_billion(self) -> dict[str, str]:
        case, limits = self.hundred, self[HUNDRED]["limits"]
        step = numbers.token_times(numbers.row_of(case, "no_engram"))["median"]
        # `gather` is the device's own memory; `copy`, in the same limits, the bus.
        least = case["weight_bytes"]["model"] / limits["gather"]["bytes_per_s"]
        found = {
            "gpu.params": f"{case['table']['parameters'] / 1e9:.0f}",
            "gpu.gib": f"{case['table']['bytes'] / 2**30:.0f}",
            "gpu.batch": str(case["batch"]),
            "gpu.step_ms": f"{1e3 * step:.1f}",
            "gpu.least_ms": f"{1e3 * least:.1f}",
            "gpu.step_over_least": f"{step / least:.0f}",
            "gpu.window_us": f"{1e6 * _window(case):.0f}",
            "gpu.graph.round_us": _by_distinct_rows(case, _PLACES["graph"]),
        }
        for name, label in _PLACES.items():
            decode = numbers.against(case, numbers.row_of(case, label), "no_engram", "decode")
            added = added_s(case, label)
            found[f"gpu.{name}.us"] = f"{1e6 * added:.0f}"
            found[f"gpu.{name}.percent"] = f"{100 * decode.median:.1f}"
            found[f"gpu.{name}.interval"] = decode.interval
            found[f"gpu.{name}.of_least"] = f"{100 * added / least:.1f}"
        graph = numbers.row_of(case, _PLACES["graph"])
        ours = numbers.against(case, graph, "resident", "decode")
        whole = numbers.against(case, graph, "no_engram", "together")
        joules = [numbers.joules(row) for row in (graph, numbers.row_of(case, "resident"))]
        # In pairs, round by round.
        ratio = paired_ratio(*([each[number] for number in sorted(joules[1])] for each in joules))
        low, high = signed_percent(ratio["low"] - 1), signed_percent(ratio["high"] - 1)
        over = numbers.against(case, graph, "resident", "together")
        return {
            **found,
            **self._energy(step),
            "gpu.graph.whole_over_resident": f"{signed_percent(over.median)} {over.interval}",
            "gpu.graph.token_us": f"{1e6 * added_s(case, _PLACES['graph']) / case['batch']:.1f}",
            "gpu.graph.over_resident": f"{100 * ours.median:.1f}",
            "gpu.graph.whole": f"{signed_percent(whole.median)} {whole.interval}",
            "gpu.graph.of_least.4b": f"{100 * added_s(case, _PLACES['graph']) / self._least_of_4b():.1f}",
            **{
                f"gpu.{name}.p99_ms": f"{1e3 * numbers.token_times(numbers.row_of(case, label))['p99']:.1f}"
                for name, label in (("none", "no_engram"), ("graph", _PLACES["graph"]), ("staged", _PLACES["staged"]))
            },
            "gpu.graph.joules": f"[{low}, {high}]",
            "gpu.pass_joules": f"{statistics.median(joules[1].values()):.0f}",
        }

    def _energy(self, step: float) -> dict[str, str]:
        """What the board takes in a decode step, beside what published figures say of its weights and its rows.

        Args:
            step: seconds of one without Engram.
        """
        case = self.hundred
        row = numbers.row_of(case, "resident")
        joules = numbers.joules(row)
        watts = statistics.median(
            joules[sample["round"]] / numbers.seconds(sample, "together") for sample in row["rounds"]
        )
        hbm, *others = tiers(published.bounds)
        weights = weights_energy(case["weight_bytes"]["model"], hbm)
        host = next(tier for tier in others if tier.name == "host DDR over PCIe")
        rows = case["batch"] * case["table"]["columns"]
        most = rows_energy(host, hbm, rows, rows, case["table"]["row_bytes"])[1]
        return {
            "gpu.step_joules": f"{watts * step:.1f}",
            "gpu.step_over_hbm": f"{watts * step / weights[1]:.0f} to {watts * step / weights[0]:.0f}",
            "gpu.rows_mj": f"{1e3 * most:.1g}",
            "gpu.graph.wait_mj": f"{1e3 * watts * added_s(case, _PLACES['graph']):.0f}",
        }

    def _least_of_4b(self) -> float:
        """Seconds that the weights of the paper's smaller model take at the bandwidth of a copy within the card."""
        weights = published.figure("backbone.4b") * 1e9 * published.figure("bytes_bf16")
        return weights / self[HUNDRED]["limits"]["gather"]["bytes_per_s"]

    def _cases(self) -> list[Json]:
        return [self.hundred, *self[SERVED]["cases"]]

    def _batches(self) -> dict[str, str]:
        """Over all cases: from the least to the most that a place adds to a decode step."""
        lost = {
            name: [
                100 * numbers.against(case, numbers.row_of(case, _PLACES[name]), "no_engram", "decode").median
                for case in self._cases()
            ]
            for name in ("graph", "staged")
        }
        us = {
            "resident": [1e6 * added_s(case, "resident") for case in self._cases()],
            # Beside 100 B parameters it was not measured.
            "own": [1e6 * added_s(case, "own_compute") for case in self[SERVED]["cases"]],
        }
        unexplained = [
            1e3 * (added_s(case, _PLACES["staged"]) - max(0.0, self._staged_s(case["batch"]) - _window(case)))
            for case in self._cases()
            if case["batch"] > 1
        ]
        windows = [1e6 * _window(case) for case in self._cases()]
        return {
            "gpu.staged.unexplained_ms": f"{min(unexplained):.1f} to {max(unexplained):.1f}",
            "gpu.windows_us": f"{min(windows):.0f} to {max(windows):.0f}",
            **{f"gpu.{name}.all_percent": f"{min(found):.1f} to {max(found):.1f}" for name, found in lost.items()},
            **{f"gpu.{name}.all_us": f"{min(found):.0f} to {max(found):.0f}" for name, found in us.items()},
        }

    def _by_batch(self) -> dict[str, str]:
        """Of the smaller table: what prefetching takes beyond waiting, and what a batch has and reads."""
        found: dict[str, str] = {}
        for case in self[SERVED]["cases"]:
            batch, none = case["batch"], numbers.row_of(case, "no_engram")
            times = numbers.paired(
                [numbers.row_of(case, _PLACES["staged"]), numbers.row_of(case, "offload_naive")], "step"
            )
            more = [1e6 * (thread - waited) for thread, waited in zip(*times)]
            least = case["weight_bytes"]["model"] / self[SERVED]["limits"]["gather"]["bytes_per_s"]
            found |= {
                f"gpu.prefetch_over_naive.{batch}": f"{min(more):+.0f} to {max(more):+.0f}",
                f"gpu.staged.us.{batch}": f"{1e6 * added_s(case, _PLACES['staged']):.0f}",
                f"gpu.window_us.{batch}": f"{1e6 * _window(case):.0f}",
                f"gpu.step_over_least.{batch}": f"{numbers.token_times(none)['median'] / least:.1f}",
            }
        return found

    def _served_prompts(self) -> dict[str, str]:
        """What the prompts of a batch lose through the whole model, against the resident table."""
        (smaller,) = (case for case in self[SERVED]["cases"] if case["batch"] == self.hundred["batch"])
        labels = {**_PLACES, "naive": "offload_naive"}
        found = {}
        for name, case in (("staged", smaller), ("naive", smaller), ("graph", self.hundred)):
            lost = numbers.against(case, numbers.row_of(case, labels[name]), "resident", "prefill")
            found[f"gpu.prompts.{name}"] = f"{signed_percent(lost.median)} {lost.interval}"
        a_token = [self._prompt_token_us(case, way) for case in (smaller, self.hundred) for way in ("uva", "graph")]
        found["gpu.prompts.token_us"] = f"{min(a_token):.1f} to {max(a_token):.1f}"
        for name, case in (("smaller", smaller), ("hundred", self.hundred)):
            itself = numbers.noise_floor(case, "prefill", "resident")
            low, high = (signed_percent(itself[end] - 1) for end in ("low", "high"))
            found[f"gpu.prompts.itself.{name}"] = f"[{low}, {high}]"
        return found

    @staticmethod
    def _prompt_token_us(case: Json, way: str) -> float:
        """What a token of a prompt takes longer than with the resident table."""
        rows = [numbers.row_of(case, label) for label in (_PLACES[way], "resident")]
        longer = statistics.median(later - own for later, own in zip(*numbers.paired(rows, "prefill")))
        return 1e6 * longer / statistics.median(entry["prompt_tokens"] for entry in case["rounds"])

    def _staged(self, tokens: int) -> list[float]:
        """Seconds from token ids to rows that the CPU gathers, as they came."""
        (case,) = (case for case in self[LOOKUP]["cases"] if case["tokens"] == tokens)
        return case["samples_s"]["staged"]

    def _staged_s(self, tokens: int) -> float:
        return statistics.median(self._staged(tokens))

    def _lookups(self) -> dict[str, str]:
        results = self[LOOKUP]
        us = {
            (way, case["tokens"]): 1e6 * statistics.median(samples)
            for case in results["cases"]
            for way, samples in case["samples_s"].items()
        }
        rate, limit = self._rows_per_s(), self._bus()
        carried = rate * results["table"]["row_bytes"]
        # One token was measured first, all of it in a slower mode, in which two tokens began.
        staged = {tokens: took for (way, tokens), took in us.items() if way == "staged" and 1 < tokens <= _FEW}
        two = self._staged(2)
        sixth = len(two) // 6
        over = [took / us["uva", tokens] for tokens, took in staged.items()]
        return {
            **{f"gpu.lookup.{way}.{tokens}": f"{us[way, tokens]:.1f}" for way, tokens in _NAMED},
            "gpu.lookup.staged_over": f"{min(over):.0f} to {max(over):.0f}",
            "gpu.lookup.staged_us": f"{min(staged.values()):.0f} to {max(staged.values()):.0f}",
            **{f"gpu.lookup.staged.{tokens}": f"{us['staged', tokens]:.0f}" for tokens in (1, 64)},
            "gpu.lookup.staged_began": f"{1e6 * statistics.median(two[:sixth]):.0f}",
            "gpu.lookup.staged_ended": f"{1e6 * statistics.median(two[-sixth:]):.0f}",
            "gpu.rows_per_s": f"{rate / 1e6:.0f}",
            "gpu.ns_a_row": f"{1e9 / rate:.0f}",
            "gpu.row_gbs": f"{carried / 1e9:.1f}",
            "gpu.bus_gbs": f"{limit / 1e9:.0f}",
            "gpu.bus_share": f"{100 * carried / limit:.0f}",
        }

    def _prompts(self) -> dict[str, str]:
        (step,) = self[PREFILL]["steps"]
        runs = {run["variant"]: run for run in step["runs"] if not run["repeat"]}
        tokens = step["shape"]["batch"] * step["shape"]["tokens"]
        # As asked for, repeats included: a lookup in place reads them again.
        rows = tokens * step["table"]["columns"]

        def crossed(name: str) -> float:
            # What crosses without any rows is not theirs.
            return runs[name]["pcie"]["value"] - runs["no_engram"]["pcie"]["value"]

        ways = paired_ratio(runs["offload_uva"]["step_s"], runs["offload_prefetch"]["step_s"])
        lost = [uva - own for uva, own in zip(runs["offload_uva"]["step_s"], runs["resident"]["step_s"])]
        return {
            "gpu.prompt.tokens": f"{step['shape']['tokens']:,}",
            "gpu.prompt.blocks": str(step["blocks"]),
            "gpu.prompt.rounds": str(len(runs["resident"]["step_s"])),
            "gpu.prompt.row_bytes": str(step["table"]["row_bytes"]),
            "gpu.prompt.crossed": f"{crossed('offload_uva') / rows:.0f}",
            "gpu.prompt.crossed_distinct": f"{crossed('offload_uva') / step['prediction']['unique_rows']:.0f}",
            "gpu.prompt.copied": f"{crossed('offload_prefetch') / rows:.0f}",
            "gpu.prompt.staged": str(overhead(step, runs["offload_prefetch"])),
            "gpu.prompt.token_us": f"{1e6 * statistics.median(lost) / tokens:.1f}",
            "gpu.prompt.uva": str(overhead(step, runs["offload_uva"])),
            "gpu.prompt.naive": str(overhead(step, runs["offload_naive"])),
            "gpu.prompt.uva_over_staged": f"{signed_percent(ways['median'] - 1)} "
            f"[{signed_percent(ways['low'] - 1)}, {signed_percent(ways['high'] - 1)}]",
            "gpu.crossed_share": " to ".join(
                f"{100 * self._rows_per_s() * crossed('offload_uva') / each / self._bus():.0f}"
                for each in (rows, step["prediction"]["unique_rows"])
            ),
        }

    def _rows_per_s(self) -> float:
        """Rows that a lookup in place reads in a second, from the first number of tokens to the last."""
        least, most = (self[LOOKUP]["cases"][place] for place in (0, -1))
        took = [statistics.median(case["samples_s"]["uva"]) for case in (least, most)]
        return (most["rows"] - least["rows"]) / (took[1] - took[0])  # what any fetch takes is in neither difference

    def _bus(self) -> float:
        return self[LOOKUP]["limits"]["copy"]["bytes_per_s"]

    def table(self) -> str:
        """What each place adds to a decode step at every size, and its class against no Engram."""
        head = ["table, batch", "step without Engram, ms", *(f"`{label}`, us" for label in _PLACES.values())]
        rows = []
        for case in self._cases():
            step = numbers.token_times(numbers.row_of(case, "no_engram"))["median"]
            rows.append(
                [
                    f"{case['table']['parameters'] / 1e9:.3g} B, {case['batch']}",
                    short(1e3 * step, digits=3),
                    *(self._cell(case, label) for label in _PLACES.values()),
                ]
            )
        return markdown(head, rows, right=range(1, len(head)))

    @staticmethod
    def _cell(case: Json, label: str) -> str:
        lost = numbers.against(case, numbers.row_of(case, label), "no_engram", "decode")
        text = f"{1e6 * added_s(case, label):+.0f} ({signed_percent(lost.median)} %)"
        return (
            f"{text} {classify([case], label, 'no_engram', 'decode')[0]}" if label in offloaded_labels(case) else text
        )

    def blocks(self) -> dict[str, Callable[[], str]]:
        """Name of each block -> what fills it."""
        return {
            "gpu_decode": self.table,
            "gpu_lookup": lambda: f"```text\n{lookup_report(self[LOOKUP])}\n```",
            "gpu_prefill": lambda: f"```text\n{wall_table(self[PREFILL])}\n```",
        }
