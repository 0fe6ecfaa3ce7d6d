"""What recovery checks before its work, and what it costs."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import nn

from cap_llm.config import CalibrationConfig, OneshotConfig, RecoverConfig
from cap_llm.models.blocks import BlockModel
from cap_llm.models.directory import ModelDirectory
from cap_llm.models.files import has_weights
from cap_llm.models.hub import is_whole
from cap_llm.models.rehearsal import check_lengths
from cap_llm.models.skeleton import NamesDiffer
from cap_llm.runtime.errors import UserError
from cap_llm.runtime.trackers import require
from cap_llm.stages import Cost, Preview
from cap_llm.text.tokenizers import load_tokenizer
from cap_llm.training import checkpoints, ds_config
from cap_llm.training import engine as engines

SAME_TOKENIZER = 0.9  # of the entries; instruct siblings rename some reserved ones
# what models' configs call the width and the number of blocks
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
    lengths = {"recover.length": settings.length}
    check_lengths(student, lengths, "the model", world.device, dtype, walked=False)
    dense = preview.models.get("model.dense")
    teacher = preview.models.get("recover.teacher") if settings.teacher else dense
    o, length = settings.objective, settings.length
    contrasts_dense = bool(o.prc or (o.fic and settings.finetuned == "train"))
    if teacher:
        option = "recover.teacher" if settings.teacher else "model.dense"
        width = contrasts_dense and dense in (None, teacher)
        _check_pair(student, teacher, option, length, width, same_blocks=bool(o.feature))
    if dense and dense != teacher:
        _check_pair(student, dense, "model.dense", length, contrasts_dense)
    if finetuned := preview.models.get("recover.finetuned"):
        _check_pair(student, finetuned, "recover.finetuned", length, same_width=True)
    start = preview.start
    has_masks = settings.levels and world.decide(lambda: start.mask_path is not None)
    if has_masks and has_weights(start.path, world) and (masks := start.masks(world)):
        settings.check_first_level(start, masks.sparsity)
    for model in dict.fromkeys(m for m in (student, teacher, dense) if m):
        if is_whole(model.path) and model.has_safetensors:
            with contextlib.suppress(NamesDiffer):  # checked once it is converted
                world.decide(functools.partial(_check_logits, model))


def _check_pair(
    student: ModelDirectory,
    teacher: ModelDirectory,
    option: str,
    length: int,
    same_width: bool,
    same_blocks: bool = False,
) -> None:
    """Checks that a model can teach the student.

    Args:
        student, teacher: the models.
        option: that names the teacher.
        length: tokens per sequence.
        same_width: whether the final states must have equal widths, because contrasts compare them.
        same_blocks: whether the blocks must, and their number, because the feature term compares
            their outputs.

    Raises:
        UserError: tokenizer, vocabulary, widths or depths differ, or it has too few positions.
    """
    a, b = student.settings, teacher.settings
    ids, teacher_ids = _entries(student), _entries(teacher)
    size, teacher_size = a.get("vocab_size"), b.get("vocab_size")
    # Larger siblings often pad their vocabulary; what exceeds the student's is cut.
    padded = ids and teacher_ids and (teacher_size or 0) > (size or 0)
    if size != teacher_size and not padded:
        raise UserError(
            f"{option} {teacher} has a vocabulary of {teacher_size}, but the student has {size}. "
            "They must share a tokenizer; if the teacher's vocabulary is padded, both directories "
            "must contain tokenizer files."
        )
    same = sum(teacher_ids.get(entry) == i for entry, i in ids.items())
    if ids and teacher_ids and same < SAME_TOKENIZER * max(len(ids), len(teacher_ids)):
        raise UserError(
            f"{option} {teacher} has another tokenizer: {same} of the student's {len(ids)} entries "
            "have the same id. Pass a model with the student's tokenizer."
        )
    for keys in [STATES] * same_width + [WIDTHS, DEPTHS] * same_blocks:
        (key, value), (_, teacher_value) = _first(a, keys), _first(b, keys)
        if value != teacher_value:
            raise UserError(
                f"{option} {teacher} has {key} {teacher_value}, but the student has {value}. "
                "Contrasts and the feature term compare states of equal width: set "
                "recover.objective.feature, prc and fic to 0, or pass another model."
            )
    lengths, cpu = {"recover.length": length}, torch.device("cpu")
    check_lengths(teacher, lengths, f"{option} {teacher}", cpu, torch.float32, walked=False)


def state_width(model: ModelDirectory) -> int:
    """The width H of the final states, which the head reads.

    Raises:
        UserError: config.json does not contain it.
    """
    _, width = _first(model.settings, STATES)
    if width is None:
        raise UserError(f"{model}/config.json has no hidden_size")
    return width


def _first(facts: dict, keys: tuple[str, ...]) -> tuple[str, int | None]:
    """The first of `keys` that a model's config has, and its value; None if it has none."""
    return next(((key, facts[key]) for key in keys if facts.get(key)), (keys[0], None))


def _entries(model: ModelDirectory) -> dict[str, int]:
    """The tokenizer's entries and their ids; empty if the directory has no tokenizer."""
    try:
        return load_tokenizer(str(model)).get_vocab()
    except UserError:
        return {}


def _check_logits(directory: ModelDirectory) -> None:
    """Checks that a model's logits are a linear function of its decoder's final states.

    Recovery applies the head itself, to chunks of tokens. It would omit what the model does besides
    (Gemma 2 caps its logits, Cohere and Granite scale them). The check passes a few tokens from the
    embedding to the head.

    Raises:
        UserError: they are not, or the model cannot be processed block by block.
    """
    model = BlockModel.open(directory, torch.device("cpu"))
    name, head = type(model.model).__name__, model.model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{name} has no linear head, so it cannot be recovered.")
    states: list[torch.Tensor] = []  # of the decoder, the head's input, the head's output
    decoder = model.model.get_decoder()
    handles = [decoder.register_forward_hook(lambda _, __, out: states.append(out[0]))]
    handles.append(head.register_forward_hook(lambda _, args, out: states.extend((*args, out))))
    ids = torch.arange(8)[None]
    logits = model.head(ids, model.embed(ids)[0])
    for handle in handles:
        handle.remove()
    equal = len(states) == 3 and torch.equal(states[0], states[1])
    if not equal or not torch.equal(states[2], logits):
        raise UserError(
            f"{name} scales or caps its logits, or does more than apply a linear head to its final "
            "states. It can be pruned, but not recovered."
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
        n_teacher = sum(p.numel() for p in teacher.skeleton.parameters()) if teacher else n
    facts = preview.folder.settings
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
