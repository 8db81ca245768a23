"""One rank of the FSDP2 test: ``fsdp_worker.py RANK WORLD STORE``; prints the losses of three steps."""

import json
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import sparsetile as st


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    st.from_dense(model, sparse_config=st.SparsePatternConfig("local_window", 0.4, block_size=16))
    x = torch.randn(2, 100, 32)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        for block in model.layers:
            fully_shard(block)
        fully_shard(model)
        x = x.chunk(world)[rank]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(3):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach()
        if world > 1:
            dist.all_reduce(value)
        losses.append(value.item() / world)
    if rank == 0:
        print(json.dumps(losses))


if __name__ == "__main__":
    main()
    if dist.is_initialized():  # not while the model holds it: see "The end" in docs/distributed.md
        dist.destroy_process_group()
