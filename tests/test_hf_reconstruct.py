"""KVzip's scores of a context against the attention weights that eager attention returns."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from kvevict.hf.reconstruct import LEAD, repeat_scores

S, CHUNK = 50, 24


def tiny(kind="Llama", **options):
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    config = getattr(transformers, f"{kind}Config")(num_key_value_heads=2, head_dim=16, **(sizes | options))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # attention that is not nearly even
        for parameter in model.parameters():
            parameter.mul_(15.0 if parameter.ndim == 2 else 1.0)
    return model


def ids(B, count, seed=0):
    return torch.randint(0, 60, (B, count), generator=torch.Generator().manual_seed(seed))


def dense(model, context, prompt, chunk):
    """[B, H, S] of each layer: the whole S × S weights of the context, the prompt and each piece, read at once."""
    model.set_attn_implementation("eager")
    best = None
    for start in range(0, S, chunk):
        piece = context[:, max(start - LEAD, 0) : start + chunk]
        text = torch.cat([context, prompt.expand(len(context), -1), piece], 1)
        with torch.no_grad():
            weights = model(text, output_attentions=True, use_cache=False).attentions
        drawn = [w[:, :, S:, :S].amax(2).unflatten(1, (2, 2)).amax(2) for w in weights]
        best = drawn if best is None else [torch.maximum(a, b) for a, b in zip(best, drawn, strict=True)]
    model.set_attn_implementation("sdpa")
    return best


@pytest.mark.parametrize("chunk", [S, CHUNK])
@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_scores_are_the_largest_weights_of_the_repetition(kind, chunk, monkeypatch):
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")  # the ops' kernels are tested elsewhere
    model, context, prompt = tiny(kind), ids(2, S), ids(1, 5, seed=1)[0]
    found = repeat_scores(model, context, prompt, chunk=chunk)
    assert model.config._attn_implementation == "sdpa"
    assert [tuple(scores.shape) for scores in found] == [(2, 2, S)] * 2
    for scores, expected in zip(found, dense(model, context, prompt, chunk), strict=True):
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-6)
        assert expected.amax() > 2 * expected.amin()  # there is something to tell apart


def test_layers_with_a_window_are_left_out_and_learned_sinks_take_their_part(monkeypatch):
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    model = tiny("GptOss", num_local_experts=2, num_experts_per_tok=1, sliding_window=8,
                 layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    with torch.no_grad():
        model.model.layers[1].self_attn.sinks.copy_(torch.tensor([2.0, 0.0, 4.0, 6.0]))
    context, prompt = ids(1, S), ids(1, 5, seed=1)[0]
    (scores,) = repeat_scores(model, context, prompt)
    with torch.no_grad():
        text = torch.cat([context, prompt[None], context], 1)
        weights = model(text, output_attentions=True, use_cache=False).attentions[1]
    torch.testing.assert_close(scores, weights[:, :, S:, :S].amax(2).unflatten(1, (2, 2)).amax(2), rtol=1e-4, atol=1e-6)


def test_what_is_not_served_is_refused(monkeypatch):
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    model, context, prompt = tiny(), ids(1, S), ids(1, 5)[0]
    for arguments, match in [
        ((context[0], prompt), "input_ids has shape"), ((context, prompt[None]), "prompt_ids has shape"),
        ((context.float(), prompt), "input_ids has dtype"),
    ]:  # fmt: skip
        with pytest.raises((TypeError, ValueError), match=match):
            repeat_scores(model, *arguments)
    with pytest.raises(ValueError, match="chunk is 0"):
        repeat_scores(model, context, prompt, chunk=0)
    capped = tiny("Gemma2", attn_logit_softcapping=50.0, query_pre_attn_scalar=16)
    with pytest.raises(ValueError, match="Gemma2ForCausalLM computes attention in a way of its own"):
        repeat_scores(capped, context, prompt)


@pytest.mark.skipif(not hasattr(transformers, "Gemma4TextConfig"), reason="older versions have other layers")
def test_latents_and_layers_of_other_kinds_are_refused(monkeypatch):
    """What attends over latents attends over keys that are made of what is cached."""
    monkeypatch.setenv("KVEVICT_BACKEND", "reference")
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16,
                 v_head_dim=16, first_k_dense_replace=8)  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(transformers.DeepseekV3Config(**sizes)).eval()
    with pytest.raises(ValueError, match="does not attend over what layer 0 caches: expected a model without MLA"):
        repeat_scores(model, ids(1, S), ids(1, 5)[0])
    assert model.config._attn_implementation == "sdpa"
    hybrid = tiny("FalconH1", mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8)
    with pytest.raises(ValueError, match="FalconH1ForCausalLM has layers of the kind LinearAttention"):
        repeat_scores(hybrid, ids(1, S), ids(1, 5)[0])
