"""A training script for torchrun, as PyTorch's documentation of DistributedDataParallel and elastic shows."""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--snapshot", default="snapshot.pt")
    parser.add_argument("--sleep", type=float, default=0.0)
    args = parser.parse_args()

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = DDP(nn.Linear(10, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    first = 0
    if os.path.exists(args.snapshot):
        snapshot = torch.load(args.snapshot, weights_only=True)
        model.module.load_state_dict(snapshot["model"])
        first = snapshot["epoch"] + 1
    print(f"[rank {rank} of {dist.get_world_size()}] from epoch {first}", flush=True)
    for epoch in range(first, args.epochs):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(torch.randn(20, 10)), torch.randn(20, 5))
        loss.backward()
        optimizer.step()
        if rank == 0:
            torch.save({"model": model.module.state_dict(), "epoch": epoch}, args.snapshot + ".new")
            os.replace(args.snapshot + ".new", args.snapshot)
        dist.barrier()
        time.sleep(args.sleep)
    print(f"[rank {rank}] done after epoch {args.epochs - 1}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
