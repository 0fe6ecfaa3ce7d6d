"""Before the work: checks what can be checked, and predicts memory, disk and time."""

from __future__ import annotations

import itertools
import shutil
import time
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cap_llm.blockwise.cache import free_memory
from cap_llm.blockwise.oneshot import earlier_mask
from cap_llm.blockwise.prune import matrix, plan_sparsities
from cap_llm.blockwise.sds import SGD_BATCH, plan_second_prune
from cap_llm.config import MODELS, Config
from cap_llm.models.blocks import BlockModel, NamesDiffer, match_names, model_class, skeleton
from cap_llm.models.checkpoint import Checkpoint, text_settings, weight_files
from cap_llm.models.masks import Masks
from cap_llm.models.source import found_here, needs_conversion
from cap_llm.runtime.console import Console, duration, size
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.world import World
from cap_llm.solvers.redensify import STEPS as SGD_STEPS
from cap_llm.text.corpora import corpus_file

BLOCKWISE = ("oneshot", "sds", "reconstruct")  # stages that rewrite a model block by block
EFFICIENCY = 0.6  # of the rate of bare matrix products; SparseGPT of SmolLM2-135M reached 0.65
RESERVE = 2**28  # bytes of disk for logs, masks' parts and file systems' own needs


def check_everything(
    located: Path | None,
    config: Config,
    console: Console,
    world: World,
    predict: bool = False,
) -> None:
    """Refuses what cannot work, before the long work, and prints an estimate.

    Args:
        located: the model's directory or .gguf file; None if it is on the hub and not fetched yet.
        config: the run's settings.
        console: where the estimate goes.
        world: the ranks.
        predict: also time the machine, to predict hours.

    Raises:
        UserError: files, names, shapes, positions or space do not fit.
    """
    if config.uses_calibration:
        corpus_file(config.calibration.corpus, "train")
    if "evaluate" in config.stages:
        for name in config.evaluate.corpora:
            corpus_file(name, "validation" if name == "c4" else "test")
    if located is None:
        console.say(f"model {config.model.path}: on the hub, not fetched; its shapes are unchecked")
        return
    if located.suffix == ".gguf":
        console.say(f"model {located.name}: will be de-quantised first; its shapes are unchecked")
        return
    bare = skeleton(located)
    _check_positions(config, bare, text_settings(located))
    model = BlockModel(bare, torch.device("cpu"))
    if "evaluate" in config.stages and not model.is_causal:
        raise UserError(
            f"{model_class(located).__name__} gives no next-token logits, so it has no perplexity "
            "and no zero-shot scores; set --stages [oneshot]"
        )
    sequences = config.calibration.sequences
    if config.uses_calibration and sequences < world.size:
        raise UserError(
            f"calibration.sequences is {sequences}, fewer than the {world.size} ranks; "
            "give at least one sequence a rank"
        )
    if {"oneshot", "sds"} & set(config.stages):
        plan = plan_sparsities(model, config.oneshot)
        if "oneshot" in config.stages and config.oneshot.budget == "uniform":
            earlier_mask(located, config.oneshot, plan)
    if dense := found_here(config.model.dense, "model.dense"):
        starts = [s for s in ("sds", "reconstruct") if s in config.stages and not config.start(s)]
        _check_dense(located if starts else None, model, dense)
    copied = 0  # bytes of a model that is rewritten first
    if needs_conversion(located):
        console.say(
            f"model {located}: its weights are no safetensors and are rewritten once, which holds "
            "the whole model in memory"
        )
        n_bytes = copied = sum(p.stat().st_size for p in weight_files(located))
    else:
        checkpoint = Checkpoint(located)  # opens every shard: truncated ones show here
        n_bytes = checkpoint.n_bytes()
        try:
            match_names(model.model, checkpoint)
            if "sds" in config.stages and not config.start("sds"):
                plan_second_prune(Masks(located, world), model, config)
        except NamesDiffer:  # those are converted, and looked at again
            copied = n_bytes
    if "evaluate" in config.stages and config.evaluate.tasks and world.device.type == "cuda":
        card = torch.cuda.get_device_properties(world.device).total_memory
        if n_bytes > card:
            raise UserError(
                f"evaluate.tasks need the whole model on each card: {located} has {size(n_bytes)}, "
                f"a card {size(card)}; score perplexity alone (--evaluate.tasks []), which streams "
                "the model"
            )
    made = [stage for stage in BLOCKWISE if stage in config.stages]
    estimate = _estimate(model, n_bytes, made, config, world)
    estimate["disk"] += copied
    estimate["memory"] = max(estimate["memory"], copied)
    check_disk(estimate["disk"], made, config)
    text = f"memory {size(estimate['memory'])} a rank, disk {size(estimate['disk'])}"
    if estimate["activations"]:
        text += f", of the memory {size(estimate['activations'])} for activations"
    if predict:
        rate = attained_rate(world.device, torch.float32) * world.size
        text += f", time {duration(estimate['flops'] / rate)}"
        if "evaluate" in config.stages and config.evaluate.tasks:
            text += " and the zero-shot tasks"
    console.say(f"estimate: {text}")


def positions_of(model: PreTrainedModel, facts: dict) -> int | None:
    """The most tokens that a model takes at once, by its config.json; None where that sets none."""
    most = facts.get("max_position_embeddings") or facts.get("n_positions")
    for name, part in model.named_modules():
        numbered = isinstance(part, nn.Embedding) and "position" in name
        if numbered and part.padding_idx is not None:  # RoBERTa counts on from the padding's
            most = part.num_embeddings - part.padding_idx - 1
    return most


def _check_positions(config: Config, model: PreTrainedModel, facts: dict) -> None:
    most = positions_of(model, facts)
    asked = {}
    if config.uses_calibration:
        asked["calibration.length"] = config.calibration.length
    if "evaluate" in config.stages and config.evaluate.corpora:
        asked["evaluate.window"] = config.evaluate.window
    if "recover" in config.stages:
        asked["recover.length"] = config.recover.length
    for name, value in asked.items():
        if most and value > most:
            raise UserError(
                f"{name} is {value}, but the model has {most} positions; "
                f"give --{name} {most} or less"
            )


def _check_dense(pruned: Path | None, model: BlockModel, folder: Path) -> None:
    """Refuses a dense model that is pruned, or whose blocks are not those of the pruned one."""
    same = pruned and folder.resolve() == pruned.resolve()
    if same or (folder / "masks.safetensors").exists():
        is_ = "the model to start from" if same else "pruned itself: it has masks.safetensors"
        raise UserError(f"model.dense {folder} is {is_}; give the model that it was pruned from")
    dense = BlockModel(skeleton(folder), torch.device("cpu"))
    ours, theirs = (len(m.model.get_input_embeddings().weight) for m in (model, dense))
    if theirs < ours:
        raise UserError(
            f"model.dense {folder} has a vocabulary of {theirs} and the pruned model one of "
            f"{ours}; give the model that it was pruned from"
        )
    ours, theirs = (
        [[(n, list(p.shape)) for n, p in m.blocks[i].named_parameters()] for i in range(len(m))]
        for m in (model, dense)
    )
    if len(ours) != len(theirs):
        raise UserError(
            f"model.dense {folder} has {len(theirs)} blocks and the pruned model {len(ours)}; "
            "give the model that it was pruned from"
        )
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        pairs = itertools.zip_longest(a, b, fillvalue=("nothing", []))
        for (name, shape), (other, expected) in pairs:
            if (name, shape) != (other, expected):
                raise UserError(
                    f"model.dense {folder} has {other} {expected} in block {i} where the pruned "
                    f"model has {name} {shape}; give the model that it was pruned from"
                )


def check_disk(needed: int, made: list[str], config: Config) -> None:
    """Refuses a run whose stages `made` write more than is free; what is there already counts.

    Raises:
        UserError: it does not fit.
    """
    place = Path(config.output_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    folders = [Path(config.output_dir) / stage for stage in made]
    done = made and all((folder / "done.json").exists() for folder in folders)
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    written = sum(p.stat().st_size for p in files)
    if not done and needed - written > free:
        raise UserError(
            f"output_dir {config.output_dir} needs {size(needed - written)} of disk and "
            f"{size(free)} are free; free some or choose another output_dir"
        )


def _estimate(
    model: BlockModel, n_bytes: int, made: list[str], config: Config, world: World
) -> dict:
    """Bytes and floating-point operations of the run, a little on the safe side.

    `n_bytes` is the size of the model's files, `made` what is done block by block.
    """
    width = 4 if world.device.type == "cpu" else 2
    linears = [[matrix(m).shape for m in model.linears(i).values()] for i in range(len(model))]
    block_weights = [sum(r * c for r, c in shapes) for shapes in linears]
    n_weights = sum(p.numel() for p in model.model.parameters())
    hidden = max((c for shapes in linears for _, c in shapes[:1]), default=0)
    estimate = {"disk": RESERVE, "flops": 0.0, "activations": 0}
    work = 0  # bytes beside the weights
    tokens = []
    if made:
        n_kept = len(made) if config.runtime.keep_intermediate else min(len(made), 2)
        # the masks twice, once in parts
        estimate["disk"] += n_kept * (n_bytes + sum(block_weights) // 4)
        largest = max((r * c for shapes in linears for r, c in shapes), default=0)
        work = 4 * 4 * largest
        if config.uses_calibration:
            columns = max(c for shapes in linears for _, c in shapes)
            squares, copies = 3, 4  # fp32 matrices [C, C] and [R, C] that a solver holds at most
            if config.oneshot.method in ("alps", "admm_grad") or "sds" in made:
                squares, copies = 6 + ("sds" in made), 8  # sds: held-out moments, too
            if "sds" in made and config.sds.mode == "paper":
                batches = -(-config.calibration.sequences // SGD_BATCH)
                squares += batches
                sgd = 2 * SGD_STEPS * batches  # products with a batch's second moments
                estimate["flops"] += sum(2 * sgd * r * c * c for s in linears for r, c in s)
            work = max(work, 4 * (squares * columns**2 + copies * largest))
            n = config.calibration.sequences * config.calibration.length
            tokens.append(n)
            # walks of the text: one for oneshot, three more for OWL and its guard, two for sds
            walks = ("oneshot" in made) * (4 if config.oneshot.budget == "owl" else 1)
            walks += 2 * ("sds" in made)
            if "sds" in made:  # the dense block; sparse, dense and free weights in fp32
                work += (width + 3 * 4) * max(block_weights)
                if config.sds.data == "redense":  # what a resumed run sends text through
                    estimate["disk"] += width * sum(block_weights)
            forwards = walks
            if "reconstruct" in made:  # a backward counts twice
                forwards += 1 + 3 * config.reconstruct.epochs
                # gradients, Adam's two moments, the weights as trained and as best, the masks
                work += 6 * 4 * max(block_weights)
            attention = 2 * config.calibration.length * hidden * len(model)
            estimate["flops"] += forwards * n * 2 * (sum(block_weights) + attention)
            estimate["flops"] += walks * n * 2 * sum(map(_second_moments, model.blocks))
            estimate["flops"] += sum(r * c * c * 2 for shapes in linears for r, c in shapes)
            if config.oneshot.refits or "sds" in made:
                estimate["flops"] += sum(r * c * c * 100 for shapes in linears for r, c in shapes)
    if "evaluate" in config.stages and config.evaluate.corpora:
        read = model.model.config.get_text_config()
        windows = config.evaluate.max_windows or 160
        n = windows * config.evaluate.window * len(config.evaluate.corpora)
        n_models = len(set(config.stages) & set(MODELS)) + config.evaluate.dense
        n_models = n_models or 1
        estimate["flops"] += n_models * n * 2 * n_weights
        tokens.append(windows * config.evaluate.window)
        work = max(work, 2 * 4 * config.evaluate.window * read.vocab_size)
    if tokens:
        streams = [max(tokens) // world.size * width]
        for stage in made:  # a block is trained in fp32
            value = 4 if stage == "reconstruct" else width
            streams.append(_stream_tokens(stage, config, world) * value)
        kept = hidden * max(streams)
        waiting = 0  # inputs of linears, until all micro-batches are there
        if config.uses_calibration:
            n = config.calibration.sequences * config.calibration.length
            waiting = n // world.size * width * max(sum(map(sum, shapes)) for shapes in linears)
        gib = config.runtime.activation_gib
        allowed = free_memory(world.device) // 2 if gib is None else int(gib * 2**30)
        estimate["activations"] = min(kept + waiting, allowed)
        estimate["disk"] += max(0, kept - allowed) * world.size
    outside = n_weights - sum(block_weights)
    # two streams begin with an embedding each
    two = "reconstruct" in made and config.reconstruct.inputs == "student"
    outside *= 1 + (two or ("sds" in made and config.sds.data == "dense"))
    loaded = 4 if "reconstruct" in made else width
    estimate["memory"] = loaded * (outside + 2 * max(block_weights)) + work
    estimate["memory"] += estimate["activations"]
    if "evaluate" in config.stages and config.evaluate.tasks:
        estimate["memory"] = max(estimate["memory"], width * n_weights)  # the whole model at once
    return estimate


def _stream_tokens(stage: str, config: Config, world: World) -> int:
    """Tokens whose hidden states a rank keeps between blocks, over all streams of a stage."""
    c = config.calibration
    every, share = (c.sequences + c.held_out) * c.length, c.sequences * c.length // world.size
    if stage == "reconstruct":
        dense = config.reconstruct.inputs == "dense"  # every rank needs all of the text
        return (4 if config.reconstruct.halves else 3) * (every if dense else every // world.size)
    if stage == "sds":
        return share * config.sds.redensify + every // world.size
    return share


def _second_moments(block: nn.Module) -> int:
    """Multiplications of one token's second moments, of a block's linears.

    Of the linears of one module the last one reads what the others made, which share their input:
    q, k and v one, o its own; gate and up one, down its own.
    """
    columns: dict[tuple, int] = {}
    for parent in block.modules():
        linears = [m for m in parent.children() if isinstance(m, nn.Linear | Conv1D)]
        for m in linears:
            columns[parent, m is linears[-1]] = matrix(m).shape[1]
    return sum(c * c for c in columns.values())


def attained_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second that work in a type attains here: its share of bare matrix products'."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device).to(dtype)
    product = a @ a
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < 0.5:
        product = a @ product.clamp(-1, 1)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        n += 1
    return EFFICIENCY * 2 * side**3 * n / (time.perf_counter() - start)
