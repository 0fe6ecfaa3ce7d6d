"""Settings of `recover` that must be refused, and what the message must say."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
from launches import BATCH, DOWN_0, NO_CONTRAST, Assets, Cases
from readings import masks
from safetensors.torch import load_file, save_file
from support import ROOT


def deepspeed_file(assets: Assets, name: str, **changes) -> dict:
    content = json.loads((ROOT / "ds_configs" / "zero2.json").read_text()) | changes
    return {"recover.engine.deepspeed": assets.write(f"{name}.json", content)}


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
        lambda a: {"recover.teacher": a.tiny("llama", num_hidden_layers=3, vocab_size=500)},
        ["recover.teacher", "500", "512"],
    ),
    "tokenizer": (
        lambda a: {"recover.teacher": other_words(a)},
        ["recover.teacher"],
    ),
    "its own teacher": (
        lambda a: {"recover.teacher": Path(shutil.copytree(a.half, a.folder / "its-own"))},
        ["half", "recover.teacher"],
    ),
    "no norm": (
        lambda a: deepspeed_file(
            a, "norm", zero_optimization={"stage": 2, "compute_grad_norm": False}
        ),
        ["norm.json sets zero_optimization.compute_grad_norm to false", "take that line out"],
    ),
    "a disk for the optimizer": (
        lambda a: deepspeed_file(
            a, "disk", zero_optimization={"stage": 3, "offload_optimizer": {"device": "nvme"}}
        ),
        ["disk.json offloads the optimizer to nvme", 'device to "cpu"'],
    ),
    "width": (
        lambda a: {"recover.teacher": a.tiny("llama", num_hidden_layers=3, hidden_size=64)},
        ["recover.teacher", "hidden_size 64", "32", "recover.objective.feature", "0"],
    ),
    "width of what is fine-tuned": (
        lambda a: {
            "recover.teacher": a.tiny("llama", num_hidden_layers=3, hidden_size=64),
            "recover.finetuned": "train",
            "recover.objective.prc": 0,
        },
        ["recover.teacher", "hidden_size 64", "32"],
    ),
    "a cap on the logits": (
        lambda a: {
            "model.path": a.tiny("gemma2", num_hidden_layers=3),
            "stages": "[oneshot, recover]",
        },
        ["Gemma2ForCausalLM"],
    ),
    "a teacher with a cap on its logits": (
        lambda a: {"recover.teacher": a.tiny("gemma2", num_hidden_layers=3)},
        ["Gemma2ForCausalLM"],
    ),
    "width of the fine-tuned model": (
        lambda a: {"recover.finetuned": a.tiny("llama", num_hidden_layers=3, hidden_size=64)},
        ["recover.finetuned", "hidden_size 64", "32"],
    ),
    "no dense model": (
        lambda a: {"recover.teacher": "null"},
        ["model.dense"],
    ),
    "changed weights": (
        lambda a: {"model.path": changed_model(a)},
        [DOWN_0, "has 1 nonzero weights", "prune again"],
    ),
    "schedule down": (
        lambda a: {"recover.masks.schedule": "0.7, 0.6"},
        ["recover.masks.schedule", "0.7", "0.6"],
    ),
    "schedule down to a pattern": (
        lambda a: {"recover.masks.schedule": "0.6, 2:4"},
        ["recover.masks.schedule", "0.6", "2"],
    ),
    "first level": (
        lambda a: {"recover.masks.schedule": "0.4, 0.6"},
        ["recover.masks.schedule", "0.4", "50.0"],
    ),
    "no level": (
        lambda a: {"recover.masks.schedule": "0.6, most"},
        ["recover.masks.schedule", "0", "1"],
    ),
    "batch": (
        lambda a: {"recover.engine.micro_batch": 4},
        ["recover.optimizer.batch", "6", "1 ranks x micro_batch 4", "recover.engine.micro_batch"],
    ),
    "removed key": (
        lambda a: deepspeed_file(a, "removed", compression_training={"layer_reduction": {}}),
        ["recover.engine.deepspeed", "removed.json", "compression_training"],
    ),
    "misspelt key": (
        lambda a: deepspeed_file(a, "misspelt", zero_optimization={"stage": 2, "overlap_com": 1}),
        ["recover.engine.deepspeed", "misspelt.json", "overlap_com"],
    ),
    "misspelt section": (
        lambda a: deepspeed_file(a, "section-name", zero_optimisation={"stage": 3}),
        ["section-name.json sets zero_optimisation", "does not know; it knows zero_optimization"],
    ),
    "autocast": (
        lambda a: deepspeed_file(a, "autocast", torch_autocast={"enabled": True}),
        ["autocast.json", "recover.optimizer.dtype"],
    ),
    "an old name": (
        lambda a: deepspeed_file(a, "old", zero_optimization={"stage": 2, "cpu_offload": True}),
        ["old.json sets zero_optimization.cpu_offload", 'write "offload_optimizer"'],
    ),
    "unknown auto": (
        lambda a: deepspeed_file(
            a, "auto", zero_optimization={"stage": 2, "reduce_bucket_size": "auto"}
        ),
        [
            "recover.engine.deepspeed",
            '"auto" for zero_optimization.reduce_bucket_size',
            "give a value",
        ],
    ),
    "optimizer": (
        lambda a: deepspeed_file(a, "optimizer", optimizer={"type": "Adam"}),
        ["optimizer.json", "recover.optimizer.lr"],
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
        ["stage.json", "zero_optimization.stage is '2'", "0", "1"],
    ),
    "no JSON": (
        lambda a: {"recover.engine.deepspeed": no_json(a)},
        ["recover.engine.deepspeed"],
    ),
    "no file": (
        lambda a: {"recover.engine.deepspeed": a.folder / "nowhere.json"},
        ["recover.engine.deepspeed", "nowhere.json"],
    ),
    "no settings": (
        lambda a: {"recover.engine.deepspeed": a.write("list.json", [1, 2])},
        ["recover.engine.deepspeed", "list.json"],
    ),
    "unknown name": (
        lambda a: {"recover.engine.deepspeed": "zero4"},
        ["recover.engine.deepspeed", "zero0, zero1, zero2, zero3, zero3_offload"],
    ),
    "unknown name of the teacher's": (
        lambda a: {"recover.engine.teacher_deepspeed": "sharded"},
        ["recover.engine.teacher_deepspeed", "teacher_zero3"],
    ),
    "whole teacher of a sharded student": (
        lambda a: {
            "recover.engine.deepspeed": "zero3",
            "recover.engine.teacher_deepspeed": a.write("whole.json", {}),
        },
        ["recover.engine.deepspeed", "3", "whole.json is ZeRO-0"],
    ),
    "sharded teacher of a whole student": (
        lambda a: {"recover.engine.teacher_deepspeed": "teacher_zero3"},
        ["recover.engine.deepspeed", "2", "teacher_zero3 is ZeRO-3"],
    ),
    "positions": (
        lambda a: {"recover.length": 512, "recover.optimizer.tokens": 512 * BATCH},
        ["recover.length", "512", "256"],
    ),
    "positions of the teacher": (
        lambda a: {
            "recover.teacher": a.tiny("opt", vocab_size=512, max_position_embeddings=32),
            **NO_CONTRAST,
        },
        ["recover.length", "64", "32"],
    ),
    "no teacher there": (
        lambda a: {"recover.teacher": a.folder / "nobody"},
        ["recover.teacher"],
    ),
    "no fine-tuned model there": (
        lambda a: {"recover.finetuned": a.folder / "nobody"},
        ["recover.finetuned"],
    ),
    "no checkpoint there": (
        lambda a: {"recover.checkpoint.resume": a.folder / "nowhere"},
        ["recover.checkpoint.resume"],
    ),
    "schedule below oneshot": (
        lambda a: {
            "model.path": a.dense,
            "stages": "[oneshot, recover]",
            "recover.masks.schedule": "0.3, 0.6",
        },
        ["recover.masks.schedule", "0.3", "50"],
    ),
    "a budget and a later pattern": (
        lambda a: {"oneshot.allocation": "owl", "recover.masks.schedule": "0.6, 1:4"},
        ["oneshot.allocation", "1:4"],
    ),
    "scored text": (
        lambda a: {"stages": "[recover, evaluate]", "evaluate.corpora": f"[{a.text}]"},
        ["recover.corpus"],
    ),
    "too few tokens": (
        lambda a: {"recover.optimizer.tokens": 300},
        ["recover.optimizer.tokens", "300", "6", "64"],
    ),
    "too little text": (
        lambda a: {"recover.held_out": 100_000},
        ["100000", "--recover.held_out"],
    ),
    "nothing to train towards": (
        lambda a: {f"recover.objective.{name}": 0 for name in ("ce", "kl", "prc")},
        ["recover.objective", "recover.finetuned"],
    ),
    "contrasts without a weight": (
        lambda a: {"recover.contrast.segment_weight": 0, "recover.contrast.token_positions": 0},
        ["recover.contrast"],
    ),
    "a negative share": (
        lambda a: {"recover.contrast.token_weight": -1},
        ["recover.contrast.token_weight", "1", "0"],
    ),
    "too many segments": (
        lambda a: {"recover.contrast.segments": 20},
        ["recover.contrast.segments", "20", "64"],
    ),
    "a large bank": (
        lambda a: {"recover.contrast.bank_gib": 1e-6},
        ["recover.contrast.bank_gib", "06", "48", "12", "lower"],
    ),
}


def add_refusals(cases: Cases) -> None:
    """Cases of one rank that must end with one clear message."""
    assets = cases.assets
    for name, (changes, _) in REFUSED.items():
        cases.add(name, **changes(assets))
    if not importlib.util.find_spec("wandb"):
        cases.add("wandb", recover__log__wandb="a-project")
    refused_late = deepspeed_file(
        assets, "late", zero_optimization={"stage": 3}, prescale_gradients=True
    )
    cases.add("settings refused at the start", **refused_late)
    for name in ("bank of another seed", "bank of another text", "bank of another model"):
        recover = cases.out(name) / "recover"
        edits = [("copy", cases.out("plain"), cases.out(name))]
        edits += [("remove", recover / file) for file in ("recipe.json", "done.json", "level.json")]
        changes = {"recover.optimizer.seed": 1}
        if name == "bank of another text":
            words = assets.folder / "other.txt"
            words.write_text(assets.text.read_text().replace("a", "e"))
            changes = {"recover.corpus": words}
        if name == "bank of another model":
            changes = {"recover.teacher": assets.tiny("llama", num_hidden_layers=3, seed=2)}
        cases.add(name, edits=edits, **changes)
