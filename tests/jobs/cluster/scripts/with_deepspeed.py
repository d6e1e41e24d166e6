"""A training script as DeepSpeed's getting-started shows, with its own checkpoints."""

import argparse
import os
import time

import deepspeed
import torch
from torch import nn


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--snapshot", default="snapshot")
    parser.add_argument("--sleep", type=float, default=0.0)
    parser.add_argument("--local_rank", type=int, default=-1)
    args = parser.parse_args()

    deepspeed.init_distributed(dist_backend="gloo")
    torch.manual_seed(0)
    model = nn.Linear(10, 5)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.001}},
        "zero_optimization": {"stage": 0},
    }
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    _, state = engine.load_checkpoint(args.snapshot) if os.path.isdir(args.snapshot) else (None, None)
    first = state["epoch"] + 1 if state else 0
    rank = engine.global_rank
    print(f"[rank {rank} of {engine.world_size}] from epoch {first}", flush=True)
    for epoch in range(first, args.epochs):
        loss = nn.functional.mse_loss(engine(torch.randn(4, 10)), torch.randn(4, 5))
        engine.backward(loss)
        engine.step()
        engine.save_checkpoint(args.snapshot, client_state={"epoch": epoch})
        time.sleep(args.sleep)
    print(f"[rank {rank}] done after epoch {args.epochs - 1}", flush=True)


if __name__ == "__main__":
    main()
