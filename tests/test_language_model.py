"""LanguageModel computes what Hugging Face's whole model and TransformerLens' compute."""

import math
from pathlib import Path

import pytest
import tiny
import torch

import experiment
from experiment import ExperimentError, LanguageModel

LAYERS = (0, 2)


def tokens_for(model, rows: int = 3, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, model.config.vocab_size, (rows, length), generator=generator)


def whole(folder: Path):
    """The same model as Hugging Face loads it, in float32, in one piece."""
    from transformers import AutoModelForCausalLM

    with experiment.quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def neox(tmp_path_factory) -> Path:
    """A tiny random GPT-NeoX (Pythia's architecture) with our tokenizer."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    folder = tmp_path_factory.mktemp("models") / "tiny-neox"
    config = GPTNeoXConfig(
        vocab_size=len(tiny.make_tokenizer(folder)),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]), experiment.quiet_transformers():
        torch.manual_seed(0)
        GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(params=["llama", "neox"])
def folder(request) -> Path:
    return request.getfixturevalue("tiny_model" if request.param == "llama" else "neox")


@torch.no_grad()
def test_one_pass_gives_every_layers_residuals_as_the_whole_model_computes_them(folder):
    lm, model = LanguageModel(folder, "tiny", LAYERS, torch.float32), whole(folder)
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
    lm, model = LanguageModel(folder, "tiny", (3,), torch.float32), whole(folder)
    tokens, base = tokens_for(model), model.base_model
    seen: list[torch.Tensor] = []
    norm = base.norm if hasattr(base, "norm") else base.final_layer_norm
    norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    after = base(tokens).last_hidden_state
    torch.testing.assert_close(lm.residuals(tokens)[3], seen[0], rtol=1e-6, atol=1e-6)
    assert not torch.allclose(seen[0], after, atol=1e-3)


@torch.no_grad()
def test_cross_entropy_is_hugging_faces_own_loss_of_the_whole_model(folder):
    lm, model = LanguageModel(folder, "tiny", LAYERS, torch.float32), whole(folder)
    tokens = tokens_for(model)
    assert math.isclose(
        lm.cross_entropy(tokens), model(tokens, labels=tokens).loss.item(), rel_tol=1e-6
    )


def test_a_layers_own_residual_in_its_place_changes_nothing_and_zeros_do(folder):
    lm = LanguageModel(folder, "tiny", LAYERS, torch.float32)
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
    lm = LanguageModel(tiny_model, "tiny", (1,), torch.float32)
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
    lm = LanguageModel(folder, "tiny", (1,), torch.float32)
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
    LanguageModel(tiny_model, "tiny", (3,), torch.float32)
    with pytest.raises(ExperimentError, match="layer 4 does not exist: tiny has 4 blocks"):
        LanguageModel(tiny_model, "tiny", (1, 4), torch.float32)


def test_the_tokenizer_begins_every_text_with_one_bos_as_sae_bench_expects(tiny_model):
    tokenizer = LanguageModel(tiny_model, "tiny", (1,), torch.float32).tokenizer
    ids = tokenizer(["\n cat has the first letter:", "x"], padding=True).input_ids
    assert [row[0] for row in ids] == [tokenizer.bos_token_id] * 2
    assert [row.count(tokenizer.bos_token_id) for row in ids] == [1, 1]


def hooked_llama(folder: Path):
    """TransformerLens' model of the same Llama weights, put together by hand, unprocessed."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    model = whole(folder)
    c, weights = model.config, model.state_dict()
    d_head = c.hidden_size // c.num_attention_heads
    hooked = HookedTransformer(
        HookedTransformerConfig(
            n_layers=c.num_hidden_layers,
            d_model=c.hidden_size,
            d_head=d_head,
            n_heads=c.num_attention_heads,
            n_key_value_heads=c.num_key_value_heads,
            d_mlp=c.intermediate_size,
            d_vocab=c.vocab_size,
            n_ctx=c.max_position_embeddings,
            act_fn="silu",
            gated_mlp=True,
            final_rms=True,
            normalization_type="RMS",
            eps=c.rms_norm_eps,
            positional_embedding_type="rotary",
            rotary_dim=d_head,
            rotary_base=c.rope_parameters["rope_theta"],
            rotary_adjacent_pairs=False,
            dtype=torch.float32,
            device="cpu",
        )
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


@torch.no_grad()
def test_residuals_equal_transformer_lens_resid_post_for_grouped_query_attention(tiny_model):
    lm, hooked = LanguageModel(tiny_model, "tiny", LAYERS, torch.float32), hooked_llama(tiny_model)
    assert hooked.cfg.n_key_value_heads == 2 < hooked.cfg.n_heads == 4
    tokens = tokens_for(lm.model)
    logits, cache = hooked.run_with_cache(tokens)
    for layer, found in lm.residuals(tokens).items():
        theirs = cache[f"blocks.{layer}.hook_resid_post"]
        assert ((found - theirs).norm() / theirs.norm()).item() < 1e-5
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert math.isclose(lm.cross_entropy(tokens), loss.item(), rel_tol=1e-5)


@torch.no_grad()
def test_the_stand_in_answers_sae_bench_as_a_real_hooked_transformer_does(tiny_model):
    """The three ways SAE-Bench asks: prompts, tokens with padding at the end, hooks."""
    from transformer_lens import HookedTransformer

    lm, hooked = LanguageModel(tiny_model, "tiny", LAYERS, torch.float32), hooked_llama(tiny_model)
    stand_in = experiment.as_hooked_transformer(lm, torch.float32)
    assert isinstance(stand_in, HookedTransformer)
    prompts = [" the film has the first letter:", " a news: good"]
    tokens = stand_in.to_tokens(prompts)
    assert tokens.tolist() == lm.tokenizer(prompts, padding=True).input_ids
    pad = lm.tokenizer.pad_token_id
    padded = torch.nn.functional.pad(tokens, (0, 3), value=pad)
    real = tokens != pad
    name = "blocks.2.hook_resid_post"
    theirs = hooked.run_with_cache(padded)[1][name][:, : tokens.shape[1]][real]

    hooks: list[torch.Tensor] = []
    stand_in.run_with_hooks(padded, fwd_hooks=[(name, lambda acts, hook: hooks.append(acts))])
    for acts in (
        stand_in.run_with_cache(prompts, names_filter=[name])[1][name],
        stand_in.run_with_cache(padded)[1][name],
        hooks[0],
    ):
        ours = acts[:, : tokens.shape[1]][real]
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-5
    assert hooks[0].shape[:2] == padded.shape
