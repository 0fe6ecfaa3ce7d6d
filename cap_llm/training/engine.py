"""DeepSpeed engines: a student that trains and frozen teachers, sharded or not.

The settings are JSON files of `ds_configs/` or the user's own. `"auto"` in them is filled from the
recipe; what DeepSpeed refuses is said before anything is loaded. Each engine has its own settings:
under a ZeRO-3 student the teacher is sharded too, and both are sharded while they are read.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from cap_llm.config import RecoverConfig
from cap_llm.models.directory import ModelDirectory
from cap_llm.runtime.errors import UserError, one_line
from cap_llm.runtime.memory import drop_pinned
from cap_llm.runtime.world import World
from cap_llm.training.ds_config import compute_dtype, stage_of


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


Wrap = Callable[[PreTrainedModel], nn.Module]  # a task's, see `training.task`


def load_teacher(
    source: ModelDirectory, settings: dict | None, config: RecoverConfig, world: World, wrap: Wrap
):
    """A frozen model as an engine whose module `wrap` makes.

    Raises:
        UserError: transformers cannot read it.
    """
    model = _load(source, settings, config, world)
    module = wrap(model.requires_grad_(False)).eval()
    if settings is None:
        return _Plain(module)
    option = f"recover.engine.teacher_deepspeed {config.engine.teacher_deepspeed}"
    engine = _initialize(option, model=module, config=settings)
    engine.eval()
    return engine


def load_student(
    source: ModelDirectory, settings: dict, config: RecoverConfig, world: World, wrap: Wrap
):
    """The model to train as an engine whose module `wrap` makes, with a fresh AdamW.

    Raises:
        UserError: transformers cannot read it, or DeepSpeed refuses the settings.
    """
    model = _load(source, settings, config, world)
    if config.engine.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    student = wrap(model).train()
    optimizer = torch.optim.AdamW(
        [p for p in student.parameters() if p.requires_grad],
        lr=0.0,  # set at each step; DeepSpeed may step once while it makes the moments
        betas=(0.9, 0.95),
        weight_decay=config.optimizer.weight_decay,
        fused=True,  # on CPUs too: the plain one makes several copies of all weights a step
    )
    option = f"recover.engine.deepspeed {config.engine.deepspeed}"
    engine = _initialize(option, model=student, optimizer=optimizer, config=settings)
    for state in engine.basic_optimizer.state.values():
        # At stage 0 in 16 bits that step would shift the bias corrections of all to come by one.
        state["step"].zero_()
    return engine


def release(engine) -> None:
    """Lets go of an engine and of all its memory.

    After DeepSpeed 0.19.8's `destroy` a global list still holds the module of a ZeRO-3 engine, a
    cache of one of its methods the submodules, and hooks of these the engine: each level would
    leak its shards, master weights, moments and buffers.
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


def _load(source: ModelDirectory, settings: dict | None, config: RecoverConfig, world: World):
    """The model, whole on every rank or sharded while it is read (ZeRO-3)."""
    from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config

    options = source.loading_options | {"dtype": compute_dtype(config, world)}
    model_config = options["config"]
    for part in (model_config, model_config.get_text_config()):  # two if multimodal
        for key, value in part.to_dict().items():
            # Dropout would add noise to the comparison of the two models.
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    drop_pinned(world.device)  # which a stage before may have filled with activations
    kind = type(source.skeleton)  # built before DeepSpeed shards every new model
    zero3 = settings is not None and stage_of(settings) == 3
    sharded = HfDeepSpeedConfig(settings) if zero3 else None  # must stay alive
    if not zero3:  # tensor by tensor: several copies would fill a node's main memory
        options["device_map"] = {"": world.device}
    try:
        model = kind.from_pretrained(source.path, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # each format raises its own types
        sharding = f" with {config.engine.deepspeed}" if sharded else ""
        raise UserError(
            f"{source} cannot be read by transformers{sharding}: {one_line(error)}"
        ) from None
    finally:
        if sharded:
            unset_hf_deepspeed_config()
    model.config.get_text_config().use_cache = model.config.use_cache = False
    return model
