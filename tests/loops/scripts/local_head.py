"""Each rank trains a head of its own."""

import torch
from task import data, loss
from torch.utils.data import DataLoader

import hpcsgd

model = torch.nn.ModuleDict({"body": torch.nn.Linear(8, 8), "head": torch.nn.Linear(8, 3)})
torch.manual_seed(0)
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer, local=["head.*"])
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model["head"](model["body"](x)), y).backward()
    run.step()
log = [float(model["head"].weight.sum())]
run.close()
