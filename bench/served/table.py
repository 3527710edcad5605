"""The tables of an end-to-end results file, as text for a terminal.

    print(report(json.loads(Path("bench/results/end_to_end_cpu.json").read_text())))

For each backbone, batch and stream: what was served, a line per variant, what each loses against both baselines and
whether that is under 3 %, the overhead taken apart by phase, and what a slowed bus does. "not resolved" stands where
the interval holds 0 or reaches into the noise floor; the interval is shown all the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench.instruments.claim import PUBLISHED_WINDOW_S
from bench.instruments.timing import NotMeasured, noise_interval
from bench.instruments.words import aligned, commit_of, gib, measured_on, short, signed
from bench.schemas.common import CONTROL
from bench.served import numbers
from bench.served.classes import NO_CLASS, losses
from bench.served.numbers import LAUNCH_BOUND, NO_LOOKUP, PARTS, PHASES, WHOLE, Json, Slowed
from bench.setup.variants import UNSEEN

_PHASE_NAMES = {"token": "median token"}


def report(results: Json) -> str:
    """Everything that a results file says; the first line names the device it was measured on."""
    lines = [measured_on(results), _machine(results), _processes(results)]
    return "\n\n".join(["\n".join(lines), *(case_report(results, case) for case in results["cases"] if case["rows"])])


def _machine(results: Json) -> str:
    e, copied = results["environment"], results["limits"]["copy"]
    return (
        f"Host {e['cpu']}, {e['cpu_count']} cores, {gib(e['memory_bytes'])}; torch {e['packages']['torch']}, "
        f"transformers {e['packages']['transformers']}; commit {commit_of(results)}\n"
        f"Limit measured in this run: copy {short(copied['bytes_per_s'] / 1e9)} GB/s ({copied['what']})"
    )


def _processes(results: Json) -> str:
    processes = results["processes"]
    if len(processes) == 1:
        return f"Measured in one go, begun {processes[0]['started']}"
    return f"Measured in {len(processes)} goes, the first begun {processes[0]['started']}; no pair is of two of them"


def case_report(results: Json, case: Json) -> str:
    """One backbone, batch and stream."""
    blocks = [_header(results, case), rows_table(results, case), losses_table(case), decomposition_table(case)]
    if any(row["bus"] for row in case["rows"]):
        blocks.append(bus_table(case))
    return "\n".join(blocks)


def _header(results: Json, case: Json) -> str:
    table, graphs = case["table"], case["rows"][0]["graphs"]
    low, high = case["prompt_tokens"]
    made = case["output_tokens"]
    rounds = len(case["rounds"])
    decoding = "decoding as CUDA graphs" if graphs["used"] else f"decoding without CUDA graphs ({graphs['why']})"
    return (
        f"== {case['backbone']}, {case['blocks']} blocks, {case['parameters'] / 1e9:.3g}e9 random weights, "
        f"{case['dtype']}, on {case['device']}; batch {case['batch']}, stream {case['stream']['name']}\n"
        f"   {rounds} rounds of {case['sequences']} sequences, prompts of {low} to {high} tokens, outputs of {made[0]} "
        f"to {made[1]}; {decoding}\n"
        f"   table {table['preset']}, {table['parameters'] / 1e9:.3g}e9 parameters, {gib(table['bytes'])}, "
        f"{table['columns']} rows of {table['row_bytes']} B a token, {table['row_dtype']}, before block "
        f"{case['layer_id'] + 1}; {short(numbers.step_bytes(case) / 1e3)} kB a decode step"
    )


def rows_table(results: Json, case: Json) -> str:
    """A line per variant."""
    columns = _columns(case)
    head = [[name for name, _, _ in columns], [unit for _, unit, _ in columns]]
    lines = [[cell(row) for _, _, cell in columns] for row in case["rows"] if row["rounds"]]
    notes = [
        _floor_note(results, case),
        _noise_note(case),
        *_weight_notes(case),
        *_board_notes(case),
        *_bus_notes(case),
        *_reasons(case),
    ]
    return "\n".join([aligned(head + lines, left={0, 1}, headers=2), *notes])


def _columns(case: Json) -> list[tuple[str, str, Callable[[Json], str]]]:
    """Name, unit and text of each column."""

    def of_steps(name: str, scale: float) -> Callable[[Json], str]:
        return lambda row: short(scale * statistics.median(numbers.per_step(row, name)))

    def if_looked_up(cell: Callable[[Json], str]) -> Callable[[Json], str]:
        return lambda row: "" if row["variant"] in NO_LOOKUP else cell(row)

    exposed = of_steps("decode_exposed_s", 1e6)
    copied = if_looked_up(lambda row: short(statistics.median(one["copied"] for one in row["rounds"]) / 1e6))
    return [
        ("variant", "", lambda row: row["label"]),
        ("on", "", lambda row: row["device"]),
        ("output", "tokens/s", lambda row: short(statistics.median(numbers.tokens_per_second(case, row)))),
        ("per token", "ms", of_steps("decode_s", 1e3)),
        ("p99", "ms", lambda row: short(1e3 * numbers.token_times(row)["p99"])),
        ("first token", "ms", of_steps("first_token_s", 1e3)),
        ("exposed", "us/token", if_looked_up(lambda r: "-" if r["schedule"] in UNSEEN else exposed(r))),
        ("freed", "GiB", lambda row: _scaled(numbers.freed_bytes(case, row), 2**30, "")),
        ("hits", "%", lambda row: "" if (hits := numbers.hit_rate(row)) is None else f"{100 * hits:.1f}"),
        ("copied", "MB/round", copied),
        ("PCIe", "MB/round", lambda row: _scaled(row["pcie"] and row["pcie"]["value"], 1e6)),
        (
            "less no_engram",
            "MB/round",
            lambda r: "" if r["variant"] == CONTROL else _scaled(numbers.over_control(case, r), 1e6),
        ),
        ("energy", "J/token", lambda row: _scaled(numbers.joules_per_token(row), 1)),
        ("board", "J/round", lambda row: _scaled(numbers.pass_joules(row), 1)),
        ("weights", "GB/s", _weights),
    ]


def _scaled(value: float | None, unit: float, missing: str = "-") -> str:
    if value is None:
        return missing
    return signed(value / unit)


def _weights(row: Json) -> str:
    """Bandwidth at which a median decode step reads the weights; marked where something else is what it waits for."""
    found = row.get("weights") and row["weights"]["value"]
    if not found:
        return "-"
    return f"{'slow ' if found['launch_bound'] else ''}{short(found['bytes_per_s'] / 1e9)}"


def _floor_note(results: Json, case: Json) -> str:
    """The floor of the fetches, and how far from it those are that nothing hides."""
    floor = numbers.fetch_floor(results, case)
    requested, unique = (short(nbytes / 1e6) for nbytes in numbers.round_bytes(case))
    text = (
        f"   rows of a round, from the ids: {requested} MB asked for, {unique} MB if each step asks for a row once; "
        f"floor, these over copy bandwidth: {short(1e6 * floor)} us"
    )
    alone = [row for row in case["rows"] if row["schedule"] == "synchronous" and row["rounds"]]
    waits = [
        f"{row['label']} waited {short(1e6 * numbers.exposed_in_round(row))} us"
        + (
            " (a disk has a floor of its own)"
            if row["held"]["disk"]
            else f", {short(numbers.exposed_in_round(row) / floor)} x"
        )
        for row in alone
    ]
    return "; ".join([text, *waits])


def _noise_note(case: Json) -> str:
    try:
        return f"   {noise_interval(numbers.noise_floor(case, 'together'))} of no_engram"
    except NotMeasured as why:
        return f"   noise floor: unknown, so that nothing is resolved: {why}"


def _weight_notes(case: Json) -> list[str]:
    """What the weights column is held against."""
    found = [row["weights"]["value"] for row in case["rows"] if row.get("weights") and row["weights"]["value"]]
    if not found:
        return []
    model, limit = case["weight_bytes"]["model"], found[0]["limit_bytes_per_s"]
    return [
        f"   weights: {short(model / 1e9)} GB a step without Engram's, over the median step; within the device "
        f"{short(limit / 1e9)} GB/s were measured; a step of more than {LAUNCH_BOUND:g} times what that allows is "
        "marked slow, be it for launches or, in graphs, for many small kernels; keys and values, up to "
        f"{gib(case['needs']['device']['keys and values'])}, are not counted"
    ]


def _board_notes(case: Json) -> list[str]:
    """Clock, power and what slowed the board, over the passes of all rows; why any of it is not known."""
    boards = [sample["board"] for row in case["rows"] for sample in row["rounds"] if sample.get("board")]
    known = [board["value"] for board in boards if board["value"]]
    if not known:
        return sorted({f"   - no clock, power or board energy: {board['why']}" for board in boards})
    texts = []
    for name, unit in (("sm_mhz", "MHz"), ("power_w", "W")):
        values = sorted(value[name] for value in known if value[name] is not None)
        if values:
            texts.append(f"{short(values[0])} to {short(values[-1])} {unit}")
    slowed_by = sorted({reason for value in known for reason in value["throttled"] or ()})
    lines = [f"   board, as each pass ended: {', '.join([*texts, 'slowed by ' + (', '.join(slowed_by) or 'nothing')])}"]
    unknown = sorted({f"{name}: {why}" for value in known for name, why in value["unknown"].items()})
    return lines + [f"   - board, {one}" for one in unknown]


def _bus_notes(case: Json) -> list[str]:
    """What was counted twice, and the sampled throughput, where there is no byte counter: no numbers of the table."""
    notes = [
        f"   PCIe, {row['label']}: {_scaled(row['pcie']['first'], 1e6)} MB counted first; shown is the second count"
        for row in case["rows"]
        if row["pcie"] and "first" in row["pcie"]
    ]
    rates = {
        row["label"]: row["pcie"]["fallback"]["value"]["bytes_per_s"]
        for row in case["rows"]
        if row["pcie"] and row["pcie"].get("fallback") and row["pcie"]["fallback"]["value"]
    }
    if not rates:
        return notes
    what = next(row["pcie"]["fallback"]["what"] for row in case["rows"] if row["label"] in rates)
    control = rates.get("no_engram")
    texts = [
        f"{label} {short(rate / 1e6)} MB/s"
        + (f" ({_scaled(rate - control, 1e6)} more)" if control is not None and label != "no_engram" else "")
        for label, rate in rates.items()
    ]
    return [*notes, f"   PCIe sampled instead ({what}): {', '.join(texts)}"]


def _reasons(case: Json) -> list[str]:
    """Why numbers are missing, and what must not be missing."""
    lines = {
        f"   - no {what}: {row[name]['why']}"
        for row in case["rows"]
        for name, what in (("pcie", "PCIe counter"), ("energy", "energy"))
        if row[name] and row[name]["why"]
    }
    for row in case["rows"]:
        if not numbers.copies_agree(case, row):
            lines.add(f"warning: {row['label']} did not copy the bytes that the ids ask for")
    if not numbers.same_tokens(case):
        lines.add("warning: variants chose different tokens: no time here counts")
    return sorted(lines)


def losses_table(case: Json) -> str:
    """What every variant loses against both baselines, in decode steps and in the whole pass."""
    text = aligned(losses(case), left={0}, headers=2)
    return text if case["device"] != "cpu" else f"{text}\n   {NO_CLASS}"


def decomposition_table(case: Json) -> str:
    """The overhead of the prefetched table, taken apart, by phase."""
    rows = [["overhead, % of no_engram", *(_PHASE_NAMES.get(phase, phase) for phase in PHASES)]]
    found = {}
    for phase in PHASES:
        try:
            found[phase] = numbers.decomposition(case, phase)
        except NotMeasured as why:
            return f"   the overhead is not taken apart: {why}"
    names = {
        part: f"{numbers.first_of(case, more)['label']} - {numbers.first_of(case, less)['label']}"
        for part, (more, less) in PARTS.items()
    }
    for part in (*PARTS, WHOLE):
        label = f"{part}: {names[part]}" if part in names else "all of it, measured by itself"
        rows.append([label, *(str(found[phase][part]) for phase in PHASES)])
    return aligned(rows, left={0})


def bus_table(case: Json) -> str:
    """Slowed buses, fastest first, and where they cost 3 %."""
    try:
        buses, found = numbers.slowed(case), numbers.breaking_bus(case)
    except NotMeasured as why:
        return f"   slowed buses: {why}"
    rows = [
        [
            "slowed bus, median token",
            "delay us",
            "window us",
            "exposed us",
            "% over resident",
            "% over no_engram",
            "3 %",
        ]
    ]
    rows += [_bus_row(one) for one in buses]
    step = numbers.token_times(numbers.row_of(case, "no_engram"))["median"]
    notes = [
        f"   a step of {short(1e3 * step)} ms loses 3 % to the bus {_between(found)}; expected from window and step: "
        f"{short(1e6 * found.predicted_s)} us{_as_bandwidth(case, found)}",
        f"   window before block {case['layer_id'] + 1} here: {short(1e6 * numbers.window_s(buses))} us; computed by "
        f"others for Qwen3-32B: {1e6 * PUBLISHED_WINDOW_S:.0f} us (arXiv 2603.10087)",
    ]
    return "\n".join([aligned(rows, left={0}), *notes])


def _bus_row(one: Slowed) -> list[str]:
    verdict = {True: "broken", False: "holds", None: "not resolved"}[one.breaks]
    return [
        one.label.removeprefix("throttled "),
        *(short(1e6 * value) for value in (one.delay_s, one.window_s, one.exposed_s)),
        str(one.extra),
        str(one.whole),
        verdict,
    ]


def _between(found: Any) -> str:
    holds, breaks = found.holds_s, found.breaks_s
    if breaks is None:
        return f"at none of these delays{'' if holds is None else f', up to {short(1e6 * holds)} us surely'}"
    if holds is None:
        return f"at {short(1e6 * breaks)} us or less"
    return f"between {short(1e6 * holds)} and {short(1e6 * breaks)} us"


def _as_bandwidth(case: Json, found: Any) -> str:
    breaks, holds = found.bandwidths(numbers.step_bytes(case))
    if breaks is None or holds is None:
        return ""
    return f"; as bandwidth alone, between {short(breaks / 1e9)} and {short(holds / 1e9)} GB/s"
