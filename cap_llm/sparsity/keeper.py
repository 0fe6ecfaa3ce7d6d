"""Keeps pruned weights at zero while a model trains, under any ZeRO stage.

    masks = masks_of_zeros(model)                # before deepspeed.initialize
    engine, *_ = deepspeed.initialize(model=model, ...)
    keeper = keep_zeros(engine, masks)           # before the first backward
    ...
    keeper.check()                               # raises if a pruned weight is not zero

Two hooks do it. The gradient is masked before it is reduced, so clipping and the optimizer's
moments never see a pruned weight. After the base optimizer's step, before DeepSpeed copies the fp32
weights to 16 bits, this rank's fp32 fragments are masked too. Writing weights after the step
instead (`safe_set_full_fp32_param`) leaves stale 16-bit copies.

DeepSpeed decides where a parameter's fp32 weights are. The keeper verifies that against their
values, because a mask on the wrong parameter's weights would destroy it. The check also counts new
zeros in unmasked weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _unflatten_dense_tensors

from cap_llm.runtime.errors import UserError
from cap_llm.sparsity.bits import pack, unpack

# Optimizers whose update of a weight depends on its own gradient and moments only, up to a common
# factor. So a zero weight with zero gradients remains zero.
ELEMENTWISE = {
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Lion"),
    *("FusedAdam", "FusedLion", "FusedLamb", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad"),
    *("DeepSpeedCPULion", "Adam8bit", "AdamW8bit"),
}
# Fraction of a parameter's unmasked weights that may become zero: a few small ones do in 16-bit
# training. A mask on the wrong weights zeroes many more.
MAX_NEW_ZEROS = 0.01


def masks_of_zeros(model: nn.Module, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Returns masks of a model in memory from its zeros: true where a weight is not zero.

    Args:
        model: with unsharded parameters.
        names: of the parameters to mask; default: all matrices with at least one zero.

    Raises:
        UserError: a name is not a parameter, or ZeRO-3 has sharded the parameters.
    """
    masks = {}
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UserError(
            "masks_of_zeros: the model is sharded by ZeRO-3, so its zeros are not visible. Call it "
            "before deepspeed.initialize, or read masks/masks.safetensors."
        )
    unknown = set(names or ()) - {name for name, _ in model.named_parameters()}
    if unknown:
        raise UserError(f"masks_of_zeros: the model has no parameter {sorted(unknown)[0]}.")
    for name, p in model.named_parameters():
        if (name in names) if names is not None else p.dim() == 2 and bool((p == 0).any()):
            masks[name] = (p != 0).cpu()
    return masks


def keep_zeros(
    model: nn.Module,
    masks: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    optimizer: torch.optim.Optimizer | None = None,
) -> ZeroKeeper:
    """Keeps masked weights at zero from now on.

    Args:
        model: a DeepSpeed engine (ZeRO 0 to 3), or a plain module with its `optimizer`.
        masks: boolean, by parameter name, in the parameter's shape; false: zero. An iterable of
            (name, mask) is consumed one mask at a time; the keeper stores one bit per weight.
        optimizer: of a plain module.

    Returns:
        The keeper, which counts and checks; `remove` detaches it.

    Raises:
        UserError: a mask does not match a parameter, the optimizer is not elementwise or already
            has moments, or DeepSpeed links a parameter to fp32 weights that are not its own.
    """
    return ZeroKeeper(model, masks, optimizer)


class ZeroKeeper:
    """The hooks that keep zeros, with their masks. See `keep_zeros`."""

    def __init__(self, model, masks, optimizer=None):
        self._wrapper = getattr(model, "optimizer", None) if optimizer is None else optimizer
        if self._wrapper is None:
            raise UserError("keep_zeros: pass the optimizer of a model without a DeepSpeed engine.")
        base = self._wrapper
        while not isinstance(base, torch.optim.Optimizer) and hasattr(base, "optimizer"):
            base = base.optimizer
        if type(base).__name__ not in ELEMENTWISE:
            raise UserError(
                f"keep_zeros: the optimizer {type(base).__name__} may mix weights, so zeros could "
                "regrow. Use AdamW."
            )
        if any(bool(m.any()) for state in base.state.values() for m in _momenta(state)):
            raise UserError(
                "keep_zeros: the optimizer already has moments, which could act on pruned weights. "
                "Use a fresh optimizer."
            )
        named = dict(getattr(model, "module", model).named_parameters())
        # unmasked parameters too: their zeros are counted
        parameters = {name: _MaskedParameter(name, p) for name, p in named.items()}
        for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
            if name not in named:
                raise UserError(f"keep_zeros: the model has no parameter {name}.")
            shape = tuple(getattr(named[name], "ds_shape", named[name].shape))
            if tuple(mask.shape) != shape:
                raise UserError(
                    f"keep_zeros: the mask of {name} has shape {list(mask.shape)}, the parameter "
                    f"has {list(shape)}."
                )
            parameters[name] = _MaskedParameter(name, named[name], mask.bool())
        self._parameters = list(parameters.values())
        self._bind_fragments()
        self.verify()
        self._initial_zeros = self._count()[1]  # not explained by a mask
        trained = [p for p in self._parameters if p.masked and p.parameter.requires_grad]
        self._handles = [p.parameter.register_hook(p.mask_gradient) for p in trained]
        self._handles.append(base.register_step_post_hook(lambda stepped, *_: self.apply(stepped)))
        self.apply()

    @torch.no_grad()
    def verify(self) -> None:
        """Verifies that each parameter's fp32 weights match those of the model.

        Collective over all ranks. Call it again after loading a checkpoint.

        Raises:
            UserError: DeepSpeed links a parameter to fp32 weights that are not its own.
        """
        if isinstance(self._wrapper, torch.optim.Optimizer):
            return  # it updates the model's weights directly
        wrong = self._sum(torch.tensor([not p.matches_model() for p in self._parameters]).long())
        names = [p.name for p, n in zip(self._parameters, wrong.tolist(), strict=True) if n]
        if names:
            remedy = "Use other DeepSpeed settings, and please report these"
            if getattr(self._wrapper, "round_robin_gradients", False):
                remedy = "Set zero_optimization.round_robin_gradients to false"
            raise UserError(
                f"keep_zeros: DeepSpeed links {names[0]} ({len(names)} parameters in total) to "
                "fp32 weights that are not its own, so masks would destroy other weights. "
                f"{remedy}."
            )

    @torch.no_grad()
    def apply(self, stepped: torch.optim.Optimizer | None = None) -> None:
        """Zeroes this rank's masked fp32 weights. No communication.

        Args:
            stepped: mask only the weights that this optimizer holds now; ZeRO-3 steps one
                sub-group at a time. None: mask all weights.
        """
        groups = stepped.param_groups if stepped else ()
        storages = {p.untyped_storage().data_ptr() for group in groups for p in group["params"]}
        for p in self._parameters:
            for weights, start in p.fragments() if p.masked else ():
                if not stepped or weights.untyped_storage().data_ptr() in storages:
                    weights.mul_(p.mask_of(weights, start))

    def regrown(self) -> dict[str, int]:
        """Counts masked weights that are not zero, by parameter name, over all ranks.

        Covers the fp32 weights and the model's. Empty if all are zero.
        """
        return self._by_name(self._sum(self._count()[0]))

    def check(self) -> None:
        """Verifies that every masked weight is zero. Collective over all ranks.

        Raises:
            UserError: a masked weight is not zero, or too many unmasked weights became zero.
        """
        regrown, zeros = self._count()
        counts = self._sum(torch.stack([regrown, zeros - self._initial_zeros]))
        if regrown := self._by_name(counts[0]):
            name, n = max(regrown.items(), key=lambda item: item[1])
            raise UserError(
                f"{sum(regrown.values())} pruned weights have regrown, {n} of them in {name}. "
                "Something writes to weights after the optimizer's step."
            )
        limits = torch.tensor([int(MAX_NEW_ZEROS * p.shape.numel()) for p in self._parameters])
        if lost := self._by_name(counts[1] * (counts[1] > limits)):
            name, n = max(lost.items(), key=lambda item: item[1])
            raise UserError(
                f"{sum(lost.values())} unmasked weights have become zero, {n} of them in {name}. "
                "The model is damaged: resume from an earlier checkpoint, or start over."
            )

    @torch.no_grad()
    def checksums(self) -> dict[str, list]:
        """Returns the dtype and checksum of each parameter, independent of its sharding.

        Collective over all ranks. Only checksums of the same dtype are comparable.
        """
        sums = torch.zeros(len(self._parameters), dtype=torch.long)
        for i, p in enumerate(self._parameters):
            if self._is_main or p.sharded(1):
                sums[i] = sum(checksum(w, start) for w, start in p.model_weights())
        values = zip(self._parameters, self._sum(sums).tolist(), strict=True)
        return {p.name: [str(p.parameter.dtype), n] for p, n in values}

    @torch.no_grad()
    def _count(self) -> torch.Tensor:
        """Counts this rank's nonzero masked weights and zero unmasked weights, [2, 2, n].

        Indices: that order; fp32 or model weights; parameter.
        """
        counts = torch.zeros(2, 2, len(self._parameters), dtype=torch.long)
        for i, p in enumerate(self._parameters):
            for k, pieces in enumerate((p.fragments(), p.model_weights())):
                if self._is_main or p.sharded(k):  # replicated weights count once
                    for weights, start in pieces:
                        counts[:, k, i] += torch.tensor(p.count(weights, start))
        return counts

    @property
    def _is_main(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks; the result is on the CPU."""
        if not dist.is_initialized() or not self._parameters:
            return values
        values = values.to(self._parameters[0].parameter.device)
        dist.all_reduce(values)
        return values.cpu()

    def _by_name(self, counts: torch.Tensor) -> dict[str, int]:
        """Returns the nonzero counts by name from counts [2, n]; the larger of the two."""
        pairs = zip(self._parameters, counts.amax(0).tolist(), strict=True)
        return {p.name: n for p, n in pairs if n > 0}

    @property
    def n_masked(self) -> int:
        """Number of weights kept at zero."""
        return sum(p.n_masked for p in self._parameters)

    def remove(self) -> None:
        """Removes the hooks."""
        for handle in self._handles:
            handle.remove()

    def _bind_fragments(self) -> None:
        """Finds the fp32 weights of the wrappers that store them apart from the parameters."""
        masters: dict[int, torch.Tensor] = {}
        if hasattr(self._wrapper, "fp32_groups"):  # ZeRO-0 with 16-bit weights, unfused
            groups = zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups, strict=True)
            masters = {id(lp): hp for g in groups for lp, hp in zip(*g, strict=True)}
        elif hasattr(self._wrapper, "fp32_groups_flat"):  # the same, with DeepSpeed's FusedAdam
            groups = zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups_flat, strict=True)
            for group, flat in groups:
                views = _unflatten_dense_tensors(flat.data, group)
                masters |= {id(lp): hp for lp, hp in zip(group, views, strict=True)}
        for p in self._parameters:
            p.master = masters.get(id(p.parameter))


class _MaskedParameter:
    """One parameter, its mask if any, and the fp32 fragments that this rank's optimizer updates.

    The whole mask is stored as packed bits, since each rank sees the whole gradient under ZeRO-3.
    """

    def __init__(self, name: str, parameter: nn.Parameter, mask: torch.Tensor | None = None):
        self.name, self.parameter = name, parameter
        self.shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        self.master: torch.Tensor | None = None  # fp32 weights apart from the parameter
        self.masked, self.n_masked = mask is not None, 0
        if mask is None:
            return
        self.n_masked = int((~mask).sum())
        self._packed = pack(mask.flatten()).to(parameter.device)

    def mask(
        self, device: torch.device, start: int = 0, n: int | None = None, dtype=torch.bool
    ) -> torch.Tensor:
        """Returns `n` values of the flattened mask from `start` on."""
        n = self.shape.numel() if n is None else n
        packed = self._packed[start // 8 : -(-(start + n) // 8)].to(device)
        return unpack(packed, start % 8 + n, dtype)[start % 8 :]

    def mask_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        """Returns the masked gradient. A product, not a fill: NaN remains visible."""
        mask = self.mask(gradient.device, dtype=gradient.dtype)
        return mask.view(self.shape).mul_(gradient)

    def sharded(self, model: int) -> bool:
        """Returns whether ranks hold different parts of the fp32 (0) or the model's weights (1)."""
        p = self.parameter
        return hasattr(p, "ds_tensor") or (not model and hasattr(p, "_hp_mapping"))

    def mask_of(self, weights: torch.Tensor, start: int) -> torch.Tensor:
        """Returns the mask of a piece that begins at `start` of the flattened parameter."""
        return self.mask(weights.device, start, weights.numel()).view(weights.shape)

    def count(self, weights: torch.Tensor, start: int) -> tuple[int, int]:
        """Counts the nonzero masked and the zero unmasked weights of a piece."""
        zero = weights == 0
        if not self.masked:
            return 0, int(zero.sum())
        mask = self.mask_of(weights, start)
        return int((~zero & ~mask).sum()), int((zero & mask).sum())

    def matches_model(self) -> bool:
        """Returns whether the fp32 fragments, rounded, equal the model's weights."""
        for model, offset in self.model_weights():
            for weights, start in self.fragments():
                stored = model.reshape(-1)[start - offset :][: weights.numel()].to(weights.device)
                rounded = weights.reshape(-1).to(stored.dtype)
                if rounded.shape != stored.shape or bool(
                    ((rounded != stored) & ~(rounded.isnan() & stored.isnan())).any()
                ):
                    return False
        return True

    def fragments(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Yields the fp32 weights that this rank's optimizer updates, with their offset."""
        p = self.parameter
        if hasattr(p, "ds_tensor"):  # ZeRO-3: a flat shard, padded to equal length
            yield self._shard(self._fp32_shard())
        elif hasattr(p, "_hp_mapping"):  # ZeRO-1 and 2: a slice of a flat buffer
            if p._hp_mapping is not None:  # otherwise on another rank
                address = p._hp_mapping.lp_fragment_address
                yield p._hp_mapping.get_hp_fragment().view(-1), address.start
        else:
            yield (p if self.master is None else self.master).data, 0

    def model_weights(self) -> Iterator[tuple[torch.Tensor, int]]:
        """Yields the model's weights that this rank holds, with their offset."""
        p = self.parameter
        if not hasattr(p, "ds_tensor"):
            yield p.data, 0
            return
        status = getattr(p.ds_tensor, "status", None)
        if status is None or status.name == "AVAILABLE":  # otherwise swapped out to NVMe
            yield self._shard(p.ds_tensor)

    def _fp32_shard(self) -> torch.Tensor:
        # the shard itself: DeepSpeed's public function copies it if the optimizer is offloaded
        partition = self.parameter._z3_optimizer._get_fp32_opt_state_partition
        try:
            return partition(self.parameter, release_swap_buffers=True)[0]
        except KeyError:  # frozen, so the optimizer does not hold it
            return self.parameter.ds_tensor

    def _shard(self, weights: torch.Tensor) -> tuple[torch.Tensor, int]:
        weights = weights.data.view(-1)
        # the rank within the group that shares the parameter
        start = weights.numel() * self.parameter.ds_zero_partition_rank
        return weights[: max(0, self.shape.numel() - start)], start  # without the padding


def checksum(weights: torch.Tensor, start: int) -> int:
    """Returns the checksum of a piece of a parameter; those of all pieces add up to the whole's.

    The bits of each weight are weighted by its position, modulo 2^64.

    Args:
        weights: the piece.
        start: its offset in the flattened parameter.
    """
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = weights.reshape(-1).view(width[weights.element_size()])
    total = torch.zeros((), dtype=torch.long, device=weights.device)
    for piece in bits.split(2**24):  # 128 MiB as int64
        positions = torch.arange(start, start + len(piece), device=weights.device)
        total += (piece.long() * (2 * positions + 1)).sum()
        start += len(piece)
    return int(total)


def _momenta(state: dict) -> Iterator[torch.Tensor]:
    """Returns the optimizer state that updates a weight even if its gradient is zero."""
    return (state[key] for key in ("exp_avg", "momentum_buffer") if state.get(key) is not None)
