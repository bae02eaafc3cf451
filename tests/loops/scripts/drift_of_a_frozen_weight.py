"""Each rank adds something of its own to a frozen layer, as a merge of adapters that differ (ReLoRA)."""

import torch
from mpi4py import MPI
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model[0].requires_grad_(False)
optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer, check_every=4)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
    if run.steps == 2:
        model[0].weight.data += 0.001 * MPI.COMM_WORLD.rank
run.close()
