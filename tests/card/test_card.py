"""The pipeline on a simulated card: where its tensors lie, its types, its DeepSpeed accelerator."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import environment

from cap_llm.runtime.files import read_json, read_metrics

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    """Of a process that simulates a card."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not compiler:
        pytest.skip("no C++ compiler")
    if torch.version.cuda:
        pytest.skip("this torch brings the CUDA that a guard would be registered beside")
    torch_at = Path(importlib.util.find_spec("torch").origin).parent
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    command = [compiler, "-shared", "-fPIC", "-std=c++20", f"-I{torch_at}/include"]
    command += [str(HERE / "guard.cpp"), f"-L{torch_at}/lib", "-lc10", "-ltorch_cpu"]
    subprocess.run([*command, "-o", str(library)], check=True)
    return environment() | {"DS_ACCELERATOR": "cuda", "CARD_GUARD": str(library)}


def options(model: Path, text: Path, stages: str, **more) -> list[str]:
    found = {"model__path": model, "stages": f"[{stages}, evaluate]"}
    found |= {"calibration__corpus": text, "calibration__length": 32}
    found |= {"calibration__sequences": 6, "calibration__held_out": 2}
    found |= {"evaluate__corpora": f"[{text.with_name('scored.txt')}]"}
    found |= {"evaluate__window": 64, "evaluate__max_windows": 4}
    found |= {"reconstruct__dtype": "float32", "recover__optimizer__dtype": "float32"}
    found |= {
        "recover__corpus": text,
        "recover__optimizer__tokens": 4 * 4 * 64,
        "recover__length": 64,
    }
    found |= {"recover__sequences": 32, "recover__optimizer__batch": 4, "recover__held_out": 4}
    found |= {"recover__optimizer__lr": 0.003, "recover__objective__feature": 0.5}
    found |= {"recover__objective__prc": 0.1}
    found |= {"recover__contrast__token_positions": 16, "recover__contrast__extra_negatives": 4}
    found |= {"recover__checkpoint__every": 3, "recover__log__evaluate_every": 3, **more}
    return [w for k, v in found.items() for w in (f"--{k.replace('__', '.')}", str(v))]


ALL = "oneshot, sds, reconstruct"
FIXED = {"sds__adjust": "false"}  # its iterations may go another way from a last bit on
# name -> family, stages, settings
BLOCKWISE = {
    "halves": (
        "llama",
        ALL,
        {"reconstruct__split_attention": "true", "reconstruct__inputs": "dense"} | FIXED,
    ),
    "spilled": ("opt", "oneshot", {"oneshot__pattern": "2:4", "runtime__activation_gib": 1e-6}),
    "OWL": ("gpt2", "oneshot", {"oneshot__method": "wanda", "oneshot__allocation": "owl"}),
    "ADMM": ("neox", "oneshot", {"oneshot__method": "admm_grad"}),
    "ALPS": ("bloom", "oneshot", {"oneshot__method": "alps", "oneshot__refit": "true"}),
    "bfloat16": ("qwen3", ALL, {"reconstruct__dtype": "auto"}),
}
SCHEDULE = {  # and all terms; of masks that no rounding error turns
    "oneshot__method": "magnitude",
    "recover__engine__deepspeed": "zero3_offload",
    "recover__optimizer__tokens": 2 * 4 * 64,
    "recover__engine__gradient_checkpointing": "true",
    "recover__masks__schedule": "0.6, 0.7",
    "recover__finetuned": "train",
    "recover__objective__snc": 0.1,
}
RECOVERY = {
    "zero0": {"recover__engine__deepspeed": "zero0"},
    "zero2": {"recover__engine__deepspeed": "zero2"},
    "zero3": {"recover__engine__deepspeed": "zero3", "recover__optimizer__dtype": "bfloat16"},
    "schedule": SCHEDULE,
}
# DeepSpeed trains it on cards alone; its loss scale begins too high.
FLOAT16 = {
    f"float16 {zero}": {
        "recover__engine__deepspeed": zero,
        "recover__optimizer__dtype": "float16",
        "recover__optimizer__tokens": 8 * 4 * 64,
    }
    for zero in ("zero2", "zero3")
}
ON_TWO = ("halves", "zero3")
SIXTEEN_BITS = ("bfloat16", "zero3", *FLOAT16)


@dataclass
class Outcome:
    """Of a case: each stage's perplexity, the losses of its steps, which of them stepped."""

    ppls: list[float]
    losses: list[float]
    stepped: list[bool]


@pytest.fixture(scope="module")
def run(tiny, text_file, tmp_path_factory, env):
    """Runs cases on the ranks of a device; returns what became of each."""
    text_file.with_name("scored.txt").write_text(text_file.read_text()[::-1])
    llama = tiny("llama")
    found = {
        n: (tiny(family, dtype=torch.bfloat16 if n == "bfloat16" else torch.float32), *more)
        for n, (family, *more) in BLOCKWISE.items()
    }
    found |= {n: (llama, "oneshot, recover", more) for n, more in (RECOVERY | FLOAT16).items()}
    cases = {n: options(m, text_file, stages, **more) for n, (m, stages, more) in found.items()}

    def run(device: str, names: Iterable[str], ranks: int = 1) -> dict[str, Outcome]:
        folder = tmp_path_factory.mktemp(device)
        # a contrast's candidates are those of all ranks' micro-batches
        each = ["--recover.engine.micro_batch", str(2 // ranks)]
        (folder / "cases.json").write_text(json.dumps({n: cases[n] + each for n in names}))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        command = [*(launcher if ranks > 1 else []), str(HERE / "worker.py"), str(folder), device]
        done = subprocess.run(
            [sys.executable, *command],
            env=env | {"DS_ACCELERATOR": device},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        outcomes = {}
        for name in names:
            place = folder / device / name
            stages = found[name][1].split(", ")
            files = [read_json(place / stage / "scores.json") for stage in stages]
            ppls = [score["value"] for file in files for score in file["scores"]]
            rows = read_metrics(place)
            losses = {(r["stage"], r["step"]): r["value"] for r in rows if r["name"] == "loss"}
            norms = {(r["stage"], r["step"]) for r in rows if r["name"] == "grad_norm"}
            stepped = [step in norms for step in losses]
            outcomes[name] = Outcome(ppls, [*losses.values()], stepped)
        return outcomes

    return run


@pytest.fixture(scope="module")
def on_card(run) -> dict[str, Outcome]:
    return run("cuda", [*BLOCKWISE, *RECOVERY, *FLOAT16])


def agree(one: dict[str, Outcome], other: dict[str, Outcome]) -> None:
    for name, outcome in one.items():
        tolerance = 3e-2 if name in SIXTEEN_BITS else 1e-4  # rounding turns masks
        assert other[name].ppls == pytest.approx(outcome.ppls, rel=tolerance), name
        assert other[name].losses == pytest.approx(outcome.losses, rel=tolerance), name


def test_a_card_gives_what_a_cpu_gives(run, on_card):
    agree(run("cpu", [*BLOCKWISE, *RECOVERY]), on_card)


def test_two_cards_give_what_one_gives(run, on_card):
    agree(run("cuda", ON_TWO, ranks=2), on_card)


def test_float16_leaves_out_steps_that_overflow_and_trains(on_card):
    for name in FLOAT16:
        outcome, float32 = on_card[name], on_card["zero2"]
        assert 2 < sum(outcome.stepped) < len(outcome.stepped)
        assert outcome.losses[0] == pytest.approx(float32.losses[0], rel=1e-3)
        assert outcome.ppls[-1] < 0.98 * outcome.ppls[0]


def test_the_simulation_refuses_what_a_card_would(env):
    done = subprocess.run(
        [sys.executable, str(HERE / "refused.py")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
