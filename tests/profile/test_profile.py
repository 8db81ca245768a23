"""The profile's numbers against definitions written out densely, and the command from end to end."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", minversion="5")

from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM  # noqa: E402

from sparsetile import BlockLayout, Causal  # noqa: E402
from sparsetile.cli import main  # noqa: E402
from sparsetile.errors import ArgumentError, DataError  # noqa: E402
from sparsetile.integrations.transformers import use  # noqa: E402
from sparsetile.profile.candidates import Candidate, candidates, kept, tiles_a_row  # noqa: E402
from sparsetile.profile.choose import choose  # noqa: E402
from sparsetile.profile.evaluate import best_tiles, loss_under, loss_with, pooled  # noqa: E402
from sparsetile.profile.measure import measure  # noqa: E402
from sparsetile.profile.run import Profile, closed, compare, search  # noqa: E402

BLOCK, LENGTH, LAYERS, HEADS, DIM = 16, 128, 2, 4, 16
ROWS = LENGTH // BLOCK
CONFIG = {
    "vocab_size": 97,
    "hidden_size": HEADS * DIM,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def tokens():
    torch.manual_seed(1)
    return torch.randint(0, 97, (1, LENGTH))


def captured(model, tokens):
    """q, k, v, o and the gradient of the summed loss by o, of every layer; by dense attention and hooks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    seen = {}

    def attend(module, query, key, value, mask, scaling=None, **_):
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        out.retain_grad()
        seen[module.layer_idx] = (query, key, value, out)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("captured", attend)
    AttentionMaskInterface.register("captured", lambda *a, **k: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("captured")
    (model(input_ids=tokens, labels=tokens).loss * (LENGTH - 1)).backward()
    model.set_attn_implementation(before)
    model.zero_grad()
    return {i: [x.detach()[0] for x in s] + [s[3].grad[0]] for i, s in seen.items()}


def test_mass_and_cost_are_those_of_the_definition(model, tokens):
    tried = candidates(LENGTH, BLOCK)
    tables, loss = measure(model, tokens, kept(tried, LENGTH, BLOCK), BLOCK)
    with torch.no_grad():
        assert abs(loss - float(model(input_ids=tokens, labels=tokens).loss)) < 1e-5
    masks = [
        BlockLayout.from_pattern(c.pattern & Causal(), LENGTH, block_size=BLOCK).to_dense() for c in tried
    ]
    for layer, (q, k, v, out, grad) in captured(model, tokens).items():
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = (q @ k.transpose(1, 2) / math.sqrt(DIM)).masked_fill(
            ~torch.ones(LENGTH, LENGTH).tril().bool(), -math.inf
        )
        weights = scores.softmax(-1)
        for number, mask in enumerate(masks):
            mass = (weights * mask).sum(-1)
            other = scores.masked_fill(~mask, -math.inf).softmax(-1) @ v
            cost = ((other - out).square().sum(-1) * grad.square().sum(-1)).sum(-1) / (2 * DIM)
            torch.testing.assert_close(tables.mass[layer][:, number], mass.mean(-1), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(tables.cost[layer][:, number], cost, rtol=1e-3, atol=1e-5)


def test_the_best_tiles_are_those_of_the_largest_mass(model, tokens):
    density = 0.4
    tried = [candidates(LENGTH, BLOCK)[-1]]
    tables, _ = measure(model, tokens, kept(tried, LENGTH, BLOCK), BLOCK, (density,))
    m, more = tiles_a_row(density, ROWS)
    assert more
    for layer, (q, k, *_) in captured(model, tokens).items():
        k = k.repeat_interleave(2, 0)
        scores = (q @ k.transpose(1, 2) / math.sqrt(DIM)).masked_fill(
            ~torch.ones(LENGTH, LENGTH).tril().bool(), -math.inf
        )
        mass = scores.softmax(-1).view(HEADS, ROWS, BLOCK, ROWS, BLOCK).sum((2, 4))
        for head in range(HEADS):
            best = tables.best[density][layer][head]
            extra = []
            for row in range(ROWS):
                order = mass[head, row, : row + 1].argsort(descending=True).tolist()
                got = [t for t in best[row].tolist() if t >= 0]
                assert got[:m] == order[: min(m, row + 1)]
                if len(got) > m:
                    assert got[m] == order[m]
                if row >= m:
                    extra.append((float(mass[head, row, order[m]]), len(got) > m))
            extra.sort(reverse=True)
            assert [taken for _, taken in extra] == [True] * more + [False] * (len(extra) - more)


@pytest.mark.parametrize("rows", [1, 2, 7, 32])
@pytest.mark.parametrize("density", [0.01, 0.15, 0.25, 0.4, 0.77, 1.0])
def test_rows_share_out_the_budget(density, rows):
    m, more = tiles_a_row(density, rows)
    every = rows * (rows + 1) // 2
    taken = sum(min(row + 1, m) for row in range(rows)) + more
    assert taken == max(rows, round(density * every))
    assert 0 <= more <= max(0, rows - m)


def test_candidates_have_whole_tiles_and_distinct_patterns():
    tried = candidates(4096, 128)
    assert len({c.pattern for c in tried}) == len(tried)
    chosen = kept(tried, 4096, 128)
    assert int(chosen.tiles.max()) == chosen.every == 32 * 33 // 2
    for row in (0, 5, 31):
        own = chosen.row(row, torch.float32)
        assert (own[:, row] == 1).all()  # no query without its own tile
        for number in (3, len(tried) // 2, len(tried) - 1):
            layout = BlockLayout.from_pattern(tried[number].pattern & Causal(), 4096)
            columns = layout.indices[layout.indptr[row] : layout.indptr[row + 1]].long()
            assert torch.equal(own[number].nonzero().flatten(), columns)


def test_choices_are_the_best_that_fit():
    """Against every combination, where those are few; a price cannot split an item, so nearly."""
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        tiles = torch.tensor([1, 2, 3, 5, 8])
        cost = torch.rand(4, 5, generator=draw).sort(dim=1, descending=True).values
        for budget in (4, 9, 14, 32):
            pick = choose(cost, tiles, budget)
            assert int(tiles[pick].sum()) <= budget
            grid = torch.cartesian_prod(*[torch.arange(5)] * 4)
            fits = tiles[grid].sum(1) <= budget
            best = float(cost.gather(1, grid.T).sum(0)[fits].min())
            assert float(cost.gather(1, pick[:, None]).sum()) <= best + 0.35
    everything = choose(cost, tiles, 32)
    assert (everything == 4).all()
    assert (choose(cost, tiles, 0) == 0).all()


def test_losses_under_everything_are_dense(model, tokens):
    with torch.no_grad():
        dense = float(model(input_ids=tokens, labels=tokens).loss)
    assert abs(loss_under(model, tokens, {"pattern": "Full()"}) - dense) < 1e-5
    every = torch.arange(ROWS).expand(HEADS, ROWS, ROWS)
    assert abs(loss_with(model, tokens, best_tiles({0: every, 1: every}), BLOCK) - dense) < 1e-5
    assert abs(loss_with(model, tokens, pooled(1.0, BLOCK), BLOCK) - dense) < 1e-5
    assert abs(loss_with(model, tokens, pooled(0.2, BLOCK), BLOCK) - dense) > 1e-4


def test_a_search_finds_the_sparsest_that_keeps_the_loss(model, tokens, monkeypatch):
    profile = Profile.of(model, tokens, BLOCK, {})
    # A loss that falls evenly with the density; the model's own, of random weights, hardly knows it.
    monkeypatch.setattr(
        "sparsetile.profile.run.loss_under",
        lambda model, tokens, settings: profile.dense * (1.3 - 0.3 * settings["about"]["density"]),
    )
    for increase in (0.2, 0.1, 0.03):
        least = 1 - increase / 0.3
        density = profile.density(search(profile, tokens, increase, str))
        assert least <= density <= least + 2**-6 + 0.03
    assert profile.density(search(profile, tokens, 0.0, str)) == 1.0


def test_a_comparison_names_every_rival(model, tokens):
    profile = Profile.of(model, tokens, BLOCK, {})
    small = Profile.of(model, tokens, BLOCK // 2, {}) if BLOCK > 16 else None
    held_out = torch.randint(0, 97, (1, LENGTH))
    rows = compare(profile, held_out, (0.4,), small, str)
    assert {"heads' own", "window", "pooled (adaptive)", "oracle"} <= {row["what"] for row in rows}
    more = [row for row in rows if row["what"].endswith("more tiles")]
    assert len(more) == 1 and 0.4 < more[0]["density"] <= 0.5
    assert all(row["density"] <= 0.4 + 0.01 for row in rows if row not in more)
    own, single, oracle, share = closed(rows, 0.4)
    assert share == pytest.approx((single - own) / (single - oracle)) or single <= oracle


def test_sliding_windows_of_the_model_count(tokens):
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**CONFIG, sliding_window=20)).eval()
    chosen = kept([Candidate("window", c.pattern) for c in candidates(LENGTH, BLOCK)], LENGTH, BLOCK)
    tables, loss = measure(model, tokens, chosen, BLOCK)
    with torch.no_grad():
        assert abs(loss - float(model(input_ids=tokens, labels=tokens).loss)) < 1e-5
    # A window of 20 reaches into three tiles of 16 at most.
    wide = [
        i
        for i, c in enumerate(candidates(LENGTH, BLOCK))
        if repr(c.pattern) == "Local(left=2, right=0, unit=16)"
    ]
    torch.testing.assert_close(tables.mass[0][:, wide[0]], torch.ones(HEADS), rtol=0, atol=1e-5)


def test_refuses_models_and_lengths_it_cannot_measure(model):
    with pytest.raises(DataError, match="a multiple of the tile's 16 tokens"):
        Profile.of(model, torch.zeros((1, 100), dtype=torch.int64), BLOCK, {})
    from transformers import Gemma2Config, Gemma2ForCausalLM

    other = Gemma2ForCausalLM(Gemma2Config(**CONFIG, head_dim=DIM))
    with pytest.raises(ArgumentError, match="a model with softcap"):
        Profile.of(other, torch.zeros((1, 64), dtype=torch.int64), BLOCK, {})


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory):
    """A folder with the model and a tokenizer of bytes."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    words = {chr(i + 32): i for i in range(96)} | {"?": 31, "[UNK]": 96}
    kind = tokenizers.models.WordLevel(vocab=words, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(kind)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(
        folder
    )
    return folder


def test_the_command_writes_what_a_model_takes(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    out = tmp_path / "out"
    given = [
        "profile",
        str(checkpoint),
        "--text",
        str(text),
        "--length",
        "128",
        "--block",
        "16",
        "--out",
        str(out),
    ]
    assert main([*given, "--max-loss-increase", "20%", "--compare", "--density", "30%"]) == 0
    said = capsys.readouterr().out
    assert "of the causal triangle's tiles" in said and "oracle" in said
    settings = json.loads((out / "pattern.json").read_text())
    model = use(LlamaForCausalLM.from_pretrained(checkpoint), out / "pattern.json")
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=torch.zeros((1, 64), dtype=torch.int64)).logits).all()
    assert set(settings["layers"]) == {"0", "1"} and len(settings["layers"]["0"]["heads"]) == HEADS
    assert (out / "profile.png").stat().st_size > 5000
    assert json.loads((out / "profile.json").read_text())["rows"]
    assert "| 30% | heads' own |" in (out / "profile.md").read_text()


def test_the_command_says_what_is_wrong(checkpoint, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("too short")
    assert main(["profile", str(checkpoint), "--text", str(text)]) == 2
    assert "expected 4,096 tokens to measure and as many to hold out" in capsys.readouterr().err
    assert main(["profile", str(tmp_path / "nowhere"), "--text", str(text)]) == 2
    assert "a causal language model that transformers loads" in capsys.readouterr().err
    assert main(["profile", str(checkpoint), "--text", str(text), "--density", "3"]) == 2
    assert "densities up to 100%" in capsys.readouterr().err
