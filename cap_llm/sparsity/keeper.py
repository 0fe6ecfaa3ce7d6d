"""Zeros that stay zero while a model trains, under any ZeRO stage.

    masks = masks_of_zeros(model)                # before deepspeed.initialize
    engine, *_ = deepspeed.initialize(model=model, ...)
    keeper = keep_zeros(engine, masks)           # before the first backward
    ...
    keeper.check()                               # one regrown weight is an error

Where a parameter's fp32 weights lie is DeepSpeed's to say, and is held against their values: a mask
on another parameter's would destroy it. The check also sees zeros that no mask explains.

Two hooks do it. The gradient is masked before it is reduced, so that clipping and the optimizer's
moments never see a pruned weight. After the base optimizer's step, and before DeepSpeed copies the
fp32 weights to 16 bits, this rank's own fragments of them are masked as well. Writing to weights
after a step instead (`safe_set_full_fp32_param`) leaves the 16-bit copies stale.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _unflatten_dense_tensors

from cap_llm.runtime.errors import UserError

# Optimizers whose update of a weight depends on that weight's own gradient and moments only (or
# scales it by a common factor), so that a zero with zero gradients stays where it is.
ELEMENTWISE = {
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta", "RMSprop", "Lion"),
    *("FusedAdam", "FusedLion", "FusedLamb", "DeepSpeedCPUAdam", "DeepSpeedCPUAdagrad"),
    *("DeepSpeedCPULion", "Adam8bit", "AdamW8bit"),
}
# The share of a parameter's weights that may become zero by themselves: small ones do where they
# are trained in 16 bits, and a mask on the wrong weights takes many more.
BY_CHANCE = 0.01


def masks_of_zeros(model: nn.Module, names: list[str] | None = None) -> dict[str, torch.Tensor]:
    """Masks of a model in memory, from its zeros: true where a weight is not zero.

    Args:
        model: with whole parameters.
        names: of the parameters to keep; by default the matrices that hold any zero.

    Raises:
        UserError: a name is no parameter's, or the parameters are ZeRO-3 shards.
    """
    masks = {}
    if any(hasattr(p, "ds_id") for p in model.parameters()):
        raise UserError(
            "masks_of_zeros: the model is sharded by ZeRO-3, and a shard does not show its zeros; "
            "take the masks before deepspeed.initialize, or read them from masks/masks.safetensors"
        )
    unknown = set(names or ()) - {name for name, _ in model.named_parameters()}
    if unknown:
        raise UserError(f"masks_of_zeros: the model has no parameter {sorted(unknown)[0]}")
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
        model: a DeepSpeed engine (ZeRO 0 to 3), or a plain module, given with its `optimizer`.
        masks: by parameter name, boolean, in the parameter's shape; false stays zero. As pairs of
            both, they are taken one at a time and need not stand in memory together: the keeper
            holds a bit a weight.
        optimizer: of a plain module.

    Returns:
        The keeper: it counts, checks, and can be removed.

    Raises:
        UserError: a mask fits no parameter, the optimizer mixes coordinates, or it has moments
            already, which a mask that is new to them would let act on pruned weights; or DeepSpeed
            links a parameter to weights that are not its own.
    """
    return ZeroKeeper(model, masks, optimizer)


class ZeroKeeper:
    """The hooks that keep zeros, and their masks. See `keep_zeros`."""

    def __init__(self, model, masks, optimizer=None):
        self._wrapper = getattr(model, "optimizer", None) if optimizer is None else optimizer
        if self._wrapper is None:
            raise UserError("keep_zeros: a module that is no DeepSpeed engine needs its optimizer")
        base = self._wrapper
        while not isinstance(base, torch.optim.Optimizer) and hasattr(base, "optimizer"):
            base = base.optimizer
        if type(base).__name__ not in ELEMENTWISE:
            raise UserError(
                f"keep_zeros: the optimizer {type(base).__name__} is not known to treat each "
                "weight by itself, so zeros could regrow; use AdamW"
            )
        if any(bool(m.any()) for state in base.state.values() for m in _momenta(state)):
            raise UserError(
                "keep_zeros: the optimizer has moments already; masks need a fresh optimizer"
            )
        named = dict(getattr(model, "module", model).named_parameters())
        # the others are kept too, without a mask: what happens to them is counted
        kept = {name: _Kept(name, parameter) for name, parameter in named.items()}
        for name, mask in masks.items() if isinstance(masks, Mapping) else masks:
            if name not in named:
                raise UserError(f"keep_zeros: the model has no parameter {name}")
            shape = tuple(getattr(named[name], "ds_shape", named[name].shape))
            if tuple(mask.shape) != shape:
                raise UserError(
                    f"keep_zeros: the mask of {name} is {list(mask.shape)}, the parameter "
                    f"{list(shape)}"
                )
            kept[name] = _Kept(name, named[name], mask.bool())
        self._kept = list(kept.values())
        self._bind_fragments()
        self.verify()
        self._zeros = self._count()[1]  # that no mask explains, from the start
        trained = [k for k in self._kept if k.masked and k.parameter.requires_grad]
        self._handles = [k.parameter.register_hook(k.mask_gradient) for k in trained]
        self._handles.append(base.register_step_post_hook(lambda stepped, *_: self.apply(stepped)))
        self.apply()

    @torch.no_grad()
    def verify(self) -> None:
        """Holds the fp32 weights of each parameter against those that the model computes with.

        All ranks take part. Call it again where a checkpoint has been loaded.

        Raises:
            UserError: DeepSpeed links a parameter to weights that are not its own.
        """
        if isinstance(self._wrapper, torch.optim.Optimizer):
            return  # it steps the model's own weights
        wrong = self._summed(torch.tensor([not kept.agrees() for kept in self._kept]).long())
        names = [kept.name for kept, n in zip(self._kept, wrong.tolist(), strict=True) if n]
        if names:
            remedy = "please report these DeepSpeed settings, and use other ones"
            if getattr(self._wrapper, "round_robin_gradients", False):
                remedy = "set zero_optimization.round_robin_gradients to false"
            raise UserError(
                f"keep_zeros: DeepSpeed links {names[0]} ({len(names)} parameters in all) to fp32 "
                f"weights that are not its own, so that masks would destroy others; {remedy}"
            )

    @torch.no_grad()
    def apply(self, stepped: torch.optim.Optimizer | None = None) -> None:
        """Sets this rank's fp32 weights that are masked to zero. No communication.

        Args:
            stepped: an optimizer that has changed no others than the ones it holds now: ZeRO-3
                steps a sub-group at a time.
        """
        groups = stepped.param_groups if stepped else ()
        changed = {p.untyped_storage().data_ptr() for group in groups for p in group["params"]}
        for kept in filter(lambda kept: kept.masked, self._kept):
            for weights, start in kept.fragments():
                if not stepped or weights.untyped_storage().data_ptr() in changed:
                    weights.mul_(kept.mask_of(weights, start))

    def regrown(self) -> dict[str, int]:
        """How many masked weights are not zero, by name, over all ranks; empty if none.

        Both the fp32 weights and the ones that the model computes with are looked at.
        """
        return self._named(self._summed(self._count()[0]))

    def check(self) -> None:
        """All ranks take part.

        Raises:
            UserError: a masked weight is not zero, or more of the others are than by chance.
        """
        regrown, zeros = self._count()
        counts = self._summed(torch.stack([regrown, zeros - self._zeros]))
        if regrown := self._named(counts[0]):
            name, n = max(regrown.items(), key=lambda item: item[1])
            raise UserError(
                f"{sum(regrown.values())} pruned weights have regrown, {n} of them in {name}; "
                "something writes to weights after the optimizer's step"
            )
        by_chance = torch.tensor([int(BY_CHANCE * kept.shape.numel()) for kept in self._kept])
        if lost := self._named(counts[1] * (counts[1] > by_chance)):
            name, n = max(lost.items(), key=lambda item: item[1])
            raise UserError(
                f"{sum(lost.values())} weights that no mask prunes have become zero, {n} of them "
                f"in {name}; the model is damaged: resume from an earlier checkpoint, or start anew"
            )

    @torch.no_grad()
    def checksums(self) -> dict[str, list]:
        """Type and checksum of each parameter's weights, the same however ranks share them.

        All ranks take part. Only those of one type can be compared.
        """
        sums = torch.zeros(len(self._kept), dtype=torch.long)
        for i, kept in enumerate(self._kept):
            if self._first or kept.sharded(1):
                sums[i] = sum(checksum(w, start) for w, start in kept.model_weights())
        values = zip(self._kept, self._summed(sums).tolist(), strict=True)
        return {kept.name: [str(kept.parameter.dtype), n] for kept, n in values}

    @torch.no_grad()
    def _count(self) -> torch.Tensor:
        """This rank's share of masked weights that are not zero and of others that are, [2, 2, n]:
        in the fp32 weights and in the ones that the model computes with, by parameter."""
        counts = torch.zeros(2, 2, len(self._kept), dtype=torch.long)
        for i, kept in enumerate(self._kept):
            for k, pieces in enumerate((kept.fragments(), kept.model_weights())):
                if self._first or kept.sharded(k):  # what all ranks hold alike counts once
                    for weights, start in pieces:
                        counts[:, k, i] += torch.tensor(kept.count(weights, start))
        return counts

    @property
    def _first(self) -> bool:
        return not dist.is_initialized() or dist.get_rank() == 0

    def _summed(self, values: torch.Tensor) -> torch.Tensor:
        """Over all ranks, in main memory."""
        if not dist.is_initialized() or not self._kept:
            return values
        values = values.to(self._kept[0].parameter.device)
        dist.all_reduce(values)
        return values.cpu()

    def _named(self, counts: torch.Tensor) -> dict[str, int]:
        """Counts [2, n] by name, the larger of both kinds of weights; those that are not 0."""
        pairs = zip(self._kept, counts.amax(0).tolist(), strict=True)
        return {kept.name: n for kept, n in pairs if n > 0}

    @property
    def n_masked(self) -> int:
        """How many weights are kept at zero."""
        return sum(kept.n_masked for kept in self._kept)

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _bind_fragments(self) -> None:
        """Where the fp32 weights that the base optimizer steps are, by the wrapper's kind."""
        masters: dict[int, torch.Tensor] = {}
        if hasattr(self._wrapper, "fp32_groups"):  # stage 0 with 16-bit weights, unfused
            groups = zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups, strict=True)
            masters = {id(lp): hp for g in groups for lp, hp in zip(*g, strict=True)}
        elif hasattr(self._wrapper, "fp32_groups_flat"):  # the same, with DeepSpeed's FusedAdam
            groups = zip(self._wrapper.fp16_groups, self._wrapper.fp32_groups_flat, strict=True)
            for group, flat in groups:
                views = _unflatten_dense_tensors(flat.data, group)
                masters |= {id(lp): hp for lp, hp in zip(group, views, strict=True)}
        for kept in self._kept:
            kept.master = masters.get(id(kept.parameter))


class _Kept:
    """One parameter, its mask if any, and the fp32 fragments that this rank's optimizer steps.

    The whole mask is kept as packed bits, an eighth of a byte a weight: under ZeRO-3 the gradient
    is whole for a moment on every rank, though nothing else is.
    """

    def __init__(self, name: str, parameter: nn.Parameter, mask: torch.Tensor | None = None):
        self.name, self.parameter = name, parameter
        self.shape = torch.Size(getattr(parameter, "ds_shape", parameter.shape))
        self.master: torch.Tensor | None = None  # where it is no fragment of the parameter's own
        self.masked, self.n_masked = mask is not None, 0
        if mask is None:
            return
        self.n_masked = int((~mask).sum())
        flat = mask.flatten().to(parameter.device, torch.uint8)
        flat = nn.functional.pad(flat, (0, -flat.numel() % 8), value=1).view(-1, 8)
        powers = 1 << torch.arange(8, dtype=torch.uint8, device=flat.device)
        self._packed = (flat * powers).sum(1, dtype=torch.uint8)

    def mask(
        self, device: torch.device, start: int = 0, n: int | None = None, dtype=torch.bool
    ) -> torch.Tensor:
        """`n` values of the flattened mask from `start` on."""
        n = self.shape.numel() if n is None else n
        packed = self._packed[start // 8 : -(-(start + n) // 8)].to(device)
        # a table of the bits of every byte: many times faster than to shift each byte
        return _bits(device, dtype).index_select(0, packed.int()).view(-1)[start % 8 :][:n]

    def mask_gradient(self, gradient: torch.Tensor) -> torch.Tensor:
        # a product, not a fill: NaN stays visible to whoever looks for it
        mask = self.mask(gradient.device, dtype=gradient.dtype)
        return mask.view(self.shape).mul_(gradient)

    def sharded(self, of_the_model: int) -> bool:
        """Whether ranks hold different pieces of the fp32 weights (0) or the model's (1)."""
        p = self.parameter
        return hasattr(p, "ds_tensor") or (not of_the_model and hasattr(p, "_hp_mapping"))

    def mask_of(self, weights: torch.Tensor, start: int) -> torch.Tensor:
        """The mask of a piece of the parameter, which begins at `start` of it, flattened."""
        return self.mask(weights.device, start, weights.numel()).view(weights.shape)

    def count(self, weights: torch.Tensor, start: int) -> tuple[int, int]:
        """Of a piece of the parameter, how many masked weights are not zero, and others are."""
        zero = weights == 0
        if not self.masked:
            return 0, int(zero.sum())
        mask = self.mask_of(weights, start)
        return int((~zero & ~mask).sum()), int((zero & mask).sum())

    def agrees(self) -> bool:
        """Whether the fp32 fragments are what the model's weights are made from."""
        for model, begin in self.model_weights():
            for weights, start in self.fragments():
                here = model.reshape(-1)[start - begin :][: weights.numel()].to(weights.device)
                made = weights.reshape(-1).to(here.dtype)
                if made.shape != here.shape or bool(
                    ((made != here) & ~(made.isnan() & here.isnan())).any()
                ):
                    return False
        return True

    def fragments(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The fp32 weights that this rank's optimizer steps, and where in the parameter they
        begin."""
        p = self.parameter
        if hasattr(p, "ds_tensor"):  # ZeRO-3: a flat shard, padded so that all are equally long
            yield self._shard(self._fp32_shard())
        elif hasattr(p, "_hp_mapping"):  # ZeRO-1 and 2: a piece of a flat buffer
            if p._hp_mapping is not None:  # another rank's otherwise
                address = p._hp_mapping.lp_fragment_address
                yield p._hp_mapping.get_hp_fragment().view(-1), address.start
        else:
            yield (p if self.master is None else self.master).data, 0

    def model_weights(self) -> Iterator[tuple[torch.Tensor, int]]:
        """The weights that the model computes with, as this rank holds them, and where in the
        parameter they begin."""
        p = self.parameter
        if not hasattr(p, "ds_tensor"):
            yield p.data, 0
            return
        status = getattr(p.ds_tensor, "status", None)
        if status is None or status.name == "AVAILABLE":  # else swapped out, to nvme
            yield self._shard(p.ds_tensor)

    def _fp32_shard(self) -> torch.Tensor:
        # the shard itself: the public function gives a copy where the optimizer is offloaded
        of = self.parameter._z3_optimizer._get_fp32_opt_state_partition
        try:
            return of(self.parameter, release_swap_buffers=True)[0]
        except KeyError:  # frozen: the optimizer does not have it
            return self.parameter.ds_tensor

    def _shard(self, weights: torch.Tensor) -> tuple[torch.Tensor, int]:
        weights = weights.data.view(-1)
        # the rank among those that share the parameter, who need not be all
        start = weights.numel() * self.parameter.ds_zero_partition_rank
        return weights[: max(0, self.shape.numel() - start)], start  # what is behind is padding


def checksum(weights: torch.Tensor, start: int) -> int:
    """Of a piece of a parameter that begins at `start`; the pieces' sum is the parameter's.

    Each weight's bits count by their place, modulo 2^64.
    """
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = weights.reshape(-1).view(width[weights.element_size()])
    total = torch.zeros((), dtype=torch.long, device=weights.device)
    for piece in bits.split(2**24):  # as int64 a piece is 128 MiB
        places = torch.arange(start, start + len(piece), device=weights.device)
        total += (piece.long() * (2 * places + 1)).sum()
        start += len(piece)
    return int(total)


def _bits(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The bits of every byte, [256, 8], the lowest first."""
    every, places = torch.arange(256, device=device), torch.arange(8, device=device)
    return ((every[:, None] >> places) & 1).to(dtype)


def _momenta(state: dict) -> Iterator[torch.Tensor]:
    """What moves a weight even where its gradient is zero."""
    return (state[key] for key in ("exp_avg", "momentum_buffer") if state.get(key) is not None)
