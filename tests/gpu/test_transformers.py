"""A model of transformers on a GPU gives the logits that it gives on the CPU."""

import copy

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
transformers = pytest.importorskip("transformers", minversion="5")

from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM  # noqa: E402

from sparsetile.integrations.transformers import use  # noqa: E402

CONFIG = {
    "vocab_size": 97,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPARSE = "Local(150, 0) | Global(20, rows=False)"


@pytest.fixture(params=["llama", "mistral"])
def pair(request):
    """The same model on the CPU and on the GPU."""
    torch.manual_seed(0)
    if request.param == "llama":
        model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    else:
        model = MistralForCausalLM(MistralConfig(**CONFIG, sliding_window=200)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    use(model, pattern=SPARSE, block_size=64)
    return model, copy.deepcopy(model).cuda()


def logits(model, x, **given):
    to = {name: t.to(model.device) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    with torch.no_grad():
        return model(input_ids=x.to(model.device), **to).logits.cpu()


def test_padding_and_packing(pair):
    here, there = pair
    x, mask = torch.randint(0, 97, (2, 500)), torch.ones(2, 500, dtype=torch.long)
    mask[0, :123] = 0
    packed = torch.cat([torch.arange(n) for n in (200, 31, 269)]).expand(2, -1)
    for given in ({}, {"attention_mask": mask}, {"position_ids": packed, "use_cache": False}):
        real = given.get("attention_mask", torch.ones_like(x)).bool()
        expected = logits(here, x, **given)[real]
        torch.testing.assert_close(logits(there, x, **given)[real], expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(pair, cache):
    here, there = pair
    x, mask = torch.randint(3, 97, (2, 300)), torch.ones(2, 300, dtype=torch.long)
    mask[1, :77] = 0
    given = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = here.generate(x, attention_mask=mask, **given)
    kind = {} if cache is None else {"cache_implementation": cache, "disable_compile": True}
    got = there.generate(x.cuda(), attention_mask=mask.cuda(), **given, **kind)
    assert torch.equal(got.cpu(), expected)


def test_gradients_in_bf16(pair):
    _, there = pair
    model = there.bfloat16()
    x = torch.randint(0, 97, (2, 400), device="cuda")
    mask = torch.ones(2, 400, dtype=torch.long, device="cuda")
    mask[1, 350:] = 0
    labels = x.masked_fill(mask == 0, -100)

    def gradients(**given):
        model.zero_grad()
        use(model, given)
        model(input_ids=x, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])

    sparse = gradients(pattern="Full()")
    model.set_attn_implementation("sdpa")
    model.zero_grad()
    model(input_ids=x, attention_mask=mask, labels=labels).loss.backward()
    dense = torch.cat([p.grad.flatten().float() for p in model.parameters()])
    assert (sparse - dense).norm() < 0.03 * dense.norm()
    assert (gradients(pattern=SPARSE) - dense).norm() > 1e-3 * dense.norm()
