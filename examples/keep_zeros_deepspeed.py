"""Keep zeros at zero in your own DeepSpeed training loop, under ZeRO-2.

    python examples/keep_zeros_deepspeed.py              # one rank on a CPU, within seconds
    deepspeed examples/keep_zeros_deepspeed.py           # all GPUs of a node

It takes two calls: `masks_of_zeros` before `deepspeed.initialize`, and `keep_zeros` after it.
"""

import os

import torch
from torch import nn

ON_GPU = torch.cuda.is_available()
if not ON_GPU:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402

from cap_llm import keep_zeros, masks_of_zeros  # noqa: E402

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}


def main() -> None:
    """Trains a pruned network for ten steps and counts its zeros."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (defaults | {"MASTER_PORT": "0"}).items():
        os.environ.setdefault(name, value)  # a launcher sets its own values
    if not ON_GPU:  # an inference kernel that takes a minute to compile
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("nccl" if ON_GPU else "gloo", auto_mpi_discovery=False)

    torch.manual_seed(0)
    first = nn.Linear(32, 64)
    with torch.no_grad():
        first.weight[:, ::2] = 0  # 50% zeros, as in a pruned model
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(64, 32))
    masks = masks_of_zeros(model)

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=CONFIG)
    keeper = keep_zeros(engine, masks)
    for _ in range(10):
        x = torch.randn(4, 32, device=engine.device)
        loss = (engine(x) - x).square().mean()
        engine.backward(loss)
        engine.step()
    keeper.check()  # collective; raises if any masked weight is nonzero
    print(f"loss {loss.item():.3f}, {keeper.n_masked} weights are still exactly zero")


if __name__ == "__main__":
    main()
