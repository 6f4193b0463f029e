"""What the tests share: the repository root on sys.path, a tiny model, and no user's cache."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import pytest
import tiny

import experiment  # noqa: F401 - blocks torchvision before anything imports transformers


@pytest.fixture(autouse=True, scope="session")
def never_the_users_cache(tmp_path_factory):
    """Whatever a test calls in this process, the cache in the user's home stays as it is."""
    before = os.environ.get("COSINE_SAE_CACHE")
    os.environ["COSINE_SAE_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield before
    if before is None:
        del os.environ["COSINE_SAE_CACHE"]
    else:
        os.environ["COSINE_SAE_CACHE"] = before


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a tiny Llama that knows the first letter of its words (see tiny.py)."""
    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny-llama")
