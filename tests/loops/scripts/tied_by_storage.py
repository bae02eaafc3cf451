"""Two layers share one storage: `b.weight.data = a.weight.data`."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
model.insert(2, torch.nn.Linear(16, 16))
model.insert(2, torch.nn.Linear(16, 16))
model[2].weight.data = model[3].weight.data
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    loss(model(x), y).backward()
    run.step()
    assert model[2].weight.equal(model[3].weight)
run.close()
