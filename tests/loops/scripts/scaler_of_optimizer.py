"""A GradScaler unscales the gradients of the optimizer, as PyTorch's examples do, and steps the run."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler("cpu")
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    scaler.scale(loss(model(x), y)).backward()
    scaler.unscale_(optimizer)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(run)
    scaler.update()
run.close()
