"""LanguageModel computes what Hugging Face's whole model and TransformerLens' compute."""

import json
import math
import shutil
from pathlib import Path

import pytest
import tiny
import torch

import lab.language_model
from lab.devices import device_kind
from lab.language_model import LanguageModel, load_language_model
from lab.process import ExperimentError, quiet_transformers
from lab.storage import file_sha256

LAYERS = (0, 2)


def load(folder: Path, layers: tuple[int, ...], dtype=torch.float32) -> LanguageModel:
    return LanguageModel.load(folder, "tiny", layers, dtype)


def tokens_for(model, rows: int = 3, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, model.config.vocab_size, (rows, length), generator=generator)


def whole(folder: Path):
    """The same model as Hugging Face loads it, in float32, in one piece and written out."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()


@pytest.fixture(scope="module")
def neox(tmp_path_factory) -> Path:
    """A tiny random GPT-NeoX with Pythia's tokenizer's ways: one special token, none put before a
    text, none for padding, and padding on the left."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny-neox"
    names = ["<|endoftext|>", *(f"w{i}" for i in range(300))]
    words = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, padding_side="left", **special
    ).save_pretrained(folder)
    config = GPTNeoXConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config)
        for weight in model.parameters():  # biases start at 0, norms at 1
            weight.data += 0.1 * torch.randn(weight.shape) * (weight.dim() == 1)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Path:
    """A tiny random Gemma-2 in which everything that is odd about Gemma-2 matters.

    Attention scores come well above their cap, windows are shorter than the texts, and a head is
    wider than its share of the residual stream.
    """
    from transformers import Gemma2Config, Gemma2ForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-gemma"
    config = Gemma2Config(
        vocab_size=len(tiny.make_tokenizer(folder)),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=8,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=3.0,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config)
        for name, weight in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                weight.data *= 12
            elif "norm" in name:  # 0 at the start, which stands for 1
                weight.data += 0.3 * torch.randn(weight.shape)
        model.model.embed_tokens.weight.data *= 6  # tied to the unembedding
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """A tiny random GPT-2: its blocks are called h and its norm ln_f, positions are learned."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("models") / "tiny-gpt2"
    size = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 64}
    config = GPT2Config(vocab_size=len(tiny.make_tokenizer(folder)), **size)
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
        for weight in model.parameters():  # biases start at 0, norms at 1
            weight.data += 0.1 * torch.randn(weight.shape) * (weight.dim() == 1)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "neox", "gemma", "gpt2"])
def folder(request) -> Path:
    name = {"llama": "tiny_model"}.get(request.param, request.param)
    return request.getfixturevalue(name)


@torch.no_grad()
def test_one_pass_gives_every_layers_residuals_as_the_whole_model_computes_them(folder):
    lm, model = load(folder, LAYERS), whole(folder)
    tokens = tokens_for(model)
    hidden = model(tokens, output_hidden_states=True).hidden_states
    found = lm.residuals(tokens)
    assert set(found) == set(LAYERS)
    for layer in LAYERS:
        # hidden_states[0] is the embedding, so block 0's output is hidden_states[1].
        torch.testing.assert_close(found[layer], hidden[layer + 1], rtol=1e-6, atol=1e-6)
        assert not torch.allclose(found[layer], hidden[layer], atol=1e-3)


@torch.no_grad()
def test_the_last_blocks_residual_stream_is_read_before_the_final_norm(folder):
    lm, model = load(folder, (3,)), whole(folder)
    tokens, base = tokens_for(model), model.base_model
    seen: list[torch.Tensor] = []
    names = {"neox": "final_layer_norm", "gpt2": "ln_f"}
    norm = getattr(base, names.get(folder.name.removeprefix("tiny-"), "norm"))
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    after = base(tokens).last_hidden_state
    torch.testing.assert_close(lm.residuals(tokens)[3], seen[0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(seen[0], after, atol=1e-3)


@torch.no_grad()
def test_cross_entropy_is_hugging_faces_own_loss_of_the_whole_model(folder):
    lm, model = load(folder, LAYERS), whole(folder)
    tokens = tokens_for(model)
    assert math.isclose(
        lm.cross_entropy(tokens), model(tokens, labels=tokens).loss.item(), rel_tol=1e-6
    )


def test_a_layers_own_residual_in_its_place_changes_nothing_and_zeros_do(folder):
    lm = load(folder, LAYERS)
    tokens = tokens_for(lm.model)
    own, residuals = lm.cross_entropy(tokens), lm.residuals(tokens)
    for layer in LAYERS:
        x = residuals[layer].clone()
        assert lm.cross_entropy(tokens, {layer: x}) == own
        assert abs(lm.cross_entropy(tokens, {layer: torch.zeros_like(x)}) - own) > 1e-3
        for other, again in lm.residuals(tokens).items():  # nothing of it stays behind
            assert again.equal(residuals[other])
    assert lm.cross_entropy(tokens) == own


@torch.no_grad()
def test_zeros_in_the_place_of_a_residual_stream_raise_the_cross_entropy(tiny_model):
    """On a model that has learned something: its own text, by a few steps of gradient descent."""
    lm = load(tiny_model, (1,))
    tokens = tokens_for(lm.model, rows=4)
    head = lm.model.lm_head.weight
    optimizer = torch.optim.Adam([head.requires_grad_()], lr=1e-2)
    lm._cut(False)
    with torch.enable_grad():
        for _ in range(30):
            optimizer.zero_grad()
            lm.model(tokens, labels=tokens).loss.backward()
            optimizer.step()
    lm._cut(True)
    zeros = torch.zeros(*tokens.shape, lm.d_in)
    assert lm.cross_entropy(tokens, {1: zeros}) > lm.cross_entropy(tokens) + 1


def test_the_model_is_cut_again_after_cross_entropy_even_if_it_fails(folder):
    lm = load(folder, (1,))
    tokens = tokens_for(lm.model)
    before = lm.residuals(tokens)[1].clone()
    run = []
    for block in lm._blocks:
        block.register_forward_hook(lambda *_: run.append(None))

    lm.cross_entropy(tokens)
    assert len(run) == 4  # the whole model
    with pytest.raises(RuntimeError):
        lm.cross_entropy(tokens, {1: torch.zeros(*tokens.shape, 7)})  # not its width
    run.clear()
    torch.testing.assert_close(lm.residuals(tokens)[1], before, rtol=0, atol=0)
    assert len(run) == 2, "blocks 0 and 1 only"


def test_a_layer_the_model_does_not_have_is_an_experiment_error(tiny_model):
    load(tiny_model, (3,))
    with pytest.raises(ExperimentError, match="layer 4 does not exist: tiny has 4 blocks"):
        load(tiny_model, (1, 4))


def test_the_tokenizer_begins_every_text_with_one_bos_and_pads_at_the_end(folder):
    """As TransformerLens' do, whatever the saved one does: SAE-Bench counts on both."""
    tokenizer = load(folder, (1,)).tokenizer
    long, short = tokenizer(["w1 w2 w3", "w4"], padding=True).input_ids
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    assert None not in (bos, pad, tokenizer.eos_token_id)
    assert long[0] == short[0] == bos
    padding = len(long) - len(tokenizer("w4").input_ids)
    assert padding > 0
    assert short[-padding:] == [pad] * padding
    assert long.count(bos) == short[:-padding].count(bos) == 1
    assert bos not in tokenizer("w1 w2 w3", add_special_tokens=False).input_ids


def test_a_tokenizer_without_a_padding_token_pads_with_its_eos_which_is_never_trained_on(neox):
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(neox)
    assert saved.pad_token is None
    assert saved.padding_side == "left"
    assert saved("w4").input_ids == [5], "nothing before the text"
    lm = load(neox, (1,))
    tokens = lm.tokenizer(["w1 w2", "w4"], padding=True, return_tensors="pt").input_ids
    assert tokens.tolist() == [[0, 2, 3], [0, 5, 0]]
    assert lm.is_special(tokens).tolist() == [[True, False, False], [True, False, True]]


# ── Models that cannot be read with ─────────────────────────────────────────────────────────────


def changed(folder: Path, to: Path, file: str, **values) -> Path:
    """A copy of a model's folder with other values in one of its JSON files."""
    shutil.copytree(folder, to)
    held = json.loads((to / file).read_text())
    (to / file).write_text(json.dumps(held | values))
    return to


@pytest.mark.parametrize("token", ["bos_token", "eos_token"])
def test_a_tokenizer_without_bos_or_eos_is_refused_at_loading(tiny_model, tmp_path, token):
    folder = changed(tiny_model, tmp_path / "m", "tokenizer_config.json", **{token: None})
    with pytest.raises(ExperimentError, match=f"tokenizer of tiny has no {token}: every context"):
        load(folder, (1,))


def test_a_model_that_does_not_predict_the_next_token_is_refused_at_loading(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 8}))
    with pytest.raises(ExperimentError, match="tiny is a T5, not a causal language model"):
        load(tmp_path, (1,))


def test_a_model_whose_blocks_are_not_found_is_refused_at_loading(tmp_path):
    from transformers import XLMConfig, XLMWithLMHeadModel

    folder = tmp_path / "xlm"
    vocabulary = len(tiny.make_tokenizer(folder))
    config = XLMConfig(vocab_size=vocabulary, emb_dim=16, n_layers=1, n_heads=2, causal=True)
    with quiet_transformers():
        XLMWithLMHeadModel(config).save_pretrained(folder)
    with pytest.raises(ExperimentError, match="XLMWithLMHeadModel, and where that keeps its bl"):
        load(folder, (0,))


def test_a_scale_that_a_model_cannot_read_is_refused_at_loading(tiny_model):
    scale = tiny.tiny_scale(tiny_model, context_length=257)
    with pytest.raises(ExperimentError, match=r"context_length=257 is more than .* reads, 256"):
        load_language_model(scale)
    scale = tiny.tiny_scale(tiny_model, k_values=(1, 65))
    with pytest.raises(ExperimentError, match=r"more channels than .* has, 64"):
        load_language_model(scale)


@torch.no_grad()
def test_the_same_model_in_another_dtype_is_loaded_once(tiny_model):
    lm = load(tiny_model, (1,), torch.bfloat16)
    assert lm.reading_in(torch.bfloat16) is lm
    exact = lm.reading_in(torch.float32)
    assert exact is lm.reading_in(torch.float32)
    tokens = tokens_for(lm.model)
    assert torch.equal(exact.residuals(tokens)[1], load(tiny_model, (1,)).residuals(tokens)[1])
    differ = {name for name in lm.identity if exact.identity[name] != lm.identity[name]}
    assert differ == {"dtype"}


# ── Memory ──────────────────────────────────────────────────────────────────────────────────────


def out_of_memory_above(contexts: int, lm: LanguageModel) -> list[int]:
    """The GPU holds no more than so many contexts from now on; returns the sizes that are tried."""
    tried: list[int] = []

    def check(module, arguments):
        tried.append(len(arguments[0]))
        if len(arguments[0]) > contexts:
            raise torch.OutOfMemoryError("CUDA out of memory")

    lm.model.base_model.register_forward_pre_hook(check)
    return tried


def test_a_batch_that_fills_the_memory_is_read_in_halves_with_the_same_result(tiny_model, capsys):
    lm = load(tiny_model, LAYERS)
    tokens = tokens_for(lm.model, rows=11)
    whole_batch = lm.residuals(tokens)
    tried = out_of_memory_above(3, lm)
    found = lm.residuals(tokens)
    # 11 are halved to 5, 5 and 1, and when the first 5 fail each of them to 2, 2 and 1.
    assert tried == [11, 5, 2, 2, 1, 2, 2, 1, 1]
    for layer in LAYERS:
        torch.testing.assert_close(found[layer], whole_batch[layer], rtol=1e-5, atol=1e-5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" reads ")[1] for line in lines] == [
        f"{n} contexts at a time" for n in (5, 2)
    ]
    assert all(line.startswith("GPU memory is full") for line in lines)
    tried.clear()
    lm.residuals(tokens[:4])
    assert (tried, capsys.readouterr().out) == ([2, 2], ""), "what fits is remembered"


def test_one_context_that_does_not_fit_is_an_error_and_nothing_stays_behind(tiny_model, capsys):
    lm = load(tiny_model, LAYERS)
    out_of_memory_above(0, lm)
    with pytest.raises(torch.OutOfMemoryError):
        lm.residuals(tokens_for(lm.model, rows=4))
    assert lm._seen == {}
    assert capsys.readouterr().out.count("GPU memory is full") == 2  # 4, 2, and 1 is the end


# ── TransformerLens ─────────────────────────────────────────────────────────────────────────────


def hooked_as(model, **how):
    """An empty HookedTransformer of a model's sizes; `how`: what its family does in its own way."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    c = model.config
    sizes = {
        "n_layers": c.num_hidden_layers,
        "d_model": c.hidden_size,
        "d_head": c.hidden_size // c.num_attention_heads,
        "n_heads": c.num_attention_heads,
        "d_vocab": c.vocab_size,
        "n_ctx": c.max_position_embeddings,
        "dtype": torch.float32,
        "device": "cpu",
    }
    return HookedTransformer(HookedTransformerConfig(**sizes | how))


def hooked_llama(folder: Path):
    """TransformerLens' model of the same Llama weights, put together by hand, unprocessed."""
    model = whole(folder)
    c, weights = model.config, model.state_dict()
    d_head = c.hidden_size // c.num_attention_heads
    hooked = hooked_as(
        model,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        act_fn="silu",
        gated_mlp=True,
        final_rms=True,
        normalization_type="RMS",
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=d_head,
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
    )

    def heads(weight: torch.Tensor) -> torch.Tensor:  # [n d_head, d_model] -> [n, d_model, d_head]
        return weight.reshape(-1, d_head, c.hidden_size).transpose(1, 2)

    state = {
        "embed.W_E": weights["model.embed_tokens.weight"],
        "unembed.W_U": weights["lm_head.weight"].T,
        "ln_final.w": weights["model.norm.weight"],
    }
    for i in range(c.num_hidden_layers):
        theirs = {
            name.removeprefix(f"model.layers.{i}."): w
            for name, w in weights.items()
            if name.startswith(f"model.layers.{i}.")
        }
        out = theirs["self_attn.o_proj.weight"].T  # [n d_head, d_model]
        ours = {
            "ln1.w": theirs["input_layernorm.weight"],
            "ln2.w": theirs["post_attention_layernorm.weight"],
            "attn.W_Q": heads(theirs["self_attn.q_proj.weight"]),
            "attn._W_K": heads(theirs["self_attn.k_proj.weight"]),
            "attn._W_V": heads(theirs["self_attn.v_proj.weight"]),
            "attn.W_O": out.reshape(-1, d_head, c.hidden_size),
            "mlp.W_gate": theirs["mlp.gate_proj.weight"].T,
            "mlp.W_in": theirs["mlp.up_proj.weight"].T,
            "mlp.W_out": theirs["mlp.down_proj.weight"].T,
        }
        state |= {f"blocks.{i}.{name}": w for name, w in ours.items()}
    missing, unexpected = hooked.load_state_dict(state, strict=False)
    assert not unexpected
    # What Llama does not have: biases (zeros here) and TransformerLens' own buffers.
    parameters = dict(hooked.named_parameters())
    assert not any(parameters[name].any() for name in missing if name in parameters)
    return hooked


def hooked_neox(folder: Path):
    """TransformerLens' model of the same GPT-NeoX weights, unprocessed."""
    from transformer_lens.pretrained.weight_conversions.neox import convert_neox_weights

    model = whole(folder)
    c = model.config
    hooked = hooked_as(
        model,
        d_mlp=c.intermediate_size,
        act_fn="gelu",
        normalization_type="LN",
        eps=c.layer_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=int(
            c.rope_parameters["partial_rotary_factor"] * (c.hidden_size // c.num_attention_heads)
        ),
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        parallel_attn_mlp=c.use_parallel_residual,
    )
    load_all(hooked, convert_neox_weights(model, hooked.cfg))
    return hooked


def hooked_gemma(folder: Path):
    """TransformerLens' model of the same Gemma-2 weights, unprocessed."""
    from transformer_lens.pretrained.weight_conversions.gemma import convert_gemma_weights

    model = whole(folder)
    c = model.config
    hooked = hooked_as(
        model,
        d_head=c.head_dim,
        n_key_value_heads=c.num_key_value_heads,
        d_mlp=c.intermediate_size,
        act_fn="gelu_pytorch_tanh",
        gated_mlp=True,
        final_rms=True,
        normalization_type="RMS",
        eps=c.rms_norm_eps,
        positional_embedding_type="rotary",
        rotary_dim=c.head_dim,
        rotary_base=c.rope_parameters["rope_theta"],
        rotary_adjacent_pairs=False,
        use_attn_scale=True,
        attn_scale=c.query_pre_attn_scalar**0.5,
        use_local_attn=True,
        window_size=c.sliding_window,
        attn_types=["local", "global"] * (c.num_hidden_layers // 2),
        attn_scores_soft_cap=c.attn_logit_softcapping,
        output_logits_soft_cap=c.final_logit_softcapping,
        use_normalization_before_and_after=True,
    )
    load_all(hooked, convert_gemma_weights(model, hooked.cfg))
    return hooked


def hooked_gpt2(folder: Path):
    """TransformerLens' model of the same GPT-2 weights, unprocessed."""
    from transformer_lens.pretrained.weight_conversions.gpt2 import convert_gpt2_weights

    model = whole(folder)
    c = model.config
    hooked = hooked_as(
        model,
        d_mlp=4 * c.hidden_size,
        act_fn="gelu_new",
        normalization_type="LN",
        eps=c.layer_norm_epsilon,
    )
    no_bias = {"unembed.b_U": torch.zeros(c.vocab_size)}
    load_all(hooked, convert_gpt2_weights(model, hooked.cfg) | no_bias)
    return hooked


def load_all(hooked, state: dict[str, torch.Tensor]) -> None:
    """Load weights, after checking that TransformerLens' own buffers are all that is missing."""
    missing, unexpected = hooked.load_state_dict(state, strict=False)
    assert not unexpected
    assert not set(missing) & set(dict(hooked.named_parameters()))


HOOKED = {
    "tiny_model": hooked_llama,
    "neox": hooked_neox,
    "gemma": hooked_gemma,
    "gpt2": hooked_gpt2,
}


@torch.no_grad()
@pytest.mark.parametrize("name", HOOKED)
def test_one_pass_gives_transformer_lens_resid_post_at_three_layers(name, request):
    """Of grouped queries, of parallel blocks, and of all that is odd about Gemma-2."""
    folder = request.getfixturevalue(name)
    lm, hooked = load(folder, (0, 1, 3)), HOOKED[name](folder)
    tokens, passes = tokens_for(lm.model), []
    logits, cache = hooked.run_with_cache(tokens)
    lm.model.base_model.register_forward_hook(lambda *_: passes.append(None))
    residuals = lm.residuals(tokens)
    assert len(passes) == 1
    for layer in (0, 1, 3):
        theirs = cache[f"blocks.{layer}.hook_resid_post"]
        assert ((residuals[layer] - theirs).norm() / theirs.norm()).item() < 1e-5
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert math.isclose(lm.cross_entropy(tokens), loss.item(), rel_tol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        {"attn_logit_softcapping": 1e6},
        {"sliding_window": 64},
        {"query_pre_attn_scalar": 16},
        {"final_logit_softcapping": 1e6},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_is_odd_about_gemma_is_really_in_effect(gemma, tmp_path, changes):
    """The comparisons above would be empty on a model where it makes no difference."""
    folder = shutil.copytree(gemma, tmp_path / "changed")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    lm, other = load(gemma, (2,)), load(folder, (2,))
    tokens = tokens_for(lm.model)
    if "final_logit_softcapping" in changes:  # comes after the residual stream
        assert abs(lm.cross_entropy(tokens) - other.cross_entropy(tokens)) > 0.01
        return
    own, theirs = (model.residuals(tokens)[2] for model in (lm, other))
    assert ((own - theirs).norm() / own.norm()).item() > 0.01


# ── What cached activations depend on ───────────────────────────────────────────────────────────


def test_the_identity_of_a_model_names_its_weights_tokenizer_dtype_and_device(tiny_model, tmp_path):
    before = load(tiny_model, (1,)).identity
    assert before["device"] == device_kind()
    for name in ("model.safetensors", "config.json"):
        assert before["files"][name] == file_sha256(tiny_model / name)
    assert load(tiny_model, (0, 2)).identity == before, "layers are named where they matter"
    assert load(tiny_model, (1,), torch.bfloat16).identity != before
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lab.language_model, "device_kind", lambda: "cpu of another kind")
        elsewhere = load(tiny_model, (1,)).identity
    assert {name for name in before if elsewhere[name] != before[name]} == {"device"}
    folder = shutil.copytree(tiny_model, tmp_path / "changed")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[-2:]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    changed = load(folder, (1,)).identity
    differ = {name for name in before if changed[name] != before[name]}
    assert differ == {"tokenizer", "files"}
    assert changed["files"]["model.safetensors"] == before["files"]["model.safetensors"]
