"""AdamW with a schedule of warm-up and cosine."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
run = hpcsgd.Run(model, optimizer)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.02, total_steps=100)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
    schedule.step()
run.close()
