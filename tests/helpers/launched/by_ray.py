"""Ray Train: two workers, the model prepared, the growing loader not."""

import sys

import ray
import torch
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer, prepare_model
from same_run import OPTIONS, keep, make_loader, make_network, train

from torch_hf import HFOptimizer


def train_loop(config):
    context = get_context()
    ranks, rank = context.get_world_size(), context.get_world_rank()
    model = prepare_model(make_network())
    group = torch.distributed.group.WORLD
    optimizer = HFOptimizer(model.parameters(), process_group=group, **OPTIONS)
    keep(rank, model, train(model, optimizer, make_loader(ranks, rank)), config["folder"])


if __name__ == "__main__":
    ray.init(num_cpus=4)
    TorchTrainer(
        train_loop,
        train_loop_config={"folder": sys.argv[1]},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=sys.argv[1] + "/ray"),
    ).fit()
