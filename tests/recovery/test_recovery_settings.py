"""What the settings of `recover` become, in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import deepspeed
import pytest
import torch
from launches import CPU
from support import ROOT

from cap_llm.config import (
    EngineConfig,
    MasksConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RecoverConfig,
)
from cap_llm.contrast.terms import NoContrast
from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime import trackers
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World
from cap_llm.tasks.language_modeling import LanguageModeling
from cap_llm.text.packing import PackedText
from cap_llm.training import checkpoints as checkpoints_module
from cap_llm.training import ds_config
from cap_llm.training import engine as engines
from cap_llm.training.loop import (
    MAX_OVERFLOWS,
    Job,
    count_overflows,
    learning_rate,
    step_once,
)
from cap_llm.training.masks import Fixed


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda folder: trackers.TensorBoard(folder)),
        ("wandb", lambda folder: trackers.Wandb(folder, "a-project", "a run", {})),
    ],
)
def test_a_tracker_names_the_package_that_it_lacks(package, make, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"recover\.log\.{package} .* pip install {package}"):
        make(tmp_path)
    assert not list(tmp_path.iterdir())


class SavingEngine:
    def save_checkpoint(self, folder, tag, save_latest):
        (Path(folder) / tag).mkdir()


def save(folder: Path, step: int, keep: int, **state) -> None:
    checkpoints_module.save(SavingEngine(), folder, step, state, {}, 2, keep, World.alone(CPU))


def test_the_converted_form_of_a_checkpoint_goes_with_it(tmp_path):
    save(tmp_path, 1, keep=1)
    shutil.copytree(tmp_path / "step-000001", tmp_path / "universal-step-000001")
    save(tmp_path, 2, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000002"]


def test_old_checkpoints_go_but_never_those_of_another_training(tmp_path):
    for step in (100, 200, 300):
        save(tmp_path, step, keep=2)
    save(tmp_path, 150, keep=2, **{"from": "/elsewhere/step-000100"})
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "step-000150",
        "step-000200",
        "step-000300",
    ]


def test_steps_are_counted_and_not_spelt(tmp_path):
    for step in (999_800, 1_000_000):
        save(tmp_path, step, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1000000"]


def test_a_model_is_trained_without_its_dropout(tiny):
    """A resumed training would draw other zeros, and the teacher has none."""
    folder = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    model = engines._load(ModelDirectory(folder), None, RecoverConfig(), World.alone(CPU)).train()
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_rank_that_cannot_write_its_checkpoint_says_so_and_waits_for_nobody(tmp_path):
    class Engine:
        def save_checkpoint(self, folder, tag, save_latest):
            raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0")

    class Waits(World):
        def gather(self, _):
            raise AssertionError("the others are inside DeepSpeed")

    with pytest.raises(UserError, match="step-000007 cannot be written .*unexpected pos.*free"):
        checkpoints_module.save(Engine(), tmp_path, 7, {}, {}, 0, 2, Waits.alone(CPU))


def test_what_was_loaded_counts_its_steps_by_itself():
    """DeepSpeed's universal form gives one tensor to all sub-groups of ZeRO-3."""
    step, weights = torch.tensor(5.0), [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]

    class Engine:
        basic_optimizer = torch.optim.AdamW(weights, fused=True)

        def load_checkpoint(self, folder, tag, load_lr_scheduler_states):
            for p in weights:
                moments = {"exp_avg": torch.zeros(3), "exp_avg_sq": torch.zeros(3)}
                self.basic_optimizer.state[p] = {"step": step, **moments}
            return folder, {}

    checkpoints_module.load(Engine(), checkpoints_module.Found(Path("there/step-5"), 5, {}))
    for p in weights:
        p.grad = torch.ones(3)
    Engine.basic_optimizer.step()
    assert [Engine.basic_optimizer.state[p]["step"].item() for p in weights] == [6, 6, 6]


class HalfEngine:
    """Steps whose gradients have the given norms."""

    def __init__(self, norms):
        self.optimizer, self.norms = SimpleNamespace(param_groups=({},)), iter(norms)

    def __call__(self, ids, teacher, head):
        one = torch.ones((), requires_grad=True)
        return one, one, one, torch.zeros(()), None

    def backward(self, loss):
        pass

    def step(self):
        self.norm = next(self.norms)

    def get_global_grad_norm(self):
        return self.norm


def half_steps(norms, n: int) -> list[dict]:
    config = RecoverConfig(
        length=128, optimizer=OptimizerConfig(batch=1, tokens=12800, dtype="float16")
    )
    ids = torch.zeros(4, 128, dtype=torch.long)
    world = World.alone(CPU)
    text = PackedText(ids, ids, ids, "")
    task = LanguageModeling(text, ObjectiveConfig(), 4, 0, CPU)
    job = Job(Path(), task, Fixed(()), None, NoContrast(), Path(), {}, "", "")
    engine, overflows, steps = HalfEngine(norms), 0, []
    for i in range(n):
        steps.append(step_once(engine, job, i, config, world))
        overflows = count_overflows(overflows, i, steps[-1])
    return steps


def test_float16_steps_that_overflow_are_left_out_until_there_are_too_many():
    inf = float("inf")
    steps = half_steps([inf, inf, 1.0, 2.0], 4)
    assert [step.get("grad_norm") for step in steps] == [None, None, 1.0, 2.0]
    nearly = [inf] * (MAX_OVERFLOWS - 1) + [1.0]
    half_steps(nearly + nearly, 2 * MAX_OVERFLOWS)
    with pytest.raises(UserError, match="overflows in float16 at every loss scale"):
        half_steps([inf] * MAX_OVERFLOWS, MAX_OVERFLOWS)


def test_float16_without_zero_is_refused(monkeypatch):
    """DeepSpeed would divide gradients by a scale that it has not multiplied the loss by."""
    knows_all = lambda content: [content.get(name) for name in content]  # noqa: E731
    monkeypatch.setattr(deepspeed.runtime.config, "DeepSpeedConfig", knows_all)
    on_gpu = World.alone(torch.device("cuda"))
    half = OptimizerConfig(dtype="float16")
    for stage in (1, 2, 3):
        settings = RecoverConfig(optimizer=half, engine=EngineConfig(f"zero{stage}"))
        assert ds_config.student_settings(settings, on_gpu)["fp16"]["enabled"] is True
    with pytest.raises(UserError, match=r"zero0 is ZeRO-0.*zero1, zero2 or zero3"):
        ds_config.student_settings(
            RecoverConfig(optimizer=half, engine=EngineConfig("zero0")), on_gpu
        )


def test_what_a_deepspeed_file_leaves_out_is_the_recipes(tmp_path):
    path = tmp_path / "bare.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    settings = RecoverConfig(
        optimizer=OptimizerConfig(batch=8, dtype="bfloat16", clip=0.25),
        engine=EngineConfig(str(path)),
    )
    resolved = ds_config.student_settings(settings, World.alone(CPU))
    assert resolved["bf16"]["enabled"] is True and resolved["fp16"]["enabled"] is False
    assert resolved["gradient_clipping"] == 0.25
    assert resolved["gradient_accumulation_steps"] == 8


def test_a_short_level_warms_up_too():
    def rates(steps: int, **options) -> list[float]:
        optimizer = OptimizerConfig(tokens=steps * 16 * 1024, lr=1.0, **options)
        config = RecoverConfig(optimizer=optimizer)
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

    schedule = MasksConfig("0.5, 0.6")
    assert on(prc=0.1) and on(snc=0.1, masks=schedule) and on(finetuned="train")
    assert not on() and not on(snc=0.1) and not on(masks=schedule)


@pytest.mark.parametrize("path", sorted((ROOT / "ds_configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_deepspeed_file_resolves_for_one_rank(path):
    world = World.alone(torch.device("cpu"))
    settings = RecoverConfig(
        optimizer=OptimizerConfig(batch=8, dtype="bfloat16"), engine=EngineConfig(micro_batch=2)
    )
    if path.stem.startswith("teacher"):
        settings.engine = EngineConfig("zero3", path.stem)
        resolved = ds_config.student_settings(settings, world)
        resolved = ds_config.teacher_settings(settings, world, resolved)
    else:
        settings.engine.deepspeed = path.stem
        resolved = ds_config.student_settings(settings, world)
        assert resolved["gradient_accumulation_steps"] == 4
        assert resolved["train_batch_size"] == 8
    assert resolved["bf16"] == {"enabled": True} and resolved["fp16"] == {"enabled": False}
    assert '"auto"' not in json.dumps(resolved)
