"""The stage `recover` in real gloo processes: ZeRO 0 to 3, resume, schedules, bad input.

Three launches of `worker.py` (two ranks; then one and three) run all cases, since a start costs
more than a case; the tests look at what the run directories hold.

All are of this file, so that nothing is launched twice.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from launches import (
    BATCH,
    FEATURE,
    LENGTH,
    LEVEL_STEPS,
    MIXED,
    NO_CONTRAST,
    RESUMED_ON,
    SCHEDULE,
    STEPS,
    ZERO,
    Assets,
    Cases,
)
from readings import (
    assert_close,
    assert_zeros,
    checkpoints,
    losses,
    masks,
    names,
    perplexity,
    record,
    sparsity,
    tensors,
)
from refusals import REFUSED, add_refusals
from support import VOCABULARY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cap_llm.models.files import fingerprint
from cap_llm.models.mask_file import FILE


@pytest.fixture(scope="module")
def two(assets, tmp_path_factory) -> Cases:
    """All cases of two ranks, run."""
    cases = Cases(2, tmp_path_factory.mktemp("two"), assets)
    for zero in ZERO:
        settings = {"recover__engine__deepspeed": zero}
        cases.add(f"plain {zero}", **settings)
        stopped = cases.add(f"stopped {zero}", ("stop", "recover", 5), **settings)
        again = ("copy", stopped, cases.out(f"resumed {zero}"))
        cases.add(f"resumed {zero}", edits=[again], **settings)
        settings |= MIXED
        cases.add(f"mixed {zero}", **settings)
        stopped = cases.add(f"mixed, stopped {zero}", ("stop", "recover", 2), **settings)
        again = ("copy", stopped, cases.out(f"mixed, resumed {zero}"))
        cases.add(f"mixed, resumed {zero}", edits=[again], **settings)
    for name in ("cpu", "zero3_offload"):
        cases.add(name, recover__engine__deepspeed=name)
    cases.add("half", **MIXED | {"recover.optimizer.dtype": "float16"})
    cases.add("accumulated", **NO_CONTRAST, **FEATURE, recover__engine__micro_batch=1)
    cases.add("crashed", ("crash", "recover", 6), recover__engine__deepspeed="zero3")
    cases.add("after the crash", out="crashed", recover__engine__deepspeed="zero3")
    cases.add("all terms", **all_terms(assets))
    cases.add("schedule", **SCHEDULE)
    cases.add("schedule, stopped", ("stop", "recover/2", 4), **SCHEDULE)
    snapshot = cases.out("schedule, stopped") / "recover" / "banks" / "snapshot-1"
    lost = [("remove", snapshot)]
    cases.add("schedule, resumed", out="schedule, stopped", edits=lost, **SCHEDULE)
    short = {"recover.optimizer.tokens": 4 * BATCH * LENGTH}
    for family, zero in (("gpt2", "zero3"), ("opt", "zero2"), ("opt350", "zero3")):
        model = {"model.path": assets.tiny(family), "stages": "[oneshot, recover]"}
        model |= {"recover.teacher": "null", "recover.engine.deepspeed": zero}
        cases.add(family, **model, **short)
    for zero in ("zero2", "zero3"):
        cases.add(f"regrown {zero}", ("without_hooks",), recover__engine__deepspeed=zero, **short)
    cases.add("no number", ("spoil_loss", "recover", 5))
    for zero in ZERO:
        cases.add(
            f"no slope {zero}", ("spoil_gradient", "recover", 5), recover__engine__deepspeed=zero
        )
    mixed = MIXED | {"recover.engine.deepspeed": "zero2"}
    cases.add("no slope in 16 bits", ("spoil_gradient", "recover", 3), **mixed)
    cases.add("no batch", recover__engine__micro_batch=2)
    return cases.start().wait()


@pytest.fixture(scope="module")
def later(assets, two, tmp_path_factory) -> Iterator[dict[int, Cases]]:
    """All cases of one rank and of three, run at once; some go on from what two ranks have left."""
    launches = {n: Cases(n, tmp_path_factory.mktemp(f"ranks{n}"), assets) for n in RESUMED_ON}
    for n, cases in launches.items():
        for zero in RESUMED_ON[n]:
            copied = ("copy", two.out(f"stopped {zero}"), cases.out(f"resumed {zero}"))
            cases.add(f"resumed {zero}", edits=[copied], recover__engine__deepspeed=zero)
    one = launches[1]
    for zero in ZERO:
        copied = ("copy", two.out(f"mixed, stopped {zero}"), one.out(f"mixed, resumed {zero}"))
        same = MIXED | {"recover.engine.deepspeed": zero, "recover.engine.micro_batch": 2}
        one.add(f"mixed, resumed {zero}", edits=[copied], **same)
    one.add("plain")
    add_types(one)
    add_resumes(one)
    add_levels(one)
    add_ablations(one)
    add_refusals(one)
    with contextlib.ExitStack() as stack:
        for cases in launches.values():
            stack.callback(cases.start().stop)
        yield {n: cases.wait() for n, cases in launches.items()}
    disk = str(one.out("full disk"))
    subprocess.run(["umount", "-l", disk], capture_output=True, check=False)


@pytest.fixture(scope="module")
def one(later) -> Cases:
    """The cases of one rank."""
    return later[1]


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
    if two.results["half"]["ranks"][0]["error"] is None:
        assert_16_bits(assets, two.finished("half"), "float16")
    else:
        message = two.refused("half")
        assert "float16" in message and "bfloat16 or float32" in message


def assert_16_bits(assets: Assets, run: Path, dtype: str) -> None:
    """The model computes in `dtype`; its files keep their own type, float32."""
    assert_zeros(run / "recover", assets.half)
    assert stored_as(run / "recover") == "float32"
    for weight in tensors(run / "recover").values():
        assert torch.equal(weight, weight.to(getattr(torch, dtype)).float())
    engines_own = losses(run)["held_out_ppl", 4]
    assert perplexity(run / "recover", assets.held_out()) == pytest.approx(engines_own, rel=1e-2)


def stored_as(folder: Path) -> str:
    """The one type of all weights of a model directory, which its configuration names."""
    (dtype,) = {str(w.dtype).removeprefix("torch.") for w in tensors(folder).values()}
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    return dtype


def add_types(cases: Cases) -> None:
    """Cases of one rank about the type that weights are stored in."""
    short = {"recover.optimizer.tokens": 2 * BATCH * LENGTH} | NO_CONTRAST
    half = {"model.path": cases.assets.tiny("llama", dtype=torch.bfloat16)}
    half |= {"stages": "[oneshot, recover]", "recover.teacher": "null"}
    for zero in ("zero2", "zero3"):
        settings = {"recover.engine.deepspeed": zero} | short
        cases.add(f"stored in 16 bits {zero}", **half | settings)
        settings["recover.save_dtype"] = "float16"
        cases.add(f"saved in 16 bits {zero}", **settings, recover__optimizer__dtype="bfloat16")


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_weights_keep_their_stored_type_or_get_the_one_that_is_asked_for(one, assets, zero):
    run = one.finished(f"stored in 16 bits {zero}")
    assert stored_as(run / "recover") == "bfloat16"
    assert_zeros(run / "recover", run / "oneshot")
    run = one.finished(f"saved in 16 bits {zero}")
    assert stored_as(run / "recover") == "float16"
    assert_zeros(run / "recover", assets.half)


@pytest.mark.parametrize("zero", [zero for zero in ZERO if zero != "zero2"])
def test_16_bits_give_the_same_losses_at_every_stage(two, zero):
    first, other = losses(two.finished("mixed zero2")), losses(two.finished(f"mixed {zero}"))
    assert "feature" in names(first)
    assert_close(first, other, 0.05)


@pytest.mark.parametrize(
    ("family", "transposed"), [("gpt2", True), ("opt", False), ("opt350", False)]
)
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
@pytest.mark.parametrize(
    ("whole", "stopped", "resumed", "step"),
    [("plain", "stopped", "resumed", 5), ("mixed", "mixed, stopped", "mixed, resumed", 2)],
)
def test_a_stopped_run_goes_on_as_if_it_had_not_been(two, whole, stopped, resumed, step, zero):
    assert checkpoints(two.stopped(f"{stopped} {zero}"))[-1] == f"step-{step:06d}"
    resumed = two.finished(f"{resumed} {zero}")
    assert record(resumed)["resumed_at_step"] == step
    whole = two.finished(f"{whole} {zero}")
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


@pytest.mark.parametrize("zero", ZERO)
def test_another_number_of_ranks_goes_on_in_16_bits(assets, two, later, zero):
    run = later[1].finished(f"mixed, resumed {zero}")
    assert record(run)["resumed_at_step"] == 2
    assert_close(losses(run), losses(two.finished(f"mixed {zero}")), 0.01)
    assert_16_bits(assets, run, "bfloat16")


BIT_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt")
ODD = {
    "empty": "{}",
    "a list": "[1, 2]",
    "deep": "[" * 100_000,
    "no recipe": '{"step": 5, "ranks": 1, "zero_stage": 2, "state": {}, "recipe": {}}',
    "no step": '{"step": "5", "ranks": 1, "zero_stage": 2, "state": {}, "recipe": {}}',
    "not UTF-8": "\udcff",
}


def add_resumes(cases: Cases) -> None:
    """Cases of one rank about what lies in the folder of checkpoints."""
    each = {"recover.checkpoint.every": 1}
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
    seldom = {"recover.checkpoint.every": 100}
    cases.add("incomplete", ("stop", "recover", 7), edits=gone, **seldom)
    again = ("copy", cases.out("incomplete"), cases.out("incomplete, resumed"))
    cases.add("incomplete, resumed", edits=[again])
    cases.add("anew", edits=[copied("anew")], recover__checkpoint__resume="false")
    cases.add("must go on", edits=[copied("must go on")], recover__checkpoint__resume="true")
    cases.add("nothing to go on from", recover__checkpoint__resume="true")
    path = complete("by path", 4).parent
    cases.add("by path", edits=[copied("by path")], recover__checkpoint__resume=path)
    no_banks = ("remove", cases.out("without banks") / "recover" / "banks")
    cases.add("without banks", edits=[copied("without banks"), no_banks])
    path = complete("stopped", 4).parent
    cases.add("by path elsewhere", ("stop", "recover", 6), recover__checkpoint__resume=path)
    again = ("copy", cases.out("by path elsewhere"), cases.out("by path elsewhere, again"))
    cases.add("by path elsewhere, again", edits=[again], recover__checkpoint__resume=path)
    cases.add(
        "by path, done", out="by path", recover__checkpoint__resume=complete("by path", 4).parent
    )
    cases.add("by a wrong path", recover__checkpoint__resume=cases.assets.half)
    cases.add(
        "another recipe by path",
        recover__checkpoint__resume=path,
        recover__optimizer__weight_decay=0.1,
    )
    elsewhere = shutil.copytree(cases.assets.half, cases.assets.folder / "half, elsewhere")
    cases.add(
        "another rate",
        recover__checkpoint__resume=path,
        recover__optimizer__lr=0.001,
        model__path=elsewhere,
    )
    weights = "mp_rank_00_model_states.pt"
    lost = ("remove", complete("damaged", 5).with_name(weights))
    cases.add("damaged", edits=[copied("damaged"), lost])
    lost = ("remove", complete("damaged", 5).parent)
    cases.add("damaged, removed", out="damaged", edits=[lost])
    for file in BIT_FILES:
        flipped = ("flip", complete(f"flipped {file}", 5).with_name(file))
        cases.add(f"flipped {file}", edits=[copied(f"flipped {file}"), flipped])
    for odd, text in ODD.items():
        written = ("write", complete(f"odd {odd}", 5), text)
        cases.add(f"odd {odd}", edits=[copied(f"odd {odd}"), written])
        cases.add(
            f"odd {odd}, by path", recover__checkpoint__resume=complete(f"odd {odd}", 5).parent
        )
    zero = {"stage": 3, "sub_group_size": 2000}
    content = {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    groups = cases.assets.write("sub-groups.json", content)
    laid = cases.add("sub-groups", ("stop", "recover", 5), recover__engine__deepspeed=groups)
    other = [("copy", laid, cases.out("other sub-groups")), ("replace", groups, "2000", "7000")]
    cases.add("other sub-groups", edits=other, recover__engine__deepspeed=groups)
    edited = ("replace", complete("another recipe", 5), '"lr": 0.003', '"lr": 0.004')
    cases.add("another recipe", edits=[copied("another recipe"), edited])
    cases.add("another stage", edits=[copied("another stage")], recover__engine__deepspeed="zero3")
    full = cases.out("full disk")
    often = {"recover.checkpoint.every": 2} | NO_CONTRAST
    cases.add("full disk", ("unchecked_disk",), edits=[("disk", full, "size=1700k")], **often)
    grown = [("disk", full, "remount,size=600m")]
    cases.add("grown disk", out="full disk", edits=grown, **often)
    text = cases.assets.folder / "changing.txt"
    text.write_text(cases.assets.text.read_text())
    changing = NO_CONTRAST | {"recover.corpus": text}
    cases.add("text", ("stop", "recover", 5), **changing)
    changed = [("copy", cases.out("text"), cases.out("another text")), ("replace", text, "a", "e")]
    cases.add("another text", edits=changed, **changing)


def test_old_checkpoints_are_removed(one):
    assert checkpoints(one.stopped("stopped")) == ["step-000004", "step-000005"]


def test_a_signal_in_the_last_step_stops_too_and_nothing_is_left_to_train(one):
    run = one.stopped("stopped at the end")
    assert checkpoints(run)[-1] == f"step-{STEPS:06d}"
    assert not list((run / "recover").glob("*.safetensors"))
    run = one.finished("at the end, resumed")
    assert record(run)["resumed_at_step"] == STEPS
    assert losses(run) == losses(one.finished("plain"))


def test_a_full_disk_is_named_and_a_larger_one_goes_on(one):
    if one.results["full disk"]["ranks"][0]["traceback"]:
        pytest.skip("a small file system cannot be mounted here")
    message = one.refused("full disk")
    assert "step-000004" in message
    assert record(one.finished("grown disk", out="full disk"))["resumed_at_step"] == 2


def test_an_incomplete_checkpoint_does_not_count_and_is_removed(one):
    run = one.stopped("incomplete")
    assert "resuming at step 5/8" in (run / "log.txt").read_text()
    assert checkpoints(run) == ["step-000004", "step-000007"]
    run = one.finished("incomplete, resumed")
    assert record(run)["resumed_at_step"] == 7
    assert losses(run) == losses(one.finished("plain"))


@pytest.mark.parametrize(("name", "step"), [("anew", 0), ("must go on", 5), ("by path", 4)])
def test_where_to_go_on_from_can_be_said(one, name, step):
    run = one.finished(name)
    assert record(run)["resumed_at_step"] == step
    assert losses(run) == losses(one.finished("plain"))


def test_the_command_that_named_a_checkpoint_goes_on_from_its_own(one):
    assert checkpoints(one.stopped("by path elsewhere"))[-1] == "step-000006"
    said = (one.out("by path elsewhere") / "log.txt").read_text()
    assert "resuming at step 5/8" in said
    assert (
        "recover: done already"
        in (one.finished("by path, done", "by path") / "log.txt").read_text()
    )


@pytest.mark.parametrize(("name", "step"), [("by path elsewhere, again", 6), ("without banks", 5)])
def test_the_rows_of_a_bank_that_is_not_there_are_made_again(one, name, step):
    run = one.finished(name)
    assert record(run)["resumed_at_step"] == step
    whole = {k: v for k, v in losses(one.finished("plain")).items() if k[1] > step}
    found = {k: v for k, v in losses(run).items() if k[1] > step}
    assert_close(whole, found, 1e-6)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nothing to go on from", ["recover.checkpoint.resume is true"]),
        (
            "by a wrong path",
            ["recover.checkpoint.resume", "complete.json"],
        ),
        (
            "another recipe",
            ["recover.optimizer.lr", "0.004", "0.003", "--recover.checkpoint.resume false"],
        ),
        (
            "another recipe by path",
            [
                "recover.optimizer.weight_decay",
                "0.1",
                "--recover.checkpoint.resume false",
            ],
        ),
        (
            "another stage",
            [
                "zero_stage",
                "--recover.checkpoint.resume false",
            ],
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(one, name, expected):
    message = one.refused(name)
    for part in expected:
        assert part in message
    if "path" not in name and name != "nothing to go on from":
        assert checkpoints(one.out(name)) == ["step-000004", "step-000005"]


def test_a_training_that_diverged_goes_on_from_a_named_checkpoint_at_a_lower_rate(one):
    run = one.finished("another rate")
    assert record(run)["resumed_at_step"] == 4
    log = " ".join((run / "log.txt").read_text().split())
    assert "recover.optimizer.lr was 0.003" in log and "0.001" in log
    slower, plain = losses(run), losses(one.finished("plain"))
    assert slower["loss", 5] == plain["loss", 5]
    assert slower["loss", STEPS] != plain["loss", STEPS]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(one):
    message = one.refused("damaged")
    assert "step-000005" in message
    run = one.finished("damaged, removed", out="damaged")
    assert record(run)["resumed_at_step"] == 4
    assert losses(run) == losses(one.finished("plain"))


@pytest.mark.parametrize("file", BIT_FILES)
def test_one_bit_in_a_checkpoint_is_found(one, file):
    message = one.refused(f"flipped {file}")
    assert "step-000005" in message and file in message


@pytest.mark.parametrize("how", ["", ", by path"])
@pytest.mark.parametrize("odd", ODD)
def test_an_odd_mark_of_a_checkpoint_is_one_line(one, odd, how):
    message = one.refused(f"odd {odd}{how}")
    assert "step-000005" in message and "complete.json" in message


def test_a_checkpoint_that_is_laid_out_in_another_way_is_refused(one):
    assert "step-000005" in one.refused("other sub-groups")


def test_a_checkpoint_of_another_text_is_refused(one):
    one.stopped("text")
    assert "text" in one.refused("another text")


def test_tensorboard_has_the_curves_of_the_metrics(one):
    run = one.finished("2:4")
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    curves = losses(run, "recover/1")
    assert {"loss", "kl", "prc", "held_out_ppl"} <= names(curves)
    for (name, step), value in curves.items():
        points = {event.step: event.value for event in events.Scalars(f"recover/1/{name}")}
        assert points[step] == pytest.approx(value, rel=1e-6)


# the schedule


def add_levels(cases: Cases) -> None:
    """Cases of one rank that start from a dense model, and a gate."""
    dense = {"model.path": cases.assets.dense, "recover.teacher": "null"}
    short = {"recover.optimizer.tokens": 2 * BATCH * LENGTH}
    cases.add(
        "2:4", **dense, **short, recover__masks__schedule="2:4", recover__log__tensorboard="true"
    )
    cases.add("3:4, 2:4", **dense, **short, recover__masks__schedule="3:4, 2:4")
    levels = {"recover.masks.schedule": "0.3, 0.4, 0.5"}
    cases.add("three levels", **dense, **short, **levels, recover__contrast__snapshots=1)
    two_levels = {"recover.masks.schedule": "0.6, 0.7"}
    for name in ("schedule, true", "schedule, by path"):
        stopped = cases.add(f"{name}, stopped", ("stop", "recover/1", 5), **two_levels)
        resume = stopped / "recover" / "checkpoints" / "1" / "step-000005"
        resume = "true" if "true" in name else resume
        again = ("copy", stopped, cases.out(name))
        settings = two_levels | {"recover.checkpoint.resume": resume}
        cases.add(name, ("stop", "recover/2", 4), edits=[again], **settings)
        cases.add(f"{name}, again", out=name, **settings)
    elsewhere = Path(shutil.copytree(cases.assets.half, cases.assets.folder / "elsewhere"))
    for name in (FILE, "sparsity.json"):
        (elsewhere / name).unlink()
    settings = {"model.path": elsewhere, "oneshot.block_size": 16, "recover.masks.schedule": "0.6"}
    cases.add("pruned elsewhere", **settings, **short)
    # so large a rate that the model is lost
    lost = {"recover.masks.schedule": "0.7, 0.8", "recover.optimizer.lr": 0.1} | short
    cases.add("gate", recover__log__max_ppl_ratio=1.01, **lost)
    cases.add("gate, again", out="gate", recover__log__max_ppl_ratio=1.02, **lost)
    raised = ("copy", cases.out("gate"), cases.out("gate, raised"))
    cases.add("gate, raised", edits=[raised], recover__log__max_ppl_ratio=1e9, **lost)
    text = cases.assets.folder / "changing-later.txt"
    text.write_text(cases.assets.text.read_text())
    changing = lost | {"recover.corpus": text}
    cases.add("text of two levels", recover__log__max_ppl_ratio=1.01, **changing)
    changed = [("replace", text, "a", "e")]
    cases.add(
        "another text of the second level", out="text of two levels", edits=changed, **changing
    )


def test_a_schedule_prunes_inside_the_earlier_masks(two, assets):
    recover = two.finished("schedule") / "recover"
    folders = [assets.half]
    folders += [recover / "levels" / "1" / name for name in ("pruned", "trained")]
    folders += [recover / "levels" / "2" / "pruned", recover]
    for before, after in zip(folders, folders[1:], strict=False):
        for name, mask in masks(after).items():
            assert not (mask & ~masks(before)[name]).any()
    found = [sparsity(folder) for folder in folders]
    assert found == pytest.approx([0.5, 0.6, 0.6, 0.7, 0.7], abs=0.01)
    assert_zeros(recover / "levels" / "1" / "trained", recover / "levels" / "1" / "pruned")
    assert_zeros(recover, recover / "levels" / "2" / "pruned")


def test_a_schedule_logs_each_contrast_and_keeps_its_banks(two):
    run = two.finished("schedule")
    for level in (1, 2):
        values = losses(run, f"recover/{level}")
        assert {step for _, step in values} == set(range(LEVEL_STEPS + 1))
        assert {"ce", "kl", "prc", "snc", "fic"} <= names(values)
    assert names(losses(run, "recover/finetuned")) == {"loss", "ce", "held_out_ppl", "grad_norm"}
    log = (run / "log.txt").read_text()
    assert "SnC is off" not in log and "FiC is off" not in log
    banks = run / "recover" / "banks"
    assert {p.name for p in banks.iterdir()} == {
        *("pretrained", "finetuned", "snapshot-1", "snapshot-2")
    }
    for bank in banks.iterdir():
        there = np.fromfile(bank / "valid.bin", np.uint8)
        # each level trains on text of its own, and the second has a snapshot that the first has not
        levels = 1 if bank.name == "snapshot-2" else 2
        assert len(there) == 2 * LEVEL_STEPS * BATCH
        assert there.sum() == levels * LEVEL_STEPS * BATCH
        facts = json.loads((bank / "bank.json").read_text())
        assert facts["mean_cosine"] < 0.7 and facts["effective_rank"] > 2
    records = json.loads((run / "recover" / "recovery.json").read_text())["levels"]
    assert [r["level"] for r in records] == ["0.6", "0.7"]


def test_a_fine_tuned_model_is_the_dense_one_trained(two, assets):
    folder = two.finished("schedule") / "recover" / "finetuned"
    values = losses(two.out("schedule"), "recover/finetuned")
    assert values["held_out_ppl", LEVEL_STEPS] < values["held_out_ppl", 0]
    dense = perplexity(assets.dense, assets.held_out())
    assert values["held_out_ppl", 0] == pytest.approx(dense, rel=1e-4)
    tuned = perplexity(folder, assets.held_out())
    assert values["held_out_ppl", LEVEL_STEPS] == pytest.approx(tuned, rel=1e-4)
    assert all((w != 0).any() for w in tensors(folder).values())


def test_a_schedule_that_was_stopped_in_a_later_level_gives_the_same_result(two):
    whole = two.finished("schedule")
    assert two.outcome("schedule, stopped")["stopped"] == signal.SIGTERM
    resumed = two.finished("schedule, resumed", out="schedule, stopped")
    for stage in ("recover/finetuned", "recover/1", "recover/2"):
        assert losses(resumed, stage) == losses(whole, stage)
    for name, weight in tensors(whole / "recover").items():
        assert torch.equal(tensors(resumed / "recover")[name], weight)
    text = (resumed / "log.txt").read_text()
    assert text.count("level 1/2 (0.6): pruning") == 1
    assert text.count("fine-tuning the dense model") == 1


@pytest.mark.parametrize("name", ["schedule, true", "schedule, by path"])
def test_a_schedule_goes_on_to_the_next_level_after_it_was_told_to_resume(one, name):
    assert one.outcome(f"{name}, stopped")["stopped"] == signal.SIGTERM
    assert one.outcome(name)["stopped"] == signal.SIGTERM
    run = one.finished(f"{name}, again", out=name)
    assert sparsity(run / "recover") == pytest.approx(0.7, abs=0.01)
    records = json.loads((run / "recover" / "recovery.json").read_text())["levels"]
    assert [r["resumed_at_step"] for r in records] == [5, 4]


def test_a_dense_model_goes_to_a_pattern_at_once(one, assets):
    run = one.finished("2:4")
    pruned = run / "recover" / "levels" / "1" / "pruned"
    assert_zeros(run / "recover", pruned)
    for mask in masks(run / "recover").values():
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
    assert "SnC is off on this level" in (run / "log.txt").read_text()
    assert "snc" not in names(losses(run, "recover/1"))


def test_a_schedule_of_patterns_takes_weights_from_each_group(one):
    recover = one.finished("3:4, 2:4") / "recover"
    first, last = masks(recover / "levels" / "1" / "trained"), masks(recover)
    for name, mask in last.items():
        assert (first[name].reshape(-1, 4).sum(1) == 3).all()
        assert (mask.reshape(-1, 4).sum(1) == 2).all()
        assert not (mask & ~first[name]).any()
    assert_zeros(recover, recover / "levels" / "2" / "pruned")


def test_a_schedule_prunes_inside_the_zeros_of_a_model_that_was_pruned_elsewhere(one, assets):
    run = one.finished("pruned elsewhere")
    assert_zeros(run / "recover", run / "recover" / "levels" / "1" / "pruned")
    assert sparsity(run / "recover") == pytest.approx(0.6, abs=0.01)
    for name, mask in masks(run / "recover").items():
        assert not (mask & ~masks(assets.half)[name]).any()


def test_snapshots_begin_with_the_second_level_of_a_dense_model_and_old_ones_go(one):
    run = one.finished("three levels")
    assert "snc" not in names(losses(run, "recover/1"))
    for level in (2, 3):
        assert "snc" in names(losses(run, f"recover/{level}"))
    assert (run / "log.txt").read_text().count("SnC is off on this level") == 1
    banks = {p.name for p in (run / "recover" / "banks").iterdir()}
    assert banks == {"pretrained", "snapshot-3"}


def test_snapshots_share_their_weight(two):
    run = two.finished("schedule")
    for level in (1, 2):  # the start was pruned already: as many snapshots as levels
        values = losses(run, f"recover/{level}")
        weights = {"ce": 0.2, "kl": 0.8, "prc": 0.1, "fic": 0.1, "snc": 0.1 / level}
        total = sum(weight * values[name, 1] for name, weight in weights.items())
        assert values["loss", 1] == pytest.approx(total, rel=1e-5)


def test_a_level_that_loses_too_much_ends_the_schedule(one):
    message = one.refused("gate")
    assert "recover.log.max_ppl_ratio is 1.01" in message and "level 1/2 (0.7)" in message
    assert "recover.optimizer.tokens" in message
    trained = one.out("gate") / "recover" / "levels" / "1" / "trained"
    assert sparsity(trained) == pytest.approx(0.7, abs=0.01)
    assert "level 1/2 (0.7)" in one.refused("gate, again")
    assert not (one.out("gate") / "recover" / "levels" / "2").exists()
    assert not (one.out("gate") / "recover" / "checkpoints" / "1").exists()  # needed no more
    assert sparsity(one.finished("gate, raised") / "recover") == pytest.approx(0.8, abs=0.01)


def test_a_later_level_has_the_text_of_the_first(one):
    assert "recover.log.max_ppl_ratio" in one.refused("text of two levels")
    message = one.refused("another text of the second level")
    assert "text" in message and str(one.out("text of two levels") / "recover") in message
    levels = one.out("text of two levels") / "recover" / "levels"
    assert [p.name for p in levels.iterdir()] == ["1"]


# the objective's terms

TERMS = ("kl", "feature", "prc", "snc", "fic")
WEIGHTS = {"ce": 0.2, "kl": 0.8, "feature": 0.5, "prc": 0.1, "snc": 0.1, "fic": 0.1}


def all_terms(assets: Assets) -> dict:
    """The settings of a level with every term on."""
    return {
        "recover.masks.schedule": "0.6",
        "recover.optimizer.tokens": 2 * BATCH * LENGTH,
        "recover.finetuned": assets.tiny("llama", num_hidden_layers=3, seed=1),
        "recover.objective.feature": WEIGHTS["feature"],
    }


def add_ablations(cases: Cases) -> None:
    """Cases of one rank with all terms on, and with each of them off."""
    tiny, everything = cases.assets.tiny, all_terms(cases.assets)
    cases.add("all terms", **everything)
    ours = dict.fromkeys(("recover.objective.prc", "recover.objective.snc"), 0)
    cases.add("default weights", **ours, recover__optimizer__tokens=2 * BATCH * LENGTH)
    for term in TERMS:
        cases.add(f"without {term}", **everything | {f"recover.objective.{term}": 0})
    cases.add("no contrast", **NO_CONTRAST, **FEATURE)
    worse = {
        "recover.finetuned": "train",
        "recover.optimizer.lr": 1.0,
        "recover.optimizer.tokens": 2 * BATCH * LENGTH,
    }
    cases.add("fine-tuned, and worse", **worse)
    wide = {"recover.teacher": tiny("llama", hidden_size=64, num_hidden_layers=3)}
    cases.add("wide teacher", **wide, **NO_CONTRAST)
    padded = {"recover.teacher": tiny("llama", num_hidden_layers=3, vocab_size=VOCABULARY + 64)}
    cases.add("padded teacher", **padded, **NO_CONTRAST, recover__engine__deepspeed="zero3")
    tuned = {"model.dense": cases.assets.dense, "recover.finetuned": "train"}
    tuned |= {"recover.objective.prc": 0, "recover.optimizer.tokens": 2 * BATCH * LENGTH}
    cases.add("wide teacher, fine-tuned", **wide | tuned)
    cases.add(
        "wide teacher, snapshots", **wide, recover__objective__prc=0, recover__masks__schedule="0.6"
    )
    short = {"recover.optimizer.tokens": 2 * BATCH * LENGTH, "recover.sequences": 8}
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


def test_all_terms_of_two_ranks_equal_those_of_one(one, two):
    of_one, of_two = (losses(cases.finished("all terms"), "recover/1") for cases in (one, two))
    assert names(of_one) >= set(WEIGHTS)
    assert_close(of_one, of_two, 1e-4)


@pytest.mark.parametrize("name", ["plain", "default weights"])
def test_a_term_without_its_model_is_off_and_the_log_says_so(one, name):
    log = (one.finished(name) / "log.txt").read_text()
    assert "FiC is off: recover.finetuned names no fine-tuned model" in log
    assert ("SnC is off" in log) == (name == "plain")


def test_a_fine_tuned_model_that_is_worse_than_the_dense_one_is_told(one, two):
    run = one.finished("fine-tuned, and worse")
    values = losses(run, "recover/finetuned")
    assert values["held_out_ppl", 2] > values["held_out_ppl", 0]
    said = r"the fine-tuned model's held-out ppl is [\d.]+, worse than the dense model's [\d.]+"
    assert re.search(said, (run / "log.txt").read_text())
    assert "worse than" not in (two.finished("schedule") / "log.txt").read_text()


def test_a_wider_teacher_gives_the_kl(one, assets):
    run = one.finished("wide teacher")
    values = losses(run)
    assert values["kl", 1] > 0.01
    assert values["held_out_ppl", STEPS] < values["held_out_ppl", 0]
    assert_zeros(run / "recover", assets.half)


def test_a_teachers_vocabulary_may_be_padded(one, assets):
    assert_zeros(one.finished("padded teacher") / "recover", assets.half)
    assert losses(one.out("padded teacher"))["kl", 1] > 0.01


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
    assert "recover.engine.deepspeed" in message and "late.json" in message


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused(one):
    message = one.refused("wandb")
    assert "recover.log.wandb" in message
    assert not (one.out("wandb") / "recover").exists()


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
    assert "banks/pretrained" in message and f"({fact}: " in message


def test_a_batch_that_the_ranks_cannot_share_is_refused(two):
    message = two.refused("no batch")
    assert "recover.optimizer.batch is 6" in message and "recover.engine.micro_batch" in message


def test_a_loss_that_is_no_number_names_the_sequences_and_keeps_the_checkpoint(two):
    message = two.refused("no number")
    order = np.random.default_rng([0, 0]).permutation(STEPS * BATCH)
    batch = order[4 * BATCH : 5 * BATCH].tolist()
    assert "step 5" in message and str(batch) in message
    assert "--recover.optimizer.lr" in message
    assert checkpoints(two.out("no number")) == ["step-000003"]


@pytest.mark.parametrize(
    ("name", "step"), [*((zero, 5) for zero in ZERO), ("in 16 bits", 3)], ids=str
)
def test_a_gradient_that_is_no_number_names_the_step_and_keeps_the_checkpoint(two, name, step):
    message = two.refused(f"no slope {name}")
    order = np.random.default_rng([0, 0]).permutation(len(two.assets.packed().ids))
    assert f"step {step}" in message
    assert "--recover.optimizer.lr" in message
    if step == 5:
        assert str(order[4 * BATCH : 5 * BATCH].tolist()) in message
        assert checkpoints(two.out(f"no slope {name}")) == ["step-000003"]
