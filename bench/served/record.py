"""The results file of an end-to-end run: written after every pass, continued by the next run, complete or absent.

    record = Record.open(path, head, fresh=False)       # refuses results of another configuration or other code
    case = record.case(description)
    case.add(row, sample)                               # the file is on disk when this returns

A run that was cut in a round has lost the pass that was running. What another run continues is whole rounds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.instruments.journal import earlier, note_process
from bench.instruments.results import write_json

_PLACE = "@pass "
Json = dict[str, Any]


class Record:
    """A results file that grows.

    Attributes:
        results: its content.
        process: number of the running process among those that wrote into the file.
        kept: passes of whole rounds that an earlier run had left.
        dropped: passes of rounds that it had not finished.
    """

    def __init__(self, path: Path, results: Json) -> None:
        self.path = path
        self.results = results
        self.kept = self.dropped = self.process = 0
        self._lines: dict[int, str] = {}  # of passes that `results` holds, which keeps their ids

    @classmethod
    def open(cls, path: Path, head: Mapping[str, Any], fresh: bool) -> Record:
        """Go on with the results of an earlier run, or begin.

        Args:
            path: of the file.
            head: what a new file begins with: machine, configuration, code.
            fresh: begin, whatever is there.

        Raises:
            ValueError: the file is of another configuration, machine or code.
        """
        begun = {**head, "processes": [], "cases": []}
        record = cls(path, begun)
        if (found := earlier(path, begun, fresh)) is not None:
            record.results = found
            record._keep_whole_rounds()
        record.process = note_process(record.results, record.kept, record.dropped)
        record.save()
        return record

    def _keep_whole_rounds(self) -> None:
        # Passes of a round are compared with each other, so an unfinished one is measured again, by one process.
        for case in self.results["cases"]:
            whole = rounds_done(case)
            for row in case["rows"]:
                kept = [sample for sample in row["rounds"] if sample["round"] in whole]
                self.kept += len(kept)
                self.dropped += len(row["rounds"]) - len(kept)
                row["rounds"] = kept

    def case(self, description: Json, labels: list[str]) -> Case:
        """The case of this description, new or continued.

        Args:
            description: backbone, batch, stream, table and so on.
            labels: of its rows, in their order.
        """
        found = self._find(description["backbone"], description["batch"], description["stream"])
        if found is None:
            found = {**description, "labels": labels, "rows": []}
            self.results["cases"].append(found)
        return Case(self, found)

    def _find(self, backbone: str, batch: int, stream: Json) -> Json | None:
        wanted = {"backbone": backbone, "batch": batch, "stream": stream}
        return next((case for case in self.results["cases"] if {key: case[key] for key in wanted} == wanted), None)

    def finished(self, backbone: str, batch: int, stream: Json, rounds: int) -> bool:
        """Whether a case has all its rounds, and what is counted beside them."""
        case = self._find(backbone, batch, stream)
        return (
            case is not None
            and len(rounds_done(case)) == rounds
            and all(row["pcie"] is not None and row["weights"] is not None for row in case["rows"])
        )

    def save(self) -> None:
        """Write the file. A pass is one line, and encoded once: a file of many passes is written after each of them."""
        # Names stand in for passes while the rest is encoded; a pass never changes, so its own line is kept.
        places: list[Json] = []

        def place(row: Json) -> Json:
            first = len(places)
            places.extend(row["rounds"])
            return {**row, "rounds": [f"{_PLACE}{number}" for number in range(first, len(places))]}

        cases = [{**case, "rows": [place(row) for row in case["rows"]]} for case in self.results["cases"]]
        text = json.dumps({**self.results, "cases": cases}, indent=1)
        text = re.sub(f'"{_PLACE}([0-9]+)"', lambda found: self._line(places[int(found[1])]), text)
        write_json(self.path, self.results, text)

    def _line(self, sample: Json) -> str:
        """A pass as JSON; nothing changes it any more."""
        line = self._lines.get(id(sample))
        if line is None:
            line = self._lines[id(sample)] = json.dumps(sample)
        return line


class Case:
    """One backbone, batch and stream of a results file.

    Attributes:
        content: as it is written.
    """

    def __init__(self, record: Record, content: Json) -> None:
        self._record = record
        self.content = content

    def add(self, row: Mapping[str, Any], sample: Json) -> None:
        """Keep one pass of a row, and write the file.

        Args:
            row: what describes it; `label` tells it from the others.
            sample: of one round.
        """
        found = next((known for known in self.content["rows"] if known["label"] == row["label"]), None)
        if found is None:
            found = {**row, "rounds": []}
            self.content["rows"].append(found)
            order = self.content["labels"]
            self.content["rows"].sort(key=lambda known: order.index(known["label"]))
        found["rounds"].append({**sample, "process": self._record.process})
        self._record.save()

    def update(self, label: str, **fields: Any) -> None:
        """Set fields of a row, and write the file."""
        row = next(known for known in self.content["rows"] if known["label"] == label)
        row.update(fields)
        self._record.save()


def rounds_done(case: Json) -> set[int]:
    """Rounds that every row of a case has."""
    done = [{sample["round"] for sample in row["rounds"]} for row in case["rows"]]
    # A row is there from its first pass on, so before that no round is whole.
    return set.intersection(*done) if len(done) == len(case["labels"]) else set()
