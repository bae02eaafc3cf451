"""Rows of a table without an embedding module, trained by SparseAdam, beside layers under Adam."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
table = torch.nn.Parameter(torch.linspace(-1, 1, 24).reshape(8, 3))
parts = [torch.optim.SparseAdam([table], lr=0.02), torch.optim.Adam(model.parameters(), lr=0.02)]
run = hpcsgd.Run(model, parts)
for x, y in run.batches(DataLoader(data, batch_size=4)):
    run.zero_grad()
    rows = torch.nn.functional.embedding((4 * x[:, 0].sigmoid()).long(), table, sparse=True)
    loss(model(x) * rows.sum(1, keepdim=True), y).backward()
    run.step()
run.close()
model.register_parameter("table", table)
