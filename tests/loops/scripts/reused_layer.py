"""One layer is applied three times."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model.insert(2, torch.nn.Linear(16, 16))
optimizer.add_param_group({"params": list(model[2].parameters())})
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    optimizer.zero_grad()
    hidden = model[:2](x)
    for _ in range(3):
        hidden = model[2](hidden).tanh()
    loss(model[3](hidden), y).backward()
    run.step()
run.close()
