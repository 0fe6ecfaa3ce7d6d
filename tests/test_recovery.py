"""The stage `recover` in real gloo processes: ZeRO 0 to 3, resume, the ladder, and what is refused.

Three launches of `worker.py` (two ranks; then one and three) run all cases, since a start costs
more than a case; the tests look at what the run directories hold. The last ones are the real entry.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import ROOT, environment

from cap_llm import train
from cap_llm.command_line import read_config
from cap_llm.config import ObjectiveConfig, RecoverConfig
from cap_llm.models.checkpoint import fingerprint
from cap_llm.recovery import checkpoints as checkpoints_module
from cap_llm.recovery import engines
from cap_llm.recovery.training import learning_rate
from cap_llm.runtime.console import Console
from cap_llm.runtime.world import World
from cap_llm.text.corpora import calibration_corpus
from cap_llm.text.packing import pack
from cap_llm.text.tokenizers import load_tokenizer

WORKER = Path(__file__).with_name("worker.py")
CPU = torch.device("cpu")
ZERO = ("zero0", "zero1", "zero2", "zero3")
STEPS, BATCH, LENGTH, HELD_OUT = 8, 6, 64, 6
LOSSES = ("loss", "ce", "kl", "prc", "snc", "fic", "feature", "held_out_ppl", "grad_norm")
DOWN_0 = "model.layers.0.mlp.down_proj.weight"

MIXED = {
    "recover.tokens": 4 * BATCH * LENGTH,
    "recover.micro_batch": 1,
    "recover.dtype": "bfloat16",
    "recover.weight_decay": 0.1,
    "recover.clip": 0.5,
    "recover.gradient_checkpointing": "true",
    "recover.objective.feature": 0.5,
}
RUNG_STEPS = 5
LADDER = {
    "recover.ladder": "0.6, 0.7",
    "recover.finetuned": "train",
    "recover.tokens": RUNG_STEPS * BATCH * LENGTH,
}
# Checkpoints of two ranks, by the number that goes on: a conversion takes seconds.
RESUMED_ON = {1: ("zero0", "zero1", "zero3"), 3: ("zero0", "zero2", "zero3")}
NO_CONTRAST = {f"recover.objective.{name}": 0 for name in ("prc", "snc", "fic")}
FEATURE = {"recover.objective.feature": 0.5}


# the three launches


class Cases:
    """Cases of one launch, and what became of them once it has run."""

    def __init__(self, ranks: int, folder: Path, assets: Assets):
        self.ranks, self.folder, self.assets = ranks, folder, assets
        self.cases: list[dict] = []
        self.results: dict[str, dict] = {}

    def add(self, name: str, *patches, edits=(), out: str | None = None, **changes) -> Path:
        """Adds a case; `changes` are settings, with `__` for the dot. Returns its run directory."""
        place = self.out(out or name)
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        args = self.assets.options(place, self.ranks) | changes
        case = {"name": name, "args": arguments(args), "patches": patches, "edits": edits}
        self.cases.append(json.loads(json.dumps(case, default=str)))
        return place

    def out(self, name: str) -> Path:
        return self.folder / re.sub(r"\W", "-", name)

    def start(self) -> Cases:
        """Begins all cases in as many processes as there are ranks."""
        (self.folder / "cases.json").write_text(json.dumps(self.cases, indent=1))
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        launcher = [*torchrun, str(self.ranks)] if self.ranks > 1 else []
        with open(self.folder / "log.txt", "w") as log:
            self._job = subprocess.Popen(
                [sys.executable, *launcher, str(WORKER), str(self.folder)],
                env=environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        return self

    def wait(self) -> Cases:
        """Reads what became of them; nothing is left running."""
        try:
            code = self._job.wait(timeout=400)
        except subprocess.TimeoutExpired:
            code = "a time-out"
        self.stop()
        said = (self.folder / "log.txt").read_text()
        assert code == 0, f"{self.ranks} ranks end with {code}:\n{said[-8000:]}"
        self.results = json.loads((self.folder / "results.json").read_text())
        return self

    def stop(self) -> None:
        """Ends whatever of it still runs."""
        end(self._job)

    def outcome(self, name: str) -> dict:
        """What all ranks say of a case alike."""
        outcomes = self.results[name]["ranks"]
        for outcome in outcomes:
            assert not outcome["traceback"], outcome["traceback"]
            assert outcome == outcomes[0]
        return outcomes[0]

    def finished(self, name: str, out: str | None = None) -> Path:
        """The run directory of a case that must have ended well."""
        assert self.outcome(name) == {"error": None, "stopped": None, "traceback": None}
        assert (self.out(out or name) / "recover" / "done.json").exists()
        return self.out(out or name)

    def refused(self, name: str) -> str:
        """The message of a case that must have ended with one."""
        message = self.outcome(name)["error"]
        assert message, f"{name} was not refused"
        assert "\n" not in message
        return message

    def stopped(self, name: str) -> Path:
        """The run directory of a case that a signal must have ended."""
        assert self.outcome(name)["stopped"] == signal.SIGTERM
        assert not (self.out(name) / "recover" / "done.json").exists()
        return self.out(name)


class Assets:
    """The models and files that the cases work on."""

    def __init__(self, folder: Path, text: Path, tiny):
        self.folder, self.tiny = folder, tiny
        self.text = folder / "text.txt"
        self.text.write_text("".join(text.read_text().splitlines(keepends=True)[:400]))
        self.dense = tiny("llama", num_hidden_layers=3)
        self.half = folder / "half" / "oneshot"  # 50 % by SparseGPT
        settings = self.options(folder / "half", 1) | {"model.path": self.dense}
        config, text, _ = read_config(arguments(settings | {"stages": "[oneshot]"}))
        train.pipeline(config, text, Console(speaks=False))

    def options(self, out: Path, ranks: int) -> dict:
        """The settings of a small sound run from the half pruned model."""
        return {
            "output_dir": out,
            "model.path": self.half,
            "stages": "[recover]",
            "calibration.corpus": self.text,
            "calibration.sequences": 8,
            "calibration.length": LENGTH,
            "recover.teacher": self.dense,
            "recover.corpus": self.text,
            "recover.length": LENGTH,
            "recover.tokens": STEPS * BATCH * LENGTH,
            "recover.batch": BATCH,
            "recover.micro_batch": BATCH // ranks,
            "recover.held_out": HELD_OUT,
            "recover.lr": 0.003,
            "recover.checkpoint_steps": 3,
            "recover.evaluate_steps": 3,
            "recover.contrast.segments": 4,
            "recover.contrast.token_positions": 8,
            "recover.contrast.frequent_ids": 5,
            "recover.contrast.extra_sequences": 4,
        }

    def write(self, name: str, content) -> Path:
        """A JSON file."""
        path = self.folder / name
        path.write_text(json.dumps(content))
        return path

    def held_out(self) -> torch.Tensor:
        """The held-out sequences [n, T]."""
        return self.packed().held_out

    def packed(self, steps: int = STEPS):
        tokenizer = load_tokenizer(str(self.dense))
        corpus = calibration_corpus(str(self.text))
        return pack(tokenizer, corpus, steps * BATCH, HELD_OUT, LENGTH, 0)


def arguments(settings: dict) -> list[str]:
    return [str(part) for key, value in settings.items() for part in (f"--{key}", value)]


def end(job: subprocess.Popen) -> None:
    """Kills a process with all that it has started: torchrun's ranks have sessions of their own."""
    if job.poll() is None:
        for process in [*psutil.Process(job.pid).children(recursive=True), job]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        job.wait()


@pytest.fixture(scope="module")
def assets(tmp_path_factory, text_file, tiny) -> Assets:
    return Assets(tmp_path_factory.mktemp("assets"), text_file, tiny)


@pytest.fixture(scope="module")
def two(assets, tmp_path_factory) -> Cases:
    """All cases of two ranks, run."""
    cases = Cases(2, tmp_path_factory.mktemp("two"), assets)
    for zero in ZERO:
        settings = {"recover__deepspeed": zero}
        cases.add(f"plain {zero}", **settings)
        stopped = cases.add(f"stopped {zero}", ("stop", "recover", 5), **settings)
        again = ("copy", stopped, cases.out(f"resumed {zero}"))
        cases.add(f"resumed {zero}", edits=[again], **settings)
        cases.add(f"mixed {zero}", **MIXED, **settings)
    for name in ("cpu", "zero3_offload"):
        cases.add(name, recover__deepspeed=name)
    cases.add("half", **MIXED | {"recover.dtype": "float16"})
    cases.add("accumulated", **NO_CONTRAST, **FEATURE, recover__micro_batch=1)
    cases.add("crashed", ("crash", "recover", 6), recover__deepspeed="zero3")
    cases.add("after the crash", out="crashed", recover__deepspeed="zero3")
    cases.add("ladder", **LADDER)
    cases.add("ladder, stopped", ("stop", "recover/2", 4), **LADDER)
    snapshot = cases.out("ladder, stopped") / "recover" / "banks" / "snapshot-1"
    lost = [("remove", snapshot)]
    cases.add("ladder, resumed", out="ladder, stopped", edits=lost, **LADDER)
    short = {"recover.tokens": 4 * BATCH * LENGTH}
    for family, zero in (("gpt2", "zero3"), ("opt", "zero2")):
        model = {"model.path": assets.tiny(family), "stages": "[oneshot, recover]"}
        model |= {"recover.teacher": "null", "recover.deepspeed": zero}
        cases.add(family, **model, **short)
    for zero in ("zero2", "zero3"):
        cases.add(f"regrown {zero}", ("without_hooks",), recover__deepspeed=zero, **short)
    cases.add("no number", ("spoil_loss", "recover", 5))
    for zero in ZERO:
        cases.add(f"no slope {zero}", ("spoil_gradient", "recover", 5), recover__deepspeed=zero)
    mixed = MIXED | {"recover.deepspeed": "zero2"}
    cases.add("no slope in 16 bits", ("spoil_gradient", "recover", 3), **mixed)
    cases.add("no batch", recover__micro_batch=2)
    return cases.start().wait()


@pytest.fixture(scope="module")
def later(assets, two, tmp_path_factory) -> dict[int, Cases]:
    """All cases of one rank and of three, run at once; some go on from what two ranks have left."""
    launches = {n: Cases(n, tmp_path_factory.mktemp(f"ranks{n}"), assets) for n in RESUMED_ON}
    for n, cases in launches.items():
        for zero in RESUMED_ON[n]:
            copied = ("copy", two.out(f"stopped {zero}"), cases.out(f"resumed {zero}"))
            cases.add(f"resumed {zero}", edits=[copied], recover__deepspeed=zero)
    one = launches[1]
    one.add("plain")
    add_resumes(one)
    add_rungs(one)
    add_ablations(one)
    add_refusals(one)
    with contextlib.ExitStack() as stack:
        for cases in launches.values():
            stack.callback(cases.start().stop)
        return {n: cases.wait() for n, cases in launches.items()}


@pytest.fixture(scope="module")
def one(later) -> Cases:
    """The cases of one rank."""
    return later[1]


# reading run directories


def losses(run: Path, stage: str = "recover") -> dict[tuple[str, int], float]:
    """The loss parts by name and step; of a step that was done twice, the later ones."""
    values = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        point = json.loads(line)
        if point["stage"] == stage and point["name"] in LOSSES:
            values[point["name"], point["step"]] = point["value"]
    assert all(math.isfinite(v) for v in values.values())
    return values


def names(values: dict[tuple[str, int], float]) -> set[str]:
    return {name for name, _ in values}


def assert_close(a: dict, b: dict, relative: float) -> None:
    assert a.keys() == b.keys()
    far = {key: (a[key], b[key]) for key in a if a[key] != pytest.approx(b[key], rel=relative)}
    assert not far


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in folder.glob("model*.safetensors") for k, v in load_file(file).items()}


def masks(folder: Path) -> dict[str, np.ndarray]:
    """The masks [R, C] of a model directory: true where a weight stays."""
    found = {}
    with safe_open(folder / "masks.safetensors", "np") as file:
        for name, columns in file.metadata().items():
            packed = file.get_tensor(name)
            found[name] = np.unpackbits(packed, axis=1, count=int(columns)).astype(bool)
    return found


def assert_zeros(folder: Path, start: Path, transposed: bool = False) -> None:
    """The masks are those of the start; the file has its zeros there and no others."""
    weights, before = tensors(folder), tensors(start)
    kept = masks(folder)
    assert kept.keys() == masks(start).keys()
    for name, mask in kept.items():
        assert np.array_equal(mask, masks(start)[name])
        key = name if name in weights else f"transformer.{name}"
        weight, old = weights[key].float().numpy(), before[key].float().numpy()
        if transposed:
            weight, old = weight.T, old.T
        assert mask.shape == weight.shape and 0 < mask.sum() < mask.size
        assert not weight[~mask].any()
        assert (weight == 0).sum() == (old == 0).sum()
        assert (weight != old)[mask].mean() > 0.5  # the others have trained


def sparsity(folder: Path) -> float:
    kept = masks(folder).values()
    return 1 - sum(m.sum() for m in kept) / sum(m.size for m in kept)


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    """As transformers gives it for a model directory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return math.exp(model(input_ids=windows, labels=windows).loss.item())


def record(run: Path) -> dict:
    (rung,) = json.loads((run / "recover" / "recovery.json").read_text())["rungs"]
    return rung


def checkpoints(run: Path, rung: str = "1") -> list[str]:
    return sorted(p.name for p in (run / "recover" / "checkpoints" / rung).glob("*-*"))


# every ZeRO stage


@pytest.mark.parametrize("name", [*(f"plain {zero}" for zero in ZERO), "cpu", "zero3_offload"])
def test_two_ranks_equal_one(one, two, name):
    of_one, of_two = losses(one.finished("plain")), losses(two.finished(name))
    assert names(of_one) == {"loss", "ce", "kl", "prc", "held_out_ppl", "grad_norm"}
    assert {step for _, step in of_one} == set(range(STEPS + 1))
    assert_close(of_one, of_two, 1e-4)
    assert of_one["held_out_ppl", STEPS] < of_one["held_out_ppl", 0]


@pytest.mark.parametrize("zero", ZERO)
@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_the_norm_of_the_gradient_is_logged(two, kind, zero):
    assert "grad_norm" in names(losses(two.finished(f"{kind} {zero}")))


def test_micro_batches_and_ranks_make_the_same_step(one, two):
    whole, parts = one.finished("no contrast"), two.finished("accumulated")
    assert names(losses(whole)) == {"loss", "ce", "kl", "feature", "held_out_ppl", "grad_norm"}
    assert_close(losses(whole), losses(parts), 1e-4)


@pytest.mark.parametrize("zero", ZERO)
def test_the_result_is_a_model_with_exact_zeros_and_the_engines_perplexity(assets, two, zero):
    run = two.finished(f"plain {zero}")
    assert_zeros(run / "recover", assets.half)
    assert sparsity(run / "recover") == pytest.approx(0.5, abs=0.01)
    engines_own = losses(run)["held_out_ppl", STEPS]
    assert perplexity(run / "recover", assets.held_out()) == pytest.approx(engines_own, rel=1e-4)
    assert record(run)["held_out_ppl"][str(STEPS)] == pytest.approx(engines_own, abs=1e-4)


@pytest.mark.parametrize("zero", ZERO)
def test_zeros_are_exact_in_16_bits_with_all_that_could_move_them(assets, two, zero):
    assert_16_bits(assets, two.finished(f"mixed {zero}"), "bfloat16")


def test_float16_trains_or_is_refused_clearly(assets, two):
    if two.results["half"]["ranks"][0] == dict.fromkeys(("error", "stopped", "traceback")):
        assert_16_bits(assets, two.finished("half"), "float16")
    else:
        message = two.refused("half")
        assert "float16" in message and "bfloat16 or float32" in message


def assert_16_bits(assets: Assets, run: Path, dtype: str) -> None:
    assert_zeros(run / "recover", assets.half)
    assert json.loads((run / "recover" / "config.json").read_text())["dtype"] == dtype
    assert {str(w.dtype) for w in tensors(run / "recover").values()} == {f"torch.{dtype}"}
    engines_own = losses(run)["held_out_ppl", 4]
    assert perplexity(run / "recover", assets.held_out()) == pytest.approx(engines_own, rel=1e-2)


@pytest.mark.parametrize("zero", [zero for zero in ZERO if zero != "zero2"])
def test_16_bits_give_the_same_losses_at_every_stage(two, zero):
    first, other = losses(two.finished("mixed zero2")), losses(two.finished(f"mixed {zero}"))
    assert "feature" in names(first)
    assert_close(first, other, 0.05)


@pytest.mark.parametrize(("family", "transposed"), [("gpt2", True), ("opt", False)])
def test_other_families_recover_with_exact_zeros(two, assets, family, transposed):
    run = two.finished(family)
    assert_zeros(run / "recover", run / "oneshot", transposed)
    engines_own = losses(run)["held_out_ppl", 4]
    assert perplexity(run / "recover", assets.held_out()) == pytest.approx(engines_own, rel=1e-4)


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_without_its_hooks_weights_regrow_and_the_run_stops(two, zero):
    message = two.refused(f"regrown {zero}")
    regrown = int(re.match(r"(\d+) pruned weights have regrown", message).group(1))
    of = sum((~mask).sum() for mask in masks(two.assets.half).values())
    assert 0.9 * of < regrown <= of
    assert re.search(r"of them in model\.\S+_proj\.weight", message)
    assert not (two.out(f"regrown {zero}") / "recover" / "checkpoints").exists()


# going on


@pytest.mark.parametrize("zero", ZERO)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(two, zero):
    stopped = two.stopped(f"stopped {zero}")
    assert checkpoints(stopped)[-1] == "step-000005"
    resumed = two.finished(f"resumed {zero}")
    assert record(resumed)["resumed_at_step"] == 5
    whole = two.finished(f"plain {zero}")
    assert losses(resumed) == losses(whole)  # bit by bit
    for name, weight in tensors(whole / "recover").items():
        assert torch.equal(tensors(resumed / "recover")[name], weight)
    assert not (resumed / "recover" / "checkpoints").exists()


def test_a_crashed_run_goes_on_from_its_last_checkpoint(two):
    (first, second) = two.results["crashed"]["ranks"]
    assert "the plug was pulled" in first["traceback"] and "pulled" in second["traceback"]
    run = two.finished("after the crash", out="crashed")
    assert record(run)["resumed_at_step"] == 3
    assert losses(run) == losses(two.finished("plain zero3"))


@pytest.mark.parametrize(("ranks", "zero"), [(n, z) for n in RESUMED_ON for z in RESUMED_ON[n]])
def test_another_number_of_ranks_goes_on(assets, two, later, zero, ranks):
    run = later[ranks].finished(f"resumed {zero}")
    assert record(run)["resumed_at_step"] == 5
    assert_close(losses(run), losses(two.finished(f"plain {zero}")), 1e-5)
    assert_zeros(run / "recover", assets.half)


def add_resumes(cases: Cases) -> None:
    """Cases of one rank about what lies in the folder of checkpoints."""
    each = {"recover.checkpoint_steps": 1}
    stopped = cases.add("stopped", ("stop", "recover", 5), **each)

    def copied(name: str) -> tuple[str, Path, Path]:
        return ("copy", stopped, cases.out(name))

    def complete(name: str, step: int) -> Path:
        step = f"step-{step:06d}"
        return cases.out(name) / "recover" / "checkpoints" / "1" / step / "complete.json"

    ended = cases.add("stopped at the end", ("stop", "recover", STEPS))
    again = ("copy", ended, cases.out("at the end, resumed"))
    cases.add("at the end, resumed", edits=[again])
    gone = [copied("incomplete"), ("remove", complete("incomplete", 5))]
    seldom = {"recover.checkpoint_steps": 100}
    cases.add("incomplete", ("stop", "recover", 7), edits=gone, **seldom)
    again = ("copy", cases.out("incomplete"), cases.out("incomplete, resumed"))
    cases.add("incomplete, resumed", edits=[again])
    cases.add("anew", edits=[copied("anew")], recover__resume="false")
    cases.add("must go on", edits=[copied("must go on")], recover__resume="true")
    cases.add("nothing to go on from", recover__resume="true")
    path = complete("by path", 4).parent
    cases.add("by path", edits=[copied("by path")], recover__resume=path)
    no_banks = ("remove", cases.out("without banks") / "recover" / "banks")
    cases.add("without banks", edits=[copied("without banks"), no_banks])
    path = complete("stopped", 4).parent
    cases.add("by path elsewhere", recover__resume=path)
    cases.add("by a wrong path", recover__resume=cases.assets.half)
    cases.add("another recipe by path", recover__resume=path, recover__lr=0.004)
    edited = ("replace", complete("another recipe", 5), '"lr": 0.003', '"lr": 0.004')
    cases.add("another recipe", edits=[copied("another recipe"), edited])
    cases.add("another stage", edits=[copied("another stage")], recover__deepspeed="zero3")
    text = cases.assets.folder / "changing.txt"
    text.write_text(cases.assets.text.read_text())
    changing = NO_CONTRAST | {"recover.corpus": text}
    cases.add("text", ("stop", "recover", 5), **changing)
    changed = [("copy", cases.out("text"), cases.out("another text")), ("replace", text, "a", "e")]
    cases.add("another text", edits=changed, **changing)


def test_old_checkpoints_are_removed(one):
    assert checkpoints(one.stopped("stopped")) == ["step-000004", "step-000005"]


def test_the_converted_form_of_a_checkpoint_goes_with_it(tmp_path):
    class Engine:
        def save_checkpoint(self, folder, tag, save_latest):
            (Path(folder) / tag).mkdir()

    def save(step):
        checkpoints_module.save(Engine(), tmp_path, step, {}, {}, 2, 1, World.alone(CPU))

    save(1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "universal-step-000001")
    save(2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_a_signal_in_the_last_step_stops_too_and_nothing_is_left_to_train(one):
    run = one.stopped("stopped at the end")
    assert checkpoints(run)[-1] == f"step-{STEPS:06d}"
    assert not list((run / "recover").glob("*.safetensors"))
    run = one.finished("at the end, resumed")
    assert record(run)["resumed_at_step"] == STEPS
    assert losses(run) == losses(one.finished("plain"))


def test_an_incomplete_checkpoint_does_not_count_and_is_removed(one):
    run = one.stopped("incomplete")
    assert "going on at step 5 of 8" in (run / "log.txt").read_text()
    assert checkpoints(run) == ["step-000004", "step-000007"]
    run = one.finished("incomplete, resumed")
    assert record(run)["resumed_at_step"] == 7
    assert losses(run) == losses(one.finished("plain"))


@pytest.mark.parametrize(("name", "step"), [("anew", 0), ("must go on", 5), ("by path", 4)])
def test_where_to_go_on_from_can_be_said(one, name, step):
    run = one.finished(name)
    assert record(run)["resumed_at_step"] == step
    assert losses(run) == losses(one.finished("plain"))


@pytest.mark.parametrize(("name", "step"), [("by path elsewhere", 4), ("without banks", 5)])
def test_the_rows_of_a_bank_that_is_not_there_are_made_again(one, name, step):
    run = one.finished(name)
    assert record(run)["resumed_at_step"] == step
    whole = {k: v for k, v in losses(one.finished("plain")).items() if k[1] > step}
    found = {k: v for k, v in losses(run).items() if k[1] > step}
    assert_close(whole, found, 1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing to go on from", ["recover.resume is true", "no complete checkpoint"]),
        ("by a wrong path", ["recover.resume", "is no complete checkpoint", "complete.json"]),
        ("another recipe", ["recover.lr was 0.004 and is 0.003", "--recover.resume false"]),
        ("another recipe by path", ["recover.lr was 0.003 and is 0.004", "--recover.resume false"]),
        (
            "another stage",
            ["was made with another recipe: zero_stage was 2 and is 3", "--recover.resume false"],
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(one, name, expected):
    message = one.refused(name)
    for part in expected:
        assert part in message
    if "path" not in name and name != "nothing to go on from":
        assert checkpoints(one.out(name)) == ["step-000004", "step-000005"]


def test_a_checkpoint_of_another_text_is_refused(one):
    one.stopped("text")
    assert "text" in one.refused("another text")


# the ladder


def add_rungs(cases: Cases) -> None:
    """Cases of one rank that start from a dense model, and a gate."""
    dense = {"model.path": cases.assets.dense, "recover.teacher": "null"}
    short = {"recover.tokens": 2 * BATCH * LENGTH}
    cases.add("2:4", **dense, **short, recover__ladder="2:4")
    rungs = {"recover.ladder": "0.3, 0.4, 0.5"}
    cases.add("three rungs", **dense, **short, **rungs, recover__contrast__snapshots=1)
    two_rungs = {"recover.ladder": "0.6, 0.7"}
    for name in ("ladder, true", "ladder, by path"):
        stopped = cases.add(f"{name}, stopped", ("stop", "recover/1", 5), **two_rungs)
        resume = stopped / "recover" / "checkpoints" / "1" / "step-000005"
        resume = "true" if "true" in name else resume
        again = ("copy", stopped, cases.out(name))
        cases.add(name, edits=[again], **two_rungs, recover__resume=resume)
    elsewhere = Path(shutil.copytree(cases.assets.half, cases.assets.folder / "elsewhere"))
    for name in ("masks.safetensors", "sparsity.json"):
        (elsewhere / name).unlink()
    settings = {"model.path": elsewhere, "oneshot.block_size": 16, "recover.ladder": "0.6"}
    cases.add("pruned elsewhere", **settings, **short)
    # so large a rate that the model is lost
    lost = {"recover.ladder": "0.7, 0.8", "recover.lr": 0.1} | short
    cases.add("gate", recover__gate=1.01, **lost)
    cases.add("gate, again", out="gate", recover__gate=1.02, **lost)
    raised = ("copy", cases.out("gate"), cases.out("gate, raised"))
    cases.add("gate, raised", edits=[raised], recover__gate=1e9, **lost)


def test_a_ladder_prunes_inside_the_earlier_masks(two, assets):
    recover = two.finished("ladder") / "recover"
    folders = [assets.half]
    folders += [recover / "rungs" / "1" / name for name in ("pruned", "trained")]
    folders += [recover / "rungs" / "2" / "pruned", recover]
    for before, after in zip(folders, folders[1:], strict=False):
        for name, mask in masks(after).items():
            assert not (mask & ~masks(before)[name]).any()
    found = [sparsity(folder) for folder in folders]
    assert found == pytest.approx([0.5, 0.6, 0.6, 0.7, 0.7], abs=0.01)
    assert_zeros(recover / "rungs" / "1" / "trained", recover / "rungs" / "1" / "pruned")
    assert_zeros(recover, recover / "rungs" / "2" / "pruned")


def test_a_ladder_logs_each_contrast_and_keeps_its_banks(two):
    run = two.finished("ladder")
    for rung in (1, 2):
        values = losses(run, f"recover/{rung}")
        assert {step for _, step in values} == set(range(RUNG_STEPS + 1))
        assert {"ce", "kl", "prc", "snc", "fic"} <= names(values)
    assert names(losses(run, "recover/finetuned")) == {"loss", "ce", "held_out_ppl", "grad_norm"}
    log = (run / "log.txt").read_text()
    assert "SnC is off" not in log and "FiC is off" not in log
    banks = run / "recover" / "banks"
    assert {p.name for p in banks.iterdir()} == {
        *("pretrained", "finetuned", "snapshot-1", "snapshot-2")
    }
    for bank in banks.iterdir():
        there = np.fromfile(bank / "there.bin", np.uint8)
        # each rung trains on text of its own, and the second has a snapshot that the first has not
        rungs = 1 if bank.name == "snapshot-2" else 2
        assert len(there) == 2 * RUNG_STEPS * BATCH
        assert there.sum() == rungs * RUNG_STEPS * BATCH
        facts = json.loads((bank / "bank.json").read_text())
        assert facts["mean_cosine"] < 0.7 and facts["effective_rank"] > 2
    records = json.loads((run / "recover" / "recovery.json").read_text())["rungs"]
    assert [r["rung"] for r in records] == ["0.6", "0.7"]


def test_a_fine_tuned_model_is_the_dense_one_trained(two, assets):
    folder = two.finished("ladder") / "recover" / "finetuned"
    values = losses(two.out("ladder"), "recover/finetuned")
    assert values["held_out_ppl", RUNG_STEPS] < values["held_out_ppl", 0]
    dense = perplexity(assets.dense, assets.held_out())
    assert values["held_out_ppl", 0] == pytest.approx(dense, rel=1e-4)
    tuned = perplexity(folder, assets.held_out())
    assert values["held_out_ppl", RUNG_STEPS] == pytest.approx(tuned, rel=1e-4)
    assert all((w != 0).any() for w in tensors(folder).values())


def test_a_ladder_that_was_stopped_in_a_later_rung_gives_the_same_result(two):
    whole = two.finished("ladder")
    assert two.outcome("ladder, stopped")["stopped"] == signal.SIGTERM
    resumed = two.finished("ladder, resumed", out="ladder, stopped")
    for stage in ("recover/finetuned", "recover/1", "recover/2"):
        assert losses(resumed, stage) == losses(whole, stage)
    for name, weight in tensors(whole / "recover").items():
        assert torch.equal(tensors(resumed / "recover")[name], weight)
    text = (resumed / "log.txt").read_text()
    assert text.count("rung 1/2 (0.6): pruning") == 1
    assert text.count("fine-tuning the dense model") == 1


@pytest.mark.parametrize("name", ["ladder, true", "ladder, by path"])
def test_a_ladder_goes_on_to_the_next_rung_after_it_was_told_to_resume(one, name):
    assert one.outcome(f"{name}, stopped")["stopped"] == signal.SIGTERM
    assert sparsity(one.finished(name) / "recover") == pytest.approx(0.7, abs=0.01)


def test_a_dense_model_goes_to_a_pattern_at_once(one, assets):
    run = one.finished("2:4")
    pruned = run / "recover" / "rungs" / "1" / "pruned"
    assert_zeros(run / "recover", pruned)
    for mask in masks(run / "recover").values():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
    assert "SnC is off on this rung" in (run / "log.txt").read_text()
    assert "snc" not in names(losses(run, "recover/1"))


def test_a_ladder_prunes_inside_the_zeros_of_a_model_that_was_pruned_elsewhere(one, assets):
    run = one.finished("pruned elsewhere")
    assert_zeros(run / "recover", run / "recover" / "rungs" / "1" / "pruned")
    assert sparsity(run / "recover") == pytest.approx(0.6, abs=0.01)
    for name, mask in masks(run / "recover").items():
        assert not (mask & ~masks(assets.half)[name]).any()


def test_snapshots_begin_with_the_second_rung_of_a_dense_model_and_old_ones_go(one):
    run = one.finished("three rungs")
    assert "snc" not in names(losses(run, "recover/1"))
    for rung in (2, 3):
        assert "snc" in names(losses(run, f"recover/{rung}"))
    assert (run / "log.txt").read_text().count("SnC is off on this rung") == 1
    banks = {p.name for p in (run / "recover" / "banks").iterdir()}
    assert banks == {"pretrained", "snapshot-3"}


def test_snapshots_share_their_weight(two):
    run = two.finished("ladder")
    for rung in (1, 2):  # the start was pruned already: as many snapshots as rungs
        values = losses(run, f"recover/{rung}")
        weights = {"ce": 0.2, "kl": 0.8, "prc": 0.1, "fic": 0.1, "snc": 0.1 / rung}
        total = sum(weight * values[name, 1] for name, weight in weights.items())
        assert values["loss", 1] == pytest.approx(total, rel=1e-5)


def test_a_rung_that_loses_too_much_ends_the_ladder(one):
    message = one.refused("gate")
    assert "rung 1/2 (0.7) ends with a held-out perplexity of" in message
    assert "1.01 (recover.gate) times the teacher's" in message
    assert "recover.tokens" in message
    trained = one.out("gate") / "recover" / "rungs" / "1" / "trained"
    assert sparsity(trained) == pytest.approx(0.7, abs=0.01)
    assert "rung 1/2 (0.7) ends with" in one.refused("gate, again")
    assert not (one.out("gate") / "recover" / "rungs" / "2").exists()
    assert not (one.out("gate") / "recover" / "checkpoints" / "1").exists()  # needed no more
    assert sparsity(one.finished("gate, raised") / "recover") == pytest.approx(0.8, abs=0.01)


# the objective's terms

TERMS = ("kl", "feature", "prc", "snc", "fic")
WEIGHTS = {"ce": 0.2, "kl": 0.8, "feature": 0.5, "prc": 0.1, "snc": 0.1, "fic": 0.1}


def add_ablations(cases: Cases) -> None:
    """Cases of one rank with all terms on, and with each of them off."""
    tiny = cases.assets.tiny
    everything = {
        "recover.ladder": "0.6",
        "recover.tokens": 2 * BATCH * LENGTH,
        "recover.finetuned": tiny("llama", num_hidden_layers=3, seed=1),
        "recover.objective.feature": WEIGHTS["feature"],
    }
    cases.add("all terms", **everything)
    for term in TERMS:
        cases.add(f"without {term}", **everything | {f"recover.objective.{term}": 0})
    cases.add("no contrast", **NO_CONTRAST, **FEATURE)
    worse = {"recover.finetuned": "train", "recover.lr": 1.0, "recover.tokens": 2 * BATCH * LENGTH}
    cases.add("fine-tuned, and worse", **worse)
    wide = {"recover.teacher": tiny("llama", hidden_size=64, num_hidden_layers=3)}
    cases.add("wide teacher", **wide, **NO_CONTRAST)
    tuned = {"model.dense": cases.assets.dense, "recover.finetuned": "train"}
    tuned |= {"recover.objective.prc": 0, "recover.tokens": 2 * BATCH * LENGTH}
    cases.add("wide teacher, fine-tuned", **wide | tuned)
    cases.add("wide teacher, snapshots", **wide, recover__objective__prc=0, recover__ladder="0.6")
    short = {"recover.tokens": 2 * BATCH * LENGTH, "recover.sequences": 8}
    large = {"recover.teacher": tiny("llama", hidden_size=64, num_hidden_layers=4)}
    cases.add("large teacher", **large, **short, model__dense=cases.assets.dense)


def test_the_loss_is_the_weighted_sum_of_its_parts(one):
    values = losses(one.finished("all terms"), "recover/1")
    for step in (1, 2):
        parts = {name: values[name, step] for name in WEIGHTS}
        assert len(set(parts.values())) == len(parts)
        total = sum(WEIGHTS[name] * value for name, value in parts.items())
        assert values["loss", step] == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("term", TERMS)
def test_a_weight_of_zero_removes_one_term_and_no_other(one, term):
    whole = losses(one.finished("all terms"), "recover/1")
    without = losses(one.finished(f"without {term}"), "recover/1")
    assert names(whole) - names(without) == {term}
    for name in names(without) - {"loss", "grad_norm", "held_out_ppl"}:
        assert without[name, 1] == whole[name, 1]
    assert without["loss", 1] < whole["loss", 1]


def test_a_term_without_its_model_is_off_and_the_log_says_so(one):
    log = (one.finished("plain") / "log.txt").read_text()
    assert "FiC is off: recover.finetuned names no fine-tuned model" in log
    assert "SnC is off" in log


def test_a_fine_tuned_model_that_is_worse_than_the_dense_one_is_told(one, two):
    run = one.finished("fine-tuned, and worse")
    values = losses(run, "recover/finetuned")
    assert values["held_out_ppl", 2] > values["held_out_ppl", 0]
    said = r"the fine-tuned model's held-out ppl is [\d.]+, worse than the dense model's [\d.]+"
    assert re.search(said, (run / "log.txt").read_text())
    assert "worse than" not in (two.finished("ladder") / "log.txt").read_text()


def test_a_wider_teacher_gives_the_kl(one, assets):
    run = one.finished("wide teacher")
    values = losses(run)
    assert values["kl", 1] > 0.01
    assert values["held_out_ppl", STEPS] < values["held_out_ppl", 0]
    assert_zeros(run / "recover", assets.half)


def test_a_wider_teacher_goes_with_the_students_own_snapshots(one):
    assert "snc" in names(losses(one.finished("wide teacher, snapshots"), "recover/1"))


def test_the_dense_model_is_contrasted_with_and_not_a_larger_teacher(one, assets):
    run = one.finished("large teacher")
    assert {"kl", "prc"} <= names(losses(run))
    bank = json.loads((run / "recover" / "banks" / "pretrained" / "bank.json").read_text())
    assert bank["facts"]["model"] == fingerprint(assets.dense)


def test_text_that_is_passed_more_than_once_is_told(one):
    run = one.finished("large teacher")
    log = (run / "log.txt").read_text()
    assert "fills 8 sequences of 64 tokens; the training passes them 1.50 times" in log
    summary = json.loads((run / "recover" / "recovery.json").read_text())
    assert summary["distinct_tokens"] == 8 * LENGTH
    assert "passes them" not in (one.finished("plain") / "log.txt").read_text()


def test_the_dense_model_is_fine_tuned_and_measured_not_a_wider_teacher(one, assets):
    run = one.finished("wide teacher, fine-tuned")
    assert "fic" in names(losses(run))
    tuned = json.loads((run / "recover" / "finetuned" / "config.json").read_text())
    assert tuned["hidden_size"] == 32
    dense = perplexity(assets.dense, assets.held_out())
    assert record(run)["dense_held_out_ppl"] == pytest.approx(dense, rel=1e-4)
    assert "the dense model's held-out ppl is" in (run / "log.txt").read_text()


# bad input


def deepspeed_file(assets: Assets, name: str, **changes) -> dict:
    content = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | changes
    return {"recover.deepspeed": assets.write(f"{name}.json", content)}


def changed_model(assets: Assets) -> Path:
    """The half pruned model with one masked weight that is no zero."""
    folder = Path(shutil.copytree(assets.half, assets.folder / "changed"))
    r, c = np.argwhere(~masks(folder)[DOWN_0])[7]
    for file in folder.glob("model*.safetensors"):
        content = load_file(file)
        if DOWN_0 in content:
            content[DOWN_0][r, c] = 0.5
            save_file(content, file, metadata={"format": "pt"})
    return folder


def other_words(assets: Assets) -> Path:
    """The dense model with as large a tokenizer whose entries have other ids."""
    folder = Path(shutil.copytree(assets.dense, assets.folder / "other-words"))
    content = json.loads((folder / "tokenizer.json").read_text())
    entries = content["model"]["vocab"]
    content["model"]["vocab"] = dict(zip(entries, reversed(entries.values()), strict=True))
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def no_json(assets: Assets) -> Path:
    path = assets.folder / "broken.json"
    path.write_text('{"zero_optimization": ')
    return path


# name -> settings of the run, parts of the message
REFUSED = {
    "vocabulary": (
        lambda a: {"recover.teacher": a.tiny("llama", num_hidden_layers=3, vocab_size=600)},
        ["recover.teacher", "vocabulary of 600", "512", "share their tokenizer"],
    ),
    "tokenizer": (
        lambda a: {"recover.teacher": other_words(a)},
        ["recover.teacher", "another tokenizer", "share their tokenizer"],
    ),
    "width": (
        lambda a: {"recover.teacher": a.tiny("llama", num_hidden_layers=3, hidden_size=64)},
        ["recover.teacher", "hidden_size 64", "32", "recover.objective.feature, prc, fic 0"],
    ),
    "width of what is fine-tuned": (
        lambda a: {
            "recover.teacher": a.tiny("llama", num_hidden_layers=3, hidden_size=64),
            "recover.finetuned": "train",
            "recover.objective.prc": 0,
        },
        ["recover.teacher", "hidden_size 64", "32", "give another model"],
    ),
    "a cap on the logits": (
        lambda a: {
            "model.path": a.tiny("gemma2", num_hidden_layers=3),
            "stages": "[oneshot, recover]",
        },
        ["Gemma2ForCausalLM", "caps its logits", "not recovered"],
    ),
    "a teacher with a cap on its logits": (
        lambda a: {"recover.teacher": a.tiny("gemma2", num_hidden_layers=3)},
        ["Gemma2ForCausalLM", "caps its logits", "not recovered"],
    ),
    "width of the fine-tuned model": (
        lambda a: {"recover.finetuned": a.tiny("llama", num_hidden_layers=3, hidden_size=64)},
        ["recover.finetuned", "hidden_size 64", "32"],
    ),
    "no dense model": (
        lambda a: {"recover.teacher": "null"},
        ["recover starts from", "name the dense model with --model.dense"],
    ),
    "changed weights": (
        lambda a: {"model.path": changed_model(a)},
        [DOWN_0, "has 1 weights that are not zero where its mask says so", "prune again"],
    ),
    "ladder down": (
        lambda a: {"recover.ladder": "0.7, 0.6"},
        ["recover.ladder goes from 0.7 to 0.6", "masks only grow"],
    ),
    "ladder down to a pattern": (
        lambda a: {"recover.ladder": "0.6, 2:4"},
        ["recover.ladder goes from 0.6 to 2:4", "sparser than the one before"],
    ),
    "first rung": (
        lambda a: {"recover.ladder": "0.4, 0.6"},
        ["recover.ladder begins with 0.4", "50.0 % sparse already", "begin above that"],
    ),
    "no rung": (
        lambda a: {"recover.ladder": "0.6, most"},
        ["recover.ladder has the rung 'most'", "(0, 1) or N:M"],
    ),
    "batch": (
        lambda a: {"recover.micro_batch": 4},
        ["recover.batch is 6", "1 ranks x micro_batch 4", "--recover.micro_batch"],
    ),
    "removed key": (
        lambda a: deepspeed_file(a, "removed", compression_training={"layer_reduction": {}}),
        ["recover.deepspeed", "removed.json", "refused by DeepSpeed", "compression_training"],
    ),
    "misspelt key": (
        lambda a: deepspeed_file(a, "misspelt", zero_optimization={"stage": 2, "overlap_com": 1}),
        ["recover.deepspeed", "misspelt.json", "refused by DeepSpeed", "overlap_com"],
    ),
    "unknown auto": (
        lambda a: deepspeed_file(
            a, "auto", zero_optimization={"stage": 2, "reduce_bucket_size": "auto"}
        ),
        ["recover.deepspeed", '"auto" for zero_optimization.reduce_bucket_size', "give a value"],
    ),
    "optimizer": (
        lambda a: deepspeed_file(a, "optimizer", optimizer={"type": "Adam"}),
        ["optimizer.json", "sets an optimizer", "recover.lr", "take that block out"],
    ),
    "another micro-batch": (
        lambda a: deepspeed_file(a, "micro", train_micro_batch_size_per_gpu=2),
        ["micro.json sets train_micro_batch_size_per_gpu to 2", "makes it 6", 'write "auto"'],
    ),
    "another type": (
        lambda a: deepspeed_file(a, "type", bf16={"enabled": True}),
        ["type.json sets bf16.enabled to true", "recipe makes it false", 'write "auto"'],
    ),
    "another clip": (
        lambda a: deepspeed_file(a, "clip", gradient_clipping=0.3),
        ["clip.json sets gradient_clipping to 0.3", "makes it 1.0", 'write "auto"'],
    ),
    "no section": (
        lambda a: deepspeed_file(a, "section", zero_optimization=[2]),
        ["section.json", "zero_optimization is no section"],
    ),
    "no stage": (
        lambda a: deepspeed_file(a, "stage", zero_optimization={"stage": "2"}),
        ["stage.json", "zero_optimization.stage is '2'", "0, 1, 2 or 3"],
    ),
    "no JSON": (
        lambda a: {"recover.deepspeed": no_json(a)},
        ["recover.deepspeed", "broken.json cannot be read as JSON"],
    ),
    "no file": (
        lambda a: {"recover.deepspeed": a.folder / "nowhere.json"},
        ["recover.deepspeed", "nowhere.json cannot be read"],
    ),
    "no settings": (
        lambda a: {"recover.deepspeed": a.write("list.json", [1, 2])},
        ["recover.deepspeed", "list.json holds no settings"],
    ),
    "unknown name": (
        lambda a: {"recover.deepspeed": "zero4"},
        ["recover.deepspeed is 'zero4'", "cpu, ", "zero0, zero1, zero2, zero3, zero3_offload"],
    ),
    "unknown name of the teacher's": (
        lambda a: {"recover.teacher_deepspeed": "sharded"},
        ["recover.teacher_deepspeed is 'sharded'", "teacher_zero3"],
    ),
    "whole teacher of a sharded student": (
        lambda a: {
            "recover.deepspeed": "zero3",
            "recover.teacher_deepspeed": a.write("whole.json", {}),
        },
        ["recover.deepspeed zero3 is ZeRO-3", "whole.json is ZeRO-0", "at auto"],
    ),
    "sharded teacher of a whole student": (
        lambda a: {"recover.teacher_deepspeed": "teacher_zero3"},
        ["recover.deepspeed zero2 is ZeRO-2", "teacher_zero3 is ZeRO-3", "at auto"],
    ),
    "positions": (
        lambda a: {"recover.length": 512, "recover.tokens": 512 * BATCH},
        ["recover.length is 512", "256 positions", "--recover.length 256"],
    ),
    "positions of the teacher": (
        lambda a: {
            "recover.teacher": a.tiny("opt", vocab_size=512, max_position_embeddings=32),
            **NO_CONTRAST,
        },
        ["recover.length is 64, but recover.teacher", "32 positions", "--recover.length 32"],
    ),
    "no teacher there": (
        lambda a: {"recover.teacher": a.folder / "nobody"},
        ["recover.teacher", "nobody is not a directory"],
    ),
    "no fine-tuned model there": (
        lambda a: {"recover.finetuned": a.folder / "nobody"},
        ["recover.finetuned", "nobody is not a directory"],
    ),
    "no checkpoint there": (
        lambda a: {"recover.resume": a.folder / "nowhere"},
        ["recover.resume", "nowhere is no complete checkpoint"],
    ),
    "ladder below oneshot": (
        lambda a: {
            "model.path": a.dense,
            "stages": "[oneshot, recover]",
            "recover.ladder": "0.3, 0.6",
        },
        ["recover.ladder begins with 0.3, and oneshot prunes to 0.5", "leave oneshot out"],
    ),
    "a budget and a later pattern": (
        lambda a: {"oneshot.budget": "owl", "recover.ladder": "0.6, 1:4"},
        ["oneshot.budget owl", "1:4", "use budget uniform"],
    ),
    "scored text": (
        lambda a: {"stages": "[recover, evaluate]", "evaluate.corpora": f"[{a.text}]"},
        ["recover.corpus", "also scored by evaluate", "another text"],
    ),
    "too few tokens": (
        lambda a: {"recover.tokens": 300},
        ["recover.tokens is 300", "one step of 6 x 64"],
    ),
    "too little text": (
        lambda a: {"recover.held_out": 100_000},
        ["too few for 100000 held-out ones", "--recover.held_out"],
    ),
    "too many segments": (
        lambda a: {"recover.contrast.segments": 20},
        ["recover.contrast.segments is 20", "64 tokens", "lower it"],
    ),
    "a large bank": (
        lambda a: {"recover.contrast.bank_gib": 1e-6},
        ["recover.contrast.bank_gib 1e-06", "48 sequences x 12 units x 32", "lower"],
    ),
}
PACKAGES = ("tensorboard", "wandb")


def add_refusals(cases: Cases) -> None:
    """Cases of one rank that must end with one clear message."""
    assets = cases.assets
    for name, (changes, _) in REFUSED.items():
        cases.add(name, **changes(assets))
    for package, value in zip(PACKAGES, ("true", "a-project"), strict=True):
        if not importlib.util.find_spec(package):
            cases.add(package, **{f"recover.{package}": value})
    refused_late = deepspeed_file(
        assets, "late", zero_optimization={"stage": 3}, prescale_gradients=True
    )
    cases.add("settings refused at the start", **refused_late)
    for name in ("bank of another seed", "bank of another text", "bank of another model"):
        recover = cases.out(name) / "recover"
        edits = [("copy", cases.out("plain"), cases.out(name))]
        edits += [("remove", recover / file) for file in ("recipe.json", "done.json", "rung.json")]
        changes = {"recover.seed": 1}
        if name == "bank of another text":
            words = assets.folder / "other.txt"
            words.write_text(assets.text.read_text().replace("a", "e"))
            changes = {"recover.corpus": words}
        if name == "bank of another model":
            changes = {"recover.teacher": assets.tiny("llama", num_hidden_layers=3, seed=2)}
        cases.add(name, edits=edits, **changes)


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_refused_before_the_work(one, name):
    message = one.refused(name)
    for part in REFUSED[name][1]:
        assert part in message


@pytest.mark.parametrize("name", REFUSED)
def test_the_remedy_can_be_given_in_the_same_directory(one, name):
    one.refused(name)
    assert not (one.out(name) / "recover" / "recipe.json").exists()


def test_what_deepspeed_refuses_only_when_it_starts_is_one_line_too(one):
    message = one.refused("settings refused at the start")
    assert "recover.deepspeed" in message and "late.json is refused by DeepSpeed" in message


def test_what_a_deepspeed_file_leaves_out_is_the_recipes(tmp_path):
    path = tmp_path / "bare.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    settings = RecoverConfig(deepspeed=str(path), batch=8, dtype="bfloat16", clip=0.25)
    resolved = engines.student_settings(settings, World.alone(CPU))
    assert resolved["bf16"]["enabled"] is True and resolved["fp16"]["enabled"] is False
    assert resolved["gradient_clipping"] == 0.25
    assert resolved["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize("package", PACKAGES)
def test_a_tracker_that_is_not_installed_is_refused(one, package):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    message = one.refused(package)
    assert f"recover.{package}" in message and "install" in message
    assert not (one.out(package) / "recover").exists()


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("bank of another seed", "seed"),
        ("bank of another text", "text"),
        ("bank of another model", "model"),
    ],
)
def test_a_bank_of_other_data_is_refused(one, name, fact):
    message = one.refused(name)
    assert f"banks/pretrained was made from other data: its {fact} was" in message
    assert "remove that folder to build it anew" in message


def test_a_short_rung_warms_up_too():
    def rates(steps: int, **options) -> list[float]:
        config = RecoverConfig(tokens=steps * 16 * 1024, lr=1.0, **options)
        assert config.steps == steps
        return [learning_rate(step, config) for step in range(steps)]

    assert rates(40)[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert rates(8)[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert rates(400)[:12] == pytest.approx([n / 12 for n in range(1, 13)])
    assert rates(400)[-1] == pytest.approx(0.1, abs=1e-4)
    assert rates(40, warmup=0.0)[0] == 1.0
    assert min(rates(1) + rates(3)) > 0


def test_contrasts_are_on_where_something_is_contrasted():
    def on(**options) -> bool:
        fields = {f.name for f in dataclasses.fields(ObjectiveConfig)}
        weights = {k: options.pop(k) for k in list(options) if k in fields}
        return RecoverConfig(objective=ObjectiveConfig(**weights), **options).contrasts

    assert on() and on(prc=0, ladder="0.5, 0.6") and on(prc=0, finetuned="train")
    assert not on(prc=0) and not on(prc=0, snc=0, ladder="0.5, 0.6")


def test_a_batch_that_the_ranks_cannot_share_is_refused(two):
    message = two.refused("no batch")
    assert "recover.batch is 6, no multiple of 2 ranks x micro_batch 2" in message


def test_a_loss_that_is_no_number_names_the_sequences_and_keeps_the_checkpoint(two):
    message = two.refused("no number")
    order = np.random.default_rng([0, 0]).permutation(STEPS * BATCH)
    batch = order[4 * BATCH : 5 * BATCH].tolist()
    assert f"the loss of step 5 is not finite; the sequences of this batch are {batch}" in message
    assert "--recover.lr" in message
    assert checkpoints(two.out("no number")) == ["step-000003"]


@pytest.mark.parametrize(
    ("name", "step"), [*((zero, 5) for zero in ZERO), ("in 16 bits", 3)], ids=str
)
def test_a_gradient_that_is_no_number_names_the_step_and_keeps_the_checkpoint(two, name, step):
    message = two.refused(f"no slope {name}")
    order = np.random.default_rng([0, 0]).permutation(len(two.assets.packed().ids))
    assert f"the gradient of step {step} is not finite, though its loss is" in message
    assert "--recover.lr" in message
    if step == 5:
        assert str(order[4 * BATCH : 5 * BATCH].tolist()) in message
        assert checkpoints(two.out(f"no slope {name}")) == ["step-000003"]


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_deepspeed_file_resolves_for_one_rank(path):
    world = World.alone(torch.device("cpu"))
    settings = RecoverConfig(batch=8, micro_batch=2, dtype="bfloat16")
    if path.stem.startswith("teacher"):
        settings.deepspeed, settings.teacher_deepspeed = "zero3", path.stem
        resolved = engines.student_settings(settings, world)
        resolved = engines.teacher_settings(settings, world, resolved)
    else:
        settings.deepspeed = path.stem
        resolved = engines.student_settings(settings, world)
        assert resolved["gradient_accumulation_steps"] == 4
        assert resolved["train_batch_size"] == 8
    assert resolved["bf16"] == {"enabled": True} and resolved["fp16"] == {"enabled": False}
    assert '"auto"' not in json.dumps(resolved)


# the real entry


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
    settings |= {"recover.teacher": "null", "recover.tokens": 2 * BATCH * LENGTH}
    config, text, _ = read_config(arguments(settings | {"stages": "[oneshot]"}))
    train.pipeline(config, text, Console(speaks=False))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    settings |= {"recover.deepspeed": "zero3"}
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
    settings = assets.options(tmp_path / "run", 2) | {"recover.tokens": 2 * BATCH * LENGTH}
    job = launched([launcher, "--num_accelerators", "2", "--master_port", port], settings)
    assert job.returncode == 0, job.stdout
    assert_zeros(tmp_path / "run" / "recover", assets.half)


def test_torchrun_with_one_process_works_too(assets, tmp_path):
    settings = assets.options(tmp_path / "run", 1) | {"recover.tokens": 2 * BATCH * LENGTH}
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
    settings |= {"recover.tokens": 150 * BATCH * LENGTH, "recover.sequences": 24}
    settings |= {"recover.checkpoint_steps": 1000, "recover.evaluate_steps": 10}
    with subprocess.Popen(
        [sys.executable, train.__file__, *arguments(settings)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as job:
        for line in job.stdout:
            if "step    20/150" in line:
                job.send_signal(signal.SIGTERM)
                break
        said, err = job.communicate(timeout=60)
    assert job.returncode == 143, err
    assert "cap-llm: stopped; give the same command again to go on" in err
    step = int(re.search(r"checkpoint at step (\d+) of 150", said).group(1))
    assert 20 <= step < 150
    assert checkpoints(tmp_path / "run") == [f"step-{step:06d}"]
