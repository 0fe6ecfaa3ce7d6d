"""The stage `recover` through the real entry: launchers, exit codes, signals."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from launches import BATCH, LENGTH, arguments, end
from readings import assert_zeros, checkpoints
from support import environment

from cap_llm import train
from cap_llm.cli.command_line import read_config
from cap_llm.pipeline import pipeline
from cap_llm.runtime.console import Console


def launched(launcher: list[str], options: dict, timeout: int = 120) -> subprocess.Popen:
    with subprocess.Popen(
        [*launcher, train.__file__, *arguments(options)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as job:
        try:
            said, _ = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end(job)
            said, _ = job.communicate()
            said += "\n... and no end"
    return subprocess.CompletedProcess(job.args, job.returncode, said)


def test_recover_is_a_job_of_its_own_after_oneshot_and_zero3_ends_with_0(assets, tmp_path):
    settings = assets.options(tmp_path / "run", 2) | {"model.path": assets.dense}
    settings |= {"recover.teacher": "null", "recover.optimizer.tokens": 2 * BATCH * LENGTH}
    config, text, _ = read_config(arguments(settings | {"stages": "[oneshot]"}))
    pipeline(config, text, Console(enabled=False))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    settings |= {"recover.engine.deepspeed": "zero3"}
    training = launched([*torchrun, "--nproc_per_node", "2"], settings)
    assert training.returncode == 0, training.stdout
    assert "FutureWarning" not in training.stdout
    assert_zeros(tmp_path / "run" / "recover", tmp_path / "run" / "oneshot")
    for path in ("ds_config.json", "ds_config_teacher.json"):
        used = json.loads((tmp_path / "run" / path).read_text())
        assert used["zero_optimization"]["stage"] == 3
    assert (tmp_path / "run" / "report.md").exists()


def test_the_deepspeed_launcher_ends_with_0(assets, tmp_path):
    launcher = str(Path(sys.executable).with_name("deepspeed"))
    if not Path(launcher).exists():
        pytest.skip("no deepspeed launcher")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    settings = assets.options(tmp_path / "run", 2) | {
        "recover.optimizer.tokens": 2 * BATCH * LENGTH
    }
    job = launched([launcher, "--num_accelerators", "2", "--master_port", port], settings)
    assert job.returncode == 0, job.stdout
    assert_zeros(tmp_path / "run" / "recover", assets.half)


def test_torchrun_with_one_process_works_too(assets, tmp_path):
    settings = assets.options(tmp_path / "run", 1) | {
        "recover.optimizer.tokens": 2 * BATCH * LENGTH
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = launched([*torchrun, "--nproc_per_node", "1"], settings, timeout=60)
    assert job.returncode == 0, job.stdout[-2000:]


@pytest.mark.parametrize(("loads", "ends"), [("os", True), ("deepspeed", False)])
def test_an_entry_that_has_loaded_deepspeed_leaves_without_pythons_own_end(loads, ends):
    code = f"import atexit, sys, {loads}\nfrom cap_llm import train\n"
    code += "atexit.register(print, 'the end')\nprint('all done')\ntrain.leave(3)"
    python = [sys.executable, "-c", code]
    done = subprocess.run(python, env=environment(), stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 3
    assert "all done" in done.stdout  # flushed
    assert ("the end" in done.stdout) == ends


def test_a_real_signal_ends_a_training_with_143_and_a_checkpoint(assets, tmp_path):
    settings = assets.options(tmp_path / "run", 1)
    settings |= {"recover.optimizer.tokens": 150 * BATCH * LENGTH, "recover.sequences": 24}
    settings |= {"recover.checkpoint.every": 1000, "recover.log.evaluate_every": 10}
    log = tmp_path / "run" / "log.txt"
    job = processes.killed(arguments(settings), log, "step    20/150", signal.SIGTERM)
    assert job.returncode == 143, job.stderr
    assert "cap-llm: interrupted" in job.stderr
    step = int(re.search(r"checkpoint at step (\d+)/150", job.stdout).group(1))
    assert 20 <= step < 150
    assert checkpoints(tmp_path / "run") == [f"step-{step:06d}"]
