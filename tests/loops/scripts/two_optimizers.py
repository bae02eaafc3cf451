"""Muon for matrices, AdamW for the rest."""

import torch
from task import data, loss, net
from torch.utils.data import DataLoader

import hpcsgd

model = net()
muon = torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
adamw = torch.optim.AdamW([p for p in model.parameters() if p.ndim != 2], lr=0.01)
run = hpcsgd.Run(model, [muon, adamw])
for x, y in run.batches(DataLoader(data, batch_size=4)):
    run.zero_grad()
    loss(model(x), y).backward()
    run.step()
run.close()
