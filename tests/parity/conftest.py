"""What the tests of kernels share."""

import pytest
import torch

from gossamer import ops


@pytest.fixture(params=ops.available_isas() or ("none",))
def isa(request):
    """Every instruction set of this processor in turn; "none" where the native kernels were not built."""
    if request.param != "none":
        ops.set_isa(request.param)
    yield request.param
    if request.param != "none":
        ops.set_isa()


@pytest.fixture(autouse=True)
def one_thread():
    """Small shapes gain nothing from threads; tests of threads set their number themselves."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
