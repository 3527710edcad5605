"""Numbers of command lines: refused in one line where no memory or patience would be enough."""

import argparse
import io
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from bench import bytedmd_toy, compare, gpu_wall, how_far, lookup_speed, production
from bench.served import options as end_to_end_options
from bench.wall import options as wall_options
from engram_ref import __version__, cli, plan
from engram_ref.checkpoint import sample
from engram_ref.cli.width import wrapped
from engram_ref.files.texts import read_text
from engram_ref.place import command as place

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
        if kind.startswith(("at_least.", "_count_or.")):
            found.append((names[-1], how.get("nargs") if isinstance(how.get("nargs"), int) else 1))
        return original(self, *names, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse._ActionsContainer, "add_argument", add_argument)
        with pytest.raises(SystemExit):
            parser_of(["--help"])
    return found


def test_help_says_every_default_once(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    parser = cli.Parser(prog="x")
    parser.add_argument("--scale", type=float, default=1.0, help="of logs")
    parser.add_argument("--caches", nargs="+", default=["cold", "100% warm"], help="of files")
    parser.add_argument("--rounds", type=int, help="default: 20; 8 on CUDA")
    parser.add_argument("--fit", action="store_true", help="leave out")
    said = " ".join(parser.format_help().split())
    assert "of logs (default: 1) " in said and "of files (default: cold 100% warm) " in said
    assert said.count("default: ") == 3 and said.endswith("--fit leave out")


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


NUMBERS = {"12": 12, " 3 ": 3, "2.5": 2.5, "1e6": 10**6, "10^6": 10**6, "2^20": 1 << 20, "1.5e3": 1500, "1e-3": 1e-3}
NUMBERS |= {"0^0": 1, "0^6": 0, "10^25": 10**25}
NO_NUMBERS = ("", "x", "1_0", "nan", "inf", "0x10", "1e", "10^", "^6", "10^-6", "1 2", "٣", "1e9999999999")


def test_numbers_in_every_spelling():
    assert {text: cli.number(text) for text in NUMBERS} == NUMBERS
    assert all(type(cli.number(text)) is type(value) for text, value in NUMBERS.items())
    assert [cli.number(text) for text in NO_NUMBERS] == [None] * len(NO_NUMBERS)
    assert cli.number("1e999999") == cli.number("99^999") == cli.number("9" * 5000) == float("inf")
    assert (cli.number("-1e99"), cli.number("1e-99999")) == (float("-inf"), 0)
    assert cli.number("1234567890123456789012345") == 1234567890123456789012345


@pytest.mark.parametrize("spelt", ["1e3", "10^3", "1000", "1000.0"])
def test_every_spelling_is_taken_where_a_number_is(spelt):
    assert cli.at_least(1)(spelt) == 1000 and cli.positive(spelt) == 1000.0 and cli.nbytes(f"{spelt}kB") == 1e6


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (cli.nbytes, "80GB", 80 * 10**9),
        (cli.nbytes, "188.5 GiB", 188.5 * 2**30),
        (cli.nbytes, "1e3 kib", 1024_000),
        (cli.nbytes, "0", 0),
        (cli.bytes_per_second, "50GB/s", 5e10),
        (cli.bytes_per_second, "1e9", 1e9),
        (cli.seconds, "56us", 56e-6),
        (cli.seconds, "3.6 ms", 3.6e-3),
        (cli.seconds, "5e-5s", 5e-5),
        (cli.seconds, "3 µs", 3e-6),
    ],
)
def test_units(kind, text, value):
    assert kind(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        *((cli.nbytes, text) for text in ("80", "80G", "-1GB", "GB", "5e", "1e400", "1 GB/s")),
        *((cli.bytes_per_second, text) for text in ("0", "0GB/s", "fast")),
        *((cli.seconds, text) for text in ("56", "", "1 h", "-1s")),
        *((cli.positive, text) for text in ("0", "-1", "nan", "1e999")),
    ],
)
def test_what_is_no_amount_is_refused(kind, text):
    with pytest.raises(
        argparse.ArgumentTypeError, match="has no unit: give .*such as" if text in ("80", "56") else "must be .*such as"
    ):
        kind(text)


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


def test_a_sample_that_no_disk_holds_is_refused_before_it_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"\d+ bytes do not fit onto the disk of .*: take smaller tables"):
        sample.write_sample(tmp_path, sample.sample_config(first_prime=2_000_000_000))
    assert list(tmp_path.iterdir()) == []


# --- habits of every command ------------------------------------------------------------------------------


@pytest.fixture
def parser():
    found = cli.Parser(prog="x", description="a line\n    indented " + "word " * 30)
    found.add_argument("--table_params", type=cli.at_least(1, 10**9))
    found.add_argument("--hot-share")
    found.add_argument("--table_rows", action="store_true")
    found.add_argument("rest", nargs="*")
    return found


@pytest.mark.parametrize("argv", [["--table_params", "10^6"], ["--table-params=1e6"]])
def test_hyphens_and_underscores_are_both_taken(parser, argv):
    assert parser.parse_args(argv).table_params == 10**6
    options, given = parser.parse_given([*argv, "--hot_share", "a_b"])
    assert options.hot_share == "a_b" and set(given) == {"table_params", "hot_share"}


def test_what_is_no_option_is_left_as_it_is(parser, capsys):
    assert parser.parse_args(["--", "--table-rows"]).rest == ["--table-rows"]
    for argv, said in (
        (["--table-para", "1"], "unrecognized arguments: --table-para, did you mean --table_params? (see"),
        (["--hot-shares=1"], "unrecognized arguments: --hot-shares=1, did you mean --hot-share? (see"),
        (["--weather"], "unrecognized arguments: --weather (see"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(argv)
        assert capsys.readouterr().err.startswith(f"x: error: {said}")


def test_every_command_says_its_version(parser, capsys):
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--version"])
    assert ended.value.code == 0 and __version__ in capsys.readouterr().out


@pytest.mark.parametrize("columns", [50, 80, 200])
def test_help_has_the_width_of_the_reader(parser, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    said = parser.format_help()
    assert max(map(len, said.splitlines())) <= columns and said.count("word") == 30


@pytest.mark.parametrize("columns", [60, 80, 100])
@pytest.mark.parametrize("module", [bytedmd_toy, compare, gpu_wall, how_far, lookup_speed, place, plan, production])
def test_a_narrower_reader_is_told_the_same(module, columns):
    said = wrapped(module.__doc__, columns)
    assert said.split() == module.__doc__.split() and max(map(len, said.splitlines())) <= columns
    assert wrapped(said, columns) == said and wrapped(module.__doc__, 120) == module.__doc__


LAID_OUT = """Prose that begins at the margin goes on there, and
flows anew.

    command --short      what it does, in words that need
                         a second line
    command --alone
    command --and-a-very-long-name --indeed
                         said below it

  one  of  three"""
NARROW = """Prose that begins at the margin goes on
there, and flows anew.

    command --short
        what it does, in words that need
        a second line
    command --alone
    command --and-a-very-long-name
      --indeed
        said below it

  one  of  three"""


def test_help_flows_as_its_author_meant_it():
    assert wrapped(LAID_OUT, 40) == NARROW and wrapped(LAID_OUT, 60) == LAID_OUT
    beside = wrapped("  term  " + "word " * 20 + "\n        and more", 60).splitlines()
    assert [line[:8] for line in beside] == ["  term  ", *[" " * 8] * (len(beside) - 1)] and len(beside) > 1


TABLE = """a title
variant       schedule   median  overhead  exposed
------------  --------  -------  --------  -------
resident      in place     1.23      base        -
offload_disk  later        4.56      +3 %     1 us

a note"""


def test_a_wide_table_is_cut_into_narrower_ones(monkeypatch):
    assert cli.fitted(TABLE, 60) == TABLE
    cut = cli.fitted(TABLE, 40)
    assert max(map(len, cut.splitlines())) <= 40 and cut.count("offload_disk") == 2
    assert {word for line in TABLE.splitlines() for word in line.split()} <= set(cut.split())
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.fitted(TABLE) == cut
    monkeypatch.delenv("COLUMNS")
    assert cli.fitted(TABLE) == TABLE  # no terminal: whoever reads it has room


def test_time_left():
    assert cli.time_left(30, 1, 4).strip() == "30 s, about 90 s left"
    assert cli.time_left(30, 4, 4).strip() == "30 s, about 0 s left" and "left" not in cli.time_left(3, 0, 4)


def test_fresh_that_would_do_nothing_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        bytedmd_toy.parse(["--fresh"])
    assert ended.value.code == 2 and "--fresh does nothing without --sweep" in capsys.readouterr().err
    assert bytedmd_toy.parse(["--fresh", "--sweep", "padding"]).fresh and production.parse(["--fresh"]).fresh


# What a command prints before its reader has left, and after: much, little, its help; and another pipe that breaks.
LEFT_ALONE = {
    "much": "print('line\\n' * 100_000)",
    "little": "print('one line')",
    "flushed": "print('one line', flush=True)",
    "help": "cli.Parser(prog='some').parse_args(['--help'])",
}


@pytest.mark.parametrize("caught", [True, False])
@pytest.mark.parametrize("kind", LEFT_ALONE)
def test_a_command_whose_reader_leaves_ends_in_silence(kind, caught):
    """As `... | head` makes it, whether its errors are told in one line or not."""
    body = f"with cli.one_line_errors('some'):\n        {LEFT_ALONE[kind]}" if caught else LEFT_ALONE[kind]
    code = (
        f"import sys\nfrom engram_ref import cli\ndef main():\n    sys.stdin.read()\n    {body}\ncli.run(main, 'some')"
    )
    command = [sys.executable, "-c", code]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    # Buffered: argparse itself drops help that it cannot write at once.
    with subprocess.Popen(command, **pipes, env={**os.environ, "PYTHONUNBUFFERED": ""}) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_another_pipe_that_breaks_is_told(capsys):
    with pytest.raises(SystemExit) as ended, cli.one_line_errors("some"):
        raise BrokenPipeError(32, "Broken pipe")
    assert ended.value.code == 2 and capsys.readouterr().err == "some: error: Broken pipe\n"


def test_a_name_in_no_encoding_is_printed(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="utf-8", errors="strict"))
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: print(os.fsdecode(b"folder-\xff")), "some")
    assert ended.value.code == 0 and written.getvalue() == b"folder-\\udcff\n"


def test_a_command_runs_in_any_thread():
    codes, handler = [], signal.getsignal(signal.SIGTERM)

    def run():
        with pytest.raises(SystemExit) as ended:
            cli.run(lambda: None, "some")
        codes.append(ended.value.code)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert codes == [0] and signal.getsignal(signal.SIGTERM) is handler


def test_what_does_not_fit_into_memory_is_told_in_one_line(capsys):
    with pytest.raises(SystemExit) as ended, cli.one_line_errors("some"):
        np.empty(1 << 60, np.uint8)
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("some: error: Unable to allocate 1.00 EiB")


def test_standard_input_that_is_closed(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ValueError, match="standard input is closed: name a text file"):
        read_text("-")


@pytest.mark.parametrize(
    ("arguments", "closed", "code"),
    [
        (["--preset", "qwen38-flash-next"], ">&-", 0),
        (["--help"], ">&-", 0),
        (["--preset", "none"], ">&-", 2),
        (["--preset", "none"], "2>&-", 2),
        (["--preset", "none"], ">&- 2>&-", 2),
    ],
)
def test_a_command_that_was_started_without_output_ends_as_any_other(closed, arguments, code):
    """As a daemon's child may be; what is an error does not go to the other stream instead."""
    command = shlex.join([sys.executable, "-m", "engram_ref.plan", *arguments])
    done = subprocess.run(
        ["bash", "-c", f"{command} {closed}"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert done.returncode == code and "Traceback" not in done.stderr
    assert "error" not in done.stdout and (code == 0 or closed != ">&-" or len(done.stderr.splitlines()) == 1)
