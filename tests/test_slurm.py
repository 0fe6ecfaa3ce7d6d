"""Jobs: the files of `slurm/`, `cap-llm status` and `prefetch`, signals, two jobs in one directory.

SLURM itself is a stub here; `make test-slurm` runs every file on a real one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from support import ROOT

from cap_llm.cli import prefetch
from cap_llm.cli.command_line import read_config
from cap_llm.cli.status import status
from cap_llm.runtime import lock
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.stages import recipe as recipe_of
from cap_llm.text import corpora

SLURM = ROOT / "slurm"
FILES = sorted([*SLURM.glob("*.sbatch"), *SLURM.glob("*.sh"), ROOT / "tests/slurm_cluster.sh"])
LENGTH, BATCH = 64, 4
PATIENCE = 300.0  # seconds with a job that does not end
QUIET = Console(enabled=False)


@pytest.fixture(scope="module")
def settings(tiny, text_file, tmp_path_factory) -> dict:
    """A short sound run of all stages of a tiny model."""
    folder = tmp_path_factory.mktemp("settings")
    lines = text_file.read_text().splitlines(keepends=True)
    (folder / "text.txt").write_text("".join(lines[:600]))
    (folder / "scored.txt").write_text("".join(lines[600:700]))
    return {
        "stages": ["oneshot", "recover", "evaluate"],
        "model": {"path": str(tiny("llama", num_hidden_layers=3))},
        "calibration": {"corpus": str(folder / "text.txt"), "sequences": 8, "length": LENGTH},
        "recover": {
            "corpus": str(folder / "text.txt"),
            "length": LENGTH,
            "optimizer": {"tokens": 12 * BATCH * LENGTH, "batch": BATCH},
            "held_out": 4,
            "sequences": 40,
            "contrast": {"segments": 4, "token_positions": 8, "extra_negatives": 4},
        },
        "evaluate": {"corpora": [str(folder / "scored.txt")], "window": LENGTH},
    }


@pytest.fixture
def recipe(settings, tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


# the files


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.name)
def test_a_file_is_sound_bash_and_short(file):
    subprocess.run(["bash", "-n", file], check=True)
    if file.parent == SLURM and file.name != "common.sh":
        assert len(file.read_text().splitlines()) < 60


def test_shellcheck_has_no_complaints():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck")
    done = subprocess.run(["shellcheck", *FILES], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", sorted(SLURM.glob("*.sbatch")), ids=lambda path: path.name)
def test_a_job_asks_for_a_signal_before_its_limit_and_to_be_requeued(file):
    text = file.read_text()
    asked = re.findall(r"^#SBATCH --(\S+)", text, re.MULTILINE)
    assert {"signal=B:USR1@300", "requeue", "partition=gpu", "account=project"} <= set(asked)
    for example in re.findall(r"^#.* (--[a-z]+\.\w+ \w+)$", text, re.MULTILINE):
        read_config(example.split())


def test_the_read_me_names_every_file():
    text = (SLURM / "README.md").read_text()
    for file in SLURM.glob("*.s*"):
        assert f"`{file.name}`" in text


@pytest.fixture
def stubs(tmp_path):
    """Stand-ins for sbatch, squeue and scontrol: what is submitted is kept in a file."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    queue = folder / "queue"
    queue.touch()
    programs = {
        "sbatch": f'echo "$*" >>{folder}/submitted; n=$(wc -l <{folder}/submitted)\n'
        'for arg in "$@"; do case $arg in --job-name=*) name=${arg#*=};;'
        " --comment=*) place=${arg#*=};; esac; done\n"
        f'echo "$n $name $place" >>{queue}; echo "$n"',
        "squeue": f"cat {queue}",
        "scontrol": f'echo "$*" >>{folder}/asked',
        "python": f'{sys.executable} "$@"',
    }
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def pipeline(stubs: Path, *args) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(SLURM / "pipeline.sh"), *map(str, args)],
        env=os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("cards", "right"), [("0,1,2,3", True), ("2,3", False), ("", True)])
def test_the_first_gpus_of_several_nodes_are_not_taken_for_the_jobs(stubs, tmp_path, cards, right):
    """With a file of hosts DeepSpeed's launcher does not heed CUDA_VISIBLE_DEVICES."""
    for name, text in {"srun": 'shift; exec "$@"', "deepspeed": 'echo "started $*"'}.items():
        (stubs / name).write_text(f"#!/bin/bash\n{text}\n")
        (stubs / name).chmod(0o755)
    (stubs / "scontrol").write_text("#!/bin/bash\necho node-a; echo node-b\n")
    slurm = {"SUBMIT_DIR": ROOT, "JOB_ID": 7, "JOB_NODELIST": "n", "CPUS_PER_TASK": 2, "NODEID": 0}
    env = os.environ | {f"SLURM_{name}": str(value) for name, value in slurm.items()}
    env |= {"RANKS": "2", "CUDA_VISIBLE_DEVICES": cards, "TMPDIR": str(tmp_path)}
    env |= {"PATH": f"{stubs}:{os.environ['PATH']}"}
    job = subprocess.run(
        ["bash", str(SLURM / "recover_multinode.sbatch"), "opt-125m-50", str(tmp_path / "run")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ("started --no_ssh --hostfile" in job.stdout) == right, job.stderr
    assert (job.returncode == 0) == right
    assert ("GPUs 2,3" in job.stderr) == (not right)


def test_the_pipeline_is_a_chain_and_is_not_submitted_twice(stubs, recipe, tmp_path):
    run = tmp_path / "run"
    first = pipeline(stubs, recipe, run, "--recover.engine.deepspeed", "zero3")
    assert first.stdout == "oneshot: job 1\nrecover: job 2\nevaluate: job 3\n", first.stderr
    jobs = (stubs / "submitted").read_text().splitlines()
    assert "--dependency" not in jobs[0]
    assert "--dependency=afterok:1 --kill-on-invalid-dep=yes slurm/recover.sbatch" in jobs[1]
    assert jobs[2].endswith(
        f"slurm/evaluate.sbatch {recipe} {run} --recover.engine.deepspeed zero3"
    )
    again = pipeline(stubs, recipe, run)
    assert again.stdout.count("already in the queue") == 3
    # the second has ended badly, the first well; the third was dropped from the queue with it
    (stubs / "queue").write_text("")
    for stage in ("oneshot", "recover"):
        (run / stage).mkdir(parents=True)
        config, *_ = read_config(["--config", str(recipe), "--output_dir", str(run)])
        (run / stage / "recipe.json").write_text(
            json.dumps(recipe_of(stage, config, ["oneshot", "recover"]))
        )
    (run / "run.lock").touch()
    (run / "config.yaml").write_text(recipe.read_text())
    (run / "oneshot" / "done.json").write_text('{"seconds": 2}')
    third = pipeline(stubs, recipe, run)
    assert third.stdout == "oneshot: done\nrecover: job 4\nevaluate: job 5\n"
    assert "--dependency" not in (stubs / "submitted").read_text().splitlines()[3]
    # what was scored before the second stage does not stand for scores of its model
    (stubs / "queue").write_text("")
    (run / "ended.json").write_text('{"code": 0, "rank": 0, "why": "done", "time": 0}')
    fourth = pipeline(stubs, recipe, run)
    assert fourth.stdout == "oneshot: done\nrecover: job 6\nevaluate: job 7\n"
    # what is done with other settings is no part of this pipeline; other scores are
    other = pipeline(stubs, recipe, run, "--oneshot.method", "wanda")
    assert other.returncode == 1 and "oneshot.method" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.parametrize("name", ["a run", "-x $(id) back\\slash\ttab ünicode"])
def test_the_pipeline_knows_its_jobs_whatever_the_run_is_called(stubs, recipe, tmp_path, name):
    run = tmp_path / name
    first = pipeline(stubs, recipe, run)
    assert first.stdout == "oneshot: job 1\nrecover: job 2\nevaluate: job 3\n", first.stderr
    again = pipeline(stubs, recipe, run)
    assert again.stdout.count("already in the queue") == 3
    other = pipeline(stubs, recipe, tmp_path / f"{name} more")
    assert other.stdout == "oneshot: job 4\nrecover: job 5\nevaluate: job 6\n"


def test_the_pipeline_waits_for_a_job_of_joined_clusters(stubs, recipe, tmp_path):
    text = (stubs / "sbatch").read_text()
    (stubs / "sbatch").write_text(text.replace('echo "$n"\n', 'echo "$n;cluster"\n'))
    assert pipeline(stubs, recipe, tmp_path / "run").returncode == 0
    assert "--dependency=afterok:1 --kill" in (stubs / "submitted").read_text().splitlines()[1]


def test_a_jobs_caches_are_private(tmp_path):
    """Nobody else can have made the folder of compiled extensions, or can write to it."""
    script = 'source slurm/common.sh; stat -c "%a %n" "$CACHE"; echo "$TORCH_EXTENSIONS_DIR"'
    env = os.environ | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7"}
    env |= {"SLURM_JOB_END_TIME": str(time.time() + 3600)}
    places = []
    for folder in (tmp_path, tmp_path, tmp_path / "of a login node"):
        said = subprocess.run(
            ["bash", "-c", script],
            env=env | {"TMPDIR": str(folder)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        mode, _, place = said[0].partition(" ")
        assert mode == "700" and said[1] == f"{place}/extensions"
        places.append(Path(place))
    assert len(set(places)) == 3 and not any(place.exists() for place in places)
    assert [place.parent for place in places[:2]] == [tmp_path, tmp_path]


def test_the_pipeline_reads_the_options_before_it_submits(stubs, recipe, tmp_path):
    done = pipeline(stubs, recipe, tmp_path / "run", "--recover.btch", "3")
    assert done.returncode != 0 and not (stubs / "submitted").exists()
    assert "pipeline.sh: unknown option --recover.btch; did you mean --recover." in done.stderr


# the shell around a job, with the real entry


def job(stubs: Path, folder: Path, out, *args: str, end: float | None = None) -> subprocess.Popen:
    """What a batch file does with its command, in a process group of its own as under SLURM."""
    script = f'source slurm/common.sh; run "{folder}" {sys.executable} cap_llm/train.py "$@"'
    env = {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT)}
    env |= {"SLURM_JOB_ID": "7", "SLURM_JOB_END_TIME": str(end or time.time() + 3600)}
    return subprocess.Popen(
        ["bash", "-c", script, "job", "--output_dir", str(folder), *args],
        env=os.environ | env | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        cwd=ROOT,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for(found, seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.2)


def reached(folder: Path, step: int) -> bool:
    path = folder / "metrics.jsonl"
    return path.exists() and f'"step": {step}, "name": "loss"' in path.read_text()


def values(folder: Path, name: str) -> dict[int, float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {m["step"]: m["value"] for m in lines if m["name"] == name}


@pytest.fixture(scope="module")
def long(settings, tmp_path_factory) -> list[str]:
    """A recovery of some seconds, from a model that is pruned already."""
    folder = tmp_path_factory.mktemp("long")
    model = settings["model"]["path"]
    settings = settings | {"stages": ["oneshot"]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    from cap_llm.pipeline import pipeline

    args = ["--config", str(folder / "recipe.yaml"), "--output_dir", str(folder / "half")]
    config, text, _ = read_config(args)
    pipeline(config, text, QUIET)
    optimizer = settings["recover"]["optimizer"] | {"tokens": 60 * BATCH * LENGTH}
    steps = {"optimizer": optimizer, "teacher": model, "checkpoint": {"every": 1000}}
    settings |= {"recover": settings["recover"] | steps, "stages": ["recover"]}
    settings |= {"model": {"path": str(folder / "half" / "oneshot")}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return ["--config", str(folder / "recipe.yaml")]


def test_a_job_near_its_limit_checkpoints_is_requeued_and_loses_nothing(stubs, long, tmp_path):
    folder, said = tmp_path / "run", tmp_path / "said"
    with open(said, "w", encoding="utf-8") as out:
        shell = job(stubs, folder, out, *long)
        wait_for(lambda: reached(folder, 8) or shell.poll() is not None)
        shell.send_signal(signal.SIGUSR1)  # to the shell alone, as SLURM does
        shell.send_signal(signal.SIGUSR1)
        asked = stubs / "asked"
        wait_for(lambda: asked.exists() and asked.read_text() == "requeue 7\n")
        os.killpg(shell.pid, signal.SIGKILL)  # the shell waits for SLURM to end it
        ended = json.loads((folder / "ended.json").read_text())
        assert ended["code"] == 128 + signal.SIGUSR2 and ended["goes_on"], said.read_text()
        (kept,) = (folder / "recover").glob("checkpoints/1/*/complete.json")
        assert json.loads(kept.read_text())["step"] == max(values(folder, "loss"))
        found = status(folder)
        assert found["stages"] == {"recover": "stopped"}
        assert re.search(r"step \d+ of 60, checkpoint at \d+", found["progress"]["recover"])
        assert job(stubs, folder, out, *long).wait(timeout=PATIENCE) == 0, said.read_text()
        assert status(folder)["stages"] == {"recover": "done"}
        plain = tmp_path / "plain"
        assert job(stubs, plain, out, *long).wait(timeout=PATIENCE) == 0
    assert values(folder, "loss") == values(plain, "loss")


def test_a_job_stops_by_its_own_clock_before_its_limit():
    code = """
import os, signal, sys, time
sys.path.insert(0, sys.argv[1])
os.environ["SLURM_JOB_END_TIME"] = str(time.time() + float(sys.argv[2]))
from cap_llm.runtime import interrupt
start = time.time()
try:
    interrupt.raise_on_signals()
    time.sleep(60)
except interrupt.Stopped as stopped:
    assert stopped.args[0] == signal.SIGALRM in interrupt.REQUEUE_SIGNALS
    assert time.time() - start > 0.8 * float(sys.argv[2])  # not before it has done some work
else:
    raise SystemExit("it did not stop")
"""
    subprocess.run([sys.executable, "-c", code, ROOT, "3"], check=True)


def test_bad_input_is_no_reason_to_requeue(stubs, long, tmp_path):
    folder = tmp_path / "run"
    with open(tmp_path / "said", "w", encoding="utf-8") as out:
        code = job(stubs, folder, out, *long, "--recover.optimizer.lr", "-1").wait(timeout=PATIENCE)
    assert code == 2 and not (stubs / "asked").exists()


# several ranks


def launch(ranks: int, out, *args: str) -> subprocess.Popen:
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return subprocess.Popen(
        [sys.executable, *command, str(ROOT / "cap_llm" / "train.py"), *args],
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=out,
        stderr=subprocess.STDOUT,
    )


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """The ranks' processes, in rank order."""
    children = psutil.Process(launcher.pid).children()
    return sorted(children, key=lambda p: int(p.environ()["RANK"]))


def test_a_killed_rank_is_named_and_the_code_is_true(long, tmp_path):
    folder, said = tmp_path / "run", tmp_path / "said"
    with open(said, "w", encoding="utf-8") as out:
        launcher = launch(2, out, *long, "--output_dir", str(folder))
        wait_for(lambda: reached(folder, 5) or launcher.poll() is not None)
        victim = ranks_of(launcher)[1]
        victim.kill()
        assert launcher.wait(timeout=PATIENCE) != 0
    ended = json.loads((folder / "ended.json").read_text())
    assert (ended["code"], ended["rank"]) == (1, 0), said.read_text()
    assert f"rank 1 (process {victim.pid} on {socket.gethostname()})" in ended["why"]
    assert f"(process {victim.pid} on" in said.read_text()
    assert status(folder)["stages"] == {"recover": "failed"}


WATCHED = """
import os, signal, sys, time
from cap_llm.runtime import watch
watch.HEARTBEAT, watch.DEAD_RANK_GRACE = 0.2, 1.0
watch.HEARTBEAT_TIMEOUT, watch.DEADLOCK_TIMEOUT = 4.0, 2.0
from cap_llm.runtime.world import World
world = World("cpu")
print(f"rank {world.rank} is {os.getpid()}", flush=True)
if sys.argv[1] == "work":  # one rank is busy for longer than any limit, the other one waits for it
    time.sleep(6 if world.is_main else 0)
    world.barrier()
elif sys.argv[1] == "halt":  # both wait, but not for the same
    with world.bounded("step 3"):
        time.sleep(3600) if world.is_main else world.barrier()
elif sys.argv[1] == "gone":  # what a wait for a GPU is like: nothing breaks, no signal is heard
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(3600) if world.is_main else os._exit(1)
else:
    world.barrier() if world.is_main else time.sleep(3600)
world.close()
"""


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("work", None),
        ("halt", "rank 0 at step 3, rank 1 at a barrier"),
        ("gone", r"rank 1 (process "),
        ("vanish", "heartbeat from rank 1"),
        ("silence", "heartbeat from rank 0"),  # the launcher holds the ranks' store
    ],
)
def test_ranks_that_cannot_go_on_end_and_say_why(what, reason, tmp_path):
    script, said = tmp_path / "watched.py", tmp_path / "said"
    script.write_text(WATCHED)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    with open(said, "w", encoding="utf-8") as out:
        launcher = subprocess.Popen(
            [sys.executable, *command, str(script), what],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        if what == "vanish":
            wait_for(lambda: "rank 1 is" in said.read_text())
            rank = psutil.Process(int(re.search(r"rank 1 is (\d+)", said.read_text()).group(1)))
            rank.suspend()
            wait_for(lambda: "heartbeat" in said.read_text())
            rank.kill()
        if what == "silence":
            wait_for(lambda: said.read_text().count(" is ") == 2)
            ranks = ranks_of(launcher)
            psutil.Process(launcher.pid).suspend()
            # One of them may say it and end before the other one's patience is at its end.
            wait_for(lambda: all(rank.status() == psutil.STATUS_ZOMBIE for rank in ranks))
            psutil.Process(launcher.pid).resume()
        code = launcher.wait(timeout=PATIENCE)
    assert (code == 0) == (reason is None), said.read_text()
    assert reason is None or reason in said.read_text()


# two jobs, one directory


def left_by_another_node(folder: Path, job_id: str | None) -> None:
    folder.mkdir()
    content = {"host": "another-node", "pid": 1, "job": job_id}
    (folder / "run.lock").write_text(json.dumps(content))


def test_a_job_of_another_node_is_noticed_without_locks(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 1.5)
    monkeypatch.setattr(lock.fcntl, "flock", lambda *args: None)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    folder = tmp_path / "run"
    left_by_another_node(folder, "12")
    waits = []

    def sleep(seconds: float) -> None:  # the other one gives a sign of life meanwhile
        waits.append(seconds)
        os.utime(folder / "run.lock", (1, 1))

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with pytest.raises(UserError, match="job 12 on another-node"):
        lock.Lock(folder, QUIET)
    assert waits


def test_what_a_dead_job_of_another_node_left_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "WATCH", 1.5)
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    left_by_another_node(tmp_path / "run", "12")
    lock.Lock(tmp_path / "run", QUIET).close()
    # a requeued job may come to another node: it is the same job
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: pytest.fail("it waits for itself"))
    (tmp_path / "run" / "run.lock").write_text(
        json.dumps({"host": "another-node", "pid": 1, "job": "13"})
    )
    lock.Lock(tmp_path / "run", QUIET).close()


def test_a_requeued_job_waits_for_what_it_left_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    left = lock.Lock(tmp_path, QUIET)
    slept = []
    monkeypatch.setattr(lock.time, "sleep", lambda s: slept.append(s) or left._file.close())
    lock.Lock(tmp_path, QUIET).close()
    assert slept == [1.0]


# status and prefetch


def test_status_of_what_is_no_run(command, tmp_path):
    done = command("status", tmp_path)
    assert done.returncode == 2
    assert f"error: {tmp_path} is not a run directory" in done.stderr


@pytest.mark.parametrize("content", ["", "[]", "{}", "7", '{"code": "x"}', "\xff", "[" * 5000])
@pytest.mark.parametrize("name", ["run.lock", "ended.json", "metrics.jsonl", "config.yaml"])
def test_status_of_odd_files(tmp_path, name, content):
    (tmp_path / "config.yaml").write_text("stages: [oneshot, recover, evaluate]")
    (tmp_path / "run.lock").touch()
    (tmp_path / "oneshot").mkdir()
    (tmp_path / "oneshot" / "done.json").write_text("{}")
    (tmp_path / name).write_text(content, encoding="latin-1")
    found = status(tmp_path)
    assert "done" not in found["stages"].values()
    assert found["job"]


def test_evaluate_as_a_job_of_its_own_scores_what_earlier_jobs_made(command, recipe, tmp_path):
    run = tmp_path / "run"
    for stage in ("oneshot", "evaluate"):
        done = command("--config", recipe, "--output_dir", run, "--stages", f"[{stage}]")
        assert done.returncode == 0, done.stderr
    assert (run / "oneshot" / "scores.json").exists()
    assert "SparseGPT 50%" in (run / "report.md").read_text()
    found = status(run)
    assert found["stages"] == {"oneshot": "done", "evaluate": "done"}
    assert re.fullmatch(r"the last job ended .* ago: done", found["job"])


class Hub:
    """A stand-in: no hub can be reached where the tests run."""

    rows = {
        "wikitext2": ["", " = A title = \n", " Some words . \n", ""],
        "ptb": ["one sentence", "another one <unk>"],
    }

    def load_dataset(self, repository, split, verification_mode, **options):
        name = "wikitext2" if "wikitext" in repository else "ptb"
        return {corpora._SOURCES[name, split].column: self.rows[name]}


def test_fetched_corpora_read_as_the_hubs(tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    shard = tmp_path / "shard.json.gz"
    corpora.gzip.open(shard, "wt").write('{"text": "a document", "url": "u"}\n')
    monkeypatch.setattr(datasets, "load_dataset", Hub().load_dataset)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *args, **options: str(shard))
    for name, split in (("wikitext2", "train"), ("wikitext2", "test"), ("ptb", "test")):
        corpora.fetch_corpus(name, split, tmp_path / "data")
    for split in ("train", "validation"):
        corpora.fetch_corpus("c4", split, tmp_path / "data")
    monkeypatch.setenv("CAP_LLM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert corpora.read_corpus("wikitext2", "train").documents == Hub.rows["wikitext2"]
    assert corpora.read_corpus("wikitext2", "test").documents == Hub.rows["wikitext2"]
    assert corpora.read_corpus("ptb", "test").documents == Hub.rows["ptb"]
    assert corpora.read_corpus("c4", "train").documents == ["a document"]


def test_prefetch_brings_all_that_a_recipe_names(settings, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot(name, revision, allow_patterns, local_files_only):
        asked.append((name, local_files_only))
        return settings["model"]["path"]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    fetched = []
    monkeypatch.setattr(corpora, "fetch_corpus", lambda *args: fetched.append(args[:2]))
    args = ["--config", "opt-125m-50", "--output_dir", "run", "--recover.teacher", "some/teacher"]
    config, *_ = read_config([*args, "--stages", "[oneshot, recover, evaluate]"])
    prefetch.fetch(config, tmp_path, QUIET)
    assert asked == [("facebook/opt-125m", False), ("some/teacher", False)]
    assert fetched == [("c4", "train"), ("wikitext2", "test"), ("c4", "validation")]


def test_prefetch_ends_with_a_dry_run_without_the_hub(recipe, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("HF_HOME", "restored afterwards")
    prefetch.main([str(recipe), "--to", str(tmp_path / "fetched")], Console())
    said = capfd.readouterr().out
    assert "dry run: nothing was written" in said
    assert f"CAP_LLM_DATA={tmp_path / 'fetched' / 'data'}" in said


def test_prefetch_names_what_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", "restored afterwards")
    with pytest.raises(UserError, match="model.path .facebook/opt-125m. .*cap-llm prefetch"):
        prefetch.main(["opt-125m-50", "--to", str(tmp_path / "fetched")], QUIET)
