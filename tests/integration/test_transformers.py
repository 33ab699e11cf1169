"""HFOptimizer under Hugging Face's Trainer, by the classes of the example and the documentation."""

import importlib.util
import re

import pytest
import torch
from example_runs import falls, three_steps
from paths import ROOT

from torch_hf import HFOptimizer

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")


@pytest.fixture(scope="module")
def example():
    """The example as a module."""
    path = ROOT / "examples" / "transformers_tiny.py"
    spec = importlib.util.spec_from_file_location("transformers_tiny", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_model(dropout=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=8,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=6,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertForSequenceClassification(config)


def make_data():
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 8, (32, 6), generator=generator)
    labels = (tokens[:, 0] > 4).long()
    return [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels, strict=True)]


@pytest.fixture
def trainer(example, tmp_path):
    class Reports(transformers.TrainerCallback):
        def __init__(self):
            self.reports = []

        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            self.reports.append(optimizer.optimizer.last_report)

    def make(kind=example.HFTrainer, optimizer=example.StepTaken, dropout=0.0, **arguments):
        arguments = {
            "max_steps": 4,
            "per_device_train_batch_size": 16,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "weight_decay": 0.1,
            "save_strategy": "no",
            **arguments,
        }
        made = kind(
            model=make_model(dropout),
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to="none",
                disable_tqdm=True,
                logging_steps=1,
                **arguments,
            ),
            train_dataset=make_data(),
            optimizer_cls_and_kwargs=(optimizer, {"cg_max_iter": 5, "cg_decay": 0.5}),
        )
        made.seen = Reports()
        made.add_callback(made.seen)
        return made

    yield make
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_two_groups_and_the_run_of_a_plain_loop(trainer):
    run = trainer(per_device_train_batch_size=32)  # the whole set: order is no matter but rounding
    run.train()
    groups = run.optimizer.param_groups
    assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
    assert all(g["params"] for g in groups)

    model, data = make_model(), make_data()
    decaying = run.get_decay_parameter_names(model)
    named = list(model.named_parameters())
    optimizer = HFOptimizer(
        [
            {"params": [p for n, p in named if n in decaying], "weight_decay": 0.1},
            {"params": [p for n, p in named if n not in decaying]},
        ],
        cg_max_iter=5,
        cg_decay=0.5,
    )
    tokens = torch.stack([case["input_ids"] for case in data])
    labels = torch.stack([case["labels"] for case in data])
    for report in run.seen.reports:
        optimizer.step(lambda: model(input_ids=tokens, labels=labels).loss)
        truth = optimizer.last_report
        assert report.new_loss == pytest.approx(truth.new_loss, rel=1e-2)
        assert report.step == truth.step
    assert run.seen.reports[-1].new_loss < 0.9 * run.seen.reports[0].loss
    logged = [row["loss"] for row in run.state.log_history if "loss" in row]
    assert len(logged) == 4  # without the decay, which the reports count
    assert all(a < b.loss for a, b in zip(logged, run.seen.reports, strict=True))


def test_accumulation_takes_one_step_on_all_batches(trainer):
    runs = [
        trainer(per_device_train_batch_size=32),
        trainer(per_device_train_batch_size=8, gradient_accumulation_steps=4),
    ]
    for run in runs:
        run.train()
    whole, parts = (run.seen.reports for run in runs)
    assert [r.batch_cases for r in parts] == [r.batch_cases for r in whole] == [32] * 4
    for a, b in zip(parts, whole, strict=True):
        assert a.new_loss == pytest.approx(b.new_loss, rel=1e-2)


def test_a_checkpoint_resumes_bit_by_bit(trainer, tmp_path):
    # two steps an epoch: the second checkpoint is at the end of one, the first in the middle
    whole = trainer(dropout=0.1, save_strategy="steps", save_steps=1)
    whole.train()
    for at in (1, 2):
        rest = trainer(dropout=0.1)
        rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
        found = [(r.step, r.loss, r.new_loss, r.damping) for r in rest.seen.reports]
        truth = [(r.step, r.loss, r.new_loss, r.damping) for r in whole.seen.reports]
        assert found == truth[at:]
        assert torch.equal(flat(rest.model), flat(whole.model))


def test_bf16(trainer):
    run = trainer(bf16=True)
    run.train()
    assert all(r.new_loss <= r.loss for r in run.seen.reports)
    assert any(r.accepted for r in run.seen.reports)


def test_without_the_classes_it_is_said_what_to_do(trainer):
    run = trainer(kind=transformers.Trainer, optimizer=HFOptimizer)
    with pytest.raises(RuntimeError, match=r"needs a closure.*docs/frameworks\.md"):
        run.train()
    assert torch.equal(flat(run.model), flat(make_model()))


def test_the_documentation_shows_the_classes_of_the_example():
    page = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    source = (ROOT / "examples" / "transformers_tiny.py").read_text(encoding="utf-8")
    for name in ("StepTaken", "HFTrainer"):
        definition = re.search(rf"^class {name}\b.*?(?=^\S)", source, re.DOTALL | re.MULTILINE)
        assert definition.group().strip() in page


@pytest.mark.slow
def test_the_example(tmp_path):
    _, columns = three_steps("transformers_tiny", cwd=tmp_path)
    assert falls(columns)
