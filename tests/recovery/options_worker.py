"""A rank of the tests over DeepSpeed's options: one small training for each of them.

    python -m torch.distributed.run --standalone --nproc_per_node 2 \
        tests/recovery/options_worker.py FILE

FILE is JSON: {name: {"zero": settings, "bf16": bool, "groups": bool, "frozen": bool, "tied": bool,
"rewire": bool}}; beside it, `results.pt` is what became of each: an error, or the weights.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

from cap_llm.runtime.errors import UserError  # noqa: E402
from cap_llm.runtime.world import World  # noqa: E402
from cap_llm.sparsity.keeper import keep_zeros, masks_of_zeros  # noqa: E402
from cap_llm.training import engine as engines  # noqa: E402

STEPS = 3
MASKED = ("embed.weight", "up.weight", "down.weight", "frozen.weight")


class Net(nn.Module):
    """Two masked matrices, a frozen one, a masked embedding, which a tied head may share."""

    def __init__(self, tied: bool, frozen: bool):
        super().__init__()
        self.embed = nn.Embedding(37, 12)
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 21), nn.Linear(21, 12)
        self.frozen = nn.Linear(12, 12, bias=False).requires_grad_(not frozen)
        self.head = nn.Linear(12, 37, bias=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        h = self.norm(self.embed(ids))
        h = h + self.down(torch.tanh(self.up(h))) + self.frozen(h)
        return nn.functional.cross_entropy(self.head(h[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def net(case: dict) -> nn.Module:
    torch.manual_seed(0)
    model = Net(case.get("tied", False), case.get("frozen", False))
    with torch.no_grad():
        for name in MASKED:
            p = model.get_parameter(name)
            p[torch.rand(p.shape) < 0.5] = 0
    return model


def train(case: dict) -> dict[str, torch.Tensor]:
    """The weights after some steps, whole."""
    import deepspeed

    model = net(case)
    masks = masks_of_zeros(model, MASKED)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": case.get("bf16", False)},
        "zero_optimization": case["zero"],
    }
    parameters = [p for p in model.parameters() if p.requires_grad]
    if case.get("groups"):
        matrices = [p for p in parameters if p.dim() > 1]
        others = [p for p in parameters if p.dim() < 2]
        parameters = [{"params": others, "weight_decay": 0.0}, {"params": matrices}]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    try:
        if case.get("rewire"):
            rewire(engine)
        for state in engine.basic_optimizer.state.values():
            state["step"].zero_()  # stage 0 in 16 bits has stepped once to make the moments
        keeper = keep_zeros(engine, masks)
        for step in range(STEPS):
            g = torch.Generator().manual_seed(10 * step + dist.get_rank())
            engine.backward(engine(torch.randint(37, (2, 8), generator=g)))
            engine.step()
        keeper.check()
        with engines.gathered(engine.module.parameters()):
            weights = {n: p.detach().float().clone() for n, p in engine.module.named_parameters()}
        for name, mask in masks.items():
            assert not weights[name][~mask].any(), name
        keeper.remove()
        return weights
    finally:
        engines.release(engine)


def rewire(engine) -> None:
    """Links two matrices to each other's fp32 weights, on the last rank alone."""
    linked = [p for p in engine.module.parameters() if getattr(p, "_hp_mapping", None)]
    if dist.get_rank() == 1:
        linked[0]._hp_mapping.hp_fragment = linked[0]._hp_mapping.hp_fragment.roll(1)


def main(file: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    engines.start(World("cpu"))
    results = {}
    for name, case in json.loads(file.read_text()).items():
        try:
            results[name] = train(case)
        except UserError as error:
            results[name] = str(error)
        print(name, time.time(), flush=True)
    everyone = [None] * dist.get_world_size()
    kinds = {n: r if isinstance(r, str) else "trained" for n, r in results.items()}
    dist.all_gather_object(everyone, kinds)
    assert all(kinds == everyone[0] for kinds in everyone), everyone  # all ranks end alike
    if dist.get_rank() == 0:
        torch.save(results, file.with_name("results.pt"))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # the end of the interpreter may abort after ZeRO-3


if __name__ == "__main__":
    main(Path(sys.argv[1]))
