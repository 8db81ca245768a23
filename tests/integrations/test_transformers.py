"""Models of transformers with ``attn_implementation="sparsetile"``, on tiny random weights."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    BertConfig,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    Qwen2Config,
    Qwen3Config,
    StaticCache,
    Trainer,
    TrainingArguments,
)

from sparsetile import Causal, Documents, Global, Local, sparse_attention  # noqa: E402
from sparsetile.errors import ArgumentError, PatternError  # noqa: E402
from sparsetile.integrations.transformers import use  # noqa: E402

transformers.utils.logging.set_verbosity_error()

VOCABULARY, LAYERS, HEADS = 97, 2, 4
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 1024,
}
GROUPED = {**SMALL, "num_key_value_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODERS = {
    "llama": LlamaConfig(**GROUPED),
    "qwen2": Qwen2Config(**GROUPED),
    "qwen3": Qwen3Config(**GROUPED, head_dim=16),
    "mistral": MistralConfig(**GROUPED, sliding_window=50),
    "gemma3": Gemma3TextConfig(
        **GROUPED, head_dim=16, sliding_window=40, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": GptOssConfig(
        **GROUPED, head_dim=16, sliding_window=32, num_local_experts=2, num_experts_per_tok=1
    ),
}
ENCODERS = {
    "bert": BertConfig(**SMALL),
    "modernbert": ModernBertConfig(
        **{**SMALL, "num_hidden_layers": 3},
        local_attention=64,
        global_attn_every_n_layers=2,
        cls_token_id=1,
        sep_token_id=2,
        **TOKENS,
    ),
}
SPARSE = "Local(40, 0) | Global(9, rows=False)"


def made(name):
    """A model with dense attention."""
    torch.manual_seed(0)
    decoder = name in DECODERS
    # transformers has no sinks in its SDPA path.
    dense = "eager" if name == "gpt_oss" else "sdpa"
    auto = AutoModelForCausalLM if decoder else AutoModelForMaskedLM
    config = type((DECODERS | ENCODERS)[name]).from_dict((DECODERS | ENCODERS)[name].to_dict())
    model = auto.from_config(config, attn_implementation=dense).eval()
    for name_, parameter in model.named_parameters():
        # Larger than the defaults, such that attention is not uniform.
        if "norm" not in name_.lower() and parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        if "sinks" in name_:
            torch.nn.init.normal_(parameter)
    return model


def tokens(batch=2, length=150):
    return torch.randint(3, VOCABULARY, (batch, length))


def logits(model, x, **given):
    with torch.no_grad():
        return model(input_ids=x, **given).logits


def masks(length):
    """Padding of each kind, and some in the middle."""
    left, right, middle = (torch.ones(2, length, dtype=torch.long) for _ in range(3))
    left[0, : length // 3], right[1, -length // 4 :] = 0, 0
    middle[1, 30:50], middle[0, :7] = 0, 0
    return {"left": left, "right": right, "middle": middle}


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_with_every_key_kept_logits_are_the_dense_ones(name):
    model, x = made(name), tokens()
    runs = {"plain": {}} | {kind: {"attention_mask": mask} for kind, mask in masks(150).items()}
    if name in DECODERS:
        packed = torch.cat([torch.arange(n) for n in (40, 81, 29)]).expand(2, -1)
        runs["packed"] = {"position_ids": packed, "use_cache": False}
    dense = {kind: logits(model, x, **given) for kind, given in runs.items()}
    use(model, pattern="Full()")
    for kind, given in runs.items():
        real = given.get("attention_mask", torch.ones_like(x)).bool()
        difference = (logits(model, x, **given) - dense[kind])[real].abs().max()
        assert difference < 5e-5 * dense[kind].abs().max(), (kind, difference)


@pytest.mark.parametrize("name", list(DECODERS))
def test_a_padded_batch_and_a_packed_one_are_the_sequences_alone(name):
    model = use(made(name), pattern=SPARSE, block_size=16)
    long, short = tokens(1, 140), tokens(1, 83)
    alone = [logits(model, long)[0], logits(model, short)[0]]
    for side in ("left", "right"):
        space = slice(0, 57) if side == "left" else slice(83, 140)
        own = slice(57, 140) if side == "left" else slice(0, 83)
        x, mask = torch.cat((long, torch.zeros_like(long))), torch.ones(2, 140, dtype=torch.long)
        x[1, own], mask[1, space] = short[0], 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        both = logits(model, x, attention_mask=mask, position_ids=positions)
        torch.testing.assert_close(both[0], alone[0], rtol=0, atol=2e-5)
        torch.testing.assert_close(both[1, own], alone[1], rtol=0, atol=2e-5)
    if name == "gpt_oss":
        return  # its model does not tell the masks of positions, with any attention
    positions = torch.cat((torch.arange(140), torch.arange(83)))[None]
    packed = logits(model, torch.cat((long, short), 1), position_ids=positions, use_cache=False)[0]
    torch.testing.assert_close(packed, torch.cat(alone), rtol=0, atol=2e-5)


def test_the_pattern_acts_on_top_of_the_models_own_mask():
    model, x = made("mistral"), tokens(1, 120)
    use(model, pattern="Local(20, 0)", block_size=16)
    narrow = logits(model, x)
    model.config.sparsetile = {"pattern": "Local(90, 0)", "block_size": 16}
    wide = logits(model, x)  # the model's own window of 50 bounds it
    model.config.sparsetile = {"pattern": "Full()", "block_size": 16}
    torch.testing.assert_close(wide, logits(model, x), rtol=0, atol=2e-5)
    assert (wide - narrow).abs().max() > 1e-2


def test_layers_and_heads_have_patterns_of_their_own(monkeypatch):
    from sparsetile.integrations import transformers as integration

    seen = []
    monkeypatch.setattr(
        integration,
        "sparse_attention",
        lambda q, k, v, layout, **given: (seen.append(layout), sparse_attention(q, k, v, layout, **given))[1],
    )
    model, x = made("llama"), tokens(1, 96)
    heads = ["Full()", "Local(5, 0)", {"pattern": "local_window", "density": 0.5}, "Local(30, 0) | Global(3)"]
    use(model, pattern="Local(11, 0)", layers={"1": {"heads": heads}}, block_size=16)
    logits(model, x)
    first, second = seen
    assert first.heads == 1 and second.heads == HEADS
    position = torch.arange(96)
    for layout, head, pattern in (
        (first, 0, Local(11, 0)),
        (second, 1, Local(5, 0)),
        (second, 3, Local(30, 0) | Global(3)),
    ):
        expected = (pattern & Causal()).allows(position[:, None], position)
        assert torch.equal(layout.to_dense(head), expected)
    assert torch.equal(second.to_dense(0), torch.ones(96, 96).tril().bool())
    counts = second.row_counts().view(HEADS, 6)[2].tolist()
    assert counts == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("name", list(DECODERS))
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_each_cached_step_is_the_row_of_one_call(name, cache):
    model = use(made(name), pattern=SPARSE, block_size=16)
    x, mask = tokens(2, 100), torch.ones(2, 100, dtype=torch.long)
    mask[1, :33] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    whole = logits(model, x, attention_mask=mask, position_ids=positions, use_cache=False)
    if cache == "static":
        kept = StaticCache(config=model.config, max_cache_len=128)
    else:
        kept = DynamicCache(config=model.config)
    steps = [(0, 61), (61, 62), (62, 65), (65, 90), (90, 91), (91, 100)]  # prompt, tokens, chunks
    for start, end in steps:
        given = {"attention_mask": mask[:, :end], "position_ids": positions[:, start:end], "cache": kept}
        part = logits(model, x[:, start:end], **given)
        real = mask[:, start:end].bool()
        torch.testing.assert_close(part[real], whole[:, start:end][real], rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_generate_gives_the_same_tokens_with_and_without_a_cache(name):
    model = use(made(name), pattern=SPARSE, block_size=16)
    x, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.long)
    x[1, :31], mask[1, :31] = 0, 0
    plain = {"max_new_tokens": 20, "pad_token_id": 0, "eos_token_id": None}

    def generated(rows=slice(None), start=0, sample=True, **given):
        torch.manual_seed(1)
        own = {"attention_mask": mask[rows, start:], "do_sample": sample, "temperature": 5.0, **plain}
        return model.generate(x[rows, start:], **own, **given)

    without = generated(use_cache=False)
    assert len(set(without[0, 70:].tolist())) > 5
    assert torch.equal(without, generated(use_cache=True))
    assert torch.equal(without, generated(cache_implementation="static", disable_compile=True))
    both, alone = generated(sample=False), generated(slice(1, 2), 31, sample=False)
    assert torch.equal(both[1, 31:], alone[0])


def test_gradients_with_and_without_checkpointing():
    model, x = made("llama"), tokens(2, 90)
    mask = torch.ones(2, 90, dtype=torch.long)
    mask[0, :20] = 0
    labels = x.masked_fill(mask == 0, -100)

    def gradients():
        model.zero_grad()
        model(input_ids=x, attention_mask=mask, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    dense = gradients()
    use(model, pattern="Full()", block_size=32)
    for a, b in zip(gradients(), dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    use(model, pattern=SPARSE, block_size=32)
    plain = gradients()
    model.train()
    model.gradient_checkpointing_enable()
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_sinks():
    model, x = made("gpt_oss"), tokens(1, 60)

    def gradients():
        model.zero_grad()
        model(input_ids=x, labels=x).loss.backward()
        return {
            name: p.grad.clone()
            for name, p in model.named_parameters()
            if "attn" in name and p.grad is not None
        }

    dense = gradients()
    use(model, pattern="Full()", block_size=32)
    ours = gradients()
    assert any("sinks" in name for name in ours)
    for name, grad in dense.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-3, atol=1e-5)


def test_trainer_trains(tmp_path):
    pytest.importorskip("accelerate")
    model = use(made("llama"), pattern=SPARSE, block_size=16)
    x = tokens(8, 64)
    data = [{"input_ids": row, "labels": row} for row in x]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=3e-3,
        report_to=[],
        use_cpu=True,
        gradient_checkpointing=True,
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2


def test_settings_travel_with_the_checkpoint(tmp_path):
    model, x = made("qwen3"), tokens(1, 80)
    settings = {
        "block_size": 16,
        "layers": {"0": {"pattern": SPARSE}, "1": {"heads": ["Local(9, 0)"] * HEADS}},
    }
    file = tmp_path / "pattern.json"
    file.write_text(json.dumps({**settings, "about": {"text": "nothing"}}))
    use(model, file)
    expected = logits(model, x)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="sparsetile").eval()
    assert again.config.sparsetile["layers"] == settings["layers"]
    torch.testing.assert_close(logits(again, x), expected, rtol=0, atol=1e-6)


def test_masks_that_are_no_pattern_are_asked():
    """A union with blocks that see each other both ways, as for the tokens of an image."""
    from transformers.masking_utils import create_causal_mask

    model, x = made("llama"), tokens(2, 64)
    groups = torch.full((2, 64), -1)
    groups[0, 10:30], groups[1, 40:64] = 0, 1
    embedded = model.get_input_embeddings()(x)
    given = {"inputs_embeds": embedded, "attention_mask": None, "cache": None, "block_sequence_ids": groups}
    dense = create_causal_mask(config=model.config, **given)
    use(model, pattern="Full()", block_size=16)
    mask = create_causal_mask(config=model.config, **given)
    q, k, v = torch.randn(3, 2, HEADS, 64, 16).unbind(0)
    from sparsetile.integrations.transformers import attention

    out, _ = attention(model.model.layers[0].self_attn, q, k, v, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    torch.testing.assert_close(out.transpose(1, 2), expected, rtol=0, atol=1e-5)


def test_a_dense_mask_of_the_callers_own():
    model, x = made("llama"), tokens(1, 50)
    allowed = torch.ones(50, 50).tril().bool() & (torch.rand(50, 50) < 0.7) | torch.eye(50).bool()
    dense = logits(model, x, attention_mask=allowed[None, None])
    use(model, pattern="Full()", block_size=16)
    torch.testing.assert_close(logits(model, x, attention_mask=allowed[None, None]), dense, rtol=0, atol=3e-5)


def test_refuses_what_it_does_not_serve():
    config = Gemma2Config(**GROUPED, head_dim=16, attn_logit_softcapping=30.0)
    model = use(AutoModelForCausalLM.from_config(config), pattern="Full()")
    with pytest.raises(ArgumentError, match="softcap with attn_implementation='sparsetile'"):
        logits(model, tokens(1, 20))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "either 'pattern' or 'heads'"),
        ({"patern": "Full()"}, "Did you mean 'pattern'"),
        ({"pattern": "Full()", "density": 0.1}, "Name a kind to ask for a density"),
        ({"pattern": "local_window"}, "a 'density' beside it"),
        ({"pattern": "Windw(3)"}, "Known patterns"),
        ({"pattern": "local_window", "density": 3}, "0 < density ≤ 1"),
        ({"heads": []}, "one pattern for each query head"),
        ({"pattern": "Full()", "layers": {"first": {}}}, "a mapping by layer number"),
        ({"pattern": "Full()", "layers": {"0": {"block_size": 3}}}, "keys among"),
        ({"layers": {"1": {"pattern": "Full()"}}}, "an entry for layer 0"),
        ({"pattern": "Full()", "block_size": "large"}, "block_size"),
    ],
)
def test_refuses_settings_that_cannot_be(settings, says):
    with pytest.raises((ArgumentError, PatternError), match=says):
        use(made("llama"), settings)


def test_says_what_is_missing():
    model = made("llama")
    use(model, pattern="Full()")
    del model.config.sparsetile
    with pytest.raises(ArgumentError, match=r"use\(model, pattern=…\)"):
        logits(model, tokens(1, 20))
    model = use(made("llama"), heads=["Full()"] * 3)
    with pytest.raises(PatternError, match="expected 4 patterns"):
        logits(model, tokens(1, 20))
    model = use(made("llama"), pattern=repr(Documents([10, 10])))
    logits(model, tokens(1, 20))
    with pytest.raises(PatternError, match="sum to"):
        logits(model, tokens(1, 30))
