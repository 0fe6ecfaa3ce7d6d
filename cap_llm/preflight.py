"""What is checked before the work of all stages, and the estimate of what it takes."""

from __future__ import annotations

import filecmp
import itertools
import shutil
from pathlib import Path

import torch

from cap_llm.config import Config
from cap_llm.models import mask_file as mask_files
from cap_llm.models.blocks import BlockModel
from cap_llm.models.checkpoint import Checkpoint
from cap_llm.models.files import weight_files
from cap_llm.models.hub import check_files, found_here, needs_conversion
from cap_llm.models.rehearsal import check_lengths
from cap_llm.models.skeleton import NamesDiffer, match_names, read_as, skeleton
from cap_llm.runtime.console import Console, format_bytes, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import Memory, attained_rate
from cap_llm.runtime.world import World
from cap_llm.stages import (
    MODELS,
    STAGES,
    TEXT_OPTIONS,
    Cost,
    Preview,
    chain,
    further_models,
    named,
    previous,
    scored_corpora,
    sections,
    used_sections,
)
from cap_llm.text.corpora import NAMES, corpus_file, scored_split

RESERVE = 2**28  # bytes of disk for logs, partial masks and the file system itself


def check_corpora(config: Config) -> None:
    """Checks that all corpora exist, and that no scored text is used for calibration or training.

    C4's training and validation documents differ: using one and scoring the other is the papers'
    protocol. WikiText-2's splits share their style and topics.

    Raises:
        UserError: a corpus is missing, or is used for both.
    """
    scored = {name: corpus_file(name, scored_split(name)) for name in scored_corpora(config)}
    for option, corpus in named(config, TEXT_OPTIONS).items():
        file = corpus_file(corpus, "train")
        is_calibration = option.startswith("calibration.")
        if is_calibration and config.calibration.allow_scored_corpus:
            continue
        for name, scored_file in scored.items():
            same = corpus == name != "c4"
            if file and scored_file and not {corpus, name} <= {*NAMES}:
                same = filecmp.cmp(file, scored_file, shallow=False)
            if same:
                remedy = ", or set calibration.allow_scored_corpus to true" * is_calibration
                raise UserError(
                    f"{option} {corpus!r} is also scored by evaluate ({name}). Choose another "
                    f"text{remedy}."
                )


def preflight(
    located: Path | None,
    config: Config,
    console: Console,
    world: World,
    *,
    models: dict[str, Path] | None = None,
    predict: bool = False,
    fetched: bool = True,
) -> None:
    """Checks what can be checked before the long work, and prints an estimate.

    Args:
        located: the model's directory or .gguf file; None if it is on the hub, out of reach.
        config: the run's settings.
        console: for the estimate.
        world: the ranks.
        models: further models by option; by default they are located, without a download.
        predict: also measure the machine's speed, to predict hours. Downloads nothing.
        fetched: whether the weights are there; otherwise `located` only has the config.json.

    Raises:
        UserError: files, names, shapes, lengths or space do not fit.
    """
    check_corpora(config)
    if located is None:
        console.say(f"model {config.model.path}: the hub is out of reach; its shapes are unchecked")
        return
    if located.suffix == ".gguf":
        console.say(f"model {located.name}: it is converted first; its shapes are unchecked")
        return
    bare = skeleton(located)
    model = BlockModel(bare, torch.device("cpu"))
    lengths = _lengths(config)
    dtype = torch.float32 if world.device.type == "cpu" else bare.dtype
    check_lengths(located, lengths, "the model", world.device, dtype)
    calibrates = "calibration" in used_sections(config)
    if calibrates and config.calibration.sequences < world.size:
        raise UserError(
            f"calibration.sequences is {config.calibration.sequences}, fewer than the "
            f"{world.size} ranks. Set it to at least one per rank."
        )
    models = _locate_further_models(config, world) if models is None else models
    stages = world.decide(lambda: chain(config))
    run_dir = Path(config.output_dir)
    starts = {stage: previous(stage, stages) for stage in config.stages}
    if dense := models.get("model.dense"):
        _check_dense(model, dense)
        lengths.pop("evaluate.window", None)
        check_lengths(dense, lengths, f"model.dense {dense}", world.device, dtype)
    n_bytes, converted, has_weights = _weights(located, model, config, world, console, fetched)
    todo = [s for s in config.stages if not _is_done(run_dir / s, s, world)]
    costs = {}
    for stage in todo:
        start = starts[stage]
        preview = Preview(
            model=model,
            folder=located,
            has_weights=has_weights,
            n_bytes=n_bytes,
            start=run_dir / start if start else located,
            from_run=bool(start),
            models=models,
            n_models=len([s for s in config.stages if s in MODELS]),
            run_dir=run_dir,
            download=not predict,
            world=world,
            console=console,
        )
        settings = sections(stage, config)
        STAGES[stage].load().check(preview, **settings)
        costs[stage] = STAGES[stage].load().cost(preview, **settings)
    _report(costs, converted, config, world, console, predict)


def _lengths(config: Config) -> dict[str, int]:
    """The lengths of sequences that pass through the model block by block, by option."""
    lengths = {}
    if "calibration" in used_sections(config):
        lengths["calibration.length"] = config.calibration.length
    if scored_corpora(config):
        lengths["evaluate.window"] = config.evaluate.window
    return lengths


def _locate_further_models(config: Config, world: World) -> dict[str, Path]:
    located = {o: found_here(o, p, config, world) for o, p in further_models(config).items()}
    return {option: folder for option, folder in located.items() if folder}


def _is_done(folder: Path, stage: str, world: World) -> bool:
    return stage in MODELS and world.decide((folder / "done.json").exists)


def _weights(
    located: Path, model: BlockModel, config: Config, world: World, console: Console, fetched: bool
) -> tuple[int, int, bool]:
    """Checks the model's weight files.

    Returns:
        The size of the weights in bytes; the size of those that are converted first; whether they
        can be read as they are.

    Raises:
        UserError: a file is damaged, or a tensor is missing or has another shape.
    """
    if not fetched:
        console.say(f"model {config.model.path}: on the hub; only its config.json is checked")
        n_parameters = sum(p.numel() for p in model.model.parameters())
        return n_parameters * model.model.dtype.itemsize, 0, False
    if needs_conversion(located):
        check_files("model.path", located, config, world)
        console.say(
            f"Model {located} is not in safetensors format. Converting it once (loads the full "
            "model into memory)."
        )
        n_bytes = sum(p.stat().st_size for p in weight_files(located))
        return n_bytes, n_bytes, False
    checkpoint = Checkpoint(located)  # opens every shard, so a truncated one is found
    n_bytes = checkpoint.n_bytes()
    try:
        match_names(model.model, checkpoint)
        if text := read_as(model.model, checkpoint):
            console.say(text)
    except NamesDiffer:  # it is converted and checked again
        check_files("model.path", located, config, world)
        return n_bytes, n_bytes, False
    return n_bytes, 0, True


def _report(
    costs: dict[str, Cost],
    converted: int,
    config: Config,
    world: World,
    console: Console,
    predict: bool,
) -> None:
    """Prints the estimate, and checks that it fits on the disk.

    Raises:
        UserError: it does not.
    """
    allowed = Memory.plan(world.device, config.runtime.activation_gib)
    memory, spilled, seconds, rates = float(converted), 0.0, 0.0, {}
    for stage, cost in costs.items():
        needed = cost.memory + min(cost.cached + cost.waiting, allowed.device)
        memory = max(memory, needed)
        # torch rounds pinned memory up to a power of two
        free = allowed.device + allowed.host // 2
        spilled = max(spilled, max(0, cost.cached - free) * world.size)
        text = f"memory {format_bytes(needed)} per rank, disk {format_bytes(cost.disk)}"
        if predict:
            for dtype in {cost.dtype, torch.float32} - rates.keys():
                rates[dtype] = attained_rate(world.device, dtype) * world.size
            time = cost.forwards / rates[cost.dtype] + cost.solving / rates[torch.float32]
            seconds += time
            text += f", time {format_duration(time)}"
        if len(costs) > 1:
            console.say(f"estimate of {stage}: {text}")
    disks = [cost.disk for cost in costs.values()]
    if not config.runtime.keep_intermediate:  # at most two models at a time
        disks = [max(map(sum, itertools.pairwise([0, *disks])), default=0)]
    disk = RESERVE + converted + spilled + sum(disks)
    check_disk(disk, [stage for stage in costs if stage in MODELS], config)
    text = f"memory {format_bytes(memory)} per rank, disk {format_bytes(disk)}"
    if predict:
        text += f", time {format_duration(seconds)}"
        if "evaluate" in costs and config.evaluate.tasks:
            text += " and the zero-shot tasks"
    console.say(f"estimate: {text}")


def check_disk(needed: float, stages: list[str], config: Config) -> None:
    """Checks that the disk has space for what `stages` write; what is there already counts.

    Raises:
        UserError: it does not.
    """
    place = Path(config.output_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    folders = [Path(config.output_dir) / stage for stage in stages]
    files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
    missing = needed - sum(p.stat().st_size for p in files)
    if stages and missing > free:
        raise UserError(
            f"output_dir {config.output_dir} needs {format_bytes(missing)} of disk, but "
            f"{format_bytes(free)} are free. Free space, or choose another output_dir."
        )


def _check_dense(model: BlockModel, folder: Path) -> None:
    """Checks that `model.dense` is dense, and has the same blocks as the run's model.

    Raises:
        UserError: it is not, or has not.
    """
    if mask_files.path_of(folder).exists():
        raise UserError(
            f"model.dense {folder} is pruned itself: it has a file of masks. Give the model that "
            "the other was pruned from."
        )
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
