"""`Embedding(max_norm=1)` shortens the rows of its own batch."""

import torch
from task import data, loss
from torch.utils.data import DataLoader

import hpcsgd

torch.manual_seed(0)
model = torch.nn.Sequential(
    torch.nn.Embedding(64, 16, max_norm=1.0), torch.nn.Flatten(), torch.nn.Linear(128, 3)
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer, check_every=4)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x.abs().mul(20).long().clamp(max=63)), y).backward()
    run.step()
run.close()
