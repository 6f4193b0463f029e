"""The stand-in for the Hugging Face hub: the unmodified clients must take it for the real one."""

import http.client
import json
import os
import re
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import hub as stand_in
import pytest
import tiny
import torch
from hub import MODEL, TEXT, TEXT_REVISION, LocalHub

from lab.packaged_text import PROSE
from lab.storage import file_sha256

ROWS = 20  # of every class in each split
SHARD = f"/datasets/{TEXT}/resolve/main/plain_text/train-00000-of-00004.parquet"
STREAM = f"""
from datasets import load_dataset
files = "hf://datasets/{TEXT}@{TEXT_REVISION}/plain_text/train-*.parquet"
rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
result = [row["text"] for row in rows]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stand_in.make_hub(tmp_path_factory.mktemp("hub"), rows_per_class=ROWS, n_documents=120)


@pytest.fixture
def hub(folder):
    with LocalHub(folder) as hub:
        yield hub


def client(hub: LocalHub, code: str, **environment: str):
    """What `code` leaves in `result`, in a process of its own that knows the hub only."""
    code = f"import json, lab\n{code}\nprint('\\n' + json.dumps(result))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | hub.environment | environment,
        cwd=tiny.ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


# Code for client(): what an action raises and the status it answers to, or what it returns.
OUTCOME = """
from huggingface_hub import HfApi, hf_hub_download

def outcome(action):
    try:
        return action()
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        return [type(error).__name__, status, str(error)]
"""


def get(hub: LocalHub, path: str, method: str = "GET", **headers: str):
    """(status, body, headers) without any client's retries."""
    connection = http.client.HTTPConnection("127.0.0.1", hub.server.server_port, timeout=60)
    with closing(connection):
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


# ── The clients ──────────────────────────────────────────────────────────────────────────────────


def test_the_hubs_own_client_lists_and_downloads_repositories(hub, folder):
    result = client(
        hub,
        f"""
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
api = HfApi()
info = api.model_info("{MODEL}", files_metadata=True)
dataset = api.dataset_info("{TEXT}", revision="{TEXT_REVISION}")
tree = api.list_repo_tree("{TEXT}", repo_type="dataset", recursive=True)
api.auth_check("{MODEL}")
result = {{
    "gated": info.gated,
    "lfs": {{s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs}},
    "sha": [info.sha, dataset.sha],
    "tree": [type(entry).__name__ + " " + entry.path for entry in tree],
    "files": api.list_repo_files("{MODEL}"),
    "config": open(hf_hub_download("{MODEL}", "config.json")).read(),
    "snapshot": snapshot_download("{MODEL}"),
}}""",
    )
    model = folder / "models" / MODEL
    assert result["gated"] is False
    weights = sorted(model.glob("*.safetensors"))
    assert len(weights) == 3  # the real ones come in three shards, too
    assert result["lfs"] == {path.name: file_sha256(path) for path in weights}
    assert re.fullmatch("[0-9a-f]{40}", result["sha"][0])
    assert result["sha"][1] == TEXT_REVISION
    names = [f"RepoFile plain_text/train-0000{i}-of-00004.parquet" for i in range(4)]
    assert result["tree"] == ["RepoFile README.md", "RepoFolder plain_text", *names]
    assert result["files"] == sorted(path.name for path in model.iterdir())
    assert result["config"] == (model / "config.json").read_text()
    assert result["snapshot"].endswith(result["sha"][0])
    assert result["snapshot"].startswith(hub.environment["HF_HOME"])


def test_the_file_system_finds_files_and_reads_parts_of_them(hub, folder):
    names, size, part = client(
        hub,
        f"""
from huggingface_hub import HfFileSystem
system = HfFileSystem()
names = system.glob("hf://datasets/{TEXT}@{TEXT_REVISION}/plain_text/train-*.parquet")
with system.open(names[1], block_size=1000, cache_type="none") as file:
    file.seek(5)
    part = file.read(70).hex()
result = names, system.info(names[1])["size"], part""",
    )
    second = "plain_text/train-00001-of-00004.parquet"
    assert names[1] == f"datasets/{TEXT}@{TEXT_REVISION}/{second}"
    content = (folder / "datasets" / TEXT / second).read_bytes()
    assert (len(names), size, bytes.fromhex(part)) == (4, len(content), content[5:75])


def test_ranges_are_served_as_http_defines_them(hub, folder):
    content = (folder / "datasets" / TEXT / "plain_text/train-00000-of-00004.parquet").read_bytes()
    for wanted, found in {
        "bytes=0-9": content[:10],
        "bytes=100-": content[100:],
        "bytes=-7": content[-7:],
        f"bytes=5-{len(content) + 99}": content[5:],
    }.items():
        status, body, headers = get(hub, SHARD, Range=wanted)
        assert (status, body) == (206, found), wanted
        assert headers["Content-Range"].endswith(f"/{len(content)}")
    assert get(hub, SHARD, Range=f"bytes={len(content)}-")[0] == 416
    status, body, headers = get(hub, SHARD, "HEAD")
    assert (status, body, int(headers["Content-Length"])) == (200, b"", len(content))


def test_transformers_load_a_gemma_that_is_odd_in_gemmas_ways(hub):
    result = client(
        hub,
        f"""
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
config = AutoConfig.from_pretrained("{MODEL}")
tokenizer = AutoTokenizer.from_pretrained("{MODEL}")
model = AutoModelForCausalLM.from_pretrained("{MODEL}").eval()
words = {{}}
for token, index in tokenizer.vocab.items():
    word = tokenizer.convert_tokens_to_string([token]).strip()
    if word.isascii() and word.isalpha():
        words[index] = ord(word[0].lower()) - ord("a")
tokens = torch.tensor([[tokenizer.bos_token_id, index] for index in words])
with torch.no_grad():
    states = model(tokens, output_hidden_states=True).hidden_states
right = states[2][:, 1, :26].argmax(-1) == torch.tensor(list(words.values()))
padded = tokenizer([" the", " the first letter"], padding=True).input_ids
result = {{
    "config": config.to_dict(),
    "class": type(model).__name__,
    "dtype": str(model.dtype),
    "tied": model.lm_head.weight is model.model.embed_tokens.weight,
    "letters": right.float().mean().item(),
    "scales": [state.pow(2).mean().sqrt().item() for state in states],
    "padded": [tokenizer.convert_ids_to_tokens(ids) for ids in padded],
}}""",
    )
    config = result["config"]
    assert (result["class"], result["dtype"], result["tied"]) == (
        "Gemma2ForCausalLM",
        "torch.float32",
        True,
    )
    assert (config["attn_logit_softcapping"], config["final_logit_softcapping"]) == (50, 30)
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * 2
    assert (config["hidden_size"], config["head_dim"], config["num_hidden_layers"]) == (64, 16, 4)
    assert result["letters"] > 0.95  # the residual stream still spells after two blocks
    assert all(0.5 < scale < 3 for scale in result["scales"])
    assert result["padded"][0] == ["<pad>", "<pad>", "<s>", "Ġthe"]
    assert result["padded"][1][0] == "<s>"


def test_the_gemma_can_be_saved_in_bfloat16(tmp_path):
    from safetensors import safe_open

    folder = stand_in.make_gemma(tmp_path / "gemma", torch.bfloat16, layers=3)
    config = json.loads((folder / "config.json").read_text())
    assert (config["dtype"], config["num_hidden_layers"]) == ("bfloat16", 3)
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as weights:
            names = weights.keys()
            assert {weights.get_tensor(name).dtype for name in names} == {torch.bfloat16}


def test_datasets_stream_openwebtext_at_a_fixed_revision(hub):
    texts = client(hub, STREAM)
    assert len(texts) == len(set(texts)) == 120
    assert min(map(len, texts)) < 300 < 1500 < max(map(len, texts))
    assert hub.asked(f"/resolve/{TEXT_REVISION}/plain_text/") and not hub.asked("/resolve/main/")


def test_sae_bench_loads_its_eight_official_datasets_itself(hub):
    found = client(
        hub,
        f"""
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset
from sae_bench.sae_bench_utils.dataset_utils import get_multi_label_train_test_data
result = {{}}
for name in SparseProbingEvalConfig().dataset_names:
    train, test = get_multi_label_train_test_data(name, {2 * ROWS}, {2 * ROWS}, 42)
    result[name] = chosen_classes_per_dataset[name], train, test""",
    )
    assert len(found) == 8
    for name, (classes, train, test) in found.items():
        for label in classes:
            # Two classes make a task: each brings half of the size that was asked for.
            assert len(train[label]) == len(test[label]) == ROWS, (name, label)
            assert min(map(len, train[label] + test[label])) > 40, (name, label)
            others = {text for other in classes if other != label for text in train[other]}
            assert not others & set(train[label]), (name, label)
    _, train, _ = found["codeparrot/github-code"]
    assert set(train) == {"C", "Python", "HTML", "Java", "PHP"}  # the repository has JavaScript too
    assert hub.asked("/resolve/", "GET") > 8


def test_the_one_dataset_with_a_script_is_read_without_it_and_gives_the_same_texts(hub):
    code = f"""
from sae_bench.sae_bench_utils import dataset_utils
from lab.bench import load_data_only
if {{ours}}:
    dataset_utils.load_dataset = load_data_only
name = "codeparrot/github-code"
result = dataset_utils.get_multi_label_train_test_data(name, {2 * ROWS}, {2 * ROWS}, 42)"""
    found = client(hub, code.format(ours=True))
    assert not hub.asked("github-code.py")
    assert found == client(hub, code.format(ours=False))
    assert hub.asked("github-code.py"), "its own way, which executes it"


def test_no_probing_text_stands_in_the_documents():
    bios, stars = stand_in.PROFESSIONS.values(), sum(stand_in.STARS.values(), ())
    numbers = [number for number, _ in [*bios, *stars, *stand_in.NEWS.values()]]
    numbers += [number for number, _ in stand_in.SPEECH.values()]
    assert not set(numbers) & set(PROSE)


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────


def test_a_gated_model_shows_its_card_and_refuses_its_files(hub):
    hub.gated.add(MODEL)
    code = f"""{OUTCOME}
result = []
for token in (None, "hf_other", "{hub.token}"):
    result.append([
        outcome(lambda: HfApi().model_info("{MODEL}", token=token).gated),
        outcome(lambda: len(HfApi().list_repo_files("{MODEL}", token=token))),
        outcome(lambda: HfApi().auth_check("{MODEL}", token=token)),
        outcome(lambda: hf_hub_download("{MODEL}", "config.json", token=token)),
    ])"""
    without, other, reader = client(hub, code)
    for answers, status in ((without, 401), (other, 403)):
        assert answers[:2] == ["manual", len(list((hub.folder / "models" / MODEL).iterdir()))]
        for answer in answers[2:]:
            assert answer[:2] == ["GatedRepoError", status]
            assert f"Access to model {MODEL} is restricted" in answer[2]
    assert reader[2] is None and reader[3].endswith("config.json")


def test_the_token_may_come_from_the_environment(hub):
    hub.gated.add(MODEL)
    code = f'{OUTCOME}result = outcome(lambda: hf_hub_download("{MODEL}", "config.json"))'
    assert client(hub, code)[0] == "GatedRepoError"
    assert client(hub, code, HF_TOKEN=hub.token).endswith("config.json")


def test_a_gated_dataset_is_not_found_by_datasets(hub):
    hub.gated.add("fancyzhx/ag_news")
    code = f"""{OUTCOME}
from datasets import load_dataset
result = outcome(lambda: load_dataset("fancyzhx/ag_news"))"""
    name, _, message = client(hub, code)
    assert name == "DatasetNotFoundError" and "gated dataset" in message


def test_missing_repositories_files_and_revisions_are_told_apart(hub):
    hub.missing.add(MODEL)
    code = f"""{OUTCOME}
api = HfApi()
result = [
    outcome(lambda: api.model_info("{MODEL}")),
    outcome(lambda: hf_hub_download("{MODEL}", "config.json")),
    outcome(lambda: api.model_info("{MODEL}", token="hf_any")),
    outcome(lambda: api.dataset_info("nobody/nothing")),
    outcome(lambda: hf_hub_download("{TEXT}", "no.txt", repo_type="dataset")),
    outcome(lambda: api.dataset_info("{TEXT}", revision="refs/convert/parquet")),
    outcome(lambda: api.dataset_info("{TEXT}", revision="{"0" * 40}")),
    outcome(lambda: api.dataset_info("{TEXT}", revision="v1")),
]"""
    assert [answer[:2] for answer in client(hub, code)] == [
        ["RepositoryNotFoundError", 401],
        ["RepositoryNotFoundError", 401],
        ["RepositoryNotFoundError", 404],
        ["RepositoryNotFoundError", 401],
        ["RemoteEntryNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RevisionNotFoundError", 404],
        ["RevisionNotFoundError", 404],
    ]


def test_an_expired_token_is_refused_everywhere(hub):
    hub.bad_tokens.add("hf_expired")
    code = f"""{OUTCOME}
result = outcome(lambda: HfApi().model_info("{MODEL}"))"""
    name, status, message = client(hub, code, HF_TOKEN="hf_expired")
    assert (name, status) == ("HfHubHTTPError", 401)
    assert "Invalid credentials in Authorization header" in message


# ── Faults ───────────────────────────────────────────────────────────────────────────────────────


def test_downloads_break_off_where_and_as_often_as_asked(hub):
    whole = get(hub, SHARD)[1]
    hub.cut_after(1000, times=2)
    for _ in range(2):
        assert get(hub, SHARD, Range="bytes=0-999")[1] == whole[:1000]  # not longer: not cut
        assert (
            get(hub, SHARD, "HEAD")[0] == get(hub, f"/{MODEL}/resolve/main/config.json")[0] == 200
        )
        with pytest.raises(http.client.IncompleteRead) as error:
            get(hub, SHARD)
        assert error.value.partial == whole[:1000]
    assert get(hub, SHARD)[1] == whole
    hub.cut_after(1000, reset=True)
    with pytest.raises(ConnectionResetError):
        get(hub, SHARD)
    hub.cut_after(1000)
    hub.heal()
    assert get(hub, SHARD)[1] == whole


def test_a_stream_resumes_after_a_cut_without_losing_or_repeating_a_document(hub):
    whole = client(hub, STREAM)
    hub.cut_after(2000, containing="train-00002")
    assert client(hub, STREAM) == whole
    assert not hub.cuts  # it did happen


def test_the_next_requests_fail_as_often_as_asked(hub):
    hub.fail_next(2)
    hub.fail_next(1, 429, containing="train-00000")
    page = f"/api/models/{MODEL}"
    assert [get(hub, page)[0] for _ in range(3)] == [503, 503, 200]
    assert [get(hub, SHARD)[0] for _ in range(2)] == [429, 200]


def test_answers_are_delayed_and_requests_recorded(hub):
    get(hub, f"/api/models/{MODEL}?blobs=true")
    hub.delay = 0.3
    start = time.monotonic()
    get(hub, SHARD, "HEAD")
    assert time.monotonic() - start >= 0.3
    assert hub.requests == [("GET", f"/api/models/{MODEL}?blobs=true"), ("HEAD", SHARD)]
    assert (hub.asked("/api/"), hub.asked("/resolve/", "GET")) == (1, 0)


def test_a_stopped_hub_is_gone_for_open_connections_too(hub):
    with closing(http.client.HTTPConnection("127.0.0.1", hub.server.server_port)) as connection:
        connection.request("GET", f"/api/models/{MODEL}")
        assert connection.getresponse().read()
        hub.stop()
        with pytest.raises(http.client.RemoteDisconnected):
            connection.request("GET", f"/api/models/{MODEL}")
            connection.getresponse()
    with pytest.raises(ConnectionRefusedError):
        get(hub, SHARD)


def test_every_hub_has_an_empty_home_of_its_own(folder):
    with LocalHub(folder) as first, LocalHub(folder) as second:
        homes = [Path(hub.environment["HF_HOME"]) for hub in (first, second)]
        assert homes[0] != homes[1]
        assert [list(home.iterdir()) for home in homes] == [[], []]
    assert not any(home.exists() for home in homes)
