"""What is checked before the work of all stages, and the estimate of what it takes."""

from __future__ import annotations

import filecmp
import functools
import itertools
import shutil
from pathlib import Path

import torch

from cap_llm.config import Config
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.files import weight_files
from cap_llm.models.hub import check_files, found_here
from cap_llm.models.rehearsal import check_lengths
from cap_llm.models.skeleton import NamesDiffer
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
    located: ModelDirectory | None,
    config: Config,
    console: Console,
    world: World,
    *,
    models: dict[str, ModelDirectory] | None = None,
    predict: bool = False,
    fetched: bool = True,
) -> None:
    """Checks what can be checked before the long work, and prints an estimate.

    Args:
        located: the model; None if it is on the hub, out of reach.
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
    if located.path.is_file():
        console.say(f"model {located.path.name}: it is converted first; its shapes are unchecked")
        return
    bare = located.skeleton
    model = BlockModel(bare, torch.device("cpu"))
    calibrates = "calibration" in used_sections(config)
    lengths = {"calibration.length": config.calibration.length} if calibrates else {}
    scored = {"evaluate.window": config.evaluate.window} if scored_corpora(config) else {}
    dtype = torch.float32 if world.device.type == "cpu" else bare.dtype
    check_lengths(located, lengths | scored, "the model", world.device, dtype)
    if calibrates and config.calibration.sequences < world.size:
        raise UserError(
            f"calibration.sequences is {config.calibration.sequences}, fewer than the "
            f"{world.size} ranks. Set it to at least one per rank."
        )
    if models is None:
        located_here = {
            o: found_here(o, p, config, world) for o, p in further_models(config).items()
        }
        models = {option: folder for option, folder in located_here.items() if folder}
    if dense := models.get("model.dense"):
        _check_dense(model, dense)
        check_lengths(dense, lengths, f"model.dense {dense}", world.device, dtype)
    n_bytes, converted, has_weights = _weights(located, model, config, world, console, fetched)
    stages, run_dir, costs = world.decide(lambda: chain(config)), Path(config.output_dir), {}
    for stage in config.stages:
        if stage in MODELS and world.decide((run_dir / stage / "done.json").exists):
            continue
        start = previous(stage, stages)
        preview = Preview(
            model=model,
            folder=located,
            has_weights=has_weights,
            n_bytes=n_bytes,
            start=ModelDirectory(run_dir / start) if start else located,
            from_run=bool(start),
            models=models,
            n_models=len({*config.stages} & {*MODELS}),
            run_dir=run_dir,
            download=not predict,
            world=world,
            console=console,
        )
        module, settings = STAGES[stage].load(), sections(stage, config)
        module.check(preview, **settings)
        costs[stage] = module.cost(preview, **settings)
    _report(costs, converted, config, world, console, predict)


def _weights(
    located: ModelDirectory,
    model: BlockModel,
    config: Config,
    world: World,
    console: Console,
    fetched: bool,
) -> tuple[int, int, bool]:
    """Checks the model's weight files.

    Returns:
        Bytes of the weights; bytes that are converted first; whether they can be read as they are.
    """
    if not fetched:
        console.say(f"model {config.model.path}: on the hub; only its config.json is checked")
        n_parameters = sum(p.numel() for p in model.model.parameters())
        return n_parameters * model.model.dtype.itemsize, 0, False
    if not located.has_safetensors:
        check_files("model.path", located, config, world)
        console.say(
            f"Model {located} is not in safetensors format. Converting it once (loads the full "
            "model into memory)."
        )
        n_bytes = sum(p.stat().st_size for p in weight_files(located.path))
        return n_bytes, n_bytes, False
    n_bytes = located.checkpoint.n_bytes()
    try:
        if located.keys and located.notice:
            console.say(located.notice)
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
    """Prints the estimate, and checks that it fits on the disk."""
    allowed = Memory.plan(world.device, world.activation_gib)
    # torch rounds pinned memory up to a power of two
    free = allowed.device + allowed.host // 2
    rate = functools.cache(lambda dtype: world.size * attained_rate(world.device, dtype))
    highest, spilled, seconds = float(converted), 0.0, 0.0

    def say(title: str, memory: float, disk: float, seconds: float) -> None:
        text = f"memory {format_bytes(memory)} per rank, disk {format_bytes(disk)}"
        console.say(f"{title}: {text}" + f", time {format_duration(seconds)}" * predict)

    for stage, cost in costs.items():
        memory = cost.memory + min(cost.cached + cost.waiting, allowed.device)
        time = 0.0
        if predict:
            time = cost.forwards / rate(cost.dtype) + cost.solving / rate(torch.float32)
        say(f"estimate of {stage}", memory, cost.disk, time)
        highest, seconds = max(highest, memory), seconds + time
        spilled = max(spilled, (cost.cached - free) * world.size)
    disks = [cost.disk for cost in costs.values()]
    if not config.runtime.keep_intermediate:  # at most two models at a time
        disks = [max(map(sum, itertools.pairwise([0, *disks])), default=0)]
    disk = RESERVE + converted + spilled + sum(disks)
    check_disk(disk, [stage for stage in costs if stage in MODELS], config)
    say("estimate", highest, disk, seconds)


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


def _check_dense(model: BlockModel, candidate: ModelDirectory) -> None:
    """Checks that `model.dense` is dense, and has the blocks and the vocabulary of the model."""
    if candidate.mask_file:
        raise UserError(f"model.dense {candidate} is pruned: it has masks. Pass the dense model.")
    dense = BlockModel(candidate.skeleton, torch.device("cpu"))
    rows, rows_of_dense = (len(m.model.get_input_embeddings().weight) for m in (model, dense))
    if rows_of_dense < rows:
        raise UserError(
            f"model.dense {candidate} has a vocabulary of {rows_of_dense}, but the pruned model "
            f"one of {rows}. Pass the model that it was pruned from."
        )
    pruned, other = (
        {
            f"{n} in block {i}": list(p.shape)
            for i in range(len(m))
            for n, p in m.blocks[i].named_parameters()
        }
        for m in (model, dense)
    )
    for name in (pruned | other) if pruned != other else ():
        if pruned.get(name) != other.get(name):
            raise UserError(
                f"model.dense {candidate}: the shape of {name} is {other.get(name)}, but "
                f"{pruned.get(name)} in the pruned model. Pass the model that it was pruned from."
            )
