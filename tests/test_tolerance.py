import numpy as np

from ops.tolerance import relative_error


def test_what_counts_as_an_error():
    assert relative_error(np.array([1.0, 2.0]), np.array([1.0, 2.5])) == 0.2
    assert relative_error(np.array([np.nan, 1.0]), np.array([np.nan, 1.0])) == 0
    assert relative_error(np.array([np.nan]), np.array([1.0])) == np.inf
    assert relative_error(np.array([1.0]), np.array([np.nan])) == np.inf
    assert relative_error(np.array([np.inf, 1.0]), np.array([np.inf, 1.0])) == 0
    assert relative_error(np.array([np.inf]), np.array([-np.inf])) == np.inf
    assert relative_error(np.array([1e-3]), np.array([0.0])) == np.inf


def test_a_dtype_need_not_hold_what_it_cannot():
    assert relative_error(np.array([0.0]), np.array([-3e-8]), "float16") == 0
    assert relative_error(np.array([0.0]), np.array([-3e-8]), "float32") == 1
    assert relative_error(np.array([0.0]), np.array([-1e-6]), "float16") == 1
