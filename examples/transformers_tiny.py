"""Train a tiny BERT with Hugging Face's Trainer and HFOptimizer.

Trainer calls ``optimizer.step()`` without a closure, but HFOptimizer evaluates the loss several
times a step. Two small classes, ``StepTaken`` and ``HFTrainer``, bridge that: copy them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched here

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from torch_hf import HFOptimizer
from torch_hf.plotting import plot_training
from torch_hf.tracking import CSVLogger


class StepTaken(HFOptimizer):
    """Ignores the call without a closure that Trainer makes after ``training_step``."""

    def step(self, closure=None, *args, **kwargs):
        """A step, if there is something to step on."""
        return None if closure is None else super().step(closure, *args, **kwargs)


class HFTrainer(Trainer):
    """Trainer whose ``training_step`` gathers batches and takes one step on all of them."""

    gathered = ()

    def training_step(self, model, inputs, num_items_in_batch=None):
        """The loss of the batches gathered since the last step, which Trainer logs."""
        model.train()
        self.gathered = [*self.gathered, self._prepare_inputs(inputs)]
        if not self.accelerator.sync_gradients:  # gradient_accumulation_steps: more to come
            return torch.zeros((), device=self.args.device)
        batches, self.gathered = self.gathered, ()
        optimizer = self.optimizer.optimizer  # Accelerate's wrapper drops what step returns
        return optimizer.step(lambda batch: self.compute_loss(model, batch), batches=batches)


class LogReports(TrainerCallback):
    """Writes each step's report to a CSV file."""

    def __init__(self, logger):
        self.logger = logger

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        """Called by Trainer."""
        self.logger.log(optimizer.optimizer.last_report)


def make_data(cases: int, length: int = 12) -> list[dict[str, torch.Tensor]]:
    """Sequences of eight tokens; the label says whether token 1 comes more often than token 2."""
    tokens = torch.randint(1, 8, (cases, length))
    labels = ((tokens == 1).sum(1) > (tokens == 2).sum(1)).long()
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


def main() -> None:
    """Train, and leave the plot and the CSV file in runs/transformers_tiny."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("runs") / "transformers_tiny")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=12,
    )
    with CSVLogger(args.out / "training.csv") as logger:
        trainer = HFTrainer(
            model=BertForSequenceClassification(config),
            args=TrainingArguments(
                output_dir=str(args.out),
                max_steps=args.max_steps,
                per_device_train_batch_size=256,  # large batches: a step solves the one it sees
                gradient_accumulation_steps=2,  # one step on two batches, at the memory of one
                lr_scheduler_type="constant",  # the rate is 1, the Newton step, and stays there
                max_grad_norm=0.0,  # there is nothing to clip
                weight_decay=1e-3,  # of weights; Trainer makes a second group for the rest
                use_cpu=True,
                report_to="none",
                save_strategy="no",
                logging_steps=10,
            ),
            train_dataset=make_data(1024),
            eval_dataset=make_data(256),
            optimizer_cls_and_kwargs=(StepTaken, {"cg_max_iter": 20}),
            callbacks=[LogReports(logger)],
        )
        trainer.train()
    print(f"Loss on held-out cases: {trainer.evaluate()['eval_loss']:.4f}")
    plot_training(args.out / "training.csv", args.out / "training.png", title="Tiny BERT")
    print(f"Steps: {args.out / 'training.csv'}   Plot: {args.out / 'training.png'}")


if __name__ == "__main__":
    main()
