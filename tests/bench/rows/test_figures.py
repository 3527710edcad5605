"""What the figures of rows draw and how they name it: against the committed records, and against their own legends."""

import pytest
from matplotlib import pyplot as plt

from bench.evidence.committed import Evidence
from bench.evidence.price import ANSWERED
from bench.rows import figures, map_figure
from bench.rows.table import TEXT, lines
from bench.rows.verdict_map import POINTS, point

CLAIM = 3  # per cent


@pytest.fixture(scope="module")
def evidence():
    return Evidence()


@pytest.fixture(scope="module")
def panels(evidence):
    """Of the whole model: all that Engram adds in decode and prefill, then the rows alone."""
    figure = figures.whole_model(evidence.production)
    yield figure.axes
    plt.close(figure)


@pytest.fixture(scope="module")
def chart(evidence):
    figure = map_figure.verdict_map(evidence["verdict_map"])
    yield figure
    plt.close(figure)


def drawn(axis, table, experts, marker="None", style="-"):
    """The points of a model's line, in its colour."""
    colour = figures.MODEL_COLOURS[table, experts]
    found = [line for line in axis.lines if (line.get_color(), line.get_marker()) == (colour, marker)]
    (line,) = (line for line in found if len(line.get_xdata()) and (marker != "None" or line.get_linestyle() == style))
    return dict(zip(line.get_xdata(), line.get_ydata()))


@pytest.mark.parametrize("number", [0, 1])
def test_lines_are_what_the_records_add_up_to(evidence, panels, number):
    mode = ("decode", "prefill")[number]
    compared = 0
    for line in lines(evidence.production):
        about = [line[0][name] for name in ("mode", "stream", "layout")]
        if about == [mode, TEXT, "held live"] and line[0]["asked_tokens"] is not None:
            model = line[0]["table"], line[0]["experts"]
            above, below = (drawn(panels[place], *model) for place in (number, number + 2))
            for r in line:
                weights = r["steps"] * r["weights_step_price"]
                beside = r["steps"] * (r["engram_weights_step_price"] + r["buried_step_price"])
                assert below[r["tokens_per_step"]] == pytest.approx(100 * r["offload_naive"] / weights)
                assert above[r["tokens_per_step"]] == pytest.approx(100 * (r["offload_naive"] + beside) / weights)
                compared += 1
    assert compared == len(figures.MODEL_COLOURS) * len(above) > 10


def test_points_are_what_the_finding_says_of_a_step(evidence, panels):
    for table, experts in ANSWERED.values():
        said = 100 * evidence.added(table, "in all", experts)
        assert drawn(panels[0], table, experts, marker="o") == {512: pytest.approx(said)}
        assert said > drawn(panels[0], table, experts)[512]  # whose rows are not copied


def test_the_claim_stands_where_all_is_drawn(panels):
    """All of Engram breaks it at one token's experts, by its own weights; its rows alone would not."""
    texts = [[text.get_text() for text in axis.texts] for axis in panels]
    assert texts == 2 * [["3 %: the claim"]] + 2 * [["3 %, by the rows alone"]]
    assert drawn(panels[0], "v41-flash", "one")[1] > CLAIM > drawn(panels[2], "v41-flash", "one")[1]
    assert [axis.get_ylabel() for axis in panels[::2]] == 2 * ["at most, % of the weights' price"]


def test_the_legend_of_the_whole_model_has_every_colour_and_style(panels):
    keys, _ = panels[0].get_legend_handles_labels()
    named = {(key.get_color(), "-") for key in keys} | {("black", key.get_linestyle()) for key in keys}
    for axis in panels:
        for line in axis.lines[: -len(keys)] if axis is panels[0] else axis.lines:
            if line.get_color() != "0.45":  # the level's, which has its name written on it
                assert (line.get_color(), "-") in named and ("black", line.get_linestyle()) in named


def look(line):
    """How a marker looks: its shape and whether it is filled."""
    return line.get_marker(), line.get_markerfacecolor() != "none"


def test_every_marker_of_the_map_is_in_its_legend(chart):
    (legend,) = chart.legends
    keys = [key for key in legend.legend_handles if isinstance(key, plt.Line2D)]
    shapes, fills = {key.get_marker() for key in keys}, {look(key)[1] for key in keys}
    markers = [line for axis in chart.axes for line in axis.lines]
    assert len(markers) == 2 * len(POINTS)  # in both layouts
    assert {line.get_marker() for line in markers} == shapes and {look(line)[1] for line in markers} == fills
    assert {line.get_color() for line in markers} == {"black"}
    texts = " ".join(text.get_text() for text in legend.get_texts())
    assert "hollow: one token's experts" in texts and "1 token a step" in texts


def test_points_of_the_map_that_coincide_are_both_seen_under_one_name(chart):
    one, expected = (point("v41-flash", experts, 1) for experts in ("one", "expected"))
    assert one == expected
    for axis in chart.axes[2:]:
        ring, dot = (line for line in axis.lines if (*line.get_xdata(), *line.get_ydata()) == one)
        assert {look(ring), look(dot)} == {("o", False), ("o", True)}
        assert ring.get_markersize() > dot.get_markersize() and not look(ring)[1]
    named = [[text.get_text() for text in axis.texts] for axis in chart.axes]
    assert named == 2 * [["Dense-4B", "Dense-8B"]] + 2 * [["V4.1-Flash"]]
    assert all(len({text.xy for text in axis.texts}) == len(axis.texts) for axis in chart.axes)
