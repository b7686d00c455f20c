"""What all tests share: real data where it is, and few threads."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# The tensors of the tests are small: a second thread costs more than it brings, and on a busy machine very much more.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real images and weights, or a skip that says how to name it."""
    name = os.environ.get("TTAQ_DATA")
    if not name:
        pytest.skip("TTAQ_DATA is unset: this test needs the folder of real images and weights")
    folder = Path(name)
    assert folder.is_dir(), f"TTAQ_DATA names {folder}, which is not a folder"
    return folder


@pytest.fixture(autouse=True)
def _leave_global_state_alone() -> object:
    """A test that changes the default dtype, grad mode or thread count would change the tests after it."""
    before = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    yield
    after = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads())
    assert before == after, f"the test changed (default dtype, grad mode, threads) from {before} to {after}"
