"""An embedding with sparse gradients."""

import torch
from task import data, loss
from torch.utils.data import DataLoader

import hpcsgd

torch.manual_seed(0)
model = torch.nn.EmbeddingBag(8, 3, sparse=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x.abs().mul(3).long().clamp(max=7)), y).backward()
    run.step()
run.close()
