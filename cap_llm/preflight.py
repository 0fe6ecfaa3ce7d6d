"""Before the work: checks what can be checked, and says what it will take."""

from __future__ import annotations

import itertools

import torch

from cap_llm.blockwise.estimate import check_disk, estimate
from cap_llm.blockwise.oneshot import earlier_mask
from cap_llm.blockwise.prune import plan_sparsities
from cap_llm.blockwise.sds import plan_second_prune
from cap_llm.config import Config
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.files import weight_files
from cap_llm.models.hub import check_files, found_here
from cap_llm.models.rehearsal import check_lengths
from cap_llm.models.skeleton import NamesDiffer
from cap_llm.runtime.console import Console, format_bytes, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import attained_rate
from cap_llm.runtime.world import World
from cap_llm.text.corpora import corpus_file

BLOCKWISE = ("oneshot", "sds", "reconstruct")  # stages that rewrite a model block by block


def check_everything(
    located: ModelDirectory | None,
    config: Config,
    console: Console,
    world: World,
    predict: bool = False,
    fetched: bool = True,
) -> None:
    """Refuses what cannot work, before the long work, and prints an estimate.

    Args:
        located: the model; None if it is on the hub, out of reach.
        config: the run's settings.
        console: where the estimate goes.
        world: the ranks.
        predict: also time the machine, to predict hours.
        fetched: whether its weights are there; else `located` holds the config.json alone.

    Raises:
        UserError: files, names, shapes, lengths or space do not fit.
    """
    if config.uses_calibration:
        corpus_file(config.calibration.corpus, "train")
    if "evaluate" in config.stages:
        for name in config.evaluate.corpora:
            corpus_file(name, "validation" if name == "c4" else "test")
    if located is None:
        console.say(f"model {config.model.path}: the hub is out of reach; its shapes are unchecked")
        return
    if located.path.is_file():
        console.say(
            f"model {located.path.name}: will be de-quantized first; its shapes are unchecked"
        )
        return
    bare = located.skeleton
    model = BlockModel(bare, torch.device("cpu"))
    if "evaluate" in config.stages and not model.is_causal:
        raise UserError(
            f"{type(bare).__name__} gives no next-token logits, so it has no perplexity "
            "and no zero-shot scores; set --stages [oneshot]"
        )
    lengths = {"calibration.length": config.calibration.length} if config.uses_calibration else {}
    scored = {}
    if "evaluate" in config.stages and config.evaluate.corpora:
        scored = {"evaluate.window": config.evaluate.window}
    dtype = torch.float32 if world.device.type == "cpu" else bare.dtype
    check_lengths(located, lengths | scored, "the model", world.device, dtype)
    sequences = config.calibration.sequences
    if config.uses_calibration and sequences < world.size:
        raise UserError(
            f"calibration.sequences is {sequences}, fewer than the {world.size} ranks; "
            "give at least one sequence a rank"
        )
    if {"oneshot", "sds"} & set(config.stages):
        plan = plan_sparsities(model, config.oneshot)
        if "oneshot" in config.stages and config.oneshot.allocation == "uniform":
            earlier_mask(located, config.oneshot, plan)
    if dense := found_here("model.dense", config.model.dense, config, world):
        starts = [s for s in ("sds", "reconstruct") if s in config.stages and not config.start(s)]
        _check_dense(located if starts else None, model, dense)
        check_lengths(dense, lengths, f"model.dense {dense}", world.device, dtype)
    copied = 0  # bytes of a model that is rewritten first
    if not fetched:
        console.say(f"model {config.model.path}: on the hub; only its config.json is checked")
        n_bytes = sum(p.numel() for p in bare.parameters()) * bare.dtype.itemsize
    elif not located.has_safetensors:
        check_files("model.path", located, config, world)
        console.say(
            f"model {located}: its weights are no safetensors and are rewritten once, which holds "
            "the whole model in memory"
        )
        n_bytes = copied = sum(p.stat().st_size for p in weight_files(located.path))
    else:
        n_bytes = located.checkpoint.n_bytes()
        try:
            if located.keys and located.notice:
                console.say(located.notice)
            if "sds" in config.stages and not config.start("sds"):
                plan_second_prune(located.masks(world), model, config)
        except NamesDiffer:  # those are converted, and looked at again
            check_files("model.path", located, config, world)
            copied = n_bytes
    if "evaluate" in config.stages and config.evaluate.tasks and world.device.type == "cuda":
        card = torch.cuda.get_device_properties(world.device).total_memory
        if n_bytes > card:
            raise UserError(
                f"evaluate.tasks need the whole model on each card: {located} has "
                f"{format_bytes(n_bytes)}, a card {format_bytes(card)}; score perplexity alone "
                "(--evaluate.tasks []), which streams the model"
            )
    made = [stage for stage in BLOCKWISE if stage in config.stages]
    needed = estimate(model, n_bytes, made, config, world)
    needed.disk += copied
    needed.memory = max(needed.memory, copied)
    check_disk(needed.disk, made, config)
    text = f"memory {format_bytes(needed.memory)} a rank, disk {format_bytes(needed.disk)}"
    if needed.activations:
        text += f", of the memory {format_bytes(needed.activations)} for activations"
    if predict:
        seconds = needed.forwards / attained_rate(world.device, needed.dtype)
        seconds += needed.solving / attained_rate(world.device, torch.float32)
        text += f", time {format_duration(seconds / world.size)}"
        if "evaluate" in config.stages and config.evaluate.tasks:
            text += " and the zero-shot tasks"
    console.say(f"estimate: {text}")


def _check_dense(
    pruned: ModelDirectory | None, model: BlockModel, candidate: ModelDirectory
) -> None:
    """Refuses a dense model that is pruned, or whose blocks are not those of the pruned one."""
    same = pruned and candidate.fingerprint == pruned.fingerprint is not None
    if same or candidate.mask_file:
        is_ = "the model to start from" if same else "pruned itself: it has a file of masks"
        raise UserError(f"model.dense {candidate} is {is_}; give the model that it was pruned from")
    dense = BlockModel(candidate.skeleton, torch.device("cpu"))
    ours, theirs = (len(m.model.get_input_embeddings().weight) for m in (model, dense))
    if theirs < ours:
        raise UserError(
            f"model.dense {candidate} has a vocabulary of {theirs} and the pruned model one of "
            f"{ours}; give the model that it was pruned from"
        )
    ours, theirs = (
        [[(n, list(p.shape)) for n, p in m.blocks[i].named_parameters()] for i in range(len(m))]
        for m in (model, dense)
    )
    if len(ours) != len(theirs):
        raise UserError(
            f"model.dense {candidate} has {len(theirs)} blocks and the pruned model {len(ours)}; "
            "give the model that it was pruned from"
        )
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        pairs = itertools.zip_longest(a, b, fillvalue=("nothing", []))
        for (name, shape), (other, expected) in pairs:
            if (name, shape) != (other, expected):
                raise UserError(
                    f"model.dense {candidate} has {other} {expected} in block {i} where the pruned "
                    f"model has {name} {shape}; give the model that it was pruned from"
                )
