"""Figures of wall-time results: what they show, read from their artists, and that they are the same every time."""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

from bench.instruments.drawing import COLOURS, redraw
from bench.instruments.output import source
from bench.wall.figures import KINDS, _merged, bandwidth, draw_all, overheads, timeline
from bench.wall.numbers import run_of
from tests.bench.wall.example import example

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
NAMES = ["timeline.svg", "overhead.svg", "bandwidth.svg"]
DRAWINGS = (timeline, overheads, bandwidth)


@pytest.fixture
def results():
    return example("cuda")


@functools.cache
def drawn_of_three(draw, device):
    """Three steps, drawn once for all that look at them."""
    return draw(example(device, steps=3))


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def rows_of(axis):
    """The text at the left of every row -> the text at its right."""
    values = {round(text.get_position()[1]): text.get_text() for text in axis.texts}
    return {label.get_text(): values[place] for place, label in enumerate(axis.get_yticklabels())}


def dots_of(axis):
    """Rows from the top: place on the scale, and whether the dot is filled."""
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    return [(dot.get_xdata()[0], dot.get_markerfacecolor() != "white") for dot in dots]


def test_every_panel_names_its_device():
    for device, name in (("cpu", "CPU Example CPU 9000"), ("cuda", "GPU Example GPU 100")):
        for draw in DRAWINGS:
            titles = [axis.get_title() for axis in drawn_of_three(draw, device).axes if axis.get_title()]
            assert titles and all(name in title for title in titles)


def test_one_panel_per_step():
    for draw in (timeline, overheads):
        assert sum(bool(axis.get_title()) for axis in drawn_of_three(draw, "cuda").axes) == 3


def test_overheads_are_resolved_or_say_that_they_are_not(results):
    (axis,) = overheads(results).axes
    rows = rows_of(axis)
    assert rows["no_engram in place"] == "-10.0 %"
    assert rows["offload_prefetch prefetched"] == "not resolved"
    assert rows["offload_disk synchronous cold"] == "+50.0 %"
    assert not any(label.startswith("resident") for label in rows)
    dots = dict(zip(rows, dots_of(axis)))
    assert dots["offload_naive synchronous"] == (pytest.approx(4.0), True)
    assert dots["offload_prefetch prefetched"] == (pytest.approx(0.5), False)


def test_the_noise_floor_is_shaded(results):
    (axis,) = overheads(results).axes
    (shade,) = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    assert (shade.get_x(), shade.get_width()) == (pytest.approx(-1.0), pytest.approx(2.0))
    runs = results["steps"][0]["runs"]
    runs[:] = [run for run in runs if not run["repeat"]]
    (axis,) = overheads(results).axes
    assert not axis.patches and "no noise floor" in axis.texts[0].get_text()


def test_bandwidth_stands_against_the_measured_limit(results):
    memory, disk = bandwidth(results).axes
    what = "prefill 1 x 4096, 1e9 parameters (1/640 of v41-flash's table), backbone none"
    assert rows_of(memory) == {f"{what}: offload_naive": "2.5 GB/s = 25 % of the limit"}
    assert [line.get_xdata()[0] for line in memory.lines if line.get_linestyle() == "--"] == [pytest.approx(10.0)]
    assert rows_of(disk) == {
        f"{what}: offload_disk cold": "2,000,000 rows/s",  # 10,000 in 5 ms
        f"{what}: offload_disk warm": "5,000,000 rows/s",
    }
    assert "dashed: 4,000,000 reads/s of one row or more, fio" in disk.get_title()


def test_a_read_of_split_rows_brings_a_part_of_one(results):
    results["steps"][0]["table"]["layout"] = "split"
    _, disk = bandwidth(results).axes
    assert "dashed: 4,000,000 reads/s of one part of a row or more, fio" in disk.get_title()


def test_every_caption_says_how_much_of_the_published_table_it_is(results):
    for draw in (timeline, overheads):
        (axis,) = draw(results).axes
        assert "(1/640 of v41-flash's table)" in axis.get_title()
    for axis in bandwidth(results).axes:
        assert all("(1/640 of v41-flash's table)" in label.get_text() for label in axis.get_yticklabels())


def test_an_unknown_limit_is_said_and_not_drawn(results):
    results["limits"]["disk"] = {"reads_per_s": None, "why": "fio is not installed"}
    _, disk = bandwidth(results).axes
    assert not [line for line in disk.lines if line.get_linestyle() == "--"]
    assert "no limit: fio is not installed" in disk.get_title()


def test_without_a_synchronous_fetch_the_figure_says_so(results):
    runs = results["steps"][0]["runs"]
    runs[:] = [run for run in runs if run["schedule"] != "synchronous"]
    (axis,) = bandwidth(results).axes
    assert axis.texts[0].get_text() == ("GPU Example GPU 100: no fetch was timed alone, so no bandwidth was measured")


def test_a_strip_per_lane_and_the_wait_where_it_was(results):
    (axis,) = timeline(results).axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    at = labels.index("offload_prefetch prefetched:  main")
    assert labels[at : at + 3] == ["offload_prefetch prefetched:  main", "background", "stream"]
    assert not any("again" in label for label in labels)
    naive = labels.index("offload_naive synchronous:  main")
    waits = [boxes for boxes in axis.collections if boxes.get_hatch() == KINDS["wait"]["hatch"]]
    extents = [boxes.get_paths()[0].get_extents() for boxes in waits]
    (wait,) = [box for box in extents if round((box.y0 + box.y1) / 2) == naive]
    assert (wait.x0, wait.x1) == (pytest.approx(5.0), pytest.approx(5.4))  # 0.4 ms in the middle of 10.4


def test_kernels_too_near_to_be_told_apart_are_one_box():
    kernels = [["compute", "stream", at, at + 0.9] for at in range(3)] + [["compute", "stream", 5.0, 6.0]]
    copy = ["copy", "stream", 1.0, 1.5]
    assert _merged([*kernels, copy], gap=0.2) == [("compute", 0, 2.9), ("compute", 5.0, 6.0), ("copy", 1.0, 1.5)]
    assert len(_merged([*kernels, copy], gap=0.05)) == 5


def test_one_slow_run_does_not_flatten_the_others(results):
    slow = run_of(results["steps"][0], "offload_disk", "synchronous", "cold")
    slow["spans"][0][3] = 1.0
    (axis,) = timeline(results).axes
    assert [text.get_text() for text in axis.texts] == ["ends at 1000 ms"]
    assert axis.get_xlim()[1] == pytest.approx(3 * 10.25 * 1.01)  # ms: three times the median run


def test_all_variants_have_a_colour_of_their_own(results):
    variants = {run["variant"] for run in results["steps"][0]["runs"]}
    assert variants <= set(COLOURS) and len(set(COLOURS.values())) == len(COLOURS)


def labels_of(axis):
    """Every text of a panel that is in sight."""
    low, high = axis.get_xlim()
    along = [tick.label1 for tick in axis.xaxis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [axis.title, axis.xaxis.label, *axis.texts, *along, *axis.get_yticklabels()]


def overlaps(figure):
    """Pairs of texts that lie on each other."""
    figure.draw_without_rendering()
    texts = [label for axis in figure.axes for label in labels_of(axis)]
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    assert len(boxes) > 5
    return [(a, b) for i, (a, box) in enumerate(boxes) for b, other in boxes[i + 1 :] if box.overlaps(other)]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("draw", DRAWINGS)
def test_no_labels_overlap(device, draw):
    assert overlaps(drawn_of_three(draw, device)) == []


def test_an_overlap_would_be_seen(results):
    figure = bandwidth(results)
    figure.axes[0].text(0.5, 1.02, "a legend", transform=figure.axes[0].transAxes)
    assert [second for _, second in overlaps(figure)] == ["a legend"]


def test_the_command_draws_the_same_bytes_and_names_the_results(results, tmp_path, monkeypatch, capsys):
    path = tmp_path / "gpu_wall.json"
    path.write_text(json.dumps(results), encoding="utf-8")
    drawn = draw_all(results, tmp_path / "here")
    assert [figure.name for figure in drawn] == NAMES and sorted((tmp_path / "here").iterdir()) == sorted(drawn)
    assert all(source(results) in figure.read_text(encoding="utf-8") for figure in drawn)
    monkeypatch.setattr(sys, "argv", ["figures", str(path)])
    redraw(draw_all, "bench.wall.figures")
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / name) for name in NAMES]
    assert [(tmp_path / name).read_bytes() for name in NAMES] == [figure.read_bytes() for figure in drawn]


def test_the_command_without_a_file_says_how_to_use_it():
    command = [sys.executable, "-m", "bench.wall.figures"]
    bare = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert bare.returncode == 2 and "the following arguments are required: RESULTS.json" in bare.stderr


def test_the_legend_of_the_timeline_names_what_can_be_seen_and_says_what_cannot(results):
    def said():
        (legend,) = timeline(results).legends
        return [text.get_text() for text in legend.get_texts()], legend.get_title().get_text()

    every = {span[0] for run in results["steps"][0]["runs"] if not run["repeat"] for span in run["spans"]}
    assert said() == ([kind for kind in KINDS if kind in every], "") and "wait" in every
    for run in results["steps"][0]["runs"]:
        for span in run["spans"]:
            if span[0] == "wait":
                span[3] = span[2] + 1e-9
    rest = [kind for kind in KINDS if kind in every and kind != "wait"]
    assert said() == (rest, "drawn as lines, nowhere as wide as 1/500 of a panel: wait")
