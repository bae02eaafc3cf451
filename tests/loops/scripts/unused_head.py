"""A head that no loss uses, under AdamW's weight decay."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model.unused = torch.nn.Linear(16, 2)
trained, head = model[:3], model.unused
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(trained(x), y).backward()
    run.step()
run.close()
