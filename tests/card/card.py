"""A CUDA card that is not there, so that what runs on cards is tested where there is none.

Its tensors lie in main memory and are computed by the CPU's kernels, but say that they are on
`cuda:N`: the code under test takes the paths of a card, autocast and DeepSpeed's CUDA accelerator
with it, and what a card refuses is refused:

- an operation between its tensors and ones of main memory (numbers may be mixed),
- a collective of tensors in main memory, as by NCCL,
- a tensor of its own drawn by a generator of the CPU, or taken by `numpy`.

Not simulated: kernels, their speed and rounding, memory, streams (all of it happens in order).
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from unittest import mock

# CARD_GUARD is `guard.cpp` as a library. torch looks for a card once, while it is imported.
_torch = os.path.dirname(importlib.util.find_spec("torch").origin)
for _library in ("libc10.so", "libtorch_cpu.so", os.environ["CARD_GUARD"]):
    ctypes.CDLL(os.path.join(_torch, "lib", _library), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.utils._device  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map  # noqa: E402

aten = torch.ops.aten
MEMORY = 80 * 2**30
# What may mix devices, and whose first tensor says where the result is.
COPIES = {aten.copy_.default, aten._to_copy.default}
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}
# What takes a number in main memory, beside all that torch calls pointwise.
NUMBERS = {aten.fill_.Tensor, aten.masked_fill.Tensor, aten.masked_fill_.Tensor, aten.rsub.Tensor}
PRODUCTS = {aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
OF_THE_STORAGE = {torch.Tensor.data_ptr, torch.Tensor.untyped_storage, torch.Tensor.storage}
_objects = False  # during a collective of Python objects, which NCCL carries as torch arranges it


def here() -> torch.device:
    """The card of this rank."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


class Card(torch.Tensor):
    """A tensor on the card; `main` holds its values."""

    @staticmethod
    def __new__(cls, main: torch.Tensor) -> Card:
        facts = {"strides": main.stride(), "storage_offset": main.storage_offset()}
        facts |= {"dtype": main.dtype, "layout": main.layout, "device": here()}
        card = torch.Tensor._make_wrapper_subclass(cls, main.size(), **facts)
        card.main = main
        return card

    def __init__(self, main: torch.Tensor):
        pass

    def __repr__(self) -> str:
        return f"Card({self.main})"

    def __reduce_ex__(self, protocol):
        if _objects:
            raise RuntimeError("a card's tensor in a collective of objects stays on its card")
        kind = isinstance(self, torch.nn.Parameter), self.requires_grad
        return _unpickled, (self.main.detach().clone(), *kind)

    def tolist(self):
        return self.main.detach().tolist()

    def numpy(self, **_):
        raise TypeError("a tensor on a card cannot be converted to numpy; copy it to the CPU first")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        """What torch does below the dispatcher, and so would do with the card itself."""
        kwargs = kwargs or {}
        if func in OF_THE_STORAGE:
            return func(args[0].main)
        if func is torch.Tensor.new_tensor:
            return torch.tensor(args[1], **{"dtype": args[0].dtype, "device": here()} | kwargs)
        if func is torch.Tensor.backward:  # or hooks would see no assignment of `data` any more
            start = kwargs.get("gradient")
            start = torch.ones_like(args[0]) if start is None else start
            keep = bool(kwargs.get("retain_graph"))
            run = torch.autograd.graph._engine_run_backward
            ends = {"allow_unreachable": True, "accumulate_grad": True}
            return run((args[0],), (start,), keep, False, (), **ends)
        if func is torch.Tensor.__getitem__ and isinstance(args[0], Card):
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            at = (torch.tensor(i, device=here()) if isinstance(i, list) else i for i in at)
            args = args[0], tuple(at)
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **kwargs)
        if func == torch.Tensor.data.__set__:
            assert isinstance(args[1], Card), "not simulated: data of another device"
            args[0].main = args[1].main
        return out

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


class _Everywhere(TorchDispatchMode):
    """Sees operations that make a tensor on the card from none."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _dispatch(func, args, kwargs or {})


def _unpickled(main: torch.Tensor, parameter: bool, requires_grad: bool) -> torch.Tensor:
    card = main.to(here())
    if parameter:
        return torch.nn.Parameter(card, requires_grad=requires_grad)
    return card.requires_grad_(requires_grad)


def _dispatch(func, args: tuple, kwargs: dict):
    """Runs one operation on the CPU, if a card would."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    asked = kwargs.get("device")
    on_card = asked is not None and torch.device(asked).type == "cuda"
    if asked is None:
        mixed = func in COPIES or func in INDEXED
        on_card = any(isinstance(x, Card) for x in (tensors[:1] if mixed else tensors))
    _refuse(func, args, kwargs, tensors, on_card)
    if func is aten._fused_sdp_choice.default:
        return 0  # its parts, which are seen here, instead of a kernel
    if func is aten._pin_memory.default:
        return args[0].clone()
    if func is aten.view.default and on_card and not args[0].main.numel() and 0 not in args[1]:
        # ZeRO-3 asks for the shape of a weight that is not here; its values are nothing to use
        return Card(args[0].main.new_full(args[1], math.nan))
    if on_card and torch.Tag.nondeterministic_seeded in func.tags:
        torch.rand(1)  # a card's numbers are not the CPU's
    known = {id(x.main): x for x in tensors if isinstance(x, Card)}
    args, kwargs = tree_map(lambda x: x.main if isinstance(x, Card) else x, (args, kwargs))
    kwargs |= {"device": torch.device("cpu")} if asked is not None and on_card else {}
    kwargs |= {"pin_memory": False} if "pin_memory" in kwargs else {}

    def placed(x):
        if id(x) in known:  # changed in place
            return known[id(x)]
        return Card(x) if on_card and isinstance(x, torch.Tensor) else x

    return tree_map(placed, func(*args, **kwargs))


def _refuse(func, args: tuple, kwargs: dict, tensors: list[torch.Tensor], on_card: bool) -> None:
    """Raises:
    RuntimeError: a card would not do this.
    """
    main = [x for x in tensors if not isinstance(x, Card)]
    if func.namespace == "c10d":
        if main and not _objects and "barrier" not in func.name():
            raise RuntimeError(f"{func}: NCCL has no tensors in main memory")
        if not all(x.is_contiguous() for x in tensors):
            raise RuntimeError(f"{func}: NCCL has no tensors with gaps")
        return
    if on_card and torch.device(kwargs.get("device") or here()).index not in (None, here().index):
        raise RuntimeError(f"{func}: {kwargs['device']} is another rank's")
    if on_card and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a card draws with a generator of its own")
    whole = func in PRODUCTS and not tensors[0].is_floating_point()
    if on_card and (whole or func is aten._pin_memory.default):
        raise RuntimeError(f"{func}: not of a card's tensor of {tensors[0].dtype}")
    if func in COPIES or len(main) == len(tensors):
        return
    if func in INDEXED and isinstance(args[0], Card):  # its indices may lie anywhere
        main = [x for x in args[2:3] if not isinstance(x, Card)]
    # a number in main memory is a value of a pointwise operation, and never its result
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    results = [a for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
    written = {id(x) for x in tree_leaves([given.get(a.name) for a in results])}
    takes = torch.Tag.pointwise in func.tags or func in NUMBERS | INDEXED
    if any(x.dim() or not takes or id(x) in written for x in main):
        where = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in tensors)
        raise RuntimeError(f"{func}: not all on one device: {where}")


class _Stream:
    """A stream, an event or a device of which nobody need take notice."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_) -> None:
        pass

    def __getattr__(self, name: str):
        return lambda *_, **__: self


def _giving(value):
    return lambda *_, **__: value


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """A card for each rank of this node, for the body of a `with` in a process that has imported
    this first and been given DS_ACCELERATOR=cuda."""
    with contextlib.ExitStack() as stack:
        for target, patches in _patches():
            stack.enter_context(mock.patch.multiple(target, create=True, **patches))
        # else a thread of its own for each device, which would have no mode
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(_Everywhere())
        yield


def _patches() -> Iterator[tuple[object, dict]]:
    """Of what calls the driver, or makes a tensor below the dispatcher: objects and attributes."""
    import deepspeed.runtime.zero.partition_parameters as zero

    properties = SimpleNamespace(total_memory=MEMORY, name="simulated", multi_processor_count=1)
    values = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "current_device": here().index,
        "mem_get_info": (MEMORY, MEMORY),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 1,
        "get_device_properties": properties,
        "get_device_name": properties.name,
        "get_device_capability": (9, 0),
        "current_stream": _Stream(),
        "default_stream": _Stream(),
    }
    nothing = ("_lazy_init", "synchronize", "empty_cache", "set_device", "manual_seed")
    nothing += ("manual_seed_all", "reset_peak_memory_stats", "reset_max_memory_allocated")
    values |= dict.fromkeys(nothing)
    streams = dict.fromkeys(("Stream", "Event", "stream", "device"), _Stream)
    yield torch.cuda, {name: _giving(value) for name, value in values.items()} | streams
    yield torch._C, {"_host_emptyCache": _giving(None)}
    yield torch.cuda.nvtx, {name: _giving(None) for name in ("range_push", "range_pop")}
    yield torch.Tensor, {"record_stream": _giving(None), "is_pinned": _giving(False)}

    torch.utils._device._device_constructors()  # remembers torch's own ones

    def moved(make):
        def made(data, *more, device=None, **options):
            tensor = make(data, *more, **options)
            return tensor if device is None else tensor.to(device)

        return made

    tensor = moved(torch.tensor)
    yield torch, {"tensor": tensor, "as_tensor": moved(torch.as_tensor)}
    yield zero, {"_orig_torch_tensor": tensor}

    submit, begin = ThreadPoolExecutor.submit, dist.init_process_group

    def inside(pool, work, *args, **kwargs):
        def run():
            with torch.autograd.set_multithreading_enabled(False), _Everywhere():
                return work(*args, **kwargs)

        return submit(pool, run)

    yield ThreadPoolExecutor, {"submit": inside}

    def by_gloo(backend=None, *args, **kwargs):
        assert backend == "nccl"
        kwargs.pop("device_id", None)
        return begin("gloo", *args, **kwargs)

    def of_objects(gather):
        def gathered(*args, **kwargs):
            global _objects
            _objects = True
            try:
                return gather(*args, **kwargs)
            finally:
                _objects = False

        return gathered

    names = ("all_gather_object", "broadcast_object_list", "gather_object")
    objects = {name: of_objects(getattr(dist, name)) for name in names}
    yield dist, {"init_process_group": by_gloo} | objects
