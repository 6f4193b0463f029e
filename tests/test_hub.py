"""What a repository of the hub holds: known layouts, whole texts, named columns, kept copies."""

from pathlib import Path

import pytest
from hub import PYTHIA, TEXT, TEXT_REVISION

import lab.hub
from lab.hub import chosen_column, model_is_kept, text_column, text_files
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


@pytest.mark.parametrize("files", [shards(NOW, 80), CONVERTED, shards(PUSHED, 7)])
def test_text_is_found_in_every_known_layout_in_the_order_of_its_files(holds, files):
    holds("openwebtext.py", "other/valid-00000-of-00001.parquet", *files[::-1])
    assert text_files(SOURCE) == [f"hf://datasets/{SOURCE}/{name}" for name in files]


def test_text_in_no_known_layout_is_refused_and_says_what_is_there(holds):
    """As the repository was with its script: a glob that matches nothing yields no document."""
    holds("openwebtext.py", "subsets/urlsf_subset00.tar")
    with pytest.raises(ExperimentError, match=r"no text in a layout.*it holds README.md, openwebt"):
        text_files(SOURCE)


def test_a_part_of_a_text_is_not_taken_for_all_of_it(holds):
    """As a pull request's commit, which this program once had pinned, holds the last 30 of 80."""
    holds(*shards(PUSHED, 80, range(50, 80)))
    with pytest.raises(ExperimentError, match=r"30 of the 80 files .*train-00050-of-00080"):
        text_files(SOURCE)


def test_without_a_network_the_files_that_follow_one_another_are_taken_from_the_copy(
    holds, monkeypatch, tmp_path
):
    for name in shards(NOW, 80, (0, 1, 3)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    holds(error=ConnectionError("no route"))
    monkeypatch.setattr(lab.hub, "copy_of", lambda *asked: tmp_path)
    assert text_files(SOURCE) == [f"{tmp_path}/{name}" for name in shards(NOW, 80, (0, 1))]
    (tmp_path / NOW.format(0, 80)).unlink()
    with pytest.raises(ExperimentError, match="2 of the 80 files"):
        text_files(SOURCE)
    monkeypatch.setattr(lab.hub, "copy_of", lambda *asked: None)
    with pytest.raises(ConnectionError):
        text_files(SOURCE)


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


def test_a_model_is_kept_when_all_that_it_is_read_from_is(monkeypatch, tmp_path):
    monkeypatch.setattr(lab.hub, "copy_of", lambda name, kind: tmp_path)
    weights = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    needed = ["config.json", "tokenizer.json", *weights]
    for name in needed:
        assert not model_is_kept(PYTHIA), f"without {name}"
        Path(tmp_path / name).touch()
    assert model_is_kept(PYTHIA)
    monkeypatch.setattr(lab.hub, "copy_of", lambda name, kind: None)
    assert not model_is_kept(PYTHIA)
