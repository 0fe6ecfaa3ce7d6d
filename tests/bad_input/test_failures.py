"""What shows only during the work: finished blocks are kept, and real processes say it too."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from damage import DOWN_1, UP_0, UP_1, assert_one_line, change_weights, finished_blocks, leftovers
from support import signalled

from cap_llm import train
from cap_llm.blockwise import oneshot as oneshot_stage
from cap_llm.blockwise import plan, prune
from cap_llm.runtime.errors import UserError
from cap_llm.solvers.hessian import factorise

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
    assert f"the input of {weight.replace('up_proj.weight', 'down_proj')} is not finite" in message
    assert "overflows" in message and "bfloat16 or float32" in message
    assert finished_blocks(out) == kept
    assert not leftovers(out)


def test_a_hessian_that_no_damping_mends_is_named():
    indefinite = torch.tensor([[1.0, 100.0], [100.0, 1.0]])
    with pytest.raises(UserError, match=r"Hessian of blocks\.3\.fc1.*damping 10:.*sequences"):
        factorise(indefinite, 0.01, "blocks.3.fc1")


def test_a_hessian_that_fails_in_a_later_block_keeps_the_finished_ones(
    refuse, accept, out, monkeypatch
):
    def spoilt(hessian, damping, name):
        if "layers.1." in name:
            far = 1e6 * hessian.diagonal().mean()
            hessian[0, 1] = hessian[1, 0] = far  # no longer a matrix of second moments
        return factorise(hessian, damping, name)

    with monkeypatch.context() as patch:
        patch.setattr(prune, "factorise", spoilt)
        message = refuse(started=True)
    assert "the Hessian of model.layers.1.self_attn.q_proj is not positive definite" in message
    assert "--calibration.sequences" in message
    assert finished_blocks(out) == ["00000.json"]
    assert "going on at block 2 of 2" in accept()


def test_a_model_whose_perplexity_overflows_is_refused(refuse, broken, scored):
    change_weights(broken, lambda t: t["lm_head.weight"].fill_(1e38))
    stage = ["--stages", "[evaluate]", "--evaluate.corpora", f"[{scored}]"]
    message = refuse("--model.path", broken, *stage, started=True)
    assert f"perplexity of {broken} is not finite" in message and "overflows" in message


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
    monkeypatch.setattr(plan, "check_disk", lambda needed, made, config: None)
    message = refuse(*args, started=True)
    assert f"the disk of {run / 'oneshot'}" in message and "is full" in message
    assert "free some space and give the same command again" in message
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
    monkeypatch.setattr(plan, "check_disk", lambda needed, made, config: None)
    with pytest.raises(OSError) as full, open(small_disk / "ballast", "wb", buffering=0) as ballast:
        while True:
            ballast.write(bytes(4096))
    assert full.value.errno == errno.ENOSPC
    message = refuse("--output_dir", run, started=True)
    assert "is full" in message
    (small_disk / "ballast").unlink()
    accept("--output_dir", run)


# real processes


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
    assert "at least one sequence a rank" in said[0]
    assert not finished_blocks(out)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_job_says_how_to_go_on_and_does(base, command, out, tiny, number, code):
    args = [*base, "--model.path", str(tiny("llama", num_hidden_layers=40))]
    job = signalled(out, "block   3/40", number, args)
    assert job.returncode == code
    assert job.stderr == "cap-llm: stopped; give the same command again to go on\n"
    kept = len(finished_blocks(out))
    assert 3 <= kept < 40
    assert not leftovers(out)
    if number == signal.SIGTERM:
        again = command(*args)
        assert again.returncode == 0, again.stderr
        assert f"going on at block {kept + 1} of 40" in again.stdout
        assert (out / oneshot_stage.STAGE / "done.json").exists()
