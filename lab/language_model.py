"""The one language model of a run: loaded, cut, read by hooks, and its cross-entropy."""

import hashlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from lab.compiled import compile_blocks
from lab.devices import device_kind, training_device
from lab.process import ExperimentError, first_line, quiet_transformers, require, say
from lab.scales import Scale
from lab.seeds import seed_for
from lab.smollm2 import smollm2_folder
from lab.storage import disjoint, file_sha256, versions

# Where families of models keep their blocks, and their final norm.
PLACES = ("layers", "h"), ("norm", "final_layer_norm", "ln_f")


class LanguageModel:
    """The one model of a run: it feeds training, answers SAE-Bench, and scores reconstructions.

    A Hugging Face causal model, cut after the last layer needed and read by hooks; the tail (later
    blocks, final norm, unembedding) only runs in cross_entropy().  Training and fidelity read it in
    bfloat16, SAE-Bench in the dtype that it notes down (reading_in()).
    The residual stream after block L is TransformerLens' blocks.L.hook_resid_post.
    """

    def __init__(
        self,
        model,
        tokenizer,
        name: str,
        layers: tuple[int, ...],
        identity: dict,
        load_in: Callable[[torch.dtype], "LanguageModel"] | None = None,
    ):
        """`model`, `tokenizer`: as transformers loads them; `identity`: what cached activations
        depend on; `load_in`: the same model again, in another dtype.  Raises ExperimentError if
        the model has no such layer."""
        self.model = model.eval().requires_grad_(False)
        base, self._names = self.model.base_model, check_structure(model, name)
        self.tokenizer, self.name, self.layers = tokenizer, name, tuple(layers)
        self.d_in, self.device, self.dtype = model.config.hidden_size, model.device, model.dtype
        self.identity = identity
        self.most_contexts = sys.maxsize  # of one forward: halved when memory runs out
        self.load_in = load_in
        self.others: dict[torch.dtype, LanguageModel] = {}  # as load_in() gave them

        self._blocks, self._norm = (getattr(base, found) for found in self._names)
        require(
            max(layers) < len(self._blocks),
            f"layer {max(layers)} does not exist: {name} has {len(self._blocks)} blocks, from 0 on",
        )
        self._seen: dict[int, torch.Tensor] = {}
        self._instead: dict[int, torch.Tensor] = {}
        for layer in self.layers:
            self._blocks[layer].register_forward_hook(partial(self._hook, layer))
        self._cut(True)

    @classmethod
    def load(
        cls, source: str | Path, name: str, layers: tuple[int, ...], dtype=torch.bfloat16
    ) -> "LanguageModel":
        """A model from a folder or from the hub, on the GPU where there is one.

        Raises ExperimentError for a model or a tokenizer that this program cannot read with.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
        from transformers.utils import cached_file

        with quiet_transformers():
            config = causal_config(source, name)
            # Soft-capped attention (Gemma-2) is silently dropped or refused by SDPA.
            capped = getattr(config, "attn_logit_softcapping", None) is not None
            model = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype,
                attn_implementation="eager" if capped else None,
                trust_remote_code=False,
            )
            # With BOS and padding at the end, as TransformerLens' tokenizers are: SAE-Bench
            # tokenises with this one.
            tokenizer = AutoTokenizer.from_pretrained(
                source, add_bos_token=True, padding_side="right", trust_remote_code=False
            )
        missing = [t for t in ("bos_token", "eos_token") if getattr(tokenizer, t) is None]
        require(
            not missing,
            f"the tokenizer of {name} has no {' and no '.join(missing)}: every context begins "
            "with BOS, and documents end with EOS; choose a model whose tokenizer has both",
        )
        require(
            isinstance(tokenizer, PreTrainedTokenizerFast),
            f"the tokenizer of {name} is not one of the tokenizers package (no tokenizer.json, and "
            "none could be made): convert it, or choose another model",
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        # Of a folder the sums of all that a model is read from, whatever its weights are called; of
        # a model on the hub its commit, which names its snapshot.
        kinds = (".safetensors", ".bin", ".pt", ".json", ".model", ".txt")
        files = sorted(p for p in Path(source).glob("*") if p.suffix in kinds and p.is_file())
        commit = Path(cached_file(source, "config.json")).parent.name
        identity = {
            "model": name,
            "files": {path.name: file_sha256(path) for path in files} or commit,
            "tokenizer": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
            "dtype": str(dtype),
            "device": device_kind(),
            "compiled": False,
        }
        identity = disjoint(identity, versions("torch", "transformers", "tokenizers"))
        again = partial(cls.load, source, name, layers)
        return cls(model.to(training_device()), tokenizer, name, layers, identity, again)

    def reading_in(self, dtype: torch.dtype) -> "LanguageModel":
        """The same model as it computes in `dtype`: this one, or one loaded beside it, once."""
        if dtype == self.dtype:
            return self
        if dtype not in self.others:
            other = self.others[dtype] = self.load_in(dtype)
            require(
                other.identity["files"] == self.identity["files"],
                f"{self.name} has changed while it was read: run the same command again",
            )
        return self.others[dtype]

    def compile(self, contexts: int, length: int) -> None:
        """Read batches of this shape with compiled blocks from here on, where they agree."""
        generator = torch.Generator().manual_seed(seed_for("compiled"))
        shape, words = (contexts, length), self.model.config.vocab_size
        tokens_BL = torch.randint(words, shape, generator=generator)
        tokens_BL[:, 0] = self.tokenizer.bos_token_id
        self.residuals(tokens_BL)  # where memory asks for it, fewer contexts go at a time from here
        tokens_BL = tokens_BL[: self.most_contexts]
        blocks = self._blocks[: max(self.layers) + 1]
        self.identity |= {"compiled": compile_blocks(blocks, self.residuals, tokens_BL)}

    def _hook(self, layer: int, module, args, output):
        """Note a block's output, or put another in its place."""
        self._seen[layer] = output[0] if isinstance(output, tuple) else output
        if layer not in self._instead:
            return None
        new = self._instead[layer].to(self.dtype)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _cut(self, cut: bool) -> None:
        base, (blocks, norm) = self.model.base_model, self._names
        setattr(base, blocks, self._blocks[: max(self.layers) + 1] if cut else self._blocks)
        setattr(base, norm, torch.nn.Identity() if cut else self._norm)

    @torch.no_grad()
    def residuals(self, tokens_BL: torch.Tensor) -> dict[int, torch.Tensor]:
        """Residual stream [B, L, D] after every layer of interest, in one forward pass, or in
        several smaller ones where the GPU's memory asks for it."""
        if len(tokens_BL) > self.most_contexts:
            parts = [self.residuals(part) for part in tokens_BL.split(self.most_contexts)]
            return {layer: torch.cat([part[layer] for part in parts]) for layer in self.layers}
        try:
            self.model.base_model(tokens_BL.to(self.device), use_cache=False)
            return dict(self._seen)
        except torch.OutOfMemoryError:
            if len(tokens_BL) == 1:
                raise
        finally:
            self._seen.clear()
        # Out of the except block: the exception would keep the failed pass in memory.
        self.most_contexts = len(tokens_BL) // 2
        say(f"GPU memory is full: the language model reads {self.most_contexts} contexts at a time")
        torch.cuda.empty_cache()
        return self.residuals(tokens_BL)

    @torch.no_grad()
    def cross_entropy(
        self, tokens_BL: torch.Tensor, instead: dict[int, torch.Tensor] | None = None
    ) -> float:
        """Mean next-token cross-entropy (nats) of the whole model; `instead` maps a layer to the
        residual stream [B, L, D] to put in place of its own."""
        tokens_BL = tokens_BL.to(self.device)
        self._instead = instead or {}
        self._cut(False)
        try:
            logits = self.model(tokens_BL, use_cache=False).logits[:, :-1]
        finally:
            self._instead = {}
            self._cut(True)
            self._seen.clear()
        targets = tokens_BL[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets).item()

    @torch.no_grad()
    def logits_of(self, rows_ND: torch.Tensor) -> torch.Tensor:
        """What directions of the residual stream [N, D] do to the logits [N, vocabulary] by
        themselves: each through the final norm and the unembedding, less what they make of 0."""
        nothing = torch.zeros_like(rows_ND[:1])
        rows = torch.cat([rows_ND, nothing]).to(self.device, self.dtype)
        normed = self._norm(rows)
        unembedding = self.model.get_output_embeddings().weight
        return torch.nn.functional.linear(normed[:-1] - normed[-1], unembedding).float()

    def is_special(self, tokens: torch.Tensor) -> torch.Tensor:
        """BOS, EOS and padding, of which some may be the same: not trained on, not scored."""
        t = self.tokenizer
        special = torch.tensor([t.bos_token_id, t.eos_token_id, t.pad_token_id])
        return torch.isin(tokens, special.to(tokens.device))


def causal_config(source: str | Path, name: str):
    """transformers' configuration of a model.  Raises ExperimentError for one that does not predict
    the next token."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except ValueError as error:  # of a kind that it does not know, or that brings its own code
        raise ExperimentError(
            f"{name} cannot be read without code of its own, and none from elsewhere is executed "
            f"here ({first_line(error)}): choose a model that transformers knows"
        ) from error
    require(
        type(config) in MODEL_FOR_CAUSAL_LM_MAPPING,
        f"{name} is a {type(config).__name__.removesuffix('Config')}, not a causal language model: "
        "choose one that transformers' AutoModelForCausalLM reads",
    )
    return config


def check_structure(model: torch.nn.Module, name: str) -> tuple[str, str]:
    """What a model calls its blocks and its final norm.  Raises ExperimentError if that, or its
    width, is not where it is known to be."""
    blocks, norm = (next(filter(partial(hasattr, model.base_model), names), "") for names in PLACES)
    require(
        bool(blocks and norm) and hasattr(model.config, "hidden_size"),
        f"{name} is a {type(model).__name__}, and where that keeps its blocks, its final norm or "
        "its width is not known here: choose a causal model that is built as Llama, Gemma-2, "
        "Qwen, GPT-NeoX or GPT-2 are",
    )
    return blocks, norm


def model_source(scale: Scale) -> tuple[str, str | Path]:
    """A scale's model: what it is called, and the folder it lies in or its id on the hub."""
    if scale.language_model == "pypi:smollm2":
        return "smollm2-135m-instruct", smollm2_folder()
    return Path(scale.language_model).name, scale.language_model


def load_language_model(scale: Scale, dtype=torch.bfloat16) -> LanguageModel:
    """The model of a scale.  Raises ExperimentError where scale and model do not fit together."""
    name, source = model_source(scale)
    lm = LanguageModel.load(source, name, scale.layers, dtype)
    longest = getattr(lm.model.config, "max_position_embeddings", None) or scale.context_length
    require(
        scale.context_length <= longest,
        f"context_length={scale.context_length} is more than {name} reads, {longest} tokens",
    )
    require(
        max(scale.k_values) <= lm.d_in,
        f"k_values={scale.k_values} asks for probes on more channels than {name} has, {lm.d_in}",
    )
    if scale.compiled:
        lm.compile(scale.lm_batch, scale.context_length)
    return lm
