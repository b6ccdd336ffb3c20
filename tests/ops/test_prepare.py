"""The dry run that finds the kernels: it launches none, and nobody notices it."""

import numpy as np

import ops
from ops import build, scope

from .toys import Model


def test_prepare_is_a_dry_run(x):
    model = Model(1, 24)
    given = ops.tensor(np.ones((3, 24), "float32"))
    compiled = ops.prepare(lambda: model(given), progress=False)
    assert not model.totals[0].numpy().any(), "nothing was launched"
    before = len(build.log)
    model(given)
    assert len(build.log) == before and compiled >= 0 and model.totals[0].numpy().any()


def test_a_dry_run_goes_unnoticed(capsys):
    passes = []

    class Loud:
        def forward(self, x):
            passes.append(scope.current.get().number)
            print("a print in a model")
            breakpoint()
            assert ops.neg(x).numpy().sum() != 0, "only zeros here"

    x = ops.tensor(np.ones((3, 4), "float32"))
    ops.prepare(lambda: scope.run(Loud(), "", Loud().forward, (x,), {}))
    assert capsys.readouterr().out == ""
    assert passes == [0]
