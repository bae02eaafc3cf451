"""A complex layer, as Fourier operators have."""

import torch
from task import data, loss
from torch.utils.data import DataLoader

import hpcsgd

torch.manual_seed(0)
model = torch.nn.Linear(8, 3, dtype=torch.complex64)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x.to(torch.complex64)).abs(), y).backward()
    run.step()
run.close()
