"""The page "Save and load" runs from top to bottom: what is kept is kept, what is refused is refused."""

from tests.ref.guides.pages import run_page


def test_the_guide_runs():
    blocks, names = run_page("save-and-load.md")
    assert len(blocks) == 8
    assert len(names["reasons"]) == 4 and names["with_engram"].isfinite().all()
