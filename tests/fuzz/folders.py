"""Damaged checkpoint folders: refused in one line, or opened with the rows of the undamaged one.

python -m tests.fuzz --only folders
"""

import json
import random
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from engram_ref.checkpoint.folder import INDEX_FILE, ModelFolder
from engram_ref.checkpoint.sample import sample_config, write_sample
from engram_ref.hashing import NgramHasher
from engram_ref.tables import make_table

IDS = [[22898, 19737, 270, 5, 7, 1000]]
BELIEVED = "of config.json are believed"  # the one warning that other rows may come with
ODD = (None, -1, 0, 1, 3, 5, 31, 10**6, 10**30, "x", [], [1, 14], {}, True, 0.5)


def run(count: int, seed: int) -> dict[str, Any]:
    """So many folders, each with one file changed in meaning, cut, lost, exchanged or with bytes flipped in its header.

    Bytes of rows are not changed: nothing beside them says what they were.
    """
    chance, faults, refused, warned = random.Random(seed), [], 0, 0
    with tempfile.TemporaryDirectory() as place:
        good, bad = Path(place) / "good", Path(place) / "bad"
        write_sample(good, sample_config(first_prime=31, hidden=32), seed=seed)
        wanted = rows_of(good)
        for number in range(count):
            what = damage(good, bad, chance)
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    same = all(torch.equal(a, b) for a, b in zip(wanted, rows_of(bad), strict=True))
                others = [text for text in map(str, (one.message for one in told)) if BELIEVED not in text]
                warned += bool(told)
                faults += [f"folder {number}, {what}: warns: {text[:200]!r}" for text in others]
                if not same and len(others) == len(told):
                    faults.append(f"folder {number}, {what}: other rows, and nothing says that they may be")
            except (ValueError, OSError) as error:
                refused += 1
                if "\n" in str(error):
                    faults.append(f"folder {number}, {what}: {str(error)[:200]!r}")
            except Exception as error:  # whatever else it is, it is what we look for
                faults.append(f"folder {number}, {what}: {type(error).__name__}: {str(error)[:200]!r}")
    return {"cases": count, "refused": refused, "warned": warned, "faults": faults}


def rows_of(path: Path) -> list[torch.Tensor]:
    """The rows that some tokens read, of every layer."""
    folder, found = ModelFolder.open(path), []
    for layer in folder.plan.layers:
        rows = NgramHasher(folder.plan)(folder.vocab(IDS), layer.layer_id).reshape(-1)
        with make_table("file", folder.stored_rows(layer.layer_id)) as table:
            found.append(table.start(torch.from_numpy(rows)).wait().clone())
    return found


def damage(good: Path, bad: Path, chance: random.Random) -> str:
    """A copy with one fault; what was done."""
    shutil.rmtree(bad, ignore_errors=True)
    bad.mkdir()
    for file in good.iterdir():
        (bad / file.name).symlink_to(file)
    kind = chance.choice((_field, _field, _index, _cut, _lost, _exchanged, _header))
    return f"{kind.__name__[1:]} {kind(bad, chance)}"


def _put(path: Path, change: Callable[[bytes], bytes]) -> str:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(change(content))
    return path.name


def _field(bad: Path, chance: random.Random) -> str:
    config = json.loads((bad / "config.json").read_bytes())
    name, value = chance.choice(sorted(config["text_config"])), chance.choice(ODD)
    config["text_config"][name] = value
    _put(bad / "config.json", lambda _: json.dumps(config).encode())
    return f"{name}={value!r}"


def _index(bad: Path, chance: random.Random) -> str:
    index = json.loads((bad / INDEX_FILE).read_bytes())
    name = chance.choice(sorted(index["weight_map"]))
    index["weight_map"][name] = chance.choice([*index["weight_map"].values(), "../x", 5, ""])
    return _put(bad / INDEX_FILE, lambda _: json.dumps(index).encode())


def _cut(bad: Path, chance: random.Random) -> str:
    return _put(chance.choice(sorted(bad.iterdir())), lambda content: content[: chance.randrange(len(content))])


def _lost(bad: Path, chance: random.Random) -> str:
    path = chance.choice(sorted(bad.iterdir()))
    path.unlink()
    return path.name


def _exchanged(bad: Path, chance: random.Random) -> str:
    one, other = chance.sample(sorted(bad.glob("*.safetensors")), 2)
    contents = one.read_bytes(), other.read_bytes()
    return _put(one, lambda _: contents[1]) + " " + _put(other, lambda _: contents[0])


def _header(bad: Path, chance: random.Random) -> str:
    def flipped(content: bytes) -> bytes:
        at = chance.randrange(8 + int.from_bytes(content[:8], "little"))
        return content[:at] + bytes([content[at] ^ 1 << chance.randrange(8)]) + content[at + 1 :]

    return _put(chance.choice(sorted(bad.glob("*.safetensors"))), flipped)
