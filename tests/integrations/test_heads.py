"""Heads that are adapted, saved beside an adapter, tied, offloaded, quantised, compiled."""

import pytest
import torch
from torch.distributed.fsdp import fully_shard

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers  # noqa: E402
from accelerate import cpu_offload, dispatch_model  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

from powerflow_fast import FusedLinearTBLoss  # noqa: E402
from powerflow_fast.integrations.transformers import patch_head  # noqa: E402
from powerflow_fast.models.lm_head import last_hidden_state, read_head  # noqa: E402
from tests.helpers import ranks, tiny  # noqa: E402

IDS = torch.arange(2, 18).reshape(2, 8)


def gradients(model, patched):
    """Gradients of the mean log-prob, by the model's logits or by the patched forward."""
    model.zero_grad()
    if patched:
        patch_head(model)
        loss = model(input_ids=IDS, labels=IDS, fused_lm_head=True).loss
    else:
        logits = model(input_ids=IDS).logits[:, :-1].log_softmax(-1)
        loss = -logits.gather(-1, IDS[:, 1:, None]).mean()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(model):
    expected, ours = gradients(model, False), gradients(model, True)
    assert expected.keys() == ours.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-6, msg=name)
    return ours


def test_tied_embeddings_get_the_gradients_of_both_uses():
    model = tiny.model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "model.embed_tokens.weight" in assert_same_gradients(model)


def test_a_head_in_modules_to_save_is_trained_and_the_base_one_is_not():
    model = get_peft_model(tiny.model(), tiny.lora(modules_to_save=["lm_head"]))
    trained = [name for name in assert_same_gradients(model) if "lm_head" in name]
    assert trained and all("modules_to_save" in name for name in trained)
    with torch.no_grad(), model.disable_adapter():
        scored = model(input_ids=IDS, labels=IDS, fused_lm_head=True).log_probs
        logits = model.get_base_model()(IDS, use_cache=False).logits[:, :-1].log_softmax(-1)
    expected = logits.gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(scored, expected, rtol=0, atol=1e-5)


def test_an_adapter_on_the_head_is_refused_even_after_patching():
    model = tiny.model()
    patch_head(model)
    adapted = get_peft_model(model, tiny.lora(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="carries an adapter"):
        adapted(input_ids=IDS, labels=IDS, fused_lm_head=True)
    with pytest.raises(ValueError, match="carries an adapter"):
        patch_head(adapted)


def test_a_model_under_the_hooks_of_device_map():
    model = tiny.model()
    whole = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu"}
    whole |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    dispatch_model(model, device_map=whole, main_device="cpu", force_hooks=True)
    assert hasattr(model.lm_head, "_hf_hook")
    assert_same_gradients(model)


def test_an_offloaded_head_is_refused():
    model = cpu_offload(tiny.model(), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        patch_head(model)


class Quantised(torch.nn.Linear):
    """A head whose weight is kept as 8-bit numbers with a scale, as quantisers keep it."""

    def __init__(self, dtype):
        super().__init__(16, 20, bias=False)
        scaled = self.weight.detach() / self.weight.detach().abs().max() * 100
        self.weight = torch.nn.Parameter(scaled.to(dtype), requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_a_quantised_head_is_refused(dtype):
    model = tiny.model()
    model.lm_head = Quantised(dtype)
    with pytest.raises(ValueError, match="quantisation"):
        patch_head(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_dynamically_quantised_head_is_refused():
    model = tiny.model()
    quantise = torch.ao.quantization.quantize_dynamic
    model.lm_head = quantise(torch.nn.Sequential(model.lm_head), {torch.nn.Linear})[0]
    with pytest.raises(ValueError, match="quantisation"):
        patch_head(model)


@pytest.mark.parametrize("package", ["torchao", "bitsandbytes"])
def test_a_head_quantised_by_a_library_is_refused(package):
    library = pytest.importorskip(package)
    model = tiny.model(hidden_size=64)
    if package == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model.lm_head, Int8WeightOnlyConfig())
    else:
        head = library.nn.Linear8bitLt(64, 20, bias=False, has_fp16_weights=False)
        head.weight = library.nn.Int8Params(
            torch.ones(20, 64, dtype=torch.int8), requires_grad=False, has_fp16_weights=False
        )
        model.lm_head = head
    with pytest.raises(ValueError, match="quantisation"):
        patch_head(model)


def test_a_head_that_is_not_linear_or_a_model_without_a_decoder():
    model = tiny.model()
    with pytest.raises(ValueError, match="expected one of transformers, unwrapped"):
        patch_head(torch.nn.DataParallel(model))
    with pytest.raises(ValueError, match="expected a linear output layer"):
        patch_head(model.model)
    model.lm_head = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 20))
    with pytest.raises(ValueError, match="expected a linear output layer"):
        patch_head(model)
    with pytest.raises(ValueError, match="no decoder apart from its head"):
        patch_head(Flat(tiny.model().config))


class Flat(transformers.PreTrainedModel):
    """A model in one piece, which has a head but nothing that ends before it."""

    _supports_sdpa = True

    def __init__(self, config):
        super().__init__(config)
        self.embedding, self.lm_head = torch.nn.Embedding(20, 16), torch.nn.Linear(16, 20)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, **kwargs):
        return CausalLMOutput(logits=self.lm_head(self.embedding(input_ids)))


def test_the_compiled_model_with_the_loss_has_no_graph_break():
    torch._dynamo.reset()
    model = get_peft_model(tiny.model(), tiny.lora()).train()
    base, loss_fn = model.get_base_model(), FusedLinearTBLoss(4.0, "group", group_size=2)
    with torch.no_grad(), model.disable_adapter():
        reference = last_hidden_state(base, IDS, torch.ones_like(IDS))[:, :-1]

    def step(ids, mask):
        hidden = last_hidden_state(base, ids, torch.ones_like(ids))[:, :-1]
        weight = read_head(base).weight
        return loss_fn(hidden, weight, ids[:, 1:], reference * 0.9, mask=mask).loss

    mask = torch.ones_like(IDS[:, 1:]).bool()
    mask[:, :3] = False

    def run(function):
        model.zero_grad()
        loss = function(IDS, mask)
        loss.backward()
        return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]

    loss, grads = run(step)
    compiled_loss, compiled_grads = run(torch.compile(step, fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-6)
    assert len(grads) == len(compiled_grads) > 4
    for ours, expected in zip(compiled_grads, grads, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)


def test_a_head_in_shards_of_fsdp2_in_the_root_unit_or_its_own(tmp_path):
    ranks.finish(2, assert_same_gradients_in_shards, tmp_path)


def assert_same_gradients_in_shards():
    """A rank with one of the two rows; expected are the gradients of both on one process."""
    torch.distributed.init_process_group("gloo")
    own = IDS[torch.distributed.get_rank()][None]
    for own_unit, tied in ((False, False), (False, True), (True, False)):
        sizes = dict(vocab_size=21, tie_word_embeddings=tied)
        expected = gradients(tiny.model(**sizes), patched=True)
        model = tiny.model(**sizes)
        patch_head(model)
        units = [*model.model.layers, *([model.lm_head] if own_unit else []), model]
        for unit in units:
            fully_shard(unit)
        model(input_ids=own, labels=own, fused_lm_head=True).loss.backward()
        for name, parameter in model.named_parameters():
            ours = parameter.grad.full_tensor()
            torch.testing.assert_close(ours, expected[name], rtol=1e-4, atol=1e-6, msg=name)
