"""Settings that all tests share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports the hub: a missing file must fail at once

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # the models are tiny: on a busy machine a second thread only waits
settings.register_profile("shared", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
