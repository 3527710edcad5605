"""`bench/findings.py`: finished steps are not run again, and files that hold the same prices are left alone."""

import json

import pytest

from bench import findings
from bench.findings import Step, adopt, require_same, run_step

TOY = {
    "started": "now",
    "environment": {"cpu": "mine"},
    "configuration": {"padding": 10, "out": "here"},
    "noise_floor": [{"ratio": 1.0}],
    "runs": [{"cost": 5, "wall_time_s": [0.1], "wall_time_summary_s": {"median": 0.1}}],
}


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def changed(content, **runs):
    return {**content, "runs": [{**content["runs"][0], **runs}]}


def test_the_same_prices_leave_the_committed_file(tmp_path):
    committed = write(tmp_path / "committed.json", TOY)
    before = committed.read_bytes()
    elsewhere = changed({**TOY, "started": "later", "noise_floor": [], "environment": {}}, wall_time_s=[0.3])
    elsewhere["configuration"] = {"padding": 10, "out": "there"}
    assert adopt(write(tmp_path / "new.json", elsewhere), committed) is False
    assert committed.read_bytes() == before


@pytest.mark.parametrize(
    "other", [changed(TOY, cost=6), {**TOY, "configuration": {"padding": 11}}], ids=["price", "configuration"]
)
def test_other_prices_replace_it(tmp_path, other):
    committed = write(tmp_path / "committed.json", TOY)
    new = write(tmp_path / "new.json", other)
    assert adopt(new, committed) is True
    assert committed.read_bytes() == new.read_bytes()
    assert adopt(new, tmp_path / "folder" / "none.json") is True  # from nothing


def test_a_text_that_is_here_has_to_be_as_it_is_committed(tmp_path, capsys):
    own, other = {"text": "own", "sha256": "a", "share": 0.5}, {"text": "novel", "sha256": "b", "share": 0.7}
    part = write(tmp_path / "part.json", {"records": [own]})
    require_same(part, write(tmp_path / "committed.json", {"records": [other, own]}))
    assert capsys.readouterr().err == ""
    require_same(part, write(tmp_path / "committed.json", {"records": [{**own, "sha256": "c", "share": 0.4}]}))
    assert capsys.readouterr().err == "findings: committed.json: another text own than here\n"
    stale = write(tmp_path / "committed.json", {"records": [other, {**own, "share": 0.4}]})
    with pytest.raises(ValueError, match=r"committed\.json holds other numbers of the text 'own' .* run make corpora"):
        require_same(part, stale)


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A step whose program counts its runs, and ends as it is told."""
    monkeypatch.setattr(findings, "BENCH", tmp_path)
    (tmp_path / "program.py").write_text(
        "import pathlib, sys\n"
        "out = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"
        "out.mkdir(parents=True, exist_ok=True)\n"
        "with (out / 'runs').open('a') as runs: runs.write('quick\\n' if '--quick' in sys.argv else 'full\\n')\n"
        "sys.exit(int(sys.argv[1]))\n"
    )

    def step(code=0, remembers=False):
        return Step("it", ("program.py", str(code)), {}, None if remembers else findings.TOY_CODE)

    return step


def test_a_finished_step_is_not_run_again(program, tmp_path, monkeypatch):
    for _ in range(2):
        run_step(program(), tmp_path / "out", quick=False)
    runs = tmp_path / "out/it/runs"
    assert runs.read_text() == "full\n"
    run_step(program(), tmp_path / "out", quick=True)  # another run
    monkeypatch.setattr(findings, "code_sha256", lambda patterns: "other code")
    run_step(program(), tmp_path / "out", quick=True)
    assert runs.read_text() == "full\nquick\nquick\n"


def test_a_step_that_remembers_is_always_asked(program, tmp_path):
    for _ in range(2):
        run_step(program(remembers=True), tmp_path / "out", quick=False)
    assert (tmp_path / "out/it/runs").read_text() == "full\n" * 2


def test_a_failed_step_is_not_finished(program, tmp_path):
    for _ in range(2):
        with pytest.raises(ValueError, match="step it ended with 3"):
            run_step(program(code=3), tmp_path / "out", quick=False)
    assert (tmp_path / "out/it/runs").read_text() == "full\n" * 2


def test_every_step_names_a_program_and_its_files():
    names = [name for step in findings.STEPS for name in step.results.values()]
    assert len(set(names)) == len(names) == 10
    for step in (*findings.STEPS, findings.OWN_TEXT):
        assert (findings.BENCH / step.command[0]).exists()
