"""`keep_zeros` on two ranks under DeepSpeed's options that lay weights out in other ways.

Whatever a user's settings are, the training is that of plain ZeRO-2, or is refused: a mask never
lands on another parameter.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import environment

WORKER = Path(__file__).with_name("options_worker.py")
CPU = {"device": "cpu"}
ROUND_ROBIN = {"round_robin_gradients": True}
MODELS = {
    "plain": {},
    "tied, frozen, in groups, in 16 bits": {
        **{"tied": True, "frozen": True, "groups": True},
        "bf16": True,
    },
}
EQUAL = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero1 offload": {"stage": 1, "offload_optimizer": CPU},
    "zero2 offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3 offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU},
    "zero3 round robin": {"stage": 3} | ROUND_ROBIN,
    "zero2 not contiguous": {"stage": 2, "contiguous_gradients": False},
    "zero1 overlap": {"stage": 1, "overlap_comm": True},
    "zero2 overlap": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 64},
    "zero2 all-reduce": {"stage": 2, "reduce_scatter": False, "reduce_bucket_size": 100},
    "zero2 aligned": {"stage": 2, "parameter_alignment": True},
    "zero3 sub-groups": {"stage": 3, "sub_group_size": 300},
    "zero3 sub-groups offload": {"stage": 3, "sub_group_size": 300, "offload_optimizer": CPU},
    "zero3 hpZ": {"stage": 3, "zero_hpz_partition_size": 2},
    "zero3 no persistence": {"stage": 3, "stage3_param_persistence_threshold": 0},
}
REFUSED = {
    f"zero{stage} round robin{name}": {"stage": stage} | ROUND_ROBIN | offload
    for stage in (1, 2)
    for name, offload in (("", {}), (" offload", {"offload_optimizer": CPU}))
}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("options")
    cases = {
        f"{name}, {kind}": {"zero": zero} | model
        for kind, model in MODELS.items()
        for name, zero in EQUAL.items()
    }
    cases |= {name: {"zero": zero} for name, zero in REFUSED.items()}
    cases["rewired"] = {"zero": {"stage": 2}, "rewire": True}
    (folder / "cases.json").write_text(json.dumps(cases))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(WORKER), str(folder / "cases.json")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", EQUAL)
def test_every_layout_trains_as_plain_zero2(results, name, kind):
    plain, other = results[f"zero2, {kind}"], results[f"{name}, {kind}"]
    assert not isinstance(other, str), other
    assert other.keys() == plain.keys()
    for key, weight in plain.items():
        near = {"rtol": 0.01, "atol": 5e-3} if kind != "plain" else {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(other[key], weight, **near)


@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_deepspeed_links_wrongly_is_refused_by_its_name(results, name):
    assert "round_robin_gradients" in results[name]


def test_a_wrong_link_of_any_kind_is_refused_on_all_ranks(results):
    assert "fp32 weights that are not its own" in results["rewired"]
