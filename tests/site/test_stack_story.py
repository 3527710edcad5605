"""The steps that the site shows are the tracer's: depths, prices, and what is live."""

import dataclasses
import random

import pytest

from bench.site.stack_story import STORIES, Story, as_data, story_tables, tell
from engram_toy.bytedmd import bytedmd, traced_eval

NAMES = [story.name for story in STORIES]


@pytest.mark.parametrize("story", STORIES, ids=NAMES)
def test_depths_and_price_are_the_tracers(story):
    told = tell(story)
    depths, _ = traced_eval(story.function, story.arguments)
    assert [read.depth for step in told.steps for read in step.reads] == depths
    assert told.price == bytedmd(story.function, story.arguments)


@pytest.mark.parametrize("story", STORIES, ids=NAMES)
def test_every_value_has_one_name(story):
    told = tell(story)
    assert len(story.results) == len(told.steps)
    assert len(told.names) == sum(map(len, story.inputs)) + len(story.results)
    assert all(told.names)


def test_what_the_page_claims():
    price = {story.name: tell(story).price for story in STORIES}
    assert price["sum"] == 6
    assert price["resident"] < price["offloaded"] < price["prefetched"]
    assert price["unheld"] == price["resident"]


def test_all_bank_stories_compute_the_same():
    outputs = [story.function(*story.arguments)[0] for story in STORIES[1:]]
    assert len(set(outputs)) == 1


@pytest.mark.parametrize("seed", range(20))
def test_the_list_walked_agrees_with_the_tracer_on_random_programs(seed):
    """Whatever is read, in whatever order, returned or not: the stories may change, their stack stays right."""
    rng = random.Random(seed)
    picks = [(rng.randrange(5 + k), rng.randrange(5 + k)) for k in range(12)]
    kept = rng.sample(range(17), 3)

    def function(values):
        values = list(values)
        for left, right in picks:
            values.append(values[left] + values[right])
        return [values[number] for number in kept]

    names = (tuple(f"v{n}" for n in range(5)),)
    told = tell(Story("random", "", "", function, ([1, 2, 3, 4, 5],), names, tuple(f"s{k}" for k in range(12))))
    assert [r.depth for step in told.steps for r in step.reads] == traced_eval(function, ([1, 2, 3, 4, 5],))[0]


def test_a_wrong_stack_is_noticed():
    """The comparison above can fail: a walk that lets the padding die gives another price."""
    held, unheld = (next(story for story in STORIES if story.name == name) for name in ("offloaded", "unheld"))
    assert tell(dataclasses.replace(held, function=unheld.function)).price != bytedmd(held.function, held.arguments)


def test_the_data_hold_what_was_told():
    for entry, story in zip(as_data(), STORIES, strict=True):
        told = tell(story)
        assert entry["price"] == sum(read["price"] for step in entry["steps"] for read in step["reads"]) == told.price
        assert entry["start"] == list(told.start)
        assert [step["stack"] for step in entry["steps"]] == [step.stack for step in told.steps]


def test_the_tables_say_the_prices():
    text = story_tables()
    assert all(f"**{story.title}**: price {tell(story).price}" in text for story in STORIES)
    assert "12 padding" in text
