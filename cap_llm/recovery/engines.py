"""DeepSpeed engines: a student that trains and frozen teachers, sharded or not.

The settings are JSON files of `ds_configs/` or the user's own. `"auto"` in them is filled from the
recipe; what DeepSpeed refuses is said before anything is loaded. Each engine has its own settings:
under a ZeRO-3 student the teacher is sharded too, and both are sharded while they are read.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from cap_llm.blockwise.cache import drop_pinned
from cap_llm.config import RecoverConfig
from cap_llm.models.blocks import FROM_DIRECTORY, model_class, reading_options
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World

FOLDER = Path(__file__).resolve().parents[2] / "ds_configs"
PACKAGED = Path(__file__).resolve().parents[1] / "ds_configs"  # where the wheel puts them
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def start(world: World) -> None:
    """Makes DeepSpeed ready, also for a single process that no launcher started."""
    if world.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # it calls by old names, twice a step under ZeRO-3, what torch has renamed
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    if world.device.type == "cpu":
        # it would be compiled for a minute, and only inference uses it
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    ours = {"RANK": world.rank, "LOCAL_RANK": world.local_rank, "WORLD_SIZE": world.size}
    os.environ |= {name: str(value) for name, value in ours.items()}  # it reads them everywhere
    backend = "nccl" if world.device.type == "cuda" else "gloo"
    if not dist.is_initialized():  # one rank: it meets nobody, whatever launchers have left
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)


def compute_dtype(settings: RecoverConfig, world: World) -> torch.dtype:
    """The type that the models compute in."""
    if settings.dtype == "auto":
        return torch.float32 if world.device.type == "cpu" else torch.bfloat16
    return DTYPES[settings.dtype]


def student_settings(settings: RecoverConfig, world: World) -> dict:
    """The student's DeepSpeed settings, resolved.

    Raises:
        UserError: the file is missing or malformed, or DeepSpeed refuses it.
    """
    name = settings.deepspeed
    if settings.dtype == "float16" and world.device.type == "cpu":
        raise UserError(
            "recover.dtype float16 is not trained on CPUs by DeepSpeed; use bfloat16 or float32"
        )
    resolved = _resolve(name, "recover.deepspeed", settings, world, trains=True)
    if settings.dtype == "float16" and stage_of(resolved) == 0:
        # 0.19.8 divides gradients by a loss scale that it has not multiplied the loss by
        raise UserError(
            f"recover.deepspeed {name} is ZeRO-0, under which DeepSpeed does not train float16 as "
            "it should: give zero1, zero2 or zero3, or --recover.dtype bfloat16"
        )
    return resolved


def teacher_settings(settings: RecoverConfig, world: World, student: dict) -> dict | None:
    """The teachers' DeepSpeed settings, resolved: sharded if the student is; else None, as a
    frozen model that every rank holds whole needs no engine.

    Raises:
        UserError: as for the student, or exactly one of the two is ZeRO-3.
    """
    name = settings.teacher_deepspeed
    if name == "auto":
        if stage_of(student) != 3:
            return None
        offload = "_offload" if "offload_param" in student["zero_optimization"] else ""
        name = f"teacher_zero3{offload}"
    resolved = _resolve(name, "recover.teacher_deepspeed", settings, world, trains=False)
    if stage_of(resolved) != 3 or stage_of(student) != 3:
        raise UserError(
            f"recover.deepspeed {settings.deepspeed} is ZeRO-{stage_of(student)} and "
            f"recover.teacher_deepspeed {name} is ZeRO-{stage_of(resolved)}: a teacher has "
            "settings only where both are ZeRO-3; leave teacher_deepspeed at auto"
        )
    return resolved


def stage_of(settings: dict) -> int:
    """The ZeRO stage of resolved settings."""
    return settings["zero_optimization"]["stage"]


Wrap = Callable[[PreTrainedModel], nn.Module]  # a task's, see `training.task`


def load_teacher(
    folder: Path, settings: dict | None, config: RecoverConfig, world: World, wrap: Wrap
):
    """A frozen model as an engine whose module `wrap` makes.

    Raises:
        UserError: transformers cannot read it.
    """
    model = _load(folder, settings, config, world)
    module = wrap(model.requires_grad_(False)).eval()
    if settings is None:
        return _Plain(module)
    option = f"recover.teacher_deepspeed {config.teacher_deepspeed}"
    engine = _initialize(option, model=module, config=settings)
    engine.eval()
    return engine


def load_student(folder: Path, settings: dict, config: RecoverConfig, world: World, wrap: Wrap):
    """The model to train as an engine whose module `wrap` makes, with a fresh AdamW.

    Raises:
        UserError: transformers cannot read it, or DeepSpeed refuses the settings.
    """
    model = _load(folder, settings, config, world)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = wrap(model).train()
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad],
        lr=0.0,  # set at each step; DeepSpeed may step once while it makes the moments
        betas=(0.9, 0.95),
        weight_decay=config.weight_decay,
        fused=True,  # on CPUs too: the plain one makes several copies of all weights a step
    )
    option = f"recover.deepspeed {config.deepspeed}"
    engine = _initialize(option, model=student, optimizer=optimizer, config=settings)
    for state in engine.basic_optimizer.state.values():
        # At stage 0 in 16 bits that step would shift the bias corrections of all to come by one.
        state["step"].zero_()
    return engine


def release(engine) -> None:
    """Lets go of an engine and of all its memory.

    After DeepSpeed 0.19.8's `destroy` a global list still holds the module of a ZeRO-3 engine, a
    cache of one of its methods the submodules, and hooks of these the engine: each rung would leave
    its shards, master weights, moments and buffers behind.
    """
    module = engine.module
    optimizers = [getattr(engine, name, None) for name in ("optimizer", "basic_optimizer")]
    engine.destroy()
    shards = [p for p in module.parameters() if hasattr(p, "ds_tensor")] if module else []
    if shards:
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

        FWD_MODULE_STACK[:] = [other for other in FWD_MODULE_STACK if other is not module]
        for p in shards:
            p.data, p.ds_tensor.data = p.data.new_empty(0), p.ds_tensor.data.new_empty(0)
            vars(p).pop("_z3_optimizer", None)
        for optimizer in filter(None, optimizers):
            vars(optimizer).clear()
    gc.collect()


def restore_linear() -> None:
    """Takes back the linear that ZeRO-3 puts in the place of torch's, which outlives its engines.

    It adds a bias after the product is rounded, so that in 16 bits a model's outputs would depend
    on what the process has done before. The next engine that is sharded puts it there again.
    """
    if "deepspeed" in sys.modules:
        from deepspeed.runtime.zero.partition_parameters import (
            InsertPostInitMethodToModuleSubClasses as Patched,
        )

        functional = torch.nn.functional
        functional.linear = getattr(Patched, "linear_bk", functional.linear)


def gathered(parameters):
    """Makes ZeRO-3 shards whole for the body of a `with`; without ZeRO-3, does nothing."""
    parameters = list(parameters)
    if not any(hasattr(p, "ds_id") for p in parameters):
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def _initialize(option: str, **arguments):
    """A DeepSpeed engine; what it refuses only now is said in one line."""
    import deepspeed

    try:
        return deepspeed.initialize(**arguments)[0]
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # assertions and errors of every kind
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"{option} is refused by DeepSpeed: {what}") from error


class _Plain:
    """A replicated teacher: the module itself, called like an engine."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __call__(self, *args):
        return self.module(*args)

    def destroy(self) -> None:
        """Lets go of the model."""
        self.module = None


def _load(folder: Path, settings: dict | None, config: RecoverConfig, world: World):
    """The model of a directory, whole on every rank or sharded while it is read (ZeRO-3)."""
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    how = reading_options(folder)
    facts = how["config"]
    for part in (facts, facts.get_text_config()):  # two where the model also sees
        for key, value in part.to_dict().items():
            # Dropout would blur what the two models are compared in.
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    drop_pinned(world.device)  # which a stage before may have filled with activations
    how["dtype"] = compute_dtype(config, world)
    zero3 = settings is not None and stage_of(settings) == 3
    sharded = HfDeepSpeedConfig(settings) if zero3 else None  # must stay alive
    if not zero3:  # tensor by tensor: several copies would fill a node's main memory
        how["device_map"] = {"": world.device}
    try:
        model = model_class(folder).from_pretrained(folder, **how, **FROM_DIRECTORY)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # every format fails in a way of its own
        how = f", sharded by {config.deepspeed}," if sharded else ""
        raise UserError(
            f"{folder}{how} cannot be read by transformers: {' '.join(str(error).split())[:200]}"
        ) from None
    finally:
        if sharded:
            unset_hf_deepspeed_config()
    model.config.get_text_config().use_cache = model.config.use_cache = False
    return model


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
        "train_batch_size": settings.batch,
        "train_micro_batch_size_per_gpu": settings.micro_batch,
        "gradient_accumulation_steps": settings.accumulation(world.size),
        "gradient_clipping": float(settings.clip),
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
            f"{option} {path} sets torch_autocast; recovery computes in recover.dtype: take that "
            "block out and give --recover.dtype bfloat16"
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
                "(recover.lr, warmup, weight_decay): take that block out"
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
