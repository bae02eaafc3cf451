"""L-BFGS with a line search."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3, line_search_fn="strong_wolfe")
run = hpcsgd.Run(model, optimizer)
for x, y in run.batches(DataLoader(data, batch_size=24)):

    def closure(x=x, y=y):
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        return value

    run.step(closure)
run.close()
