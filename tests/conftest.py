"""What the tests share: the repository root on sys.path, a tiny model, and no user's cache."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

from made_up_runs import alone, comparison, summary  # noqa: F401  fixtures, drawn once for all


@pytest.fixture(autouse=True, scope="session")
def never_the_users_cache(tmp_path_factory):
    """Whatever a test calls in this process, the cache in the user's home stays as it is.

    Yields what COSINE_SAE_CACHE was before.
    """
    with pytest.MonkeyPatch.context() as patch:
        before = os.environ.get("COSINE_SAE_CACHE")
        patch.setenv("COSINE_SAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield before


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a tiny Llama that knows the first letter of its words (see tiny.py)."""
    import tiny

    return tiny.make_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="module")
def scale(tiny_model):
    """The laptop scale for the tiny model."""
    import tiny

    return tiny.tiny_scale(tiny_model)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One cache for every test of a file that does not need its own."""
    return tmp_path_factory.mktemp("shared-cache")
