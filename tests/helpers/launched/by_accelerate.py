"""Accelerate: model and optimizer prepared, the growing loader not."""

import torch
from accelerate import Accelerator
from same_run import OPTIONS, keep, make_loader, make_network, train

from torch_hf import HFOptimizer

accelerator = Accelerator(cpu=True)
ranks, rank = accelerator.num_processes, accelerator.process_index
model = make_network()
optimizer = HFOptimizer(model.parameters(), process_group=torch.distributed.group.WORLD, **OPTIONS)
model, optimizer = accelerator.prepare(model, optimizer)
seen = train(model, optimizer, make_loader(ranks, rank), accelerator.backward)
keep(rank, model, seen)
accelerator.end_training()
