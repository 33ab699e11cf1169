"""HFOptimizer under Lightning: an unchanged module, the run of a plain loop."""

import pytest
import torch
from example_runs import falls, three_steps
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from torch_hf import GrowingBatchSampler, HFOptimizer

L = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning asks isinstance
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on workers and logging
    pytest.mark.filterwarnings("ignore:.*litlogger.*"),
]

_generator = torch.Generator().manual_seed(1)
X = torch.randn(60, 6, generator=_generator)
Y = (X[:, 0] > 0).long() + (X[:, 1] * X[:, 2] > 0).long()


def make_network(dropout=0.0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


def make_loader():
    own = torch.Generator()  # a loader draws a number each epoch: not from the noise's generator
    return DataLoader(TensorDataset(X, Y), batch_size=20, generator=own)


class Classifier(L.LightningModule):
    """Written for any optimizer."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.network = make_network(dropout)
        self.reports = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self.network(x), y)
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return HFOptimizer(self.parameters(), weight_decay=1e-3)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.reports.append(self.optimizers().optimizer.last_report)


@pytest.fixture
def trainer(tmp_path):
    def make(epochs=3, **options):
        options = {"enable_checkpointing": False, "accelerator": "cpu", **options}
        return L.Trainer(
            max_epochs=epochs,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            **options,
        )

    return make


def plain_run(epochs, dropout=0.0, **autocast):
    network = make_network(dropout)
    optimizer, reports = HFOptimizer(network.parameters(), weight_decay=1e-3), []
    for _ in range(epochs):
        for x, y in make_loader():

            def closure(x=x, y=y):
                optimizer.zero_grad()
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bool(autocast)):
                    loss = F.cross_entropy(network(x), y)
                loss.backward()
                return loss

            optimizer.step(closure)
            reports.append(optimizer.last_report)
    return network, reports


def assert_same(module, network):
    found, truth = list(module.parameters()), list(network.parameters())
    torch.testing.assert_close(found, truth, rtol=0, atol=0)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_an_unchanged_module_trains_as_a_plain_loop_does(dropout, trainer):
    module = Classifier(dropout)
    torch.manual_seed(3)
    trainer().fit(module, make_loader())
    torch.manual_seed(3)
    network, reports = plain_run(3, dropout)
    assert [r.loss for r in module.reports] == [r.loss for r in reports]
    assert_same(module.network, network)
    assert {r.solver for r in module.reports} <= {"cg", "kronecker"}
    assert F.cross_entropy(network(X), Y) < 0.8 * F.cross_entropy(make_network()(X), Y)


def test_products_under_lightning_are_gauss_newtons(trainer):
    """Not the Hessian's: the run differs from the Hessian's and has no negative curvature."""

    class Hessian(Classifier):
        def configure_optimizers(self):
            return HFOptimizer(self.parameters(), weight_decay=1e-3, curvature="hessian")

    modules = Classifier(), Hessian()
    for module in modules:
        trainer(1).fit(module, make_loader())
    first, second = (module.reports[0] for module in modules)
    assert first.loss == second.loss
    assert first.new_loss != second.new_loss


def test_bf16_mixed(trainer):
    module = Classifier()
    trainer(precision="bf16-mixed").fit(module, make_loader())
    network, _ = plain_run(3, bf16=True)
    assert_same(module.network, network)
    assert F.cross_entropy(module.network(X), Y) < 0.8 * F.cross_entropy(make_network()(X), Y)


def test_a_run_resumes_from_a_checkpoint_bit_by_bit(trainer, tmp_path):
    whole = Classifier(dropout=0.2)
    torch.manual_seed(3)
    half = {}

    class Half(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 1:
                trainer.save_checkpoint(tmp_path / "half.ckpt")
                half["random"] = torch.get_rng_state()

    trainer(4, callbacks=[Half()]).fit(whole, make_loader())
    rest = Classifier(dropout=0.2)

    class SameNoise(L.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                torch.set_rng_state(half["random"])

    with torch.no_grad():
        for p in rest.parameters():
            p.zero_()
    trainer(4, callbacks=[SameNoise()]).fit(rest, make_loader(), ckpt_path=tmp_path / "half.ckpt")
    assert [r.step for r in rest.reports] == [r.step for r in whole.reports[6:]]
    assert [r.loss for r in rest.reports] == [r.loss for r in whole.reports[6:]]
    assert [r.damping for r in rest.reports] == [r.damping for r in whole.reports[6:]]
    assert_same(rest.network, whole.network)


class Manual(Classifier):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        x, y = batch

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(self.network(x), y)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


def test_manual_optimization(trainer):
    module = Manual()
    trainer().fit(module, make_loader())
    network, reports = plain_run(3)
    assert [r.loss for r in module.reports] == [r.loss for r in reports]
    assert_same(module.network, network)


def test_a_scheduler_of_the_rate(trainer):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
            return [optimizer], [scheduler]

    module = Scheduled()
    trainer(2).fit(module, make_loader())
    assert [max(r.step_length for r in module.reports[i : i + 3]) for i in (0, 3)] == [1.0, 0.5]


def test_batches_grow_without_a_call_of_set_epoch(trainer):
    module = Classifier()
    sampler = GrowingBatchSampler(len(X), batch_size=10, growth=1.5)
    trainer(3).fit(module, DataLoader(TensorDataset(X, Y), batch_sampler=sampler))
    assert [r.batch_cases for r in module.reports] == [10] * 6 + [15] * 4 + [22, 22, 16]


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_refused(algorithm, trainer):
    module = Classifier()
    clipping = {"gradient_clip_val": 0.5, "gradient_clip_algorithm": algorithm}
    with pytest.raises(RuntimeError, match="Clipping does not change the step"):
        trainer(**clipping).fit(module, make_loader())
    assert_same(module.network, make_network())


def test_accumulated_gradients_are_refused(trainer):
    module = Classifier()
    with pytest.raises(RuntimeError, match="accumulate_grad_batches=1"):
        trainer(accumulate_grad_batches=3).fit(module, make_loader())
    assert_same(module.network, make_network())


@pytest.mark.parametrize("kind", [Classifier, Manual])
def test_16_mixed_is_refused(kind, trainer):
    """On a CPU, Lightning takes bfloat16 where float16 was asked for: the scaler is given here."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    module = kind()
    scaler = torch.amp.GradScaler("cpu")
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    with pytest.raises(RuntimeError, match="precision='bf16-mixed'"):
        trainer(plugins=[plugin]).fit(module, make_loader())
    assert_same(module.network, make_network())


@pytest.mark.slow
def test_the_example(tmp_path):
    _, columns = three_steps("lightning_digits", cwd=tmp_path)
    assert falls(columns)
