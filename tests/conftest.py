"""What the tests share: the repository root on sys.path, tiny models and SAEs, no user's cache."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

# Two processes of tests share two cores, and what is tiny gains nothing from a second thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")
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
def hub(tmp_path_factory):
    """A hub on this machine with everything that its scales read: one for each file of tests."""
    from hub import LocalHub, make_hub

    with LocalHub(make_hub(tmp_path_factory.mktemp("hub"))) as hub:
        yield hub


@pytest.fixture(scope="session")
def trained(tiny_model, tmp_path_factory) -> SimpleNamespace:
    """The tiny scale, trained once through experiment's own functions and saved."""
    import tiny

    return tiny.trained(tiny_model, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def evaluated(trained, tmp_path_factory) -> SimpleNamespace:
    """Both SAEs evaluated with an empty cache, and what lay around before and after."""
    import tiny

    return tiny.evaluated(trained, tmp_path_factory.mktemp("evaluated"))


@pytest.fixture(scope="module")
def scale(tiny_model):
    """The laptop scale for the tiny model."""
    import tiny

    return tiny.tiny_scale(tiny_model)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """One cache for every test of a file that does not need its own."""
    return tmp_path_factory.mktemp("shared-cache")


@pytest.fixture
def signals():
    import tiny

    with tiny.signals() as found:
        yield found


@pytest.fixture
def documents(monkeypatch) -> None:
    """Texts of numbers in place of the packaged documents, for tiny.ReadingModel."""
    import tiny

    import lab.text

    texts = [" ".join(map(str, tiny.tokens_of(i))) for i in range(tiny.N_DOCUMENTS)]
    monkeypatch.setattr(lab.text, "packaged_documents", lambda scale: texts)
