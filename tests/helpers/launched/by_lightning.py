"""Lightning: ``strategy="ddp"``, which starts the other process itself."""

import lightning
import torch
from same_run import EPOCHS, OPTIONS, keep, make_loader, make_network
from torch.nn import functional as F

from torch_hf import HFOptimizer


class Classifier(lightning.LightningModule):
    """Written for any optimizer but for the sampler, which knows of ranks."""

    def __init__(self):
        super().__init__()
        self.network, self.seen = make_network(), []

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.cross_entropy(self.network(x), y)

    def configure_optimizers(self):
        group = torch.distributed.group.WORLD
        return HFOptimizer(self.parameters(), process_group=group, **OPTIONS)

    def train_dataloader(self):
        return make_loader(self.trainer.world_size, self.trainer.global_rank)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        report = self.optimizers().optimizer.last_report
        self.seen.append((report.loss, report.batch_cases))


if __name__ == "__main__":
    module = Classifier()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        use_distributed_sampler=False,
        reload_dataloaders_every_n_epochs=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module)
    keep(trainer.global_rank, module, module.seen)
