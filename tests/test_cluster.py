"""Sweeps on a Ray cluster of two workers: the same tables, whatever happens to the workers"""
from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
import pytest
import torch

import longlens as ll
from longlens.interventions.heads import Ablate, Temperature
from longlens.models.forward import LongModel
from longlens.prompts.haystack import Haystack
from longlens.prompts.needle import needle_context
from longlens.prompts.questions import fact_questions
from longlens.sweeps import ray_engine as cluster
from longlens.sweeps.cells import Cell, Changed, Task
from longlens.sweeps.ray_engine import Cluster, start_ray
from longlens.sweeps.runner import SweepWarning
from longlens.sweeps.serialize import ClusterError
from longlens.sweeps.sweep import sweep
from longlens.task_data.made import document_tasks

ray = pytest.importorskip("ray", reason="engine='ray' needs Ray: pip install longlens[ray]")
pytestmark = [pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),  # Ray's, where it did not start at once
              pytest.mark.filterwarnings("ignore:no worker has been ready")]  # on a busy machine
GONE = "is run again by another one"


@dataclass(frozen=True)
class NextToken(Task):
    "Probability and rank of the answer's first token, and the five that come first"

    def run(self, lm, cells, start):
        p = lm.hf(input_ids=start.last, past_key_values=start.fork(), use_cache=True).logits[:, -1].float().softmax(-1)
        return [{"next": pl.DataFrame({"p": [float(row[c.completion[0]])], "rank": [int((row > row[c.completion[0]]).sum())]}),
                 "top": pl.DataFrame({"token": row.topk(5).indices.tolist(), "p": row.topk(5).values.tolist()})}
                for row, c in zip(p, cells, strict=True)]


@dataclass(frozen=True)
class Harmful(NextToken):
    "Does something bad at one depth"
    what: str = "kill"  # "kill": this process; "raise": after a warning
    folder: str = ""  # if given: only once, which is noted there
    depth: int = 50

    def run(self, lm, cells, start):
        if any(c.axes["depth"] == self.depth for c in cells):
            note = Path(self.folder) / "done"
            if self.what == "raise":
                warnings.warn("it looks bad", SweepWarning, stacklevel=1)
                raise LookupError(f"nothing to be found at {self.depth} %")
            if not (self.folder and note.exists()):
                if self.folder: note.touch()
                time.sleep(0.5)  # what is finished is on its way
                os.kill(os.getpid(), signal.SIGKILL)
        return super().run(lm, cells, start)


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    "A Ray cluster on this machine, with room for two workers; they can import this module"
    before = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    os.environ["RAY_worker_niceness"] = "0"  # Ray's own choice, 15, starves workers beside other tests
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as many as workers have: the same numbers, to the last digit
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start_ray("local", num_cpus=2, object_store_memory=200 * 2**20)
        yield
        ray.shutdown()
    torch.set_num_threads(threads)
    os.environ["PYTHONPATH"] = before


@pytest.fixture(scope="module")
def lm() -> LongModel: return ll.load()


@pytest.fixture(scope="module")
def cells(lm: LongModel) -> list[Cell]:
    def at(d: int, t: int) -> Cell:
        return Cell.of(needle_context(lm, 300, d, wording="facts", haystack=Haystack.generated(t), seed=t), depth=d, trial=t)

    return [at(d, t) for d in (0, 25, 50, 75, 100) for t in (0, 1)]


def free_cpus() -> float: return ray.available_resources().get("CPU", 0)


def wait_for(what, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end: time.sleep(0.2)
    return what()


def test_the_same_table(two_workers: None, lm: LongModel, cells: list[Cell], tmp_path: Path) -> None:
    "Two workers that load the model, conditions among the cells, half of them finished before, another number of threads"
    heads = Changed((Ablate([(2, 1)]), Temperature(1.5)))
    cells = [*cells, *(replace(c, condition=heads, axes={**c.axes, "heads": "silenced"}) for c in cells[:4])]
    local = sweep(lm, cells, NextToken())
    first = sweep(lm, cells[::2], NextToken(), out=tmp_path)
    swept = sweep(lm, cells, NextToken(), out=tmp_path, engine=Cluster(workers=2, threads=2, load=dict(model=None)))
    assert swept.plan.finished == frozenset(range(0, 14, 2)) and first.keys == swept.keys[::2]
    for name in ("next", "top"):
        assert swept.table(name)["p"].to_numpy() == pytest.approx(local.table(name)["p"].to_numpy(), abs=1e-5)
        assert swept.table(name).drop("p").equals(local.table(name).drop("p"))
    done_by = swept.costs["worker"].str.extract(r"^(\w+(?:-\d)?)").to_list()
    assert done_by[::2] == ["local"] * 7 and set(done_by[1::2]) <= {"ray-0", "ray-1"}
    again = sweep(lm, cells, NextToken(), out=tmp_path, engine=Cluster(address="somewhere:1"))  # nothing is left: nobody is asked
    assert again.table("top").equals(swept.table("top"))


def test_a_worker_is_killed(two_workers: None, lm: LongModel, cells: list[Cell], tmp_path: Path) -> None:
    "What is left of its job is run by another one, and every number is the local engine's; the model is the one of this process"
    local = sweep(lm, cells, NextToken())
    task = Harmful(folder=str(tmp_path))
    with pytest.warns(SweepWarning, match=r"a worker died in job \d of \d: what is left of it, \d cells, is run again by another one"):
        swept = sweep(lm, cells, task, engine=Cluster(workers=2), out=tmp_path / "out")
    assert swept.table("next").equals(local.table("next")) and swept.table("top").equals(local.table("top"))
    assert len(ll.plan(sweep, lm, cells, task, out=tmp_path / "out").finished) == len(cells)
    assert wait_for(lambda: free_cpus() == 2)


@pytest.mark.slow
def test_a_batch_that_kills(two_workers: None, lm: LongModel, cells: list[Cell], tmp_path: Path) -> None:
    "It is given up, with its cells named; what was finished is kept"
    with pytest.warns(SweepWarning, match=GONE), pytest.raises(ClusterError, match=r"2 workers died, one after another.*depth=50, trial="):
        sweep(lm, cells, Harmful(), engine=Cluster(workers=1, retries=2), out=tmp_path)
    kept = ll.plan(sweep, lm, cells, Harmful(), out=tmp_path).finished
    assert kept and not any(cells[i].axes["depth"] == 50 for i in kept)


def test_an_error_of_the_task(two_workers: None, lm: LongModel, cells: list[Cell]) -> None:
    "It is raised here, with a note on where it was; so are warnings"
    look = pytest.warns(SweepWarning, match=r"ray-0 \(.*\): it looks bad")
    with look, pytest.raises(LookupError, match="nothing to be found at 50") as raised:
        sweep(lm, cells[4:6], Harmful("raise"), engine=Cluster(workers=1))
    assert "raised by the worker ray-0 (" in raised.value.__notes__[0] and "in a batch of the cells [" in raised.value.__notes__[0]


@pytest.mark.slow
def test_another_model(two_workers: None, lm: LongModel, cells: list[Cell]) -> None:
    "Workers that would measure another model than this process has are refused"
    with pytest.raises(ClusterError, match="workers have another model than this process.*bfloat16 on cpu.* there, .*float32 on cpu"):
        sweep(lm, cells, NextToken(), engine=Cluster(workers=1, load=dict(dtype="bfloat16")))


def test_it_waits_and_is_stopped(two_workers: None, lm: LongModel, cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    "An engine that waits for room says so; one that is closed ends its workers"
    assert wait_for(lambda: free_cpus() == 2)
    other, said = ray.remote(num_cpus=2)(dict).remote(), cluster._warn_waiting

    def say(crew: cluster.Crew) -> None:
        said(crew)
        ray.kill(other)

    assert wait_for(lambda: free_cpus() == 0)
    monkeypatch.setattr(cluster, "PATIENCE", 0.5)
    monkeypatch.setattr(cluster, "_warn_waiting", say)
    engine = Cluster(workers=1)(lm, ll.plan(sweep, lm, cells, NextToken()), [str(i) for i in range(len(cells))])
    with pytest.warns(SweepWarning, match="no worker has been ready for .* s: the sweep waits for room in the cluster"): next(engine)
    assert free_cpus() == 1
    engine.close()
    assert wait_for(lambda: free_cpus() == 2)


def test_refused(two_workers: None, lm: LongModel, cells: list[Cell]) -> None:
    "What can be known to go wrong is said before any worker starts"
    with ll.ablate(lm, [(2, 1)]), pytest.raises(ValueError, match="ablate: this is at work on needle-lm in this process.*a condition of"):
        sweep(lm, cells, NextToken(), engine=Cluster())
    with pytest.raises(ClusterError, match="no node of the cluster has the 3 CPUs and 0 GPUs that a worker needs"):
        sweep(lm, cells, NextToken(), engine=Cluster(cpus=3))
    with pytest.raises(ClusterError, match="no node of the cluster has the 1 CPUs and 1 GPUs"):
        sweep(lm, cells, NextToken(), engine=Cluster(gpus=1))
    with pytest.raises(ClusterError, match="this process is connected to a Ray cluster"):
        sweep(lm, cells, NextToken(), engine=Cluster(address="192.0.2.1:6379"))
    with pytest.raises(ClusterError, match="ray job submit"):
        sweep(lm, cells, NextToken(), engine=Cluster(address="ray://192.0.2.1:10001"))


def test_without_ray(lm: LongModel, cells: list[Cell], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None: raise ImportError(name)

    monkeypatch.setattr("longlens.sweeps.serialize.import_module", missing)
    with pytest.raises(ImportError, match=r"pip install longlens\[ray\]"): sweep(lm, cells, NextToken(), engine="ray")


@pytest.mark.slow
def test_questions_of_a_set(two_workers: None, lm: LongModel) -> None:
    "Replies, scores and the attention on the evidence are the same on a cluster"
    asked = [q for place in (0, 1) for q in document_tasks(fact_questions(2, 3), "middle", place)]
    local = ll.evaluate_tasks(lm, asked, max_new_tokens=4).frames["answers"]
    far = ll.evaluate_tasks(lm, asked, max_new_tokens=4, engine=Cluster(workers=2, load=dict(model=None))).frames["answers"]
    assert far["reply"].to_list() == local["reply"].to_list() and far["score"].to_list() == local["score"].to_list()
    assert far["gold_attention"].to_numpy() == pytest.approx(local["gold_attention"].to_numpy(), abs=1e-6)
