"""Every file of `slurm/` on a real SLURM of two emulated nodes (`make test-slurm`; some minutes).

Skipped with a reason where no SLURM can be set up: it needs root and Debian's packages slurmctld,
slurmd, slurm-client and munge. The nodes' GPUs are pretended; a rank of a job computes on the CPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support import ROOT

BATCH, LENGTH = 4, 64
STEPS = 20
STAGES = ["oneshot", "reconstruct", "recover", "evaluate"]
PIPELINE = "runs/pipeline"  # the first test's run


class Cluster:
    """A running SLURM and a project to submit from."""

    def __init__(self, folder: Path, project: Path):
        self.project = project
        path = [str(Path(sys.executable).parent), os.environ["PATH"]]
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": os.pathsep.join(path),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "RANKS": "2",  # not one for each pretended GPU
            # both nodes are this machine
            "MASTER_ADDR": "127.0.0.1",
            "GLOO_SOCKET_IFNAME": "lo",
        }

    def run(self, *command, **env: str) -> str:
        done = subprocess.run(
            [str(part) for part in command],
            env=self.env | env,
            cwd=self.project,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def submit(self, *args, **env: str) -> str:
        return self.run("sbatch", "--parsable", *args, **env)

    def facts(self, job: str) -> dict[str, str]:
        shown = self.run("scontrol", "show", "job", job, "--oneliner")
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def wait(self, job: str, seconds: float = 900) -> dict[str, str]:
        """The facts of a job once it is over; it must have ended well."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            facts = self.facts(job)
            if facts["JobState"] not in ("PENDING", "RUNNING", "COMPLETING", "REQUEUED"):
                assert facts["JobState"] == "COMPLETED", f"{facts}\n{self.said()}"
                return facts
            if facts["JobState"] == "PENDING" and int(facts["Restarts"]):
                self.start_now(job)
            time.sleep(1)
        raise AssertionError(f"job {job} does not end\n{self.said()}")

    def start_now(self, job: str) -> None:
        """Takes away the wait of a requeued job: two minutes, so that its nodes are clean."""
        subprocess.run(
            ["scontrol", "update", f"JobId={job}", "StartTime=now"], env=self.env, check=False
        )

    def said(self) -> str:
        return "\n".join(p.read_text()[-3000:] for p in self.project.glob("slurm-*.out"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    project = tmp_path_factory.mktemp("project")
    for name in ("cap_llm", "ds_configs", "slurm"):
        (project / name).symlink_to(ROOT / name)
    (project / "eval").symlink_to(ROOT / "eval")
    folder = tmp_path_factory.mktemp("slurm")
    script = str(ROOT / "tests" / "slurm_cluster.sh")
    started = subprocess.run(["bash", script, "start", folder], capture_output=True, text=True)
    if started.returncode:
        pytest.skip(f"no SLURM here: {started.stdout.strip() or started.stderr.strip()}")
    found = Cluster(folder, project)
    yield found
    with contextlib.suppress(AssertionError):
        found.run("scancel", "--state=RUNNING", "--partition=gpu")
        found.run("scancel", "--state=PENDING", "--partition=gpu")
    subprocess.run(["bash", script, "stop", folder], check=True)


@pytest.fixture(scope="module")
def recipe(cluster, tiny, text_file) -> Path:
    """A recipe of a tiny model and a short text."""
    text = cluster.project / "text.txt"
    text.write_text("".join(text_file.read_text().splitlines(keepends=True)[:600]))
    scored = cluster.project / "scored.txt"
    scored.write_text("".join(text_file.read_text().splitlines(keepends=True)[600:700]))
    settings = {
        "stages": STAGES,
        "model": {"path": str(tiny("llama", num_hidden_layers=3))},
        "calibration": {"corpus": str(text), "sequences": 8, "length": LENGTH, "held_out": 4},
        "recover": {
            "corpus": str(text),
            "length": LENGTH,
            "optimizer": {"tokens": STEPS * BATCH * LENGTH, "batch": BATCH},
            "held_out": 4,
            "checkpoint": {"every": 10},
            "sequences": 40,
            "contrast": {"segments": 4, "token_positions": 8, "extra_negatives": 4},
        },
        "evaluate": {"corpora": [str(scored)], "window": LENGTH},
    }
    path = cluster.project / "tiny.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def losses(run: Path) -> dict[int, float]:
    """The loss of each step; of a step that was done again, the last one."""
    return {m["step"]: m["value"] for m in metrics(run, "loss")}


def metrics(run: Path, name: str) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [m for m in lines if m["name"] == name]


def step(run: Path) -> int:
    with contextlib.suppress(OSError, ValueError):
        return max(losses(run), default=0)
    return 0


def until(found, seconds: float = 900) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.5)


def status(cluster: Cluster, run: str) -> dict:
    return json.loads(cluster.run("python", "cap_llm/train.py", "status", run, "--json"))


def test_a_pipeline_that_was_killed_half_way_completes_only_what_is_missing(cluster, recipe):
    run = PIPELINE
    command = ["bash", "slurm/pipeline.sh", recipe, run]
    with subprocess.Popen(
        command, env=cluster.env, cwd=cluster.project, stdout=subprocess.PIPE, text=True
    ) as first:
        said = first.stdout.readline()
        first.kill()
    job = re.fullmatch(r"oneshot: job (\d+)\n", said).group(1)
    again = cluster.run(*command).splitlines()
    assert again[0] in (f"oneshot: job {job} is already in the queue", "oneshot: done")
    jobs = [re.search(r"job (\d+)", line).group(1) for line in again[1:]]
    assert [line.split(":")[0] for line in again] == STAGES
    third = cluster.run(*command).splitlines()
    assert [line.split("job ")[-1].split()[0] for line in third[1:]] == jobs
    cluster.wait(jobs[-1])
    found = status(cluster, run)
    assert found["stages"] == dict.fromkeys(STAGES, "done")
    assert cluster.run(*command).splitlines() == [f"{s}: done" for s in found["stages"]]
    scored = cluster.project / run
    assert all((scored / s / "scores.json").exists() for s in ("dense", *STAGES[:-1]))
    assert "sparsegpt + reconstruction + recovery 50%" in (scored / "report.md").read_text()


def test_two_nodes_train_as_one_does_though_one_of_them_goes_down(cluster, recipe):
    one, two, steps = "runs/one-node", "runs/two-nodes", 60
    options = ["--recover.engine.micro_batch", 2, "--recover.engine.deepspeed", "zero3"]
    options += ["--recover.optimizer.tokens", steps * BATCH * LENGTH]
    made = [cluster.submit("slurm/oneshot.sbatch", recipe, run, *options) for run in (one, two)]
    first = cluster.submit(
        f"--dependency=afterok:{made[0]}", "slurm/recover.sbatch", recipe, one, *options
    )
    cluster.wait(made[1])
    cluster.wait(first)
    job = cluster.submit("slurm/recover_multinode.sbatch", recipe, two, *options, RANKS="1")
    until(lambda: step(cluster.project / two) > 12)
    assert cluster.facts(job)["NumNodes"] == "2"
    cluster.run("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=test")
    until(lambda: cluster.facts(job)["Restarts"] == "1")
    cluster.run("scontrol", "update", "NodeName=node2", "State=RESUME")
    cluster.wait(job)
    one, two = cluster.project / one, cluster.project / two
    assert losses(one) == losses(two) and len(losses(one)) == steps
    assert json.loads((two / "recover" / "done.json").read_text())["levels"][0]["resumed_at_step"]


def test_the_array_and_its_comparison_give_one_report(cluster, recipe):
    job = cluster.submit("slurm/baselines.sbatch", recipe, "runs/baselines", RANKS="1")
    until(lambda: not cluster.run("squeue", "-h", "-o", "%i"))
    runs = cluster.project / "runs" / "baselines"
    assert len(list(runs.glob("*-*/oneshot/done.json"))) == 6, cluster.said()
    assert list(runs.glob("comparison/*")), f"of {job}: {cluster.said()}"


def test_a_training_stopped_by_its_limit_and_pre_empted_thrice_loses_nothing(cluster, recipe):
    rates = [m["value"] for m in metrics(cluster.project / PIPELINE, "tokens_per_second")]
    steps = max(60, round(100 * statistics.median(rates) / (BATCH * LENGTH)))  # about 100 seconds
    options = [
        "--recover.engine.micro_batch",
        2,
        "--recover.optimizer.tokens",
        steps * BATCH * LENGTH,
    ]
    options += ["--recover.checkpoint.every", 1000, "--recover.log.evaluate_every", 1000]
    disturbed, plain = "runs/disturbed", "runs/undisturbed"
    made = [
        cluster.submit("slurm/oneshot.sbatch", recipe, run, *options) for run in (disturbed, plain)
    ]
    for job in made:
        cluster.wait(job)
    job = cluster.submit("--signal=B:USR1@110", "slurm/recover.sbatch", recipe, disturbed, *options)
    folder, reached = cluster.project / disturbed, [0]

    def until_restarted(n: int) -> None:
        def restarted() -> bool:
            facts = cluster.facts(job)
            assert facts["JobState"] in ("PENDING", "RUNNING", "COMPLETING"), cluster.said()
            waits = int(facts["Restarts"]) == n and facts["JobState"] == "PENDING"
            return waits and (folder / "ended.json").exists()  # its ranks end a little later

        until(restarted)
        ended = json.loads((folder / "ended.json").read_text())
        assert ended["why"] in ("stopped by SIGUSR2", "stopped by SIGALRM", "stopped by SIGTERM")
        at = [p.parent.name for p in (folder / "recover").glob("checkpoints/1/*/complete.json")]
        assert max(at) == f"step-{step(folder):06d}"  # nothing was done twice
        assert step(folder) > reached[-1]
        reached.append(step(folder))

    def until_trained() -> None:
        until(lambda: step(folder) > reached[-1] + 5)

    until_trained()
    _, minutes, _ = cluster.facts(job)["RunTime"].split(":")
    limit = int(minutes) + 2  # so that the warning is due
    cluster.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")
    until_restarted(1)
    cluster.run("scontrol", "update", f"JobId={job}", "TimeLimit=600")
    for n in (2, 3, 4):
        cluster.start_now(job)
        until_trained()
        urgent = ("-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1")
        other = cluster.submit(*urgent)
        until_restarted(n)
        cluster.wait(other)
    cluster.start_now(job)
    facts = cluster.wait(job)
    assert facts["Restarts"] == "4"
    cluster.wait(cluster.submit("slurm/recover.sbatch", recipe, plain, *options))
    assert len(losses(folder)) == steps
    assert losses(folder) == losses(cluster.project / plain)
    print(f"stopped at steps {reached[1:]} of {steps}; all {steps} losses are equal")
