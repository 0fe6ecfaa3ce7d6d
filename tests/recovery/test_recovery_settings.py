"""What the settings of `recover` become, in this process."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from launches import CPU
from support import ROOT

from cap_llm.config import ObjectiveConfig, RecoverConfig
from cap_llm.recovery import checkpoints as checkpoints_module
from cap_llm.recovery import engines
from cap_llm.recovery.training import learning_rate
from cap_llm.runtime.world import World


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


def test_what_a_deepspeed_file_leaves_out_is_the_recipes(tmp_path):
    path = tmp_path / "bare.json"
    path.write_text('{"zero_optimization": {"stage": 1}}')
    settings = RecoverConfig(deepspeed=str(path), batch=8, dtype="bfloat16", clip=0.25)
    resolved = engines.student_settings(settings, World.alone(CPU))
    assert resolved["bf16"]["enabled"] is True and resolved["fp16"]["enabled"] is False
    assert resolved["gradient_clipping"] == 0.25
    assert resolved["gradient_accumulation_steps"] == 8


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
