"""From documents to contexts: streamed or packaged text, tokenised, dealt into lanes, packed."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from lab.hub import chosen_column, text_files
from lab.language_model import LanguageModel
from lab.packaged_text import packaged_documents
from lab.process import ExperimentError, require, say
from lab.scales import Scale


def streamed_documents(source: str, start: int = 0, tries: int = 6) -> Iterator[str]:
    """Documents of "dataset@revision" on the hub from `start` on, read as they are needed; where
    there is no network, of the files that the hub's client keeps.  A row without text is an empty
    document.

    A network that fails is asked again after 1, 2, 4, ... seconds, from the document it failed at;
    raises ExperimentError after `tries` failures with no document between them.
    """
    from datasets import load_dataset

    dataset, failures, files = source.split("@")[0], 0, None
    while True:
        try:
            files = files or text_files(source)  # once: its documents are numbered by its files
            rows = load_dataset(
                "parquet", data_files=files.addresses, split="train", streaming=True
            )
            for row in rows.skip(start):
                yield row[chosen_column(source, row)] or ""
                start, failures = start + 1, 0
            require(
                not files.not_kept,
                f"the text of {source} goes on in {files.not_kept}, which is not kept on this "
                "machine: fetch it with `hf download`, or run with a network",
            )
            return
        except ExperimentError:
            raise
        except Exception as error:  # each of the libraries in between has its own
            failures += 1
            reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}".splitlines()[0]
            require(
                failures < tries,
                f"{dataset} could not be read at document {start}, {tries} times in a row "
                f"({reason}): check the network, then run the same command again to go on",
            )
            wait = 2 ** (failures - 1)
            say(f"{dataset}: {reason}; trying again from document {start} in {wait} s")
            time.sleep(wait)


def tokenized(
    scale: Scale, lm: LanguageModel, start: int, wanted: Callable[[int], bool], at_once: int = 64
) -> Iterator[tuple[int, list[int]]]:
    """(index, tokens) of the documents that are wanted, from `start` on."""
    if scale.world:
        yield from ((i, rows) for i, rows in lm.documents(start) if wanted(i))
        return
    if scale.text == "sae-probes":
        documents = iter(packaged_documents(scale)[start:])
    else:
        documents = streamed_documents(scale.text, start)
    chosen = ((i, text) for i, text in enumerate(documents, start) if wanted(i))
    while some := list(islice(chosen, at_once)):  # tokenizers spreads a list over the cores
        # Half a character (a lone surrogate) is no text to a tokenizer: it becomes "?".
        texts = [text.encode("utf-8", "replace").decode("utf-8") for _, text in some]
        found = lm.tokenizer(texts, add_special_tokens=False).input_ids
        yield from zip((i for i, _ in some), found, strict=True)


def pack(tokens: list[int], bos: int, length: int) -> torch.Tensor:
    """Contexts [N, length] of BOS and length - 1 tokens each; a remainder is left out."""
    body = torch.tensor(tokens[: len(tokens) // (length - 1) * (length - 1)], dtype=torch.long)
    return torch.nn.functional.pad(body.view(-1, length - 1), (1, 0), value=bos)


WATCHED = 32  # at least so many held-out contexts have their L0 held at the target in training


def heldout_contexts(scale: Scale, lm: LanguageModel) -> tuple[torch.Tensor, int]:
    """The first contexts of the text [heldout_contexts, L], kept for fidelity, and how many
    documents they took: training begins after those."""
    tokens: list[int] = []
    for index, found in tokenized(scale, lm, 0, wanted=lambda _: True, at_once=8):
        tokens += [*found, lm.tokenizer.eos_token_id]
        contexts = pack(tokens, lm.tokenizer.bos_token_id, scale.context_length)
        if len(contexts) >= scale.heldout_contexts:
            return contexts[: scale.heldout_contexts], index + 1
    raise ExperimentError(
        f"the text of scale {scale.name!r} is shorter than its {scale.heldout_contexts} held-out "
        "contexts: nothing is left to train on"
    )


@dataclass
class Lane:
    """One of the streams that text is dealt into: every `lanes`-th document, end to end.

    What a lane holds does not depend on how many processes share the lanes between them, and so
    training does not either.
    """

    next_document: int  # all before it are read, or another lane's
    pending: list[int]  # tokens read and not packed yet

    def copy(self) -> "Lane":
        return Lane(self.next_document, [*self.pending])


def text_blocks(
    scale: Scale, lm: LanguageModel, start: dict[int, Lane]
) -> Iterator[tuple[dict[int, Lane], torch.Tensor]]:
    """Blocks of contexts, the same number from every lane of `start`, lane after lane.

    Yields (the lanes as they stood before it, contexts [N, L]); ends where a lane's text ends.
    """
    lanes = {i: lane.copy() for i, lane in start.items()}
    need = scale.block_contexts // scale.lanes * (scale.context_length - 1)
    first = min(lane.next_document for lane in lanes.values())
    documents = tokenized(scale, lm, first, wanted=lambda i: i % scale.lanes in lanes)
    while True:
        before = {i: lane.copy() for i, lane in lanes.items()}
        while min(len(lane.pending) for lane in lanes.values()) < need:
            index, tokens = next(documents, (None, None))
            if index is None:
                return
            lane = lanes[index % scale.lanes]
            if index >= lane.next_document:
                lane.pending += [*tokens, lm.tokenizer.eos_token_id]
                lane.next_document = index + 1
        parts = []
        for lane in lanes.values():
            parts.append(pack(lane.pending[:need], lm.tokenizer.bos_token_id, scale.context_length))
            del lane.pending[:need]
        yield before, torch.cat(parts)


def ahead(items: Iterable, depth: int = 2) -> Iterator:
    """The same items, made by a thread that works up to `depth` of them ahead of the reader."""
    made, done, stop = queue.Queue(depth), object(), threading.Event()

    def put(item: object) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=0.1)
                return

    def work() -> None:
        try:
            for item in items:
                put((item, None))
                if stop.is_set():
                    return
            put((done, None))
        except BaseException as error:
            put((done, error))

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while True:
            item, error = made.get()
            if error:
                raise error
            if item is done:
                return
            yield item
    finally:
        stop.set()
        worker.join(timeout=5)
