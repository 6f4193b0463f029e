"""What a repository of the hub holds: known layouts, whole texts, named columns, kept copies."""

import json
from types import SimpleNamespace

import pytest
from hub import PYTHIA, TEXT, TEXT_REVISION

import lab.hub
from lab.hub import (
    chosen_column,
    missing_files,
    model_is_kept,
    text_column,
    text_files,
    unreachable,
)
from lab.process import ExperimentError

SOURCE = f"{TEXT}@{TEXT_REVISION}"


@pytest.fixture
def holds(monkeypatch):
    """Makes the hub hold these files, or raise this."""

    def listing(*names: str, error: Exception | None = None) -> None:
        def list_repo_files(self, name, repo_type, revision):
            assert f"{name}@{revision}" == SOURCE and repo_type == "dataset"
            if error:
                raise error
            return ["README.md", *names]

        monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", list_repo_files)

    return listing


def shards(layout: str, of: int, which: range | None = None) -> list[str]:
    return [layout.format(i, of) for i in which or range(of)]


# OpenWebText's layouts that were seen, now and earlier; push_to_hub's (docs/hub.md).
NOW, PUSHED = "plain_text/train-{:05d}-of-{:05d}.parquet", "data/train-{:05d}-of-{:05d}.parquet"
CONVERTED = [f"plain_text/train/{i:04d}.parquet" for i in range(80)]


HASHED = [f"data/train-{i:05d}-of-00003-0ab65b32c47407e8.parquet" for i in range(3)]


@pytest.mark.parametrize("files", [shards(NOW, 80), CONVERTED, shards(PUSHED, 7), HASHED])
def test_text_is_found_in_every_known_layout_in_the_order_of_its_files(holds, files):
    holds("openwebtext.py", "other/valid-00000-of-00001.parquet", *files[::-1])
    assert text_files(SOURCE) == ([f"hf://datasets/{SOURCE}/{name}" for name in files], None)


def test_text_in_no_known_layout_is_refused_and_says_what_is_there(holds):
    """As the repository was with its script: a glob that matches nothing yields no document."""
    holds("openwebtext.py", "subsets/urlsf_subset00.tar")
    with pytest.raises(ExperimentError, match=r"no text in a layout.*it holds README.md, openwebt"):
        text_files(SOURCE)


@pytest.mark.parametrize(
    ("files", "lacking"),
    [  # a pull request's commit, which this program once had pinned, holds the last 30 of 80
        (shards(PUSHED, 80, range(50, 80)), "data/train-00000-of-00080"),
        (HASHED[1:], "data/train-00000-of-00003"),
        (HASHED[:2], "data/train-00002-of-00003"),
        (CONVERTED[:2] + CONVERTED[3:], "number 2"),
        ([*shards(PUSHED, 2), "data/train-extra.parquet"], "number 2"),
    ],
)
def test_a_part_of_a_text_is_not_taken_for_all_of_it(holds, files, lacking):
    holds(*files)
    with pytest.raises(ExperimentError, match=rf"not all files of its text.*there: {lacking}"):
        text_files(SOURCE)


def test_without_a_network_the_files_that_follow_one_another_are_taken_from_the_copy(
    holds, monkeypatch, tmp_path
):
    for name in shards(NOW, 80, (0, 1, 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    holds(error=ConnectionError("no route"))
    monkeypatch.setattr(lab.hub, "copy_of", lambda *asked: tmp_path)
    two = [f"{tmp_path}/{name}" for name in shards(NOW, 80, (0, 1))]
    assert text_files(SOURCE) == (two, "plain_text/train-00002-of-00080")
    (tmp_path / NOW.format(0, 80)).unlink()
    with pytest.raises(ExperimentError, match="not there: plain_text/train-00000-of-00080"):
        text_files(SOURCE)
    monkeypatch.setattr(lab.hub, "copy_of", lambda *asked: None)
    with pytest.raises(ConnectionError):
        text_files(SOURCE)


@pytest.mark.parametrize("error", [ValueError("a column has changed"), OSError(28, "no space")])
def test_an_error_that_is_not_the_networks_is_not_taken_for_it(holds, monkeypatch, tmp_path, error):
    monkeypatch.setattr(lab.hub, "copy_of", lambda *asked: tmp_path)
    holds(error=error)
    with pytest.raises(type(error)):
        text_files(SOURCE)
    assert not unreachable(error)


def test_what_the_hubs_clients_raise_without_a_network_is_known():
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    def answered(status: int) -> Exception:
        error = ValueError("as http errors are")
        error.response = SimpleNamespace(status_code=status)
        return error

    class ConnectError(type("TransportError", (Exception,), {})):
        """As httpx's."""

    led = RuntimeError("could not load")
    led.__cause__ = ConnectError("refused")
    for error in (OfflineModeIsEnabled(), LocalEntryNotFoundError("x"), TimeoutError(), led):
        assert unreachable(error)
    assert [unreachable(answered(status)) for status in (401, 403, 404, 429, 503)] == [
        False, False, False, True, True,
    ]  # fmt: skip
    assert issubclass(HfHubHTTPError, OSError), "so that OSError alone says nothing"


def test_files_of_which_some_are_missing_are_named():
    whole = ["a/x-00000-of-00002.parquet", "a/x-00001-of-00002.parquet", "README.md"]
    assert missing_files(whole) == []
    assert missing_files([*whole[1:], *HASHED[:1]]) == [
        "a/x-00000-of-00002", "data/train-00001-of-00003", "data/train-00002-of-00003",
    ]  # fmt: skip


def test_a_column_of_another_name_is_refused_with_those_that_there_are(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "train.parquet"
    for columns in ({"text": ["a"], "id": [1]}, {"id": [1], "content": ["a"]}):
        parquet.write_table(pyarrow.table(columns), path)
        if "text" in columns:
            assert text_column(str(path)) == "text"
    with pytest.raises(ExperimentError, match=r"has no column 'text', but 'id', 'content'"):
        text_column(str(path))
    with pytest.raises(ExperimentError, match="some/where has no column"):
        chosen_column("some/where", ["Text"])


INDEX = {"weight_map": {f"w{i}": f"model-0000{i}-of-00002.safetensors" for i in (1, 2)}}


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors.index.json": json.dumps(INDEX)}
        | dict.fromkeys(INDEX["weight_map"].values(), ""),
        {"model.safetensors": ""},
        {"pytorch_model.bin": ""},
    ],
    ids=["in parts", "safetensors", "bin"],
)
def test_a_model_is_kept_when_all_that_it_is_read_from_is(monkeypatch, tmp_path, files):
    monkeypatch.setattr(lab.hub, "copy_of", lambda name, kind: tmp_path)
    (tmp_path / "training_args.bin").touch()
    needed = {"config.json": "{}", "tokenizer.json": "{}"} | files
    for name, text in needed.items():
        assert not model_is_kept(PYTHIA), f"without {name}"
        (tmp_path / name).write_text(text)
    assert model_is_kept(PYTHIA)
    monkeypatch.setattr(lab.hub, "copy_of", lambda name, kind: None)
    assert not model_is_kept(PYTHIA)
