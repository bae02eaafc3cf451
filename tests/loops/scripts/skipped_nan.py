"""A batch whose loss is not finite is left out."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader, TensorDataset

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
inputs = data.tensors[0].clone()
inputs[50] = float("nan")
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(TensorDataset(inputs, data.tensors[1]), batch_size=4)):
    optimizer.zero_grad()
    value = loss(model(x), y)
    value.backward()
    if value.isfinite():
        run.step()
    else:
        run.skip()
run.close()
