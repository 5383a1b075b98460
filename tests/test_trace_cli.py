"`longlens trace`: what it refuses, what it leaves behind, and hostile documents"
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from longlens.cli import main as cli
from longlens.models.forward import LongModel
from longlens.report import Report

COMMAND = Path(sys.executable).with_name("longlens")
NOTE = "The code for Ada is lamb. The lamp is green.\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(NOTE)
    Path("b.txt").write_text("The code for Eve is stone. " * 2)
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00")
    return tmp_path


def run(*args: str) -> int:
    "The command, with needle-lm where the first argument is no model"
    model = ["needle-lm"] if not args or args[0].startswith("-") else []
    return cli.main(["trace", *model, *args])


@pytest.mark.parametrize(("args", "said"), [
    (["--question", "Who?"], "a context and a question are needed"),
    (["--context", "a.txt"], "a context and a question are needed"),
    (["--context", "a.txt", "--question", " "], "a context and a question are needed"),
    (["--context", "nowhere.txt", "--question", "Who?"], "there is no text file nowhere.txt"),
    (["--context", "a.txt", "bytes.txt", "--question", "Who?"], "bytes.txt is not text in UTF-8"),
    (["./nowhere", "--context", "a.txt", "--question", "Who?"], "there is no model folder ./nowhere"),
    (["--context", "a.txt", "--question", "Who?", "--method", "guess"], "there is no method 'guess'"),
    (["--context", "a.txt", "--question", "Who?", "--method", ","], "--method is empty"),
    (["--context", "a.txt", "--question", "Who?", "--set", "odd"], "--set odd: a setting is KEY=VALUE"),
    (["--context", "a.txt", "--question", "Who?", "--by", "chapters"], "not 'chapters'"),
    (["--context", "a.txt", "--question", "Who?", "--budget", "1"], "and budget is 1"),
    (["--context", "a.txt", "--question", "Who?", "--heads", "nowhere"], "nowhere"),
    (["--context", "a.txt", "--question", "Who?", "--method", "retrieval_attention"], "needs heads"),
    (["--context", "a.txt", "--question", "Who?", "--template", "no places"], "a template has {context} once"),
    (["--context", "a.txt", "--question", "Who?", "--template", "{context} So:"], "has no {question}"),
    (["--context", "a.txt", "--question", "Who?", "--method", "shapley", "--set", "permutations=abc"], "wants a whole number"),
])
def test_one_clear_line_and_nothing_written(capsys: pytest.CaptureFixture[str], args: list[str], said: str) -> None:
    before = sorted(Path().rglob("*"))
    assert run(*args, "--out", "out") == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("longlens: ")]
    assert len(err) == 1 and said in err[0]
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("args", [["--out", "a.txt/deep/out"], ["--out", "/proc/x"]])
def test_a_place_that_cannot_be_is_refused_before_the_model(capsys: pytest.CaptureFixture[str], args: list[str]) -> None:
    assert run("./nowhere", "--context", "a.txt", "--question", "Who?", *args) == 2
    assert f"{args[-1]} cannot be made" in capsys.readouterr().err


def test_names_and_questions_do_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    Path("red\x1b[31m.txt").write_text(NOTE)
    assert run("--context", "red\x1b[31m.txt", "b.txt", "--question", "What \x1b[31mis?", "--answer", "stone", "--dry-run") == 0
    said = capsys.readouterr()
    assert "\x1b[31m" not in said.out + said.err
    assert "is asked: What \\x1b[31mis?" in said.out and "1 red\\x1b[31m.txt, 2 b.txt" in said.out


def test_a_folder_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--context", "a.txt", "--question", "Who?") == 2
    assert "a folder for the page is needed: --out DIR" in capsys.readouterr().err


def test_documents_methods_and_a_given_answer(capsys: pytest.CaptureFixture[str]) -> None:
    "Two documents, two methods, one answer; the tables can be loaded"
    asked = ["--context", "a.txt", "b.txt", "--question", "What is the code for Eve?", "--answer", "stone"]
    assert run(*asked, "--method", "loo,shapley", "--set", "samples=3", "--out", "out") == 2
    assert "--set samples: there is no such setting: loo has none; shapley has permutations" in capsys.readouterr().err
    assert run(*asked, "--method", "loo,shapley,loo", "--set", "permutations=3", "--out", "out") == 0
    traces = [Report.load(Path("out") / n) for n in ("loo", "shapley")]
    assert [t.meta["method"] for t in traces] == ["loo", "shapley"]
    assert [t.top(1)["source"].item() for t in traces] == [1, 1]
    assert all(t.meta["by"] == "documents" and not t.meta["generated"] and t.meta["answer"].strip() == "stone" for t in traces)
    assert Path("out/context.txt").read_text() == NOTE + "\n\n" + "The code for Eve is stone. " * 2
    said = capsys.readouterr().out
    for t in traces:
        for line in t.findings(): assert line in said
    assert traces[1].meta["settings"] == {"permutations": 3}


def test_a_short_text_is_cut_into_sentences(capsys: pytest.CaptureFixture[str]) -> None:
    "By the name that reports give the model, and with the option that the command has where one source is left"
    Path("four.txt").write_text(NOTE + "The code for Bob is river. Nobody knew why.")
    asked = ("needle-lm", "--context", "four.txt", "--question", "What is the code for Ada?", "--method", "stc")
    assert run(*asked, "--out", "out") == 0
    said = capsys.readouterr().out
    assert "every sentence is a source, 4 in all: 100 words each would make one source" in said and "of 4 sources by sentences" in said
    assert run(*asked, "--by", "words", "--size", "100", "--out", "words") == 0
    assert "none to compare it with: cut finer (--by)\n" in capsys.readouterr().out


def test_settings_and_a_part_of_the_answer() -> None:
    asked = ["--context", "b.txt", "--question", "What is the code for Eve?", "--answer", "stone and more", "--span", "stone"]
    assert run(*asked, "--by", "sentences", "--method", "shapley", "--set", "permutations=3", "--top", "1", "--out", "out") == 0
    t = Report.load("out/shapley")
    assert t.meta["settings"] == {"permutations": 3} and t.meta["traced"].strip() == "stone" and len(t.top()) == 1


def test_what_it_would_cost(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    "The model is not asked: its answer has as many tokens as it may have; a refusal comes before it, too"
    def never(*a: object, **k: object) -> None: raise AssertionError("the model ran")
    monkeypatch.setattr(LongModel, "logits_at", never)
    before = sorted(Path().rglob("*"))
    assert run("--context", "a.txt", "--question", "Who?", "--budget", "1", "--out", "o") == 2
    assert run("--context", "a.txt", "--question", "Who?", "--answer", "Eve", "--dry-run") == 0
    assert "loo: 3 evaluations" in capsys.readouterr().out    # a short text is cut into its two sentences
    assert run("--context", "a.txt", "b.txt", "--question", "What is the code for Eve?", "--method", "loo,stc", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "loo: up to 3 evaluations" in said and "stc: up to 3 evaluations" in said and "for the answer itself" in said
    assert sorted(Path().rglob("*")) == before


def test_hostile_documents_do_nothing() -> None:
    "Markup, escape codes and marks that turn text around are shown, not obeyed"
    evil = "</script><script>window.pwned=1</script><img src=x onerror=pwned()> \x1b[31mred\x1b[0m \u202eturned\u202c "
    Path("evil.txt").write_text(evil + "The code for Eve is stone.", encoding="utf-8")
    assert run("--context", "a.txt", "evil.txt", "--question", f"{evil}?", "--answer", "stone <b>", "--out", "out") == 0
    page = Path("out/index.html").read_text(encoding="utf-8")
    assert "<script>window.pwned" not in page and "<img src=x" not in page and "stone <b>" not in page
    assert "\x1b" not in page and "\u202e" not in page


@pytest.mark.slow
def test_real_run(tmp_path: Path) -> None:
    "With nothing but a folder: needle-lm, a false fact that stands twice, offline, in a process of its own"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([COMMAND, "trace", "--by", "sentences", "--out", "out"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    t = Report.load("out/loo")
    best, second, *_ = t.frames["sources"].sort("rank")["text"].to_list()
    assert best.strip() == second.strip() and t.meta["answer"].strip() in best
    assert "Where the answer comes from" in (tmp_path / "out/index.html").read_text(encoding="utf-8")


def test_a_large_cost_is_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    "What takes long is said before its bar, in the command's words; a budget is consent"
    from longlens.probes.traceback import probe as traceback
    monkeypatch.setattr(traceback, "LARGE_COST", 50)
    asked = ["--context", "a.txt", "b.txt", "--question", "What is the code for Eve?", "--answer", "stone"]
    assert run(*asked, "--out", "out") == 0
    err = capsys.readouterr().err
    line = next(x for x in err.splitlines() if x.startswith("longlens: the trace of 2 sources is going to take"))
    assert "Give --budget and" in line and "(--size, --by)" in line
    assert run(*asked, "--budget", "100000", "--out", "out", "--overwrite") == 0
    assert "is going to take" not in capsys.readouterr().err
