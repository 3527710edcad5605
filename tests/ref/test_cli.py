"""Numbers of command lines: refused in one line where no memory or patience would be enough.

python -m pytest tests/ref/test_cli.py
"""

from __future__ import annotations

import argparse
import sys

import pytest

from bench import bytedmd_toy, gpu_wall, production
from bench.served import options as end_to_end_options
from bench.wall import options as wall_options
from engram_ref import cli
from engram_ref.checkpoint import sample

HUGE = ("99999999999999", "1" + "0" * 30, "9" * 5000)


def parse_wall(argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["gpu_wall", *argv])
        return gpu_wall.parse_arguments()


def numbers_of(parser_of):
    """The options of a command that take a whole number."""
    found, original = [], argparse._ActionsContainer.add_argument

    def add_argument(self, *names, **how):
        kind = getattr(how.get("type"), "__qualname__", "")
        if kind.startswith("at_least.") or how.get("type") in (
            end_to_end_options._batch,
            end_to_end_options._sequences,
        ):
            found.append((names[-1], how.get("nargs") if isinstance(how.get("nargs"), int) else 1))
        return original(self, *names, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse._ActionsContainer, "add_argument", add_argument)
        with pytest.raises(SystemExit):
            parser_of(["--help"])
    return found


COMMANDS = {
    "bytedmd_toy": (bytedmd_toy.parse, [], 7),
    "gpu_wall": (parse_wall, [], 13),
    "production": (production.parse, [], 1),
    "sample_checkpoint": (sample.parse, ["folder"], 3),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_has_an_upper_bound(command, capsys):
    parse, more, least = COMMANDS[command]
    options = numbers_of(parse)
    assert len(options) >= least
    capsys.readouterr()
    for option, count in options:
        for value in HUGE[1:] if option == "--seed" else HUGE:
            with pytest.raises(SystemExit) as ended:
                parse([*more, option, *[value] * count])
            said = capsys.readouterr().err
            assert ended.value.code == 2 and option in said and said.count("\n") == 1 and len(said) < 300, said
            assert "must be at most" in said


def test_the_bounds_themselves():
    parse = cli.at_least(2, 5)
    assert [parse(text) for text in ("2", "5", " 3 ")] == [2, 5, 3]
    for text, message in (("1", "an integer of at least 2"), ("6", "at most 5"), ("2.5", "integer"), ("", "integer")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be .*{message}"):
            parse(text)
    assert cli.at_least(0)("100000") == 100_000


@pytest.mark.parametrize(
    "text", ["prefill:99999x99999", "decode:99999999", "decode:99999999999999", "prefill:1x" + "9" * 5000]
)
def test_steps_have_a_size(text):
    with pytest.raises(
        argparse.ArgumentTypeError, match=r"must be (at most 16777216 tokens|prefill:BATCHxTOKENS)"
    ) as caught:
        wall_options.step_shape(text)
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize("text", ["1e-30", "1e-7:20", "nan", "1:nan", "-1", "1:1e9"])
def test_a_bus_brings_something_in_time(text):
    with pytest.raises(argparse.ArgumentTypeError, match="1e-6 GB/s at least"):
        end_to_end_options._bus(text)


def test_a_sample_that_no_disk_holds_is_refused_before_it_is_written(tmp_path, monkeypatch, cache_home):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    with pytest.raises(ValueError, match=r"\d+ bytes do not fit onto the disk of .*: take smaller tables"):
        sample.write_sample(tmp_path, sample.sample_config(first_prime=2_000_000_000))
    assert list(tmp_path.iterdir()) == []
