"""What all tests share: no hub, no deadlines on a shared machine, and a reason for every skipped GPU test."""

import os

import pytest
from hypothesis import settings

# a hub name that slips into a test fails at once instead of waiting for a network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("brise", deadline=None, print_blob=True, derandomize=bool(os.environ.get("CI")))
settings.load_profile("brise")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch sees none"))
