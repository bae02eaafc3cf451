"""A frozen embedding of a quantised class beside trained layers."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
weights = torch.linspace(-1, 1, 8 * 8).view(8, 8)
model.codes = torch.nn.Parameter(torch.quantize_per_tensor(weights, 0.1, 0, torch.qint8), requires_grad=False)
trained = model[:3]
optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(trained(x @ model.codes.dequantize()), y).backward()
    run.step()
run.close()
