"Head lists on disk: the published files, exact round trips, and files that are damaged or hostile"
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from longlens.probes.heads.files import (
    read_qrhead,
    read_retrieval_scores,
    to_head_list,
    write_qrhead,
    write_retrieval_scores,
)
from longlens.probes.heads.patterns import (
    DuoPattern,
    choose,
    kv_heads,
    kvpress_pattern,
    list_gates,
    query_heads,
    read_duo,
    write_duo,
)

DATA = Path(__file__).parents[1] / "../shared/data"
LLAMA2, LLAMA31 = "duo-attention/Llama-2-7B-32K-Instruct", "duo-attention/Meta-Llama-3.1-8B-Instruct"
NQ = [(14, 22), (13, 16), (14, 28), (14, 31), (16, 19), (14, 1), (16, 26), (17, 24), (14, 0), (13, 0), (16, 25), (13, 12), (13, 1),
      (13, 10), (17, 27), (20, 14)]
LME = [(13, 18), (13, 21), (8, 11), (14, 13), (17, 29), (13, 1), (13, 13), (14, 29), (14, 31), (13, 8), (16, 1), (17, 21), (13, 3),
       (10, 31), (13, 4), (14, 22)]


def published(name: str) -> Path:
    "A published file or folder"
    if not (DATA / name).exists(): pytest.skip(f"needs published files: {name} in a folder shared/data beside the project's")
    return DATA / name


def grid(a: np.ndarray) -> pl.DataFrame:
    "Gates (layers, kv_heads) as a table"
    return pl.DataFrame([(i, j, g) for (i, j), g in np.ndenumerate(a)], schema=["layer", "kv_head", "gate"], orient="row")


# The published files. The statistics are those of the files themselves, computed once without longlens, with numpy.

@pytest.mark.parametrize(("name", "shape", "mean", "half", "zero", "clipped"), [
    (LLAMA2, (32, 32), .419, .436, .268, 274), (LLAMA31, (32, 8), .852, .914, .027, 0),
])
def test_published_patterns(name: str, shape: tuple[int, int], mean: float, half: float, zero: float, clipped: int) -> None:
    duo = read_duo(published(name))
    a = duo.array
    assert a.shape == shape and duo.gates.shape == (a.size, 3)
    assert (round(a.mean(), 3), round((a >= .5).mean(), 3), round((a == 0).mean(), 3)) == (mean, half, zero)
    assert (duo.sink, duo.recent, duo.clipped) == (128, 256, clipped)
    assert duo.config["reg_weight"] == .05 and duo.config["num_passkeys"] == 10
    assert a.min() >= 0 and a.max() <= 1
    tsv = read_duo(published(name) / "full_attention_heads.tsv")
    assert_frame_equal(tsv.gates, duo.gates)
    assert tsv.config == duo.config


def test_quantiles_of_a_published_pattern() -> None:
    a = read_duo(published(LLAMA2)).array
    assert [round(q, 3) for q in np.quantile(a, [.5, .75])] == [.237, .941]


@pytest.mark.parametrize("name", [LLAMA2, LLAMA31])
def test_a_published_pattern_is_read_as_numpy_reads_it(name: str) -> None:
    want = np.loadtxt(published(name) / "full_attention_heads.tsv", delimiter="\t")
    assert (read_duo(published(name), clip=False).array == want).all()
    sink, recent, scores = kvpress_pattern(read_duo(published(name)))
    assert (sink, recent) == (128, 256) and (scores == want.clip(0, 1)).all() and type(scores) is np.ndarray and scores.dtype == float


@pytest.mark.parametrize("name", [LLAMA2, LLAMA31])
def test_a_published_pattern_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    write_duo(read_duo(published(name), clip=False), tmp_path)
    for file in ("full_attention_heads.tsv", "config.json"): assert (tmp_path / file).read_bytes() == (published(name) / file).read_bytes()


@pytest.mark.parametrize(("name", "sparsity"), [(LLAMA2, .75), (LLAMA2, .5), (LLAMA31, .5)])
def test_the_published_choice(name: str, sparsity: float) -> None:
    duo = read_duo(published(name))
    chosen = choose(duo, sparsity=sparsity)
    np.random.seed(42)
    noisy = duo.array + np.random.uniform(0, 1e-6, duo.array.shape)
    assert chosen["full"].to_list() == (noisy >= np.quantile(noisy, sparsity)).ravel().tolist()
    assert chosen["full"].sum() == round(duo.array.size * (1 - sparsity))
    assert chosen.filter("full")["gate"].min() >= chosen.filter(~pl.col("full"))["gate"].max() - 1e-6
    other = choose(duo, sparsity=sparsity, seed=1)  # the noise matters only among ties
    moved = chosen.filter(chosen["full"] != other["full"])["gate"]
    assert moved.is_empty() or moved.max() - moved.min() < 1e-6
    assert choose(duo)["full"].mean() == (duo.array >= .5).mean()


@pytest.mark.parametrize(("file", "want"), [("NQ", NQ), ("LME", LME)])
def test_published_head_lists(file: str, want: list[tuple[int, int]], tmp_path: Path) -> None:
    path = published(f"qrhead/Llama-3.1-8B-Instruct_qr_head_{file}.yaml")
    heads = read_qrhead(path)
    assert heads == want == read_qrhead(path, n_layers=32, n_heads=32)
    with pytest.raises(ValueError, match="32 layers|16 heads"): read_qrhead(path, n_layers=32, n_heads=16)
    again = write_qrhead(heads, tmp_path / "again.yaml", "meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct")
    assert yaml.safe_load(again.read_text()) == yaml.safe_load(path.read_text())
    groups = kv_heads(heads, n_heads=32, n_kv_heads=8)
    assert {(layer, head // 4) for layer, head in want} == set(groups) and len(groups) < 16
    assert set(heads) <= set(query_heads(groups, 32, 8))


def test_published_full_heads(tmp_path: Path) -> None:
    path = published("qrhead/Llama-3.1-8B-Instruct_full_head.yaml")
    with pytest.raises(ValueError, match="n_layers= and n_heads="): read_qrhead(path)
    with pytest.raises(ValueError, match="n_layers= and n_heads="): read_qrhead(path, n_layers=32)
    assert read_qrhead(path, n_layers=32, n_heads=32) == [(i, j) for i in range(32) for j in range(32)]
    write_qrhead("full_heads", tmp_path / "again.yaml", "meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct")
    assert yaml.safe_load((tmp_path / "again.yaml").read_text()) == yaml.safe_load(path.read_text())


# Round trips

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(data=st.data(), layers=st.integers(1, 3), heads=st.integers(1, 3), trials=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_scores_survive_exactly(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, layers: int, heads: int, trials: int,
) -> None:
    keys = [(i, j, t) for i in range(layers) for j in range(heads) for t in range(trials)]
    values = data.draw(st.lists(FINITE, min_size=len(keys), max_size=len(keys)))
    frame = pl.DataFrame([(*k, v) for k, v in zip(keys, values, strict=True)], orient="row",
                         schema={"layer": pl.Int64, "head": pl.Int64, "trial": pl.Int64, "score": pl.Float64})
    path = write_retrieval_scores(frame.sample(fraction=1, shuffle=True), tmp_path_factory.mktemp("trip") / "s.json")
    assert_frame_equal(read_retrieval_scores(path), frame, check_exact=True)


def test_scores_as_they_are_published(tmp_path: Path) -> None:
    "As json.dump writes the lists of the published program: integer noughts among floats, one line, no newline"
    told = {f"{i}-{j}": [0, 3 / 29, 1 / 26 * i, 1.0025 * j] for i in range(2) for j in range(12)}
    text = json.dumps({k: [v or 0 for v in vs] for k, vs in told.items()})
    (tmp_path / "a.json").write_text(text)
    frame = read_retrieval_scores(tmp_path / "a.json")
    assert frame.columns == ["layer", "head", "trial", "score"] and frame.height == 2 * 12 * 4
    assert frame.filter(layer=1, head=10)["score"].to_list() == told["1-10"]
    assert write_retrieval_scores(frame, tmp_path / "b.json").read_text() == text


def test_trials_are_numbered_anew(tmp_path: Path) -> None:
    frame = pl.DataFrame({"layer": [0] * 4, "head": [0, 0, 1, 1], "trial": [7, 3, 3, 7], "score": [.7, .3, .4, .8]})
    again = read_retrieval_scores(write_retrieval_scores(frame, tmp_path / "s.json"))
    assert again.rows() == [(0, 0, 0, .3), (0, 0, 1, .7), (0, 1, 0, .4), (0, 1, 1, .8)]


@given(data=st.data(), shape=st.tuples(st.integers(1, 4), st.integers(1, 4)))
@settings(max_examples=60, deadline=None)
def test_gates_survive_exactly(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: tuple[int, int]) -> None:
    size = shape[0] * shape[1]
    a = np.array(data.draw(st.lists(st.floats(-.05, 1.05), min_size=size, max_size=size))).reshape(shape)
    folder = write_duo(grid(a), tmp_path_factory.mktemp("trip") / "new" / "duo", {"sink_size": 4, "recent_size": 16})
    again = read_duo(folder, clip=False)
    assert (again.array == a).all() and again.clipped == 0 and (again.sink, again.recent) == (4, 16)
    assert (read_duo(folder).array == a.clip(0, 1)).all() and read_duo(folder).clipped == ((a < 0) | (a > 1)).sum()
    assert (np.loadtxt(folder / "full_attention_heads.tsv", delimiter="\t", ndmin=2) == a).all()


def test_the_config_says_what_the_pattern_says(tmp_path: Path) -> None:
    gates = grid(np.eye(2))
    write_duo(DuoPattern(gates, {"lr": .02, "deploy_sink_size": 64, "recent_size": 256}, 64, 256), tmp_path)
    old = read_duo(tmp_path)
    assert (old.sink, old.recent, old.config) == (64, 256, {"lr": .02, "deploy_sink_size": 64, "recent_size": 256})
    new = read_duo(write_duo(replace(old, sink=4), tmp_path))
    assert (new.sink, new.recent, new.config["sink_size"], new.config["lr"]) == (4, 256, 4, .02)
    bare = read_duo(write_duo(gates, tmp_path))  # and not with the config that was there
    assert (bare.sink, bare.recent, bare.config) == (None, None, {})
    (tmp_path / "config.json").unlink()
    assert read_duo(tmp_path).config == {}


HEADS = st.lists(st.tuples(st.integers(0, 999), st.integers(0, 999)), min_size=1, max_size=40, unique=True)
WORDS = st.text(st.characters(codec="utf-8"), max_size=20)


@given(heads=HEADS, model=WORDS, base=WORDS)
@settings(max_examples=60, deadline=None)
def test_head_lists_survive(tmp_path_factory: pytest.TempPathFactory, heads: list[tuple[int, int]], model: str, base: str) -> None:
    path = write_qrhead(heads, tmp_path_factory.mktemp("trip") / "h.yaml", model, base)
    assert read_qrhead(path) == heads
    told = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert (told["model_name_or_path"], told["model_base_class"]) == (model, base)


@given(heads=HEADS, group=st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_kv_heads_and_back(heads: list[tuple[int, int]], group: int) -> None:
    n_heads = 1000 * group
    groups = kv_heads(heads, n_heads, 1000)
    assert len(set(groups)) == len(groups)
    back = query_heads(groups, n_heads, 1000)
    assert set(heads) <= set(back) and len(back) == group * len(groups)
    assert kv_heads(back, n_heads, 1000) == groups
    gates = list_gates(groups, 1000, 1000).filter(gate=1.)
    assert gates.select("layer", "kv_head").rows() == sorted(groups)


def test_kvpress_streams_the_heads_that_were_not_chosen() -> None:
    "Its rule: the round(size * ratio) lowest scores are streamed"
    chosen = choose(grid(np.random.default_rng(0).integers(0, 3, (8, 4)) / 2), sparsity=.3)
    _, _, scores = kvpress_pattern(chosen, 4, 256)
    streamed = np.zeros(scores.shape, bool)
    streamed.flat[np.argsort(scores, axis=None)[:round(scores.size * (1 - scores.mean()))]] = True
    assert (streamed.ravel() == ~chosen["full"].to_numpy()).all()


@given(scores=st.lists(st.integers(0, 3), min_size=1, max_size=30), top=st.integers(1, 30), threshold=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_head_list_is_sorted_whatever_the_order(scores: list[int], top: int, threshold: int) -> None:
    rows = [(i // 4, i % 4, s / 2) for i, s in enumerate(scores)]
    frame = pl.DataFrame(rows, schema=["layer", "head", "s"], orient="row").sample(fraction=1, shuffle=True)
    want = [(i, j) for i, j, s in sorted(rows, key=lambda r: (-r[2], r[0], r[1])) if s >= threshold / 2][:top]
    if top > len(rows):
        with pytest.raises(ValueError, match=f"top is {top}: the frame has {len(rows)} heads"): to_head_list(frame, "s", top, threshold / 2)
    elif want: assert to_head_list(frame, "s", top, threshold / 2) == want
    else:
        with pytest.raises(ValueError, match=f"the highest is {max(scores) / 2:g}"): to_head_list(frame, "s", top, threshold / 2)


# What cannot be read

READERS = {"json": read_retrieval_scores, "tsv": read_duo, "yaml": read_qrhead}


@pytest.mark.parametrize("kind", READERS)
def test_not_there_not_a_file_not_text(kind: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"no.{kind} is not there"): READERS[kind](tmp_path / f"no.{kind}")
    (tmp_path / "bin").write_bytes(b"0.5\xff\xfe\t1.0")
    with pytest.raises(ValueError, match="bin is not text in UTF-8"): READERS[kind](tmp_path / "bin")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"): READERS[kind](tmp_path / "empty")
    wanted = "full_attention_heads.tsv is not there" if kind == "tsv" else "is a folder"
    with pytest.raises(FileNotFoundError, match=wanted): READERS[kind](tmp_path)


@pytest.mark.parametrize(("text", "said"), [
    ("{}", "holds no heads"),
    ("[1]", "holds a list"), ('{"0-0": 1}', 'head "0-0" has 1 where a list'), ('{"0-0": [], "0-1": []}', "no trial was kept"),
    ('{"0_0": [1]}', "'0_0' names no head"), ('{"0-0-0": [1]}', "names no head"),
    ('{"-1-0": [1]}', "names no head"), ('{"": [1]}', "names no head"),
    ('{"٣-٤": [1]}', "names no head"), ('{"0-0": [1], "0-1": [1, 2], "0-2": [1]}', '"0-1" has 2 trials and others have 1'),
    ('{"0-0": ["0.5"]}', "trial 0: '0.5' is not a score"), ('{"0-0": [0, null]}', "trial 1: None is not a score"),
    ('{"0-0": [[1]]}', "is not a score"), ('{"0-0": [NaN]}', "NaN is no number"), ('{"0-0": [-Infinity]}', "-Infinity is no number"),
    ('{"0-0": [1e999]}', "inf is not a score"),
    (f'{{"0-0": [1{"0" * 400}]}}', "is not a score"),
    (f'{{"0-0": [1{"0" * 9000}]}}', "cannot be read as JSON"),
    ('{"0-0": [1], "0-0": [2]}', "'0-0' stands there twice"), ('{"0-0": [1], "00-0": [2]}', r"\(0, 0\) stands in the list twice"),
    ('{"0-0": [1]}\n{"0-1": [1]}', "Extra data"), ("[" * 100_000, "cannot be read as JSON"),
])
def test_wrong_scores(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=said) as e: read_retrieval_scores(tmp_path / "s.json")
    assert "s.json" in str(e.value) and len(str(e.value)) < 500


def test_scores_cut_short_anywhere(tmp_path: Path) -> None:
    whole = json.dumps({f"0-{i}": [.25, 0, i / 7] for i in range(4)})
    for n in range(len(whole)):
        (tmp_path / "s.json").write_text(whole[:n])
        with pytest.raises(ValueError, match="s.json cannot be read as JSON"): read_retrieval_scores(tmp_path / "s.json")


@pytest.mark.parametrize(("tsv", "config", "said"), [
    ("1.0\t0.0\n0.5\n", "{}", "row 1 .from 0. has 1 columns and row 0 has 2"),
    ("1.0\t\n", "{}", "row 0, column 1 .from 0.: '' is not a number"),
    ("1.0,0.5\n", "{}", "'1.0,0.5' is not a number"),
    ("1.0\tinf\n", "{}", "KV head 1 is inf"),
    ("nan\n", "{}", "layer 0, KV head 0 is nan"),
    ("1.0\n1.06\n", "{}", "layer 1, KV head 0 is 1.06"), ("-0.051\n", "{}", "is -0.051"), (" \n", "{}", "is empty"),
    ("1.0\n", "{", "config.json cannot be read as JSON"), ("1.0\n", "[]", "config.json holds a list"),
    ("1.0\n", '{"sink_size": "128"}', "sink_size is '128': expected a number of tokens"),
    ("1.0\n", '{"recent_size": -1}', "recent_size is -1"),
    ("1.0\n", '{"deploy_sink_size": true, "sink_size": 4}', "deploy_sink_size is True"),
    ("1.0\n", '{"sink_size": 4, "sink_size": 8}', "twice"),
])
def test_wrong_patterns(tsv: str, config: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text(tsv)
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=said) as e: read_duo(tmp_path)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize(("text", "said"), [
    ("model: x", "attn_head_set is None"),
    ("attn_head_set: 8", "attn_head_set is 8"),
    ("- 8-21", "holds a list"),
    ("attn_head_set: ''", "names no head"),
    ("attn_head_set: 8-21;8-14", "names no head"), ("attn_head_set: 8-21,8-021", r"\(8, 21\) stands in the list twice"),
    ("attn_head_set: 1-2\nattn_head_set: 1-2", "stands there twice"), ("attn_head_set: [", "cannot be read as YAML"),
    ("a: 1\n---\nattn_head_set: 1-2", "expected a single document"),
    ("a: 2024-13-45", "cannot be read as YAML"),
    ("a: *b", "undefined alias"),
    ("[" * 5000, "cannot be read as YAML"), ("{" * 50 + "a" + "}" * 50, "cannot be read as YAML"), ("\x00", "special characters"),
])
def test_wrong_lists(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text(text)
    with pytest.raises(ValueError, match=said) as e: read_qrhead(tmp_path / "h.yaml")
    assert "h.yaml" in str(e.value)


@pytest.mark.parametrize("tag", [
    "object/apply:os.mkdir ['{}']", "object/new:os.mkdir ['{}']", "object/apply:os.system ['mkdir {}']", "name:os.mkdir",
])
def test_nothing_is_executed(tag: str, tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text(f"attn_head_set: 1-2\nx: !!python/{tag.format(tmp_path / 'made')}")
    with pytest.raises(ValueError, match="could not determine a constructor"): read_qrhead(tmp_path / "h.yaml")
    assert not (tmp_path / "made").exists()


# What cannot be written leaves what was there

@pytest.mark.parametrize(("change", "said"), [
    ({"score": pl.lit(float("nan"))}, "layer 0, head 0, trial 0: score is nan"), ({"score": pl.lit(None)}, "column 'score' is Null"),
    ({"score": pl.when(pl.col("head") == 1).then(None).otherwise(1.)}, "head 1, trial 0: score is None"),
    ({"score": pl.lit("x")}, "is String"),
    ({"head": pl.lit(0)}, "stands in the frame twice"),
    ({"head": pl.col("head") - 1}, "'head' holds -1"),
    ({"layer": pl.lit(None, pl.Int64)}, "missing value"),
    ({"trial": pl.col("trial") + pl.col("head")}, r"head \(0, 1\) was scored on other trials than head \(0, 0\)"),
])
def test_scores_that_cannot_be_written(change: dict[str, pl.Expr], said: str, tmp_path: Path) -> None:
    frame = pl.DataFrame({"layer": [0] * 4, "head": [0, 0, 1, 1], "trial": [0, 1, 0, 1], "score": [.5] * 4})
    path = write_retrieval_scores(frame, tmp_path / "s.json")
    before = path.read_bytes()
    with pytest.raises(ValueError, match=said): write_retrieval_scores(frame.with_columns(**change), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["s.json"]


def test_frames_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="this is a dict"): write_retrieval_scores({"layer": [0]}, tmp_path / "s.json")
    with pytest.raises(ValueError, match="no column 'layer': it has none at all"): to_head_list(pl.DataFrame(), "score")
    with pytest.raises(ValueError, match="has no rows"): to_head_list(pl.DataFrame({"layer": [], "head": [], "score": []}), "score")
    with pytest.raises(IsADirectoryError, match="is a folder"): write_qrhead([(0, 1)], tmp_path, "m", "b")


@pytest.mark.parametrize(("gates", "config", "said"), [
    (grid(np.array([[.5, 1.2]])), {}, "KV head 1 is 1.2"), (grid(np.eye(3)).head(7), {}, "layer 2, KV head 1 has no gate"),
    (grid(np.eye(3)).drop("gate"), {}, "no column 'gate'"), (grid(np.eye(2)), {"lr": float("nan")}, r"config\['lr'\] is nan"),
    (pl.DataFrame({"layer": [10**9], "kv_head": [10**9], "gate": [1.]}), {}, "layer 0, KV head 0 has no gate"),
])
def test_patterns_that_cannot_be_written(gates: pl.DataFrame, config: dict[str, float], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said): write_duo(gates, tmp_path / "duo", config)
    assert not (tmp_path / "duo").exists()


@pytest.mark.parametrize("heads", [[(0, 1), (0, 1)], [], [(0,)], [(0, -1)], ["0-1"], [(0., 1.)]])
def test_lists_that_cannot_be_written(heads: list, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="head"): write_qrhead(heads, tmp_path / "h.yaml", "m", "b")
    assert not any(tmp_path.iterdir())
