"""The answer as text: a table of placements for each batch size, the recommendation, and what was assumed."""

from __future__ import annotations

from typing import Any

from engram_ref.place.words import in_joules, in_tokens, in_units, percent, size, time

_OF_GPUS = ("device", "bus", "uva", "compute", "start_device", "start_bus", "start_staged")
_BESIDE = ("beside_uva", "beside_staged", "beside_hot")  # of GPUs, too
_OF_CPUS = ("memory", "processor", "beside_file")  # where it computes
_WHERE = {
    "device": "in GPU memory",
    "memory": "in host memory, read where it lies",
    "uva": "in pinned host memory, read there by the GPU",
    "host": "in host memory, gathered by the CPU",
    "file": "on disk, read by the CPU",
    "hot": "the most frequent rows in GPU memory, behind them host",
    "hot file": "the most frequent rows in memory, behind them file",
    "sharded": "a part with each rank",
    "sharded host": "a part with each rank, in host memory",
    "hot sharded": "the most frequent rows with each rank, behind them sharded",
}
_TIERS = {"gpu": "GPU", "host": "host", "disk": "disk"}
_HEAD = ["placement", "fits", *_TIERS.values(), "freed", "fetch", "exposed", "loss", "price", "model", "energy"]


def report(answer: dict[str, Any]) -> str:
    """The answer for a terminal."""
    model, machine, reads = answer["model"], answer["machine"], answer["reads"]
    gpu = "no GPU: the CPU computes" if machine["gpu"] is None else f"GPU {size(machine['gpu'])}"
    lines = [
        f"{model['name']}: table of {size(model['table_bytes'])}, "
        f"{sum(model['rows']):,} rows of {model['row_bytes']} B, {model['rows_per_token']} of them a token",
        f"free for it: {gpu}, host {size(machine['host'])}, disk {size(machine['disk'])}",
        *_of_group(answer),
        _of_blocks(answer["block"]),
        f"text: {reads['text']}, {reads['tokens']:,} tokens, {100 * reads['first']:.0f} % of row reads are first ones",
    ]
    for number in range(len(answer["batches"] + answer["prompts"])):
        lines += ["", _heading(answer, number), aligned(_rows(answer, number))]
    lines += ["", f"take {answer['recommendation']['reason']}" if answer["recommendation"]["placement"] else
              answer["recommendation"]["reason"], "", *_notes(answer)]  # fmt: skip
    return "\n".join(lines)


def _of_group(answer: dict[str, Any]) -> list[str]:
    """A line on the ranks, if there are several."""
    group = answer["group"]
    if group["ranks"] == 1:
        return []
    each = f"{group['ranks']} on {group['machines']} machine{'s' * (group['machines'] > 1)}"
    link = group["link"]
    return [f"ranks: {each}, {link['name']}, {size(link['bytes_per_s'])}/s ({link['source']})"]


def _of_blocks(block: dict[str, Any]) -> str:
    given = "" if block["seconds"] is None else f"{time(block['seconds'])}, "
    return f"block: {given}{block['source']}; {block['blocks']} of them a step, {block['blocks_source']}"


def _heading(answer: dict[str, Any], number: int) -> str:
    step = answer["placements"][0]["steps"][number]
    asked = step["rows"] * answer["model"]["row_bytes"]
    rows = f"{step['rows']:,} rows, {step['distinct_rows']:,.0f} of them distinct, {size(asked)}"
    prompt = step["phase"] == "prefill"
    # What was given stands above; a prompt's block may take longer, and nobody may know how long.
    said = step["block_s"] in (None, answer["block"]["seconds"])
    least = "" if said else f"; a block takes {time(step['block_s'])} by these rates"
    if prompt:
        return f"== a prompt of {in_tokens(step['tokens'])}: {rows}{least}"
    return f"== {in_tokens(step['tokens'])} a step: {rows} a step{least}"


def _rows(answer: dict[str, Any], number: int) -> list[list[str]]:
    found = [_HEAD]
    for placement in answer["placements"]:
        step = placement["steps"][number]
        prices, joules = step["price"], step["joules"]
        lacking = ", ".join(f"{_TIERS[tier]} lacks {size(n)}" for tier, n in placement["lacking"].items())
        found.append([
            placement["placement"],
            "yes" if placement["fits"] else f"no: {lacking}",
            *(size(n) if n else "0" for n in placement["held"].values()),
            size(placement["freed"]) if placement["freed"] > 0 else "0",
            time(step["seconds"]),
            time(step["exposed_s"]),
            percent(step["loss"]),
            "-" if prices["over_resident"] is None else f"{prices['over_resident']:.3g} x",
            "-" if prices["whole_model"] is None else f"{prices['whole_model']:.4f} x",
            in_joules(joules["least"], joules["most"]),
        ])  # fmt: skip
    return found


def _notes(answer: dict[str, Any]) -> list[str]:
    """What the columns mean, and where every rate is from."""
    no_gpu = answer["machine"]["gpu"] is None
    idle = _OF_GPUS + _BESIDE if no_gpu else _OF_CPUS
    rates = [(name, rate) for name, rate in answer["machine"]["rates"].items() if name not in idle]
    alone = answer["group"]["ranks"] == 1
    unmeasured = "" if alone else "; what blocks lose beside rows of other ranks was never measured"
    lines = [
        *(f"{p['placement']}: {_WHERE[p['placement']]}" for p in answer["placements"]),
        "fetch: what a step's fetches take by themselves; exposed, by how much they make the step longer: what the "
        "blocks before the layers do not hide of them, and what blocks lose beside them; it may be the longer one",
        "loss: exposed over the time of all blocks; it is less where they take longer than is said above, more where "
        f"they are shorter{unmeasured}",
        "price, model: ByteDMD price of the rows over resident ones, and the same for the whole model's step",
        "energy: of moving the rows, from published ranges. Every prediction names its formula in --json",
    ]
    found = [["rate", "value", "from"]]
    found += [[name, in_units(rate["value"], rate["unit"]), rate["source"]] for name, rate in rates]
    return [*lines, "", aligned(found, left=(0, 2))]


def aligned(rows: list[list[str]], left: tuple[int, ...] = (0, 1)) -> str:
    """Cells in columns under a ruled head, those of `left` flush left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])
