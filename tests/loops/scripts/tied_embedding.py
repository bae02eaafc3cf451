"""The embedding is the head too, as in a language model."""

import torch
from task import data, loss
from torch.utils.data import DataLoader

import hpcsgd

model = torch.nn.Sequential(torch.nn.Embedding(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8, bias=False))
torch.manual_seed(0)
torch.nn.init.normal_(model[0].weight)
model[2].weight = model[0].weight
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for x, _ in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    tokens = x.abs().mul(3).long().clamp(max=7)
    loss(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    run.step()
run.close()
