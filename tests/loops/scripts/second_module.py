"""An encoder and a head, of which the run gets the encoder."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
encoder, head = model[:2], model[2]
optimizer = torch.optim.SGD([*encoder.parameters(), *head.parameters()], lr=0.1)
run = hpcsgd.Run(encoder, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(head(encoder(x)), y).backward()
    run.step()
run.close()
