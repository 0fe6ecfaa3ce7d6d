"""DeepSpeed settings: JSON files of `ds_configs/` or the user's own, with `"auto"` filled in."""

from __future__ import annotations

import difflib
import json
from pathlib import Path

import torch

from cap_llm.config import RecoverConfig
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"


PACKAGED = Path(__file__).resolve().parents[1] / "ds_configs"  # where the wheel puts them


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(settings: RecoverConfig, world: World) -> torch.dtype:
    """The type that the models compute in."""
    if settings.optimizer.dtype == "auto":
        return torch.float32 if world.device.type == "cpu" else torch.bfloat16
    return DTYPES[settings.optimizer.dtype]


def student_settings(settings: RecoverConfig, world: World) -> dict:
    """The student's DeepSpeed settings, resolved.

    Raises:
        UserError: the file is missing or malformed, or DeepSpeed refuses it.
    """
    name = settings.engine.deepspeed
    if settings.optimizer.dtype == "float16" and world.device.type == "cpu":
        raise UserError(
            "recover.optimizer.dtype is float16, which DeepSpeed does not train on CPUs. "
            "Use bfloat16 or float32."
        )
    resolved = _resolve(name, "recover.engine.deepspeed", settings, world, trains=True)
    if settings.optimizer.dtype == "float16" and stage_of(resolved) == 0:
        # 0.19.8 divides gradients by a loss scale that it has not multiplied the loss by
        raise UserError(
            f"recover.engine.deepspeed {name} is ZeRO-0, where DeepSpeed scales float16 gradients "
            "wrongly. Use zero1, zero2 or zero3, or --recover.optimizer.dtype bfloat16."
        )
    return resolved


def teacher_settings(settings: RecoverConfig, world: World, student: dict) -> dict | None:
    """The teachers' DeepSpeed settings, resolved: sharded if the student is; else None, as a
    frozen model that every rank holds whole needs no engine.

    Raises:
        UserError: as for the student, or exactly one of the two is ZeRO-3.
    """
    name = settings.engine.teacher_deepspeed
    if name == "auto":
        if stage_of(student) != 3:
            return None
        offload = "_offload" if "offload_param" in student["zero_optimization"] else ""
        name = f"teacher_zero3{offload}"
    resolved = _resolve(name, "recover.engine.teacher_deepspeed", settings, world, trains=False)
    if stage_of(resolved) != 3 or stage_of(student) != 3:
        raise UserError(
            f"recover.engine.deepspeed {settings.engine.deepspeed} is ZeRO-{stage_of(student)} and "
            f"recover.engine.teacher_deepspeed {name} is ZeRO-{stage_of(resolved)}: a teacher has "
            "settings only where both are ZeRO-3; leave teacher_deepspeed at auto"
        )
    return resolved


def stage_of(settings: dict) -> int:
    """The ZeRO stage of resolved settings."""
    return settings["zero_optimization"]["stage"]


def _resolve(name: str, option: str, settings: RecoverConfig, world: World, trains: bool) -> dict:
    """A DeepSpeed file with its `auto` filled in, checked by DeepSpeed itself."""
    path = Path(name)
    if path.suffix != ".json":
        folder = FOLDER if FOLDER.is_dir() else PACKAGED
        path = folder / f"{name}.json"
        if not path.exists():
            names = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
            raise UserError(f"{option} is {name!r}; give a .json file or one of {names}")
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{option} {path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{option} {path} holds no settings")
    dtype = compute_dtype(settings, world)
    values = {
        "train_batch_size": settings.optimizer.batch,
        "train_micro_batch_size_per_gpu": settings.engine.micro_batch,
        "gradient_accumulation_steps": settings.accumulation(world.size),
        "gradient_clipping": float(settings.optimizer.clip),
        "bf16.enabled": dtype == torch.bfloat16,
        "fp16.enabled": dtype == torch.float16,
    }
    content = _filled(content, values, option)
    for section in ("zero_optimization", "bf16", "fp16"):
        if not isinstance(content.setdefault(section, {}), dict):
            raise UserError(f"{option} {path}: {section} is no section of settings")
    zero = content["zero_optimization"]
    if zero.setdefault("stage", 0) not in range(4):
        raise UserError(
            f"{option} {path}: zero_optimization.stage is {zero['stage']!r}; it must be 0, 1, 2 "
            "or 3"
        )
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        if not trains and not section:
            content[name] = value  # a teacher's batches are the student's
        # What a file leaves out is the recipe's too, not a default of DeepSpeed's.
        given = (content[section] if section else content).setdefault(name, value)
        if given != value:
            raise UserError(
                f"{option} {path} sets {key} to {json.dumps(given)}, the recipe makes it "
                f'{json.dumps(value)}; write "auto" there'
            )
    autocast = content.get("torch_autocast")
    if isinstance(autocast, dict) and autocast.get("enabled"):
        raise UserError(
            f"{option} {path} sets torch_autocast, but recover.optimizer.dtype sets the compute "
            "type. Remove that block and pass --recover.optimizer.dtype bfloat16."
        )
    if old := next((key for key in zero if key.startswith("cpu_offload")), None):
        new = "offload_param" if "param" in old else "offload_optimizer"
        raise UserError(
            f"{option} {path} sets zero_optimization.{old}, a name of older DeepSpeed versions; "
            f'write "{new}": {{"device": "cpu"}}'
        )
    if trains:
        if zero.get("compute_grad_norm") is False:
            raise UserError(
                f"{option} {path} sets zero_optimization.compute_grad_norm to false; recovery logs "
                "the gradient's norm and stops where it is not finite: take that line out"
            )
        # padded by parameter_alignment it may be right, which the keeper of zeros looks at
        wrong = zero.get("round_robin_gradients") and not zero.get("parameter_alignment")
        if wrong and zero["stage"] in (1, 2) and world.size > 1:
            raise UserError(
                f"{option} {path} sets zero_optimization.round_robin_gradients, under which "
                "DeepSpeed takes fp32 weights for other parameters' than theirs, so that masks "
                "would destroy them: set it to false"
            )
        offload = zero.get("offload_optimizer")
        if isinstance(offload, dict) and offload.get("device") == "nvme":
            raise UserError(
                f"{option} {path} offloads the optimizer to nvme, where zeros cannot be kept, as "
                "its weights are swapped anew; set zero_optimization.offload_optimizer.device to "
                '"cpu"'
            )
        if "optimizer" in content or "scheduler" in content:
            raise UserError(
                f"{option} {path} sets an optimizer or scheduler; recovery brings its own "
                "(recover.optimizer.lr, warmup, weight_decay): take that block out"
            )
        if "offload_optimizer" in zero:  # it would insist on DeepSpeed's own Adam
            content.setdefault("zero_force_ds_cpu_optimizer", False)
    if world.device.type == "cpu":
        for place in ("offload_param", "offload_optimizer"):
            if isinstance(zero.get(place), dict):
                zero[place].pop("pin_memory", None)
    content.setdefault("steps_per_print", 10**9)
    from deepspeed.runtime.config import DeepSpeedConfig

    asked = _Asked(json.loads(json.dumps(content)))
    try:
        DeepSpeedConfig(asked)
    except Exception as error:  # its own kinds, pydantic's, and assertions
        raise UserError(
            f"{option} {path} is refused by DeepSpeed: {' '.join(str(error).split())[:300]}"
        ) from None
    for key in content.keys() - asked.names:  # misspelt, a section would be ZeRO-0 without a word
        near = difflib.get_close_matches(key, asked.names, 1)
        raise UserError(
            f"{option} {path} sets {key}, which DeepSpeed does not know"
            f"{f'; it knows {near[0]}' if near else ''}: correct it or take it out"
        )
    return content


class _Asked(dict):
    """Settings that remember the names that were looked for: those that a reader knows."""

    def __init__(self, settings: dict):
        super().__init__(settings)
        self.names: set[str] = set()

    def __contains__(self, name) -> bool:
        self.names.add(name)
        return super().__contains__(name)

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)

    def keys(self):  # as in `name in settings.keys()`
        return self


def _filled(content: dict, values: dict, option: str, prefix: str = "") -> dict:
    filled = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = _filled(value, values, option, f"{prefix}{key}.")
        elif value == "auto":
            if prefix + key not in values:
                raise UserError(
                    f'{option} has "auto" for {prefix}{key}, which no setting fills; give a value. '
                    f"auto is for {', '.join(values)}"
                )
            value = values[prefix + key]
        filled[key] = value
    return filled
