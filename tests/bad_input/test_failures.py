"""What shows only during the work: finished blocks are kept, and real processes say it too."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from damage import DOWN_1, UP_0, UP_1, assert_one_line, change_weights, finished_blocks, leftovers
from support import environment

from cap_llm import preflight, train
from cap_llm.blockwise import oneshot as oneshot_stage
from cap_llm.runtime import interrupt, lock
from cap_llm.runtime.console import Console
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.launcher import read_launch
from cap_llm.solvers import methods
from cap_llm.solvers.hessian import factorize

# what shows only during the work; finished blocks are kept


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named_and_the_block_before_is_kept(
    refuse, broken, out, value
):
    change_weights(broken, lambda t: t[DOWN_1].__setitem__((3, 5), value))
    message = refuse("--model.path", broken, started=True)
    assert DOWN_1 in message and "NaN or infinite" in message and "model.safetensors" in message
    assert finished_blocks(out) == ["00000.json"]
    assert not leftovers(out)


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
@pytest.mark.parametrize(("weight", "kept"), [(UP_0, []), (UP_1, ["00000.json"])])
def test_activations_that_overflow_are_named_and_finished_blocks_are_kept(
    refuse, broken, out, method, weight, kept
):
    change_weights(broken, lambda t: t[weight].fill_(1e30))
    message = refuse("--model.path", broken, "--oneshot.method", method, started=True)
    assert f"input of {weight.replace('up_proj.weight', 'down_proj')}" in message
    assert "bfloat16 or float32" in message
    assert finished_blocks(out) == kept
    assert not leftovers(out)


def test_a_hessian_that_no_damping_mends_is_named():
    indefinite = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    with pytest.raises(UserError, match=r"blocks\.3\.fc1.*damping 10\b.*calibration\.sequences"):
        factorize(indefinite, 0.01, "blocks.3.fc1")


def test_a_hessian_that_fails_in_a_later_block_keeps_the_finished_ones(
    refuse, accept, out, monkeypatch
):
    def spoilt(hessian, damping, name):
        if "layers.1." in name:
            far = 1e6 * hessian.diagonal().mean()
            hessian[0, 1] = hessian[1, 0] = far  # no longer a matrix of second moments
        return factorize(hessian, damping, name)

    with monkeypatch.context() as patch:
        patch.setattr(methods, "factorize", spoilt)
        message = refuse(started=True)
    assert "Hessian of model.layers.1.self_attn.q_proj" in message
    assert "--calibration.sequences" in message
    assert finished_blocks(out) == ["00000.json"]
    assert "going on at block 2 of 2" in accept()


def test_a_model_whose_perplexity_overflows_is_refused(refuse, broken, scored):
    change_weights(broken, lambda t: t["lm_head.weight"].fill_(1e38))
    stage = ["--stages", "[evaluate]", "--evaluate.corpora", f"[{scored}]"]
    message = refuse("--model.path", broken, *stage, started=True)
    assert str(broken) in message and "not finite" in message


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of its own size, which can be full."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(place)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def grow(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=8m", str(place)], check=True)


@pytest.fixture
def six_blocks(tiny) -> Path:
    """Blocks of 120 kB each."""
    return tiny("llama", num_hidden_layers=6, intermediate_size=256)


def test_a_full_disk_is_named_and_the_same_command_goes_on(
    refuse, accept, six_blocks, small_disk, monkeypatch
):
    run = small_disk / "run"
    args = ["--model.path", six_blocks, "--output_dir", run]
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    message = refuse(*args, started=True)
    assert f"the disk of {run / 'oneshot'}" in message and "is full" in message
    kept = finished_blocks(run)
    assert 1 <= len(kept) < 6
    assert not leftovers(run)
    grow(small_disk)
    assert f"going on at block {len(kept) + 1} of 6" in accept(*args)
    assert (run / "oneshot" / "done.json").exists()


def test_a_disk_that_is_full_from_the_start_is_named_and_can_be_freed(
    refuse, accept, small_disk, monkeypatch
):
    run = small_disk / "run"
    monkeypatch.setattr(preflight, "check_disk", lambda *_: None)
    with pytest.raises(OSError) as full, open(small_disk / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    assert full.value.errno == errno.ENOSPC
    message = refuse("--output_dir", run, started=True)
    assert "is full" in message
    (small_disk / "ballast").unlink()
    accept("--output_dir", run)


# what launchers and SLURM say

MEET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MEET


@pytest.fixture
def launch(monkeypatch):
    """Sets the variables of a launcher; no other ones are left."""

    def run(variables: dict[str, str]) -> None:
        for name in (*TWO, "LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_JOB_END_TIME"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return run


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "999999999"}, "WORLD_SIZE"),
        ({"RANK": "1"}, "RANK"),
        ({"RANK": "1.0"}, "RANK"),
        (TWO | {"RANK": "5"}, "RANK"),
        (TWO | {"RANK": ""}, "RANK"),
        (TWO | {"LOCAL_RANK": "x"}, "LOCAL_RANK"),
        ({"LOCAL_RANK": "-2"}, "LOCAL_RANK"),
        (TWO | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE"),
        (TWO | {"MASTER_ADDR": ""}, "MASTER_ADDR"),
        (TWO | {"MASTER_PORT": ""}, "MASTER_PORT"),
        (TWO | {"MASTER_PORT": "port"}, "MASTER_PORT"),
        (TWO | {"MASTER_PORT": "70000"}, "MASTER_PORT"),
        ({"SLURM_JOB_END_TIME": "abc"}, "SLURM_JOB_END_TIME"),
        ({"SLURM_JOB_END_TIME": "1e300"}, "SLURM_JOB_END_TIME"),
    ],
    ids=str,
)
def test_an_odd_variable_of_a_launcher_is_named(refuse, launch, variables, named):
    launch(variables)
    assert named in refuse("--dry-run")


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "odd"},
        {"RANK": "", "WORLD_SIZE": "", "LOCAL_RANK": ""},
        {"LOCAL_RANK": "-1", "LOCAL_WORLD_SIZE": "8"},
    ],
    ids=str,
)
def test_what_a_launcher_left_to_a_single_process_changes_nothing(launch, variables):
    launch(variables)
    found = read_launch()
    assert (found.rank, found.size, found.local_rank, found.local_size) == (0, 1, 0, 1)
    assert found.address is None


def test_an_earlier_jobs_time_limit_does_not_stop_this_one(launch):
    launch({"SLURM_JOB_END_TIME": "12"})
    interrupt.stop_before_limit(60.0)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_rank_that_waits_names_who_is_missing():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = TWO | {"RANK": "0", "WORLD_SIZE": "12", "MASTER_PORT": port}
    code = "from cap_llm.runtime import world\n"
    code += "world.START_TIMEOUT, world.START_WARNING = 1.0, 0.2\n"
    code += "world.World('cpu')"
    command = [sys.executable, "-c", code]
    waiting = subprocess.run(
        command,
        env=environment() | rank,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    assert "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 3 more" in waiting.stderr
    assert waiting.stderr.count("waiting for ranks 1, 2") == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_rank_that_waits_hears_signals(number):
    code = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)  # though under nohup\n"
    code += "from cap_llm.runtime import interrupt, world\ninterrupt.raise_on_signals()\n"
    code += "print('here', flush=True)\nworld.World('cpu')"
    rank = TWO | {"MASTER_PORT": "1"}  # where nobody answers
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(command, env=environment() | rank, stdout=subprocess.PIPE)
    process.stdout.readline()
    time.sleep(1.0)
    process.send_signal(number)
    assert process.wait(timeout=20) in (-number, 128 + number)


def test_nohup_keeps_its_promise():
    code = "from cap_llm.runtime import interrupt\ninterrupt.raise_on_signals()\n"
    code += "import os, signal\nos.kill(os.getpid(), signal.SIGHUP)\nprint('lives')"
    command = ["nohup", sys.executable, "-c", code]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "lives\n"


# what killed jobs and others left in the run directory


def test_what_a_killed_job_left_is_swept_and_nothing_else(tmp_path):
    run = tmp_path / "run"
    names = [".scratch-ab12/spilled", ".scratch-file", "oneshot/blocks/.00000.json.0123abcd.tmp"]
    kept = ["oneshot/.hidden", "oneshot/blocks/00000.json", "notes.tmp", ".x.tmp"]
    kept += ["inner/run.lock", "inner/.scratch-ab12/spilled"]  # another run, which may be at work
    for name in (*names, *kept):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("")
    held = lock.Lock(run, Console(enabled=False))
    left = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert left == {*kept, "run.lock"}
    (run / ".scratch-living").mkdir()
    with pytest.raises(UserError, match=f"output_dir {run}"):
        lock.Lock(run, Console(enabled=False))
    assert (run / ".scratch-living").exists()
    held.close()


@pytest.mark.parametrize(
    "content",
    ["", "{}", "[]", '"x"', "\0", '{"host": 1}', "[" * 5000]
    + [json.dumps({"host": "h", "pid": pid, "job": None}) for pid in (-1, "1", 10**30)],
    ids=lambda text: text[:30],
)
def test_an_odd_lock_is_taken_over(tmp_path, content):
    (tmp_path / lock.FILE).write_text(content)
    assert lock.holder(tmp_path) is None
    lock.Lock(tmp_path, Console(enabled=False)).close()


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
@pytest.mark.parametrize("name", [lock.FILE, "log.txt"])
def test_a_folder_or_fifo_in_a_files_place_is_named(refuse, out, make, name):
    if (make, name) == (os.mkfifo, "log.txt"):
        pytest.skip("opened for writing, a fifo waits for a reader: the user's own wish")
    out.mkdir()
    (out / lock.FILE).touch()
    (out / name).unlink(missing_ok=True)
    make(out / name)
    assert name in refuse(started=True)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "file/run", "new/" + "y" * 256])
def test_an_output_dir_that_cannot_be_is_named(refuse, tmp_path, name):
    (tmp_path / "file").write_text("")
    for more in ([], ["--dry-run"]):
        message = refuse("--output_dir", tmp_path / name, *more)
        assert message.startswith("output_dir ")


def test_a_read_only_output_dir_is_named_before_the_work(refuse, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for place in (small_disk, small_disk / "new" / "run"):
        message = refuse("--output_dir", place)
        assert f"output_dir {place}" in message


def test_an_error_of_a_file_is_one_line(monkeypatch, capsys):
    def work(console):
        Path("/proc/self/nothing/there").read_text()

    assert train.guarded(work, "cap-llm") == 2
    assert capsys.readouterr().err == (
        "cap-llm: error: /proc/self/nothing/there: No such file or directory\n"
    )


def test_names_are_printed_as_they_are(capfd, tmp_path):
    console = Console()
    console.log_to(tmp_path / "log.txt")
    console.say("[/] [bold] :smile: \udcff")
    console.table("", ["run [/]", "ppl"], [["[/x] :+1: \udcff", "1"]])
    said = capfd.readouterr().out
    assert "[/] [bold] :smile: \\udcff" in said and "[/x] :+1: \\udcff" in said
    assert "[/x] :+1: \\udcff" in (tmp_path / "log.txt").read_text()


# real processes


def test_a_reader_that_has_gone_ends_the_run_quietly(base, out, accept):
    command = [sys.executable, train.__file__, *base]
    process = subprocess.Popen(
        command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=120) == 128 + signal.SIGPIPE
    ended = out / lock.ENDED  # not there where the first word comes before the run directory
    assert not ended.exists() or "SIGPIPE" in json.loads(ended.read_text())["why"]
    accept()


def test_a_bad_option_is_one_line_of_a_real_process_too(command):
    result = command("--oneshot.sparsty", "0.7")
    assert_one_line(result.returncode, result.stderr)
    assert "did you mean --oneshot.sparsity?" in result.stderr
    assert result.stdout == ""


def test_a_failure_during_the_work_is_one_line_of_a_real_process_too(command, base, broken, out):
    change_weights(broken, lambda t: t[DOWN_1].fill_(float("nan")))
    result = command(*base, "--model.path", broken)
    assert_one_line(result.returncode, result.stderr)
    assert DOWN_1 in result.stderr
    assert "block   1/2" in result.stdout
    assert finished_blocks(out) == ["00000.json"]


def test_more_ranks_than_sequences_are_refused(base, out):
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    result = subprocess.run(
        [sys.executable, *launcher, train.__file__, *base, "--calibration.sequences", "1"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    said = [line for line in result.stderr.splitlines() if line.startswith("cap-llm: error: ")]
    assert len(said) == 1
    assert "calibration.sequences is 1, fewer than the 2 ranks" in said[0]
    assert not finished_blocks(out)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_stopped_job_says_how_to_go_on_and_does(base, command, out, tiny, number, code):
    args = [*base, "--model.path", str(tiny("llama", num_hidden_layers=40))]
    job = processes.killed(args, out / "log.txt", "block   3/40", number)
    assert job.returncode == code
    assert job.stderr.startswith("cap-llm: interrupted") and job.stderr.count("\n") == 1
    kept = len(finished_blocks(out))
    assert 3 <= kept < 40
    assert not leftovers(out)
    if number == signal.SIGTERM:
        again = command(*args)
        assert again.returncode == 0, again.stderr
        assert f"going on at block {kept + 1} of 40" in again.stdout
        assert (out / oneshot_stage.STAGE / "done.json").exists()
