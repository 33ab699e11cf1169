"""How far CG goes on data that stay and on new data."""

import pytest
from factor_runs import batch_of, network
from torch.nn import functional as F

from torch_hf import HFOptimizer
from torch_hf.preconditioner.simple import NoPreconditioner
from torch_hf.solver.cg_budget import max_iterations

pytestmark = pytest.mark.usefixtures("seeded")


class TestHowFarCGGoes:
    def reports(self, new_data, steps=4, **options):
        model, found = network(), []
        optimizer = HFOptimizer(model.parameters(), solver="cg", **options)
        for step in range(steps):
            x, y = batch_of(step if new_data else 0)
            optimizer.step(lambda x=x, y=y: F.cross_entropy(model(x), y))
            found.append(optimizer.last_report)
        return found

    def test_few_iterations_on_new_data(self):
        assert [r.cg_iterations for r in self.reports(True)] == [3, 3, 3, 3]
        iterations = [r.cg_iterations for r in self.reports(True, preconditioner="none")]
        assert max(iterations) <= 20 and iterations[-1] > 3

    def test_many_on_data_that_stay(self):
        first, *rest = [r.cg_iterations for r in self.reports(False, cg_tol=0.0)]
        assert first == 3
        assert min(rest) > 10

    def test_a_number_given_holds_on_both(self):
        for new_data in (True, False):
            found = self.reports(new_data, cg_max_iter=5, cg_tol=0.0)
            assert [r.cg_iterations for r in found] == [5] * 4

    def test_what_was_earned_ends_at_the_number_on_data_that_stay(self):
        found = [
            max_iterations(NoPreconditioner(), False, b) for b in (1.0, 2.0, 12.0, 16.0, 256.0)
        ]
        assert found == [20, 40, 240, 250, 250]
