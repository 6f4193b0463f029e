"""A Hugging Face hub on this machine, and small repositories in the layout of the official ones.

`LocalHub` answers huggingface_hub, transformers and datasets over HTTP, so that a script can be
tested with its real loading code: `with LocalHub(make_hub(folder)) as hub:` and then a subprocess
with `os.environ | hub.environment`.  It can also refuse, break off and fail as the real hub does.
"""

import contextlib
import hashlib
import itertools
import json
import random
import re
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import torch
from tiny import make_tokenizer, spell_first_letters, vocabulary

from lab.packaged_text import PROSE, sae_probes_rows
from lab.process import quiet_transformers

MODEL = "google/gemma-2-2b"
PYTHIA = "EleutherAI/pythia-70m-deduped"
TEXT = "Skylion007/openwebtext"
TEXT_REVISION = "79d93d786212f7344586290adb811d4ae6a1762c"
# What main was of each when it was looked up (the text's is pinned: docs/hub.md has its sources);
# of others a made-up hash.
COMMITS = {
    MODEL: "c5ebcd40d208330abc697524c919956e692655cf",
    PYTHIA: "e93a9faa9c77e5d09219f6c868bfc7a1bd65593c",
    TEXT: TEXT_REVISION,
    "codeparrot/github-code": "b5661e6b17396364b2bcf8e68977b0d28e1ebd19",
    "fancyzhx/ag_news": "eb185aade064a813bc0b7f42de02595523103ca4",
    "Helsinki-NLP/europarl": "ab45e286aef3fb5780067100cb5a1132b52b7949",
}

# ── The server ───────────────────────────────────────────────────────────────────────────────────

LFS = {".safetensors", ".parquet", ".model", ".bin"}  # the hub identifies these by SHA-256
DATE = "2024-07-31T00:00:00.000Z"
# Revisions may be quoted; of the refs/... ones the clients leave the slashes as they are.
REVISION = r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"
API = re.compile(
    r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
    rf"(?:/(?P<what>auth-check|(?:revision|tree|paths-info)/{REVISION}(?:/(?P<path>.+))?))?"
)
RESOLVE = re.compile(rf"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/{REVISION}/(?P<path>.+)")


class LocalHub:
    """Serves folder/models/OWNER/NAME/... and folder/datasets/OWNER/NAME/...; a context manager.

    A repository has one commit, which is its main: no other revision exists.

    environment  what a subprocess needs on top of os.environ; its HF_HOME is empty at the start
    requests     every (method, path with query) so far
    gated        ids whose files need `token`: as at the real hub, their metadata and listings
                 are public, and files and auth_check() answer 401 without a token, 403 with another
    missing      ids that answer as if they did not exist
    bad_tokens   tokens that answer 401 wherever they are used, as expired ones do
    delay        seconds before every answer
    """

    token = "hf_reader"

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.requests: list[tuple[str, str]] = []
        self.gated: set[str] = set()
        self.missing: set[str] = set()
        self.bad_tokens: set[str] = set()
        self.delay = 0.0
        self.down = False
        self.lock = threading.Lock()
        self.failures: list[tuple[str, int]] = []  # (part of the path, status)
        self.cuts: list[tuple[str, int, bool]] = []  # (part of the path, bytes, reset)

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True  # a client's idle connection does not hold up the end
        self.server.hub = self
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()
        self.home = tempfile.TemporaryDirectory(prefix="hub-", ignore_cleanup_errors=True)
        return self

    def __exit__(self, *_):
        self.stop()
        self.home.cleanup()

    def stop(self) -> None:
        """The hub is gone: connections are refused, and open ones closed at the next request."""
        self.down = True
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        home = self.home.name
        return {
            "HF_ENDPOINT": self.url,
            # The caches are named one by one, for the caller's environment may name them too.
            "HF_HOME": home,
            "HF_HUB_CACHE": f"{home}/hub",
            "HF_XET_CACHE": f"{home}/xet",
            "HF_ASSETS_CACHE": f"{home}/assets",
            "HF_DATASETS_CACHE": f"{home}/datasets",
            "HF_MODULES_CACHE": f"{home}/modules",
            "HF_TOKEN_PATH": f"{home}/token",
            "HF_TOKEN": "",
            "HUGGING_FACE_HUB_TOKEN": "",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def fail_next(self, n: int = 1, status: int = 503, containing: str = "") -> None:
        """The next n requests whose path contains a text are answered with an error status."""
        with self.lock:
            self.failures += [(containing, status)] * n

    def cut_after(
        self, bytes_n: int, times: int = 1, containing: str = "/datasets/", reset: bool = False
    ) -> None:
        """The next `times` downloads whose path contains a text break off after bytes_n bytes.

        A download (or range of one) that is no longer than that is left whole and not counted.
        The connection is closed; with `reset` it is reset, which clients report in another way.
        """
        with self.lock:
            self.cuts += [(containing, bytes_n, reset)] * times

    def heal(self) -> None:
        """Forgets the faults still to come."""
        with self.lock:
            self.failures.clear()
            self.cuts.clear()
            self.delay = 0.0

    def take(self, faults: list[tuple], path: str, fits: Callable = lambda *_: True):
        """The first fault meant for this path, taken off the list; else None."""
        with self.lock:
            for fault in faults:
                if fault[0] in path and fits(*fault):
                    faults.remove(fault)
                    return fault
        return None

    def asked(self, containing: str, method: str = "") -> int:
        """How many requests had a text in their path."""
        with self.lock:
            return sum(containing in path and method in ("", m) for m, path in self.requests)


@lru_cache(maxsize=4096)
def describe(path: Path, size: int, _modified: int) -> dict:
    """A file as the hub's listings show it, without its path."""
    content = path.read_bytes()
    blob = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    if path.suffix not in LFS:
        return {"type": "file", "oid": blob, "size": size}
    lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
    return {"type": "file", "oid": blob, "size": size, "lfs": lfs}


class Handler(BaseHTTPRequestHandler):
    """One request to the hub."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    wbufsize = 1 << 16

    def log_message(self, *_):
        pass

    def handle(self):
        with contextlib.suppress(ConnectionError):  # a client that gave up waiting
            super().handle()

    def answer(self, status: int, body: bytes = b"", cut: tuple | None = None, **headers) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: cut[1]] if cut else body)
        self.wfile.flush()
        if cut:
            self.close_connection = True
            if cut[2]:  # closing with a linger time of 0 sends a reset
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)

    def json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), Content_Type="application/json")

    def error(self, status: int, message: str, code: str = "", **headers) -> None:
        headers |= {"X_Error_Code": code} if code else {}
        body = json.dumps({"error": message}).encode()
        self.answer(status, body, X_Error_Message=message, **headers)

    def do_GET(self):
        hub = self.server.hub
        # Read before anything else, or it would be taken for the connection's next request.
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if hub.down:
            self.close_connection = True
            return
        with hub.lock:
            hub.requests.append((self.command, self.path))
        time.sleep(hub.delay)
        if failure := hub.take(hub.failures, self.path):
            self.error(failure[1], "The hub is out of order.")
            return
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        if found := RESOLVE.fullmatch(url.path):
            kind = "datasets" if found["kind"] else "models"
            route = self.file
        elif found := API.fullmatch(url.path):
            kind, route = found["kind"], self.api
        else:
            self.error(404, "Sorry, we can't find the page you are looking for.")
            return
        self.kind, self.id = kind, unquote(found["id"])
        self.root = hub.folder / self.kind / self.id
        self.revision = unquote(found["revision"] or "main")
        self.commit = COMMITS.get(self.id, hashlib.sha1(self.id.encode()).hexdigest())
        if self.allowed(locked=route == self.file or found["what"] == "auth-check"):
            route(found)

    do_HEAD = do_POST = do_GET

    def allowed(self, locked: bool) -> bool:
        """Whether the repository, or what is `locked` of it, may be shown; else says why not."""
        hub = self.server.hub
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token in hub.bad_tokens:
            self.error(401, "Invalid credentials in Authorization header")
        elif self.id in hub.missing or not self.root.is_dir():
            # Without a token the real hub names no code; there the client goes by the https URL.
            refusal = (
                (404, "Repository not found") if token else (401, "Invalid username or password.")
            )
            self.error(*refusal, "RepoNotFound")
        elif self.revision not in ("main", self.commit):
            self.error(404, f"Invalid rev id: {self.revision}", "RevisionNotFound")
        elif locked and self.id in hub.gated and token != hub.token:
            what = f"Access to {self.kind[:-1]} {self.id} is restricted"
            page = ("" if self.kind == "models" else "datasets/") + self.id
            why = ". You must have access to it and be authenticated to access it. Please log in."
            if token:
                why = (
                    " and you are not in the authorized list."
                    f" Visit https://huggingface.co/{page} to ask for access."
                )
            self.error(403 if token else 401, what + why, "GatedRepo")
        else:
            return True
        return False

    def entry(self, path: Path) -> dict:
        """A file or folder as the listings show it."""
        relative = path.relative_to(self.root).as_posix()
        if path.is_dir():
            oid = hashlib.sha1(relative.encode()).hexdigest()
            found = {"type": "directory", "oid": oid, "size": 0, "path": relative}
        else:
            status = path.stat()
            found = {**describe(path, status.st_size, status.st_mtime_ns), "path": relative}
        if self.query.get("expand", ["false"])[0].lower() == "true":
            found["lastCommit"] = {"id": self.commit, "title": "Upload", "date": DATE}
        return found

    def api(self, found: re.Match) -> None:
        what = found["what"] or "revision"
        if what == "auth-check":
            self.answer(200)
        elif what.startswith("revision"):
            self.json(self.info())
        elif what.startswith("paths-info"):
            form = parse_qs(self.body.decode())
            self.query = form
            paths = [self.root / path for path in form.get("paths", [])]
            self.json([self.entry(path) for path in paths if path.exists()])
        else:
            folder = self.root / unquote(found["path"] or "")
            if not folder.is_dir():
                self.error(404, f'{found["path"]} does not exist on "main"', "EntryNotFound")
                return
            recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
            self.json([self.entry(p) for p in sorted(folder.glob("**/*" if recursive else "*"))])

    def info(self) -> dict:
        files = sorted(path for path in self.root.rglob("*") if path.is_file())
        siblings = [{"rfilename": path.relative_to(self.root).as_posix()} for path in files]
        if self.query.get("blobs", ["false"])[0].lower() == "true":
            for sibling, entry in zip(siblings, map(self.entry, files), strict=True):
                sibling |= {"size": entry["size"], "blobId": entry["oid"]}
                if lfs := entry.get("lfs"):
                    sibling["lfs"] = {**lfs, "sha256": lfs["oid"]}
        return {
            "_id": self.commit[:24],
            "id": self.id,
            "author": self.id.split("/")[0],
            "sha": self.commit,
            "lastModified": DATE,
            "createdAt": DATE,
            "private": False,
            "gated": "manual" if self.id in self.server.hub.gated else False,
            "disabled": False,
            "downloads": 1,
            "likes": 1,
            "tags": [],
            "siblings": siblings,
        } | ({"modelId": self.id} if self.kind == "models" else {})

    def file(self, found: re.Match) -> None:
        path = self.root / unquote(found["path"])
        if not path.is_file():
            self.error(404, "Entry not found", "EntryNotFound", X_Repo_Commit=self.commit)
            return
        entry = self.entry(path)
        headers = {
            "X_Repo_Commit": self.commit,
            "ETag": f'"{entry.get("lfs", entry)["oid"]}"',
            "Accept_Ranges": "bytes",
            "Content_Type": "application/octet-stream",
        }
        size, status, start, end = entry["size"], 200, 0, entry["size"]
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if wanted and any(wanted.groups()):
            first, last = wanted.groups()
            start = int(first) if first else max(0, size - int(last))
            end = min(size, int(last) + 1) if first and last else size
            if start >= size:
                self.answer(416, Content_Range=f"bytes */{size}")
                return
            status = 206
            headers["Content_Range"] = f"bytes {start}-{end - 1}/{size}"
        with path.open("rb") as source:
            source.seek(start)
            body = source.read(end - start)
        cut = None
        if self.command == "GET":
            hub = self.server.hub
            cut = hub.take(hub.cuts, self.path, lambda _, bytes_n, __: bytes_n < len(body))
        self.answer(status, body, cut, **headers)


# ── The repositories ─────────────────────────────────────────────────────────────────────────────


def edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2))


def make_gemma(
    folder: Path, dtype: torch.dtype = torch.float32, layers: int = 4, width: int = 64
) -> Path:
    """A tiny random Gemma-2 whose embedding spells first letters (see tiny.py), in shards.

    What is odd about Gemma-2 is kept: soft-capped attention and logits, alternating sliding
    windows, tied embeddings, padding on the left, and BOS put before every text by the tokenizer.
    """
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = make_tokenizer(folder)
    edit_json(folder / "tokenizer_config.json", padding_side="left")
    bos = tokenizer.bos_token
    before = {"SpecialToken": {"id": bos, "type_id": 0}}
    texts = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    template = {
        "type": "TemplateProcessing",
        "single": [before, texts[0]],
        "pair": [before, texts[0], before, texts[1]],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_token_id], "tokens": [bos]}},
    }
    edit_json(folder / "tokenizer.json", post_processor=template)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).float()
        embedding = spell_first_letters(model, tokenizer)
        # Gemma multiplies by this again, so that the residual stream is tiny.py's.
        embedding /= config.hidden_size**0.5
        for layer in model.model.layers:
            # These norms make whatever a random block computes as large as 1 + w: with w = 0 the
            # blocks would drown the letters.
            layer.post_attention_layernorm.weight.data.fill_(-0.7)
            layer.post_feedforward_layernorm.weight.data.fill_(-0.7)
    with quiet_transformers():
        model.to(dtype).save_pretrained(folder, max_shard_size="300KB")
    (folder / "README.md").write_text("---\nlicense: gemma\nlibrary_name: transformers\n---\n")
    return folder


def make_pythia(folder: Path, layers: int = 4) -> Path:
    """A tiny random GPT-NeoX whose embedding spells first letters, in float16.

    What is odd about Pythia is kept: one special token for BOS, EOS and unknown words, none for
    padding, none put before a text; weights in both formats; parallel blocks.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|padding|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    how = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=20_000, min_frequency=1, **how)
    tokenizer.train_from_iterator(vocabulary(), trainer)  # until each of its pieces is one token
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(("bos_token", "eos_token", "unk_token"), special[0])
    (folder / "special_tokens_map.json").write_text(json.dumps(names))
    about = {"add_prefix_space": False, "tokenizer_class": "GPTNeoXTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | about))
    config = GPTNeoXConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config).float()
        spell_first_letters(model, AutoTokenizer.from_pretrained(folder))
        model.half().save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "generation_config.json").unlink(missing_ok=True)  # the real one has none
    return folder


def endless(
    *sources: tuple[int, object], keep: Callable[[str], bool] = lambda text: len(text) > 60
) -> Iterator[str]:
    """Different texts of (data file number, target or None for all), then the same ones again."""
    texts = dict.fromkeys(
        text
        for number, target in sources
        for text, value in sae_probes_rows(number)
        if target in (None, value) and keep(text)
    )
    shuffled = list(texts)
    random.Random(str(sources)).shuffle(shuffled)
    return itertools.cycle(shuffled)


def take(texts: Iterator[str], n: int) -> list[str]:
    return list(itertools.islice(texts, n))


def write_parquet(path: Path, columns: dict[str, list]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, row_group_size=100)


def write_dataset(
    folder: Path,
    features: dict,
    splits: dict[str, list[dict]],
    config: str = "default",
    n_files: int = 1,
    hashes: dict[str, str] | None = None,
) -> None:
    """Adds a configuration to a dataset, in the layout and with the card of push_to_hub(), whose
    older versions put a hash at the end of a split's file names."""
    import yaml

    data = "data" if config == "default" else config
    for split, rows in splits.items():
        for i in range(n_files):
            part = rows[len(rows) * i // n_files : len(rows) * (i + 1) // n_files]
            end = f"-{hashes[split]}" if hashes else ""
            name = f"{data}/{split}-{i:05d}-of-{n_files:05d}{end}.parquet"
            write_parquet(folder / name, {k: [row[k] for row in part] for k in features})
    size = sum(path.stat().st_size for path in (folder / data).glob("*.parquet"))
    info = {
        "config_name": config,
        "features": [{"name": name, "dtype": dtype} for name, dtype in features.items()],
        "splits": [
            {"name": split, "num_bytes": size, "num_examples": len(rows)}
            for split, rows in splits.items()
        ],
        "download_size": size,
        "dataset_size": size,
    }
    files = [{"split": split, "path": f"{data}/{split}-*"} for split in splits]
    readme = folder / "README.md"
    card = {"dataset_info": [], "configs": []}
    if readme.exists():
        card = yaml.safe_load(readme.read_text().split("---")[1])
    card["dataset_info"].append(info)
    card["configs"].append({"config_name": config, "data_files": files})
    readme.write_text(f"---\n{yaml.safe_dump(card, sort_keys=False)}---\n")


def make_text(folder: Path, n_documents: int, n_files: int = 4) -> Path:
    """OpenWebText's layout: documents of one to eight passages of prose in plain_text/."""
    passages = endless(*((number, None) for number in PROSE))
    lengths = random.Random("documents")
    rows = [
        {"text": "\n\n".join(take(passages, lengths.choice((1, 1, 2, 3, 5, 8))))}
        for _ in range(n_documents)
    ]
    write_dataset(folder, {"text": "string"}, {"train": rows}, "plain_text", n_files)
    return folder


# Where the texts of each class come from: a class is told by its data file.  None of these files
# is among lab.packaged_text.PROSE, so that no document of make_text() holds a probing text.
PROFESSIONS = {
    0: (93, None),
    1: (44, None),
    2: (62, 1),
    6: (110, 0),
    9: (61, 1),
    11: (59, 1),
    13: (42, None),
    14: (63, 1),
    17: (60, 1),  # in no class set
    18: (94, 1),
    19: (110, 1),
    20: (113, None),
    21: (64, 1),
    22: (86, None),
    25: (51, None),
    26: (88, None),
}
PRODUCTS = {1: "toy", 2: "phone", 3: "machine", 5: "music", 6: "computer", 24: "book"}
STARS = {1.0: ((157, 0), (112, 0)), 5.0: ((157, 1), (112, 4))}
NEWS = {0: (161, 1), 1: (162, 1), 2: (163, 1), 3: (97, "Technology")}
# There is only English text here: every second word is taken from the language.
SPEECH = {
    "en": (55, ""),
    "fr": (89, "le la les un une des et est dans pour que qui sur pas avec nous vous ce il au"),
    "de": (103, "der die das und ist nicht ein eine zu von mit auf wir Sie es auch dass im den"),
    "es": (91, "el la los las un una y es en por que para con no se del su al lo como"),
    "nl": (47, "de het een en is niet van in op dat te voor met wij zijn aan ook om bij er"),
    "it": (41, "il la i gli un una e in per che con non si del della sono al da come"),
    "pt": (51, "o a os as um uma e em por que para com se do da no na ao como mais"),
}
PAIRS = ("en-fr", "fr-it", "de-en", "es-fr", "nl-pt")

# As the official one: other arguments than load_dataset's own, files by their names in the
# repository, and rows read one record batch at a time.
GITHUB_CODE = '''"""GitHub code, filtered by language and licence."""

import os

import datasets
import pyarrow.parquet as pq

SUFFIXES = {
    "C": [".c", ".h"],
    "HTML": [".html"],
    "Java": [".java"],
    "JavaScript": [".js"],
    "PHP": [".php", ".php3"],
    "Python": [".py"],
}
LANGUAGE_OF = {suffix: language for language, all_ in SUFFIXES.items() for suffix in all_}
LICENSES = ["mit", "gpl-2.0"]
SHARDS = 2


class GithubCodeConfig(datasets.BuilderConfig):
    def __init__(self, *args, languages=("all",), licenses=("all",), **kwargs):
        name = "+".join(languages) + "-" + "+".join(licenses)
        super().__init__(*args, name=name, **kwargs)
        self.languages, self.licenses = set(languages), set(licenses)


class GithubCode(datasets.GeneratorBasedBuilder):
    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = GithubCodeConfig
    BUILDER_CONFIGS = [
        GithubCodeConfig(languages=[language], licenses=[license])
        for language in ["all", *SUFFIXES]
        for license in ["all", *LICENSES]
    ]
    DEFAULT_CONFIG_NAME = "all-all"

    def _info(self):
        names = ("code", "repo_name", "path", "language", "license")
        features = {name: datasets.Value("string") for name in names}
        features["size"] = datasets.Value("int32")
        return datasets.DatasetInfo(features=datasets.Features(features))

    def _split_generators(self, dl_manager):
        names = [f"data/train-{i:05d}-of-{SHARDS:05d}.parquet" for i in range(SHARDS)]
        files = dl_manager.download(names)
        return [datasets.SplitGenerator(name=datasets.Split.TRAIN, gen_kwargs={"files": files})]

    def _generate_examples(self, files):
        languages, licenses = self.config.languages, self.config.licenses
        key = 0
        for name in files:
            with open(name, "rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(batch_size=10_000):
                    for row in batch.to_pylist():
                        language = LANGUAGE_OF[os.path.splitext(row["path"])[1]]
                        if "all" not in languages and language not in languages:
                            continue
                        if "all" not in licenses and row["license"] not in licenses:
                            continue
                        code = row.pop("content")
                        yield key, {**row, "code": code, "language": language}
                        key += 1
'''


def shuffled(rows: list[dict]) -> list[dict]:
    random.Random(len(rows)).shuffle(rows)
    return rows


def make_probing_datasets(folder: Path, rows_per_class: int) -> Path:
    """The datasets of SAE-Bench's eight sparse probing tasks, as folder/OWNER/NAME.

    `rows_per_class` is even, and the number of rows of every class in each split; of people's
    biographies half are of either gender, of products' reviews half have either rating.  Where
    there is one split only, it has twice as many.  Train and test sets of 2 * rows_per_class
    (SAE-Bench halves them) are the largest that every task can fill.
    """
    half = rows_per_class // 2
    splits = ("train", "test")

    texts = {profession: endless(source) for profession, source in PROFESSIONS.items()}
    features = {"hard_text": "string", "profession": "int64", "gender": "int64"}
    bios = {
        split: shuffled(
            [
                {"hard_text": f"{pronoun} says: {text}", "profession": p, "gender": gender}
                for p in PROFESSIONS
                for gender, pronoun in enumerate(("He", "She"))
                for text in take(texts[p], half)
            ]
        )
        for split in (*splits, "dev")
    }
    hashes = {"train": "0ab65b32c47407e8", "test": "5598c840ce8de1ee", "dev": "e6551072fff26949"}
    write_dataset(folder / "LabHC/bias_in_bios", features, bios, hashes=hashes)

    reviews = {rating: endless(*sources) for rating, sources in STARS.items()}
    features = {"rating": "float64", "text": "string", "category": "int64"}
    amazon = {
        split: shuffled(
            [
                # Reviews come without a category: the name of the product in each sentence is it.
                {"rating": rating, "text": text.replace(". ", f". The {product} "), "category": c}
                for c, product in PRODUCTS.items()
                for rating in STARS
                for text in take(reviews[rating], half)
            ]
        )
        for split in splits
    }
    write_dataset(folder / "canrager/amazon_reviews_mcauley_1and5", features, amazon)

    names = dict(zip("0123", ("World", "Sports", "Business", "Sci/Tech"), strict=True))
    articles = {label: endless(source) for label, source in NEWS.items()}
    news = {
        split: shuffled(
            [
                {"text": text, "label": label}
                for label in NEWS
                for text in take(articles[label], rows_per_class)
            ]
        )
        for split in splits
    }
    features = {"text": "string", "label": {"class_label": {"names": names}}}
    write_dataset(folder / "fancyzhx/ag_news", features, news)

    def speak(text: str, words: list[str]) -> str:
        chosen = itertools.cycle(random.Random(text).sample(words, len(words)))
        return " ".join(next(chosen) if words and i % 2 else w for i, w in enumerate(text.split()))

    for pair in PAIRS:
        sides = {}
        for language in pair.split("-"):
            number, words = SPEECH[language]
            texts = take(endless((number, None)), 2 * rows_per_class)
            sides[language] = [speak(text, words.split()) for text in texts]
        columns = zip(*sides.values(), strict=True)
        rows = [{"translation": dict(zip(sides, row, strict=True))} for row in columns]
        features = {"translation": {"translation": {"languages": list(sides)}}}
        write_dataset(folder / "Helsinki-NLP/europarl", features, {"train": rows}, pair, 2)

    make_code(folder / "codeparrot/github-code", 2 * rows_per_class)
    return folder


def make_code(folder: Path, rows_per_class: int) -> Path:
    """Code in six languages behind a loading script, in two files."""

    def code(marks: str = "", avoid: str = "^$") -> Callable[[str], bool]:
        # SAE-Bench leaves out what is shorter than 534 characters.
        return lambda t: len(t) > 600 and bool(re.search(marks, t)) and not re.search(avoid, t)

    others = tuple((number, 0) for number in (158, 159, 160))
    php, java = r"<\?php|\$this->", r"import java|public (final |abstract )?class|@Override"
    languages = {
        "c": endless((158, 1), keep=code()),
        "py": endless((159, 1), keep=code()),
        "html": endless((160, 1), keep=code()),
        "java": endless(*others, keep=code(java, php)),
        "php": endless(*others, keep=code(php, java)),
        "js": endless(*others, keep=code(r"function ?\(", f"{php}|{java}")),
    }
    rows = [
        {
            "content": text,
            "repo_name": f"someone/project-{i % 7}",
            "path": f"src/file{i}.{suffix}",
            "license": ("mit", "gpl-2.0")[i % 2],
            "size": len(text),
        }
        for suffix, texts in languages.items()
        for i, text in enumerate(take(texts, rows_per_class))
    ]
    rows = shuffled(rows)
    for i in range(2):
        columns = {name: [row[name] for row in rows[i::2]] for name in rows[0]}
        write_parquet(folder / f"data/train-{i:05d}-of-00002.parquet", columns)
    (folder / "github-code.py").write_text(GITHUB_CODE)
    (folder / "README.md").write_text("---\nlicense: other\n---\n")
    return folder


def make_hub(
    folder: Path,
    rows_per_class: int = 40,
    n_documents: int = 400,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Everything: the language model, its text and the probing datasets."""
    make_gemma(folder / "models" / MODEL, dtype)
    make_pythia(folder / "models" / PYTHIA)
    make_text(folder / "datasets" / TEXT, n_documents)
    make_probing_datasets(folder / "datasets", rows_per_class)
    return folder
