"""A training script as Accelerate's quick tour shows, with its own checkpoints."""

import argparse
import os
import time

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--snapshot", default="snapshot")
    parser.add_argument("--sleep", type=float, default=0.0)
    args = parser.parse_args()

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    model = nn.Linear(10, 5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)
    dataset = TensorDataset(torch.randn(16, 10), torch.randn(16, 5))
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(dataset, batch_size=4))
    done = os.path.join(args.snapshot, "epoch")
    first = 0
    if os.path.exists(done):
        with open(done) as file:
            first = int(file.read()) + 1
        accelerator.load_state(args.snapshot)
    print(f"[rank {accelerator.process_index} of {accelerator.num_processes}] from epoch {first}", flush=True)
    for epoch in range(first, args.epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(nn.functional.mse_loss(model(inputs), targets))
            optimizer.step()
        accelerator.save_state(args.snapshot)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            with open(done, "w") as file:
                file.write(str(epoch))
        accelerator.wait_for_everyone()
        time.sleep(args.sleep)
    print(f"[rank {accelerator.process_index}] done after epoch {args.epochs - 1}", flush=True)
    accelerator.end_training()


if __name__ == "__main__":
    main()
