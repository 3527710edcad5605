"""Results go where they can: found out before the work, printed even so, never beside figures of others."""

import errno
import os
import tempfile

import pytest

from bench import bytedmd_toy, hashing_speed, production
from bench.instruments import output
from bench.instruments.output import forget_figures, printed_anyway, require_writable, require_writable_file, source
from bench.instruments.results import write_json


def test_a_folder_is_made_and_left_empty(tmp_path):
    require_writable(tmp_path / "new" / "folder")
    require_writable_file(tmp_path / "new" / "results.json")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["folder"]


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nothing", "x" * 300, "full"])
def test_an_unusable_folder_is_refused_in_one_line(tmp_path, monkeypatch, where):
    (tmp_path / "file").write_text("")
    if where == "full":

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

            def write(self, content):
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: Full())
    for check in (require_writable, lambda folder: require_writable_file(folder / "results.json")):
        with pytest.raises(ValueError, match="name a") as refused:
            check(tmp_path / where)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match="is a folder: name a file in it"):
        require_writable_file(tmp_path)


def test_a_folder_in_the_place_of_results_is_refused(tmp_path):
    (tmp_path / "results.json").mkdir()
    require_writable_file(tmp_path / "others.json")
    with pytest.raises(ValueError, match="is a folder in the place of results: move it"):
        require_writable(tmp_path)


@pytest.mark.parametrize(
    ("main", "works", "arguments"),
    [
        (bytedmd_toy.main, (bytedmd_toy, "measure"), ["--quick", "--out"]),
        (production.main, (production, "price_all"), ["--quick", "--out"]),
        (hashing_speed.main, (hashing_speed, "measure"), ["--out"]),
    ],
)
def test_commands_find_out_before_they_work(monkeypatch, capsys, main, works, arguments):
    monkeypatch.setattr(*works, lambda *a, **k: pytest.fail("it went to work"))
    monkeypatch.setattr("sys.argv", ["command", *arguments, "/proc/nothing/results"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "cannot be written" in capsys.readouterr().err


def test_the_table_is_printed_when_writing_fails(capsys):
    with pytest.raises(OSError), printed_anyway(lambda: "the table"):
        raise OSError("no space")
    assert capsys.readouterr().out == "the table\n"


def test_figures_of_earlier_results_go_and_others_stay(tmp_path):
    old, new, other = {"price": 1}, {"price": 2}, {"grid": 3}
    write_json(tmp_path / "other.json", other)
    for name, text in {
        "old": source(old), "new": source(new), "other": source(other), "stranger": "a drawing of my own"
    }.items():  # fmt: skip
        (tmp_path / f"{name}.svg").write_text(f"<svg><desc>{text}</desc></svg>")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 10**5)
    for name in ("pipe.json", "pipe.svg"):
        os.mkfifo(tmp_path / name)
    write_json(tmp_path / "results.json", new)
    assert {path.stem for path in tmp_path.glob("*.svg")} == {"new", "other", "stranger", "pipe"}


def test_without_a_figure_nothing_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(output, "source", lambda results: pytest.fail("results were digested"))
    forget_figures(tmp_path / "results.json", {})
