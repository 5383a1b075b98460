"Reports on disk: odd frames, damaged files, a process killed while it saves"
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import ModuleType

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal
from polars.testing.parametric import dataframes

from longlens.report import MARK, Report, ReportError, atomic_write, free_place, new_folder

PLAIN = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
                     lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8)


class KeptReport(Report): "A subclass known by name"


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    frame = pl.DataFrame({"layer": range(200), "mass": [i / 200 for i in range(200)]})
    return KeptReport({"heads": frame, "other": frame.head(3)}, {"model": "m"}).save(tmp_path / "kept")


@given(frame=dataframes(max_cols=6, max_size=6, allow_null=True), meta=st.dictionaries(st.text(), PLAIN, max_size=3))
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, frame: pl.DataFrame, meta: dict) -> None:
    report = KeptReport({"odd": frame}, meta)
    again = Report.load(report.save(tmp_path_factory.mktemp("trip") / "r"))
    assert type(again) is KeptReport
    assert again.meta == report.meta
    assert_frame_equal(again.table, frame)


def test_whatever_the_damage_it_is_a_report_error(kept: Path) -> None:
    "Every file, cut at every eighth or with a byte changed there"
    for file in [p for p in kept.iterdir() if p.name != MARK]:
        whole = file.read_bytes()
        for at in range(0, len(whole), max(1, len(whole) // 8)):
            for broken in (whole[:at], whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1:]):
                file.write_bytes(broken)
                with pytest.raises(ReportError, match=file.name): Report.load(kept)
        file.write_bytes(whole)
    assert Report.load(kept).table.height == 200


@pytest.mark.parametrize("name", ["heads.parquet", "report.json"])
def test_missing_file_is_named(kept: Path, name: str) -> None:
    (kept / name).unlink()
    with pytest.raises(ReportError, match=name): Report.load(kept)


@pytest.mark.parametrize(("entry", "value", "said"), [
    ("longlens", 99, "format 99"), ("kind", "Nobody", "'Nobody' is no kind"), ("kind", "load", "'load' is no kind"),
    ("kind", 3, "no 'kind'"), ("frames", {"../../x": {"bytes": 1, "sha256": ""}}, "cannot name a frame"),
    ("frames", {"heads": {}}, "does not describe the frame 'heads'"), ("frames", {}, "at least one frame"),
])
def test_wrong_head(kept: Path, entry: str, value: object, said: str) -> None:
    head = json.loads((kept / "report.json").read_text())
    (kept / "report.json").write_text(json.dumps({**head, entry: value}))
    with pytest.raises(ReportError, match=said): Report.load(kept)


def test_an_older_folder_says_who_wrote_it_and_what_to_do(kept: Path) -> None:
    head = json.loads((kept / "report.json").read_text())
    old = {**head, "longlens": 1, "kind": "Reading", "meta": {"created": "2025-11-30T10:00:00+00:00", "versions": {"longlens": "0.1.0"}}}
    (kept / "report.json").write_text(json.dumps(old))
    with pytest.raises(ReportError, match=r"format 1 \(written by longlens 0\.1\.0, 2025-11-30.*reads format 2: run the measurement again"):
        Report.load(kept)
    (kept / "report.json").write_text(json.dumps({"longlens": 3}))    # of a later version, and not even whole
    with pytest.raises(ReportError, match="format 3 .*: update longlens"): Report.load(kept)
    assert pl.read_parquet(kept / "heads.parquet").height == 200    # as the message promises


@pytest.mark.parametrize(("kind", "explorer"), [
    ("SinkReport", "heads:explore_sinks"), ("HeadReport", "heads:explore_heads"), ("PromptReading", "workbench:explore_reading"),
    ("GridReport", "needle:explore_grid"), ("MiddleReport", "needle:explore_middle"), ("CollapseReport", "collapse:explore_collapse"),
    ("Trace", "trace:explore_trace"), ("GainReport", "sections:explore_sections"),
])
def test_explorers_are_there_and_take_a_model(kind: str, explorer: str) -> None:
    import longlens
    named = getattr(longlens, kind).explorer
    assert named == f"longlens.apps.{explorer}"
    module, name = named.split(":")
    assert "model" in signature(getattr(import_module(module), name)).parameters


def test_a_report_opens_the_explorer_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    "Of any module that can be imported, also for classes that inherit it; what it does not take is refused"
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    monkeypatch.setattr(module, "explore", lambda report, model=None: (type(report).__name__, model), raising=False)
    class Mine(KeptReport): explorer = "mine:explore"
    class Heir(Mine): "Takes it over"
    frames = {"a": pl.DataFrame({"x": [1]})}
    assert (Mine(frames).widget(), Heir(frames).widget(model=3)) == (("Mine", None), ("Heir", 3))
    with pytest.raises(TypeError, match=r"widget\(\) of a Heir takes model, and not 'top'"): Heir(frames).widget(top=1)
    Mine.explorer = "mine.explore"
    with pytest.raises(TypeError, match=r"Heir\.explorer is 'mine\.explore': write module:function"): Heir(frames).widget()
    with pytest.raises(TypeError, match="KeptReport draws no chart of its own"): KeptReport(frames).widget()


def test_a_folder_that_is_not_there_or_is_a_file(kept: Path) -> None:
    with pytest.raises(ReportError, match="not a report"): Report.load(kept / "nowhere")
    with pytest.raises(ReportError, match="not a report"): Report.load(kept / "report.json")


def test_other_files_in_the_folder_do_not_matter(kept: Path) -> None:
    (kept / "notes.txt").write_text("mine")
    assert Report.load(kept).table.height == 200


def test_never_replaces_what_longlens_did_not_write(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.tex").write_text("x")
    report = Report({"a": pl.DataFrame({"x": [1]})})
    for place in (tmp_path / "mine", tmp_path / "mine/thesis.tex", tmp_path):
        with pytest.raises(FileExistsError, match=place.name): report.save(place, overwrite=True)
    assert (tmp_path / "mine/thesis.tex").read_text() == "x"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("place", ["file/deep/kept", "/proc/kept", f"{'x' * 300}/kept"])
def test_a_place_that_cannot_be_is_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("x")
    for write in (free_place, Report({"a": pl.DataFrame({"x": [1]})}).save):
        with pytest.raises(OSError, match=r"choose a place in a folder") as e: write(place)
        assert str(e.value).startswith(f"{place} cannot be made")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert free_place("new/deep/kept") == tmp_path.resolve() / "new/deep/kept"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_link_is_followed_not_replaced(kept: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(kept)
    Report({"new": pl.DataFrame({"x": [1]})}).save(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert list(Report.load(kept).frames) == ["new"]


def test_the_folder_is_open_to_the_same_people_as_any_other(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a"): pass
    (tmp_path / "b").mkdir()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_place_taken_meanwhile_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError), new_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a/theirs").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a/theirs").read_text() == "x"


SAVES = """
import sys, polars as pl
from longlens.report import Report
report = Report({f"f{i}": pl.DataFrame({"x": range(20_000)}) for i in range(20)})
print("ready", flush=True)
while True: report.save(sys.argv[1], overwrite=sys.argv[2] == "over")
"""


@pytest.mark.parametrize("how", ["new", "over"])
def test_killed_while_saving(tmp_path: Path, how: str) -> None:
    "kill -9 at any moment: the report is whole or not there; an older one is still whole, in its place or beside it"
    for wait in (0.0, 0.004, 0.01, 0.02, 0.04):
        place = tmp_path / f"{how}{wait}" / "kept"
        place.parent.mkdir()
        if how == "over": Report({"old": pl.DataFrame({"x": [1]})}).save(place)
        with subprocess.Popen([sys.executable, "-c", SAVES, str(place), how], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as saver:
            assert saver.stdout is not None
            saver.stdout.readline()
            time.sleep(wait)
            os.kill(saver.pid, signal.SIGKILL)
        if place.exists(): assert Report.load(place).table.height in (1, 20_000)
        if how == "over":
            whole = [p for p in place.parent.iterdir() if (p / "report.json").exists()]
            assert any(Report.load(p) for p in whole)
        assert [p for p in place.parent.iterdir() if not p.name.startswith(".")] in ([], [place])


def test_atomic_write_takes_the_last_of_many(tmp_path: Path) -> None:
    for i in range(20): atomic_write(tmp_path / "f", str(i) * 1000)
    assert (tmp_path / "f").read_text() == "19" * 1000
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_class_that_was_defined_twice_loads_its_own(tmp_path: Path) -> None:
    "As when a notebook's cell is run again: the name means the later class, and the earlier one still reads what it kept"
    made = [type("DefinedTwice", (Report,), {}) for _ in range(2)]
    made[0]({"a": pl.DataFrame({"x": [1]})}).save(tmp_path / "kept")
    assert [type(c.load(tmp_path / "kept")) for c in made] == made
    assert type(Report.load(tmp_path / "kept")) is made[1]
