"""However a run goes, in other processes, on a cluster, killed and started again: the same rows."""

import os
import signal
import subprocess
import sys
import time
from threading import Thread

import psutil
import pytest

from tests.data.preparation.runs import recipe, results, rows
from xplus_fast import cli
from xplus_fast.data.preparation.engines import RETRIES, run_calls
from xplus_fast.errors import UserError

pytest.importorskip("py3langid", reason="identifies languages")


@pytest.fixture(scope="module")
def cluster():
    """Ray, with two cores on one node."""
    ray = pytest.importorskip("ray", reason="the engine for clusters")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    ray.init(address=made.address, log_to_driver=False, configure_logging=False)
    yield made
    ray.shutdown()
    made.shutdown()


def test_two_processes_give_the_same(whole, corpus, tmp_path):
    assert cli.main(["prepare", str(recipe(corpus, tmp_path, workers=2))]) == 0
    assert rows(tmp_path / "out")[0] == rows(whole)[0]


def test_two_ray_workers_give_the_same(whole, corpus, tmp_path, cluster):
    path = recipe(corpus, tmp_path, engine="ray", workers=2)
    assert cli.main(["prepare", str(path)]) == 0
    assert rows(tmp_path / "out")[0] == rows(whole)[0]


KILLED = """
import os, signal, sys
from xplus_fast import cli
from xplus_fast.data.preparation import parts, run
module, name = {"part": (parts, "write_table"), "report": (run, "write_report")}[sys.argv[3]]
true, calls, at = getattr(module, name), 0, int(sys.argv[2])
def counted(*arguments):
    global calls
    calls += 1
    if calls > at:
        os.kill(os.getpid(), signal.SIGKILL)
    return true(*arguments)
setattr(module, name, counted)
sys.exit(cli.main(["prepare", sys.argv[1]]))
"""


def test_killed_at_any_point_and_run_again(whole, corpus, tmp_path):
    """Among the parts, twice, among the conversations, and when all but the manifest is there."""
    path = recipe(corpus, tmp_path)
    work = tmp_path / "out/.work"
    done, kinds = {}, ("*/?????-??????.json", "*/*.conversations.parquet")
    counts = results(whole)[0]
    for at, what in ((2, "part"), (3, "part"), (11, "part"), (0, "report")):
        ran = subprocess.run(
            [sys.executable, "-c", KILLED, str(path), str(at), what], capture_output=True
        )
        assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
        assert not (tmp_path / "out/manifest.json").exists()
        before, done = done, {p: p.stat().st_mtime_ns for k in kinds for p in work.glob(k)}
        assert before.items() < done.items()  # none was made again
        if what == "part":
            assert len(done) == len(before) + at
    assert len(done) == 2 * sum(-(-n // 40) for n in counts["read"].values())
    script = (
        f"import sys; from xplus_fast import cli; from xplus_fast.data.preparation import run\n"
        f"run.filter_part = run.instruct_part = None\n"  # not called again
        f"sys.exit(cli.main(['prepare', {str(path)!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
    assert rows(tmp_path / "out")[0] == rows(whole)[0]
    assert results(tmp_path / "out") == results(whole)


def test_workers_end_with_a_killed_parent_and_the_rerun_is_the_same(whole, corpus, tmp_path):
    path = recipe(corpus, tmp_path, workers=2)
    ran = subprocess.Popen([sys.executable, "-m", "xplus_fast.cli", "prepare", str(path)])
    deadline = time.monotonic() + 60
    while not list((tmp_path / "out/.work").glob("*/*.json")):
        assert ran.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    workers = psutil.Process(ran.pid).children(recursive=True)
    ran.kill()
    ran.wait()
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    assert not (tmp_path / "out/manifest.json").exists()
    assert cli.main(["prepare", str(path)]) == 0
    assert rows(tmp_path / "out")[0] == rows(whole)[0]
    assert results(tmp_path / "out") == results(whole)


def test_workers_open_the_recipes_files_wherever_they_run(whole, corpus, tmp_path, monkeypatch):
    """As on a cluster, whose processes start in folders of their own."""
    from xplus_fast.data.preparation import run as module

    def elsewhere(engine, function, calls, workers):
        for call in calls:
            with monkeypatch.context() as there:
                there.chdir("/")
                made = function(*call)
            yield made

    monkeypatch.setattr(module, "run_calls", elsewhere)
    monkeypatch.chdir(tmp_path)
    os.symlink(corpus, "corpus")
    files = {"files": ["corpus/flores.*"], "flores": []}
    path = recipe(corpus, tmp_path, evaluation=files, output="out")
    assert cli.main(["prepare", str(path)]) == 0
    assert rows("out")[0] == rows(whole)[0]


def kill_one(out, is_worker):
    """Kill a worker of this process's as soon as a part is finished; returns whom."""
    killed = []

    def watch():
        deadline = time.monotonic() + 60
        while not list((out / ".work").glob("*/*.json")) and time.monotonic() < deadline:
            time.sleep(0.005)
        while not killed and time.monotonic() < deadline:
            for process in psutil.Process().children(recursive=True):
                try:
                    if is_worker(" ".join(process.cmdline())):
                        process.kill()
                        killed.append(process.pid)
                        return
                except psutil.NoSuchProcess:
                    continue

    thread = Thread(target=watch)
    thread.start()
    return thread, killed


def test_a_killed_worker_of_this_machine_changes_nothing(whole, corpus, tmp_path):
    path = recipe(corpus, tmp_path, workers=2)
    thread, killed = kill_one(tmp_path / "out", lambda command: "spawn_main" in command)
    assert cli.main(["prepare", str(path)]) == 0
    thread.join()
    assert killed
    assert rows(tmp_path / "out")[0] == rows(whole)[0]
    assert results(tmp_path / "out") == results(whole)


def test_a_killed_worker_of_ray_changes_nothing(whole, corpus, tmp_path, cluster):
    path = recipe(corpus, tmp_path, engine="ray", workers=2)
    thread, killed = kill_one(tmp_path / "out", lambda command: "ray::filter_part" in command)
    assert cli.main(["prepare", str(path)]) == 0
    thread.join()
    assert killed
    assert rows(tmp_path / "out")[0] == rows(whole)[0]
    assert results(tmp_path / "out") == results(whole)


def die(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_workers_that_die_again_and_again_are_told_in_a_line(engine, request):
    if engine == "ray":
        request.getfixturevalue("cluster")
    with pytest.raises(UserError, match="killed again and again, perhaps for want of memory"):
        list(run_calls(engine, die, [(1,), (2,)], 2))


def die_at_zero(i):
    time.sleep(0.1)
    if i == 0:
        time.sleep(0.5)  # others end meanwhile
        die(i)
    return i


def test_a_call_that_kills_its_worker_is_told_though_others_end():
    found = []
    with pytest.raises(UserError, match="killed again and again"):
        for made in run_calls("local", die_at_zero, ((i,) for i in range(1000)), 2):
            found.append(made)
            assert len(found) < 100  # not with the last of them
    assert len(found) > RETRIES and len(set(found)) == len(found)


def test_a_node_that_joins_late_is_given_work(cluster):
    import ray

    def where(i):
        time.sleep(0.2)
        return i, ray.get_runtime_context().get_node_id()

    stream = run_calls("ray", where, ((i,) for i in range(80)), None)
    found = [next(stream)]
    cluster.add_node(num_cpus=2)
    found += stream
    assert sorted(i for i, _ in found) == list(range(80))  # each once
    nodes = [node for _, node in found]
    assert len(set(nodes)) == 2 and nodes.count(nodes[0]) < 70
