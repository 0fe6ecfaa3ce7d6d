"""What recovery checks before its work, and what it costs."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from torch import nn

from cap_llm.config import CalibrationConfig, OneshotConfig, RecoverConfig
from cap_llm.models import mask_file as mask_files
from cap_llm.models.blocks import BlockModel
from cap_llm.models.files import has_weights, text_settings
from cap_llm.models.hub import is_whole, needs_conversion
from cap_llm.models.masks import Masks
from cap_llm.models.rehearsal import check_lengths
from cap_llm.models.skeleton import NamesDiffer, skeleton
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.trackers import require
from cap_llm.runtime.world import World
from cap_llm.stages import Cost, Preview
from cap_llm.text.tokenizers import load_tokenizer
from cap_llm.training import checkpoints, ds_config
from cap_llm.training import engine as engines

SAME_TOKENIZER = 0.9  # of the entries; instruct siblings rename some that were in reserve
# what models' settings call the width and the number of their blocks
WIDTHS = ("hidden_size", "n_embd", "d_model")
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
STATES = ("word_embed_proj_dim", *WIDTHS)  # OPT projects the final states to that


def check(
    preview: Preview,
    recover: RecoverConfig,
    oneshot: OneshotConfig | None = None,
    calibration: CalibrationConfig | None = None,
) -> None:
    """Checks that the settings fit the models, the ranks and DeepSpeed.

    Raises:
        UserError: something does not fit.
    """
    settings, world, student = recover, preview.world, preview.folder
    engines.start(world)
    student_ds = ds_config.student_settings(settings, world)
    ds_config.teacher_settings(settings, world, student_ds)
    for package in ("tensorboard", "wandb"):
        if getattr(settings.log, package):
            require(package, f"recover.log.{package}")
    if not (preview.run_dir / "recover" / "recipe.json").exists():
        checkpoints.named(settings)  # a run that has begun may not need it any more
    dtype = engines.compute_dtype(settings, world)
    length = {"recover.length": settings.length}
    check_lengths(student, length, "the model", world.device, dtype, walked=False)
    dense = preview.models.get("model.dense")
    teacher = preview.models.get("recover.teacher") if settings.teacher else dense
    check_models(student, teacher, dense, settings)
    if finetuned := preview.models.get("recover.finetuned"):
        check_pair(student, finetuned, "recover.finetuned", settings.length, same_width=True)
    start = preview.start
    has_masks = settings.levels and world.decide(mask_files.path_of(start).exists)
    if has_masks and has_weights(start, world) and (masks := Masks(start, world)):
        settings.check_first_level(start, masks.sparsity)
    for folder in dict.fromkeys(f for f in (student, teacher, dense) if f):
        if is_whole(folder) and not needs_conversion(folder):
            with contextlib.suppress(NamesDiffer):  # checked once it is converted
                refuse_changed_logits(folder, world)


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


def cost(
    preview: Preview,
    recover: RecoverConfig,
    oneshot: OneshotConfig | None = None,
    calibration: CalibrationConfig | None = None,
) -> Cost:
    """The cost of all levels, roughly; what the engine offloads counts as memory too."""
    settings, o, world = recover, recover.objective, preview.world
    zero = engines.stage_of(ds_config.student_settings(settings, world))
    dtype = engines.compute_dtype(settings, world)
    n, width = sum(p.numel() for p in preview.model.model.parameters()), dtype.itemsize
    n_teacher = 0
    if o.kl or o.feature:  # a teacher that is not downloaded counts as one of the student's size
        teacher = preview.models.get("recover.teacher" if settings.teacher else "model.dense")
        n_teacher = sum(p.numel() for p in skeleton(teacher).parameters()) if teacher else n
    facts = text_settings(preview.folder)
    states, gradients, weights = (1 / world.size if zero >= s else 1.0 for s in (1, 2, 3))
    memory = n * (12 * states + width * gradients + width * weights)
    memory += n_teacher * width * weights
    tokens = settings.engine.micro_batch * settings.length
    hidden, layers = _first(facts, WIDTHS)[1] or 0, _first(facts, DEPTHS)[1] or 0
    stored = 2 if settings.engine.gradient_checkpointing else 20  # multiples of H per token
    memory += tokens * hidden * layers * stored * width
    # the head's gradient, summed in fp32, or, for few tokens, the logits'
    memory += (facts.get("vocab_size") or 0) * min(4 * hidden, tokens * width)
    # Imports, reduction buckets and copies while loading add this much on a model of 135M.
    result = Cost(dtype, memory=1.3 * memory + 2**29)
    trained = (8 if settings.engine.gradient_checkpointing else 6) * n
    levels, tuned = max(1, len(settings.levels)), bool(o.fic) and settings.finetuned == "train"
    # checkpoints (fp32 weights, two moments, the model), with the one that is being written; two
    # models per level, and the fine-tuned one
    result.disk = n * (12 + width) * (settings.checkpoint.keep + 1)
    result.disk += 4 * n * (2 * levels + tuned)
    if settings.contrasts:
        c = settings.contrast
        snapshots = min(c.snapshots, len(settings.levels)) if o.snc else 0
        banks = bool(o.prc) + bool(o.fic and settings.finetuned) + snapshots
        units = settings.n_sequences * (c.segments + c.token_positions)
        result.disk += banks * 2 * units * min(c.dim, hidden or c.dim)
    flops = levels * (trained + 2 * n_teacher) + tuned * trained
    result.forwards = settings.optimizer.tokens * flops
    return result
