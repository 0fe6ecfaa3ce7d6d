"""What a card refuses, the simulated one refuses as well; and what it allows it allows."""

import os

from card import simulated

import pytest  # isort: skip
import torch  # isort: skip
import torch.distributed as dist  # isort: skip

with simulated():
    on_card, main = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    first, number = torch.tensor([0]), torch.tensor(1.0)
    assert (on_card * 2 + number).sum().item() == 12
    assert on_card[first].device.type == "cuda" and on_card.cpu().numpy().sum() == 4
    for refused in (
        lambda: on_card + main,
        lambda: number.add_(on_card[0, 0]),
        lambda: torch.stack([on_card[0, 0], number]),
        lambda: main[first.cuda()],
        lambda: main.index_put_((first,), on_card[0]),
        lambda: torch.nn.Linear(2, 2)(on_card),
        lambda: torch.embedding(on_card, torch.tensor(0)),
        lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        lambda: main.to("cuda:1"),
        lambda: on_card.pin_memory(),
        lambda: on_card.int() @ on_card.int(),
    ):
        with pytest.raises(RuntimeError):
            refused()
    with pytest.raises(TypeError):
        on_card.numpy()
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    dist.init_process_group("nccl", rank=0, world_size=1)
    dist.all_reduce(on_card)
    for refused in (
        lambda: dist.all_reduce(main),
        lambda: dist.all_reduce(on_card[:, :1]),
        lambda: dist.all_gather_object([None], on_card),
    ):
        with pytest.raises(RuntimeError):
            refused()
