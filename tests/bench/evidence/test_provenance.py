"""Committed results were measured by code that is committed."""

import functools
import subprocess

import pytest

from bench.evidence.committed import RESULTS
from bench.instruments.reading import read_results

# Once, on a machine that was lent for minutes, by a tree with changes: bench/results/h200_2026-11-27/README.md.
LENT = {"end_to_end_h200", "end_to_end_h200_100b", "gpu_wall_h200", "lookup_speed_h200"}
NAMES_NONE = {"lab"}  # of a program that runs in another project's tree


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_code_that_ran_can_be_had(path):
    git = read_results(path).get("git")
    if path.stem in NAMES_NONE:
        assert git is None
    else:
        assert len(git["commit"]) == 40 and git["dirty"] is (path.stem in LENT)
        assert not knows_history() or asked_git("cat-file", "-t", git["commit"]) == "commit"


def asked_git(*words):
    done = subprocess.run(["git", *words], cwd=RESULTS, capture_output=True, text=True)
    return done.stdout.strip()


@functools.cache
def knows_history():
    """Not in an archive without one, which may lie in another's, nor in a clone of the last commits only."""
    own = asked_git("rev-parse", "--show-toplevel") == str(RESULTS.parents[1])
    return own and asked_git("rev-parse", "--is-shallow-repository") == "false"
