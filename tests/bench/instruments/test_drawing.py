"""Figures for a phone: the same panels in one column, each with its own labels, and nothing beside them."""

import itertools
import json
import subprocess
import sys

import pytest
from matplotlib import pyplot as plt
from matplotlib.backends.backend_agg import FigureCanvasAgg

from bench import fill_docs
from bench.instruments.drawing import NARROW, same_picture, save_all, stack
from bench.instruments.output import source

pytestmark = pytest.mark.slow


def drawn(results=None):
    """Three panels of four, a legend below, labels of rows and columns once, and a scale of colours at the side."""
    figure, grid = plt.subplots(2, 2, figsize=(11, 5), sharex=True, sharey=True)
    for number, axis in enumerate(grid.flat[:3]):
        axis.plot([1, 2], [number, 2], label="a line with a long name, so that two have no room side by side")
        axis.plot([1, 2], [2, number], label="another")
        axis.set_title(f"panel {number}: with a title that is longer than a phone is wide, by some words")
        axis.set_xticks([1, 2], ["first place", "second"])
    grid[1][1].axis("off")
    grid[1][0].set_xlabel("across")
    grid[0][0].set_ylabel("up")
    grid[1][0].set_ylabel("up, too")
    figure.suptitle("A title over all of them that is wider than a phone\nand a second line")
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="lower center", ncols=2)
    shades = grid[0][1].imshow([[1, 2], [3, 4]])
    figure.tight_layout(rect=(0, 0.1, 0.9, 1))
    figure.colorbar(shades, cax=figure.add_axes((0.94, 0.2, 0.01, 0.5)), label="shades")
    return figure


@pytest.fixture
def narrow():
    figure = drawn()
    stack(figure)
    figure.canvas.draw()
    yield figure
    plt.close(figure)


def test_panels_stand_one_below_the_other_and_each_has_its_labels(narrow):
    *panels, scale = narrow.axes
    places = [axis.get_position() for axis in panels]
    assert len(panels) == 3 and narrow.get_figwidth() == NARROW
    assert all(upper.y0 > lower.y1 for upper, lower in itertools.pairwise(places))
    assert [axis.get_xlabel() for axis in panels] == ["across", "", "across"]  # the second stood above an empty place
    assert [axis.get_ylabel() for axis in panels] == ["up", "up", "up, too"]
    assert all(label.get_text() == "first\nplace" for axis in panels for label in axis.get_xticklabels()[:1])
    assert scale.get_position().y1 < places[-1].y0 and scale.get_xlabel() == "shades"


def test_nothing_is_wider_than_the_figure(narrow):
    renderer = FigureCanvasAgg(narrow).get_renderer()
    width = narrow.bbox.width
    for part in (*narrow.axes, *narrow.legends, narrow._suptitle):
        box = part.get_tightbbox(renderer) if part in narrow.axes else part.get_window_extent(renderer)
        assert box.x0 >= -1 and box.x1 <= 1.05 * width, part
    assert narrow.legends[0]._ncols == 1 and narrow._suptitle.get_text().count("\n") == 2


def test_both_drawings_name_their_results(tmp_path):
    for wanted in (False, True):
        save_all({"some": drawn}, {"a": 1}, tmp_path, wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"some.svg", "some.narrow.svg"}
    assert all(source({"a": 1}) in path.read_text(encoding="utf-8") for path in tmp_path.iterdir())


def test_a_command_in_a_process_of_its_own_draws_what_the_documents_show(tmp_path):
    """With this figure, as letters measured by another backend than `drawing` chooses would lay it out otherwise."""
    results = fill_docs.load("verdict_map")
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    command = [sys.executable, "-m", "bench.rows.map_figure", str(tmp_path / "results.json")]
    subprocess.run(command, cwd=fill_docs.ROOT, check=True, capture_output=True)
    shown = fill_docs.DRAWN["verdict_map"](results, tmp_path / "shown")
    assert [(tmp_path / path.name).read_bytes() for path in shown] == [path.read_bytes() for path in shown] != []


PICTURE = """<svg width="9.5pt"><!-- 1.25 --><path d="M 226.958197 2" style="stroke: #0072b2; opacity: 0.5"
clip-path="url(#pddf34868ef)"/><use x="1" xlink:href="#DejaVuSans-35"/><clipPath id="pddf34868ef"/></svg>"""


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("226.958197", "226.958198", True),  # the last digit, as another processor computes it
        ("M 226.958197 2", "M 226.958197 1.999999", True),
        ("pddf34868ef", "pfcf660f317", True),  # in both places
        ('id="pddf34868ef"', 'id="pfcf660f317"', False),
        ("226.958197", "226.968197", False),
        ("226.958197 2", "226.958197 2 3", False),
        ("9.5pt", "9.6pt", False),
        ("0.5", "0.4", False),
        ("#0072b2", "#0073b2", False),
        ("DejaVuSans-35", "DejaVuSans-36", False),
        ("1.25", "-1.25", False),
        ("M 226", "L 226", False),
    ],
)
def test_the_same_picture_but_for_last_digits(old, new, same):
    assert old in PICTURE and same_picture(PICTURE, PICTURE)
    assert same_picture(PICTURE, PICTURE.replace(old, new)) is same
