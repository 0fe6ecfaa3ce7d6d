"""Before the work: refuses what a recovery cannot do, and predicts what it takes."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn

from cap_llm.blockwise.estimate import check_disk
from cap_llm.config import Config, Level, RecoverConfig
from cap_llm.models import mask_file as mask_files
from cap_llm.models.blocks import BlockModel
from cap_llm.models.files import has_weights, text_settings
from cap_llm.models.hub import found_here, is_whole, needs_conversion
from cap_llm.models.masks import Masks
from cap_llm.models.rehearsal import check_lengths
from cap_llm.models.skeleton import NamesDiffer, skeleton
from cap_llm.runtime.console import Console, format_bytes, format_duration
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.memory import attained_rate
from cap_llm.runtime.trackers import require
from cap_llm.runtime.world import World
from cap_llm.text.tokenizers import load_tokenizer
from cap_llm.training import checkpoints, ds_config
from cap_llm.training import engine as engines

SAME_TOKENIZER = 0.9  # of the entries; instruct siblings rename some that were in reserve
# what models' settings call the width and the number of their blocks
WIDTHS = ("hidden_size", "n_embd", "d_model")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
STATES = ("word_embed_proj_dim", *WIDTHS)  # OPT projects the final states to that


def check_recovery(
    located: Path, config: Config, world: World, console: Console, predict: bool = False
) -> None:
    """Refuses settings that do not fit the model, the ranks or DeepSpeed, and prints an estimate.

    Args:
        located: the model's directory.
        config: the run's settings.
        world: the ranks.
        console: where the estimate goes.
        predict: also time the machine, to predict hours.

    Raises:
        UserError: something does not fit.
    """
    settings = config.recover
    engines.start(world)
    student = ds_config.student_settings(settings, world)
    ds_config.teacher_settings(settings, world, student)
    for package in ("tensorboard", "wandb"):
        if getattr(settings.log, package):
            require(package, f"recover.log.{package}")
    if not (Path(config.output_dir) / "recover" / "recipe.json").exists():
        checkpoints.named(settings)  # later on it may be needed no more
    dtype = engines.compute_dtype(settings, world)
    length = {"recover.length": settings.length}
    check_lengths(located, length, "the model", world.device, dtype, walked=False)
    teacher = dense = found_here("model.dense", config.model.dense, config, world)
    if settings.teacher:
        teacher = found_here("recover.teacher", settings.teacher, config, world)
    check_models(located, teacher, dense, settings)
    if settings.finetuned != "train":
        finetuned = found_here("recover.finetuned", settings.finetuned, config, world)
        if finetuned:
            check_pair(located, finetuned, "recover.finetuned", settings.length, same_width=True)
    earlier = config.start("recover")
    start = Path(config.output_dir) / earlier if earlier else located
    has_masks = settings.levels and world.decide(mask_files.path_of(start).exists)
    if has_masks and has_weights(start, world) and (masks := Masks(start, world)):
        check_first_level(settings.levels, start, masks.sparsity)
    if is_whole(located) and not needs_conversion(located):  # what is converted: afterwards
        with contextlib.suppress(NamesDiffer):
            refuse_changed_logits(located, world)
    memory, disk, flops = _estimate(located, teacher, config, world, engines.stage_of(student))
    check_disk(disk, ["recover"], config)
    offloaded = any("offload" in key for key in student["zero_optimization"])
    where = ", what is offloaded in main memory" if offloaded else ""
    text = f"about {format_bytes(memory)} a rank{where}, disk {format_bytes(disk)}"
    if predict:
        rate = attained_rate(world.device, engines.compute_dtype(settings, world)) * world.size
        text += f", time {format_duration(flops / rate)}"
    console.say(f"estimate of recover: {text}")


def check_models(
    student: Path, teacher: Path | None, dense: Path | None, settings: RecoverConfig
) -> None:
    """Holds a student against its teacher and the dense model, as far as they are there.

    Raises:
        UserError: see `check_pair`.
    """
    o, length = settings.objective, settings.length
    contrasted = bool(o.prc or (o.fic and settings.finetuned == "train"))  # with the dense model
    if teacher:
        option = "recover.teacher" if settings.teacher else "model.dense"
        width = contrasted and dense in (None, teacher)
        check_pair(student, teacher, option, length, same_width=width, same_blocks=bool(o.feature))
    if dense and dense != teacher:
        check_pair(student, dense, "model.dense", length, same_width=contrasted)


def check_first_level(levels: list[Level], start: Path, sparsity: float) -> None:
    """Raises:
    UserError: a schedule's first level is no sparser than the model that it starts from.
    """
    if levels and levels[0].sparsity <= sparsity + 1e-6:
        raise UserError(
            f"recover.masks.schedule begins with {levels[0]}, but {start} is already "
            f"{100 * sparsity:.1f}% sparse, and masks only grow. Begin above that."
        )


def check_pair(
    student: Path,
    teacher: Path,
    name: str,
    length: int,
    *,
    same_width: bool,
    same_blocks: bool = False,
) -> None:
    """Holds two models against each other.

    Args:
        student, teacher: directories.
        name: the option that names the teacher.
        length: tokens of a sequence.
        same_width: of the final states, as contrasts compare them.
        same_blocks: in width and number, as the feature term compares their outputs.

    Raises:
        UserError: other vocabularies, widths or depths, or too few positions.
    """
    a, b = text_settings(student), text_settings(teacher)
    ours, theirs = _entries(student), _entries(teacher)
    # Larger siblings often pad their vocabulary to more: what is beyond the student's is cut.
    padded = ours and theirs and (b.get("vocab_size") or 0) > (a.get("vocab_size") or 0)
    if a.get("vocab_size") != b.get("vocab_size") and not padded:
        raise UserError(
            f"{name} {teacher} has a vocabulary of {b.get('vocab_size')}, the student one of "
            f"{a.get('vocab_size')}; they must share their tokenizer, which both directories must "
            "hold where the teacher's vocabulary is padded to more"
        )
    same = sum(theirs.get(entry) == i for entry, i in ours.items())
    if ours and theirs and same < SAME_TOKENIZER * max(len(ours), len(theirs)):
        raise UserError(
            f"{name} {teacher} has another tokenizer than the student: {same} of {len(ours)} "
            "entries have the same id; they must share their tokenizer"
        )
    compared = [STATES] * same_width + [WIDTHS, DEPTHS] * same_blocks
    for keys in compared:
        (key, mine), (_, its) = _first(a, keys), _first(b, keys)
        if mine != its:
            raise UserError(
                f"{name} {teacher} has {key} {its}, the student {mine}; the contrasts "
                "compare states of equal width, the feature term those of equally many blocks: "
                "switch them off (recover.objective.feature, prc, fic 0) or give another model"
            )
    asked, cpu = {"recover.length": length}, torch.device("cpu")
    check_lengths(teacher, asked, f"{name} {teacher}", cpu, torch.float32, walked=False)


def state_width(folder: Path) -> int:
    """H of the final states that the head reads.

    Raises:
        UserError: the model's settings do not say.
    """
    _, width = _first(text_settings(folder), STATES)
    if width is None:
        raise UserError(f"{folder}/config.json says no width (hidden_size)")
    return width


def _first(facts: dict, keys: tuple[str, ...]) -> tuple[str, int | None]:
    """The first of the settings that a model has, and its value; None where it has none."""
    return next(((key, facts[key]) for key in keys if facts.get(key)), (keys[0], None))


def _entries(folder: Path) -> dict[str, int]:
    """The tokenizer's entries and their ids; none where the directory has no tokenizer."""
    try:
        return load_tokenizer(str(folder)).get_vocab()
    except UserError:
        return {}


def refuse_changed_logits(folder: Path, world: World) -> None:
    """Refuses a model that is more than its decoder's final states and a linear head.

    Recovery applies the head itself, to chunks of tokens: what the model does to the states before
    it, or to the logits after it (Gemma 2 caps, Cohere and Granite scale them), would be left out,
    and the losses be those of another model. A few tokens past all blocks tell.

    Raises:
        UserError: its class does more, or cannot be walked block by block.
    """
    world.decide(lambda: _refuse_changed_logits(folder))  # one rank holds the embedding


def _refuse_changed_logits(folder: Path) -> None:
    model = BlockModel.open(folder, torch.device("cpu"))
    name, head = type(model.model).__name__, model.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{name} has no linear head; it cannot be recovered")
    seen: list[torch.Tensor] = []
    decoder = model.model.get_decoder()
    handles = [decoder.register_forward_hook(lambda _, __, out: seen.append(out[0]))]
    handles.append(head.register_forward_hook(lambda _, args, out: seen.extend((*args, out))))
    ids = torch.arange(8)[None]
    logits = model.head(ids, model.embed(ids)[0])
    for handle in handles:
        handle.remove()
    # the decoder's final states, what the head reads, what it gives
    if len(seen) == 3 and torch.equal(seen[0], seen[1]) and torch.equal(seen[2], logits):
        return
    raise UserError(
        f"{name} does more than apply a linear head to its final states (it scales or caps its "
        "logits, say), which recovery would leave out; it can be pruned, but not recovered"
    )


def _estimate(
    located: Path, teacher: Path | None, config: Config, world: World, stage: int
) -> tuple[float, int, float]:
    """Bytes of memory a rank and of disk, and floating-point operations of all levels, roughly."""
    settings, o = config.recover, config.recover.objective
    n = sum(p.numel() for p in skeleton(located).parameters())
    taught = bool(o.kl or o.feature)
    n_teacher = 0
    if taught:  # one that is only on the hub yet counts as one of the student's size
        n_teacher = sum(p.numel() for p in skeleton(teacher).parameters()) if teacher else n
    facts = text_settings(located)
    width = engines.compute_dtype(settings, world).itemsize
    states, gradients, weights = (1 / world.size if stage >= s else 1.0 for s in (1, 2, 3))
    memory = n * (12 * states + width * gradients + width * weights)
    memory += n_teacher * width * weights
    tokens = settings.engine.micro_batch * settings.length
    hidden, layers = _first(facts, WIDTHS)[1] or 0, _first(facts, DEPTHS)[1] or 0
    kept = 2 if settings.engine.gradient_checkpointing else 20  # of H per token
    memory += tokens * hidden * layers * kept * width
    # the head's gradient, summed in fp32, or of few tokens the logits'
    memory += (facts.get("vocab_size") or 0) * min(4 * hidden, tokens * width)
    # What was measured on a 135M model is that much above the sum of the parts: imports, buckets of
    # the reduction, copies while weights are loaded and moments made.
    memory = 1.3 * memory + 2**29
    trained = (8 if settings.engine.gradient_checkpointing else 6) * n
    levels, tuned = max(1, len(settings.levels)), bool(o.fic) and settings.finetuned == "train"
    # checkpoints (fp32 weights, two moments, the model), with the one that is being written; two
    # models a level, and the fine-tuned one
    disk = n * (12 + width) * (settings.checkpoint.keep + 1)
    disk += 4 * n * (2 * levels + tuned)
    if settings.contrasts:
        c = settings.contrast
        snapshots = min(c.snapshots, len(settings.levels)) if o.snc else 0
        banks = bool(o.prc) + bool(o.fic and settings.finetuned) + snapshots
        units = settings.n_sequences * (c.segments + c.token_positions)
        disk += banks * 2 * units * min(c.dim, hidden or c.dim)
    flops = settings.optimizer.tokens * (levels * (trained + 2 * n_teacher) + tuned * trained)
    return memory, disk, flops
