"""A prompt of several rows passes through the model once, and the completions are the same."""

from contextlib import contextmanager, nullcontext

import pytest
import torch

pytest.importorskip("transformers")

import transformers  # noqa: E402
from peft import get_peft_model  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from powerflow_fast import sample  # noqa: E402
from powerflow_fast.evaluation.scores import Sampling, complete  # noqa: E402
from powerflow_fast.models import prefill, sampling  # noqa: E402
from powerflow_fast.models.lm_head import base_model  # noqa: E402
from powerflow_fast.models.prefill import prompts_once  # noqa: E402
from tests.helpers import packed, tiny  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402

LONG = [5, 6, 7, 8, 9, 10, 11, 12]  # longer than the sliding windows of the models below
PROMPTS = {  # each as many rows
    "one": [LONG],
    "padded": [LONG, [12, 13], [4]],
    "of one token": [[5], [6]],
    "not neighbours": [[12, 13], LONG, [12, 13], [3], LONG],
}


def batch(prompts):
    ids, mask, _ = packed.batch(*((prompt, []) for prompt in prompts))
    return ids, mask


@contextmanager
def counted(model):
    """[rows, columns] of every forward pass within."""
    shapes = []

    def count(_module, args, inputs):
        shapes.append(tuple((args or [inputs["input_ids"]])[0].shape))

    hook = base_model(model).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def draw(model, prompts, each=4, greedy=False, **options):
    """Completions, and [rows, columns] of every forward pass that drew them."""
    ids, mask = batch(prompts)
    if greedy:  # transformers refuses to repeat what is the same
        ids, mask, each = ids.repeat_interleave(each, 0), mask.repeat_interleave(each, 0), 1
    torch.manual_seed(0)
    options = dict(num_return_sequences=each, max_new_tokens=6, end_token_ids=()) | options
    with counted(model) as shapes:
        return sample(model, ids, mask, greedy=greedy, **options), shapes


@pytest.fixture
def each(monkeypatch):
    """`draw` as if there were nothing to share."""

    def drawn(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(sampling, "prompts_once", lambda base: nullcontext())
            return draw(*args, **options)

    return drawn


@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mistral", "GPT2", "GptOss", "DeepseekV3"])
def test_the_same_tokens_from_fewer(each, name, prompts):
    model, rows = packed.build(name), PROMPTS[prompts]
    kinds, width = len(set(map(tuple, rows))), max(map(len, rows))
    for greedy in (False, True):
        expected, apart = each(model, rows, greedy=greedy)
        drawn, once = draw(model, rows, greedy=greedy)
        assert all(map(torch.equal, drawn, expected))
        assert apart[0] == (4 * len(rows), width) and once[0] == (kinds, width)
        assert once[1:] == apart[1:] and len(once) == 6  # as many passes, of every rank


RECURRENT = {
    "Mamba": dict(state_size=4),
    "Lfm2": packed.SIZE | dict(layer_types=["conv", "full_attention", "conv"]),
    "Qwen3Next": packed.SIZE
    | dict(layer_types=["linear_attention", "full_attention", "linear_attention"])
    | dict(linear_num_key_heads=2, linear_num_value_heads=4, num_experts=4, num_experts_per_tok=2)
    | dict(linear_key_head_dim=8, linear_value_head_dim=8, moe_intermediate_size=16)
    | dict(shared_expert_intermediate_size=16),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_states_of_recurrent_layers_are_repeated(each, name):
    small = packed.WORDS | dict(hidden_size=32, num_hidden_layers=3, initializer_range=0.3)
    model = packed.build(name, **small | RECURRENT[name])
    for rows in PROMPTS.values():
        expected, _ = each(model, rows)
        drawn, once = draw(model, rows)
        assert all(map(torch.equal, drawn, expected))
        assert once[0] == (len(set(map(tuple, rows))), max(map(len, rows)))


def test_in_chunks(monkeypatch, each):
    """Of a long prompt, as `prefill_chunk_size` asks for."""
    plain = sampling.generation_config
    monkeypatch.setattr(
        sampling,
        "generation_config",
        lambda base, **options: plain(base, **options, prefill_chunk_size=3),
    )
    model, rows = tiny.model(), PROMPTS["not neighbours"]
    expected, _ = each(model, rows)
    drawn, once = draw(model, rows)
    assert all(map(torch.equal, drawn, expected))
    assert once[:3] == [(3, 3), (3, 3), (3, 2)]


def test_log_probs_of_a_pass_are_of_its_own_row():
    """A repeated cache belongs to the row's own prompt: scored alone, the greedy token wins."""
    model = tiny.model()
    drawn, _ = draw(model, PROMPTS["not neighbours"], greedy=True)
    for ids, mask in zip(drawn.input_ids, drawn.attention_mask.bool(), strict=True):
        text = ids[mask]
        likeliest = model(text[None]).logits[0].argmax(-1)
        assert torch.equal(likeliest[-7:-1], text[-6:])


def test_what_differs_is_computed_apart():
    model = tiny.model()
    _, shapes = draw(model, PROMPTS["padded"], each=1)
    assert shapes[0] == (3, 8)
    ids, mask = torch.tensor([[3, 4, 5], [3, 4, 5]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    with counted(model) as shapes:
        sample(model, ids, mask, max_new_tokens=1, num_return_sequences=2)
    assert shapes == [(2, 3)]


def reason(monkeypatch, model, **options) -> str | None:
    """What `why_each` says of a batch that is sampled with `options` of `generate`."""
    said, own = [], prefill.why_each

    def why_each(*args):
        said.append(own(*args))
        return said[-1]

    ids, mask = batch(PROMPTS["padded"])
    config = GenerationConfig(do_sample=True, num_return_sequences=2, pad_token_id=0, **options)
    config.max_new_tokens = 3
    drawn = []
    for once in (False, True):
        torch.manual_seed(0)
        with monkeypatch.context() as patch, prompts_once(model) if once else nullcontext():
            patch.setattr(prefill, "why_each", why_each)
            ids_ = ids if not model.config.is_encoder_decoder else ids.clamp(min=3)
            out = model.generate(input_ids=ids_, attention_mask=mask, generation_config=config)
            drawn.append(out if isinstance(out, torch.Tensor) else out.sequences)
    assert torch.equal(*drawn)
    assert "_prefill" not in vars(model)
    return said[0] if said else "never asked"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(use_cache=False), "no cache to repeat"),
        (dict(cache_implementation="static"), "a StaticCache that is not repeated"),
        (dict(cache_implementation="offloaded"), "a DynamicCache that is not repeated"),
        (dict(num_beams=2), "beams and assistants share rows"),
        (dict(return_dict_in_generate=True, output_scores=True), "states of every row are to be"),
        ({}, None),
    ],
)
def test_a_setting_that_cannot_share(monkeypatch, options, said):
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloading needs a GPU")
    found = reason(monkeypatch, tiny.model().eval(), **options)
    assert found is None if said is None else found.startswith(said)


def test_models_that_cannot_share(monkeypatch):
    model = tiny.model().eval()
    model.config.expert_capacity = 4
    assert "drop tokens" in reason(monkeypatch, model)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16)
    sizes |= dict(decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2)
    config = transformers.BartConfig(**packed.WORDS | sizes, decoder_start_token_id=2)
    model = transformers.BartForConditionalGeneration(config).eval()
    assert reason(monkeypatch, model) == "an encoder has computed the prompts"
    model = packed.build("Rwkv", vocab_size=60, hidden_size=32, num_hidden_layers=2)
    assert reason(monkeypatch, model) == "no cache to repeat"


def test_states_outside_the_cache(monkeypatch):
    small = dict(vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=3)
    small |= dict(num_attention_heads=4, lru_width=32, attention_window_size=4)
    model = packed.build("RecurrentGemma", **small)
    said = reason(monkeypatch, model)
    assert said == "model.layers.0.temporal_block.conv1d_state is kept outside the cache"


def test_a_layer_that_does_not_say_how_its_rows_are_selected(monkeypatch):
    class Own(transformers.cache_utils.DynamicLayer):
        pass

    mapping = transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING
    monkeypatch.setitem(mapping, "full_attention", Own)
    said = reason(monkeypatch, tiny.model().eval())
    assert said == "Own does not say how its rows are selected"


def test_evaluation_computes_a_prompt_once():
    model = tiny.model()
    with counted(model) as shapes:
        complete(
            model,
            tiny.tokenizer(),
            ["rain", "the sea is a b c"],
            Sampling(samples=4, max_new_tokens=1, batch_size=8),
            likelihood=False,
        )
    assert shapes == [(2, 6)]


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("way", ["training", "evaluation"])
def test_the_trainers_rollouts_compute_a_prompt_once(tmp_path, monkeypatch, adapter, way):
    tiny.model().save_pretrained(tmp_path / "model")
    shapes = {}
    for once in (True, False):
        trainer, _ = make(
            tmp_path / str(once),
            model=tiny.model() if adapter else str(tmp_path / "model"),
            peft=adapter,
            rollout=None,
            gradient_checkpointing=True,
            evaluation=tiny.dataset(1),
            per_device_eval_batch_size=8,
        )
        own = base_model(trainer.model)
        generate = own.generate

        def watched(*args, own=own, generate=generate, once=once, **options):
            with counted(own) as shapes[once]:
                return generate(*args, **options)

        own.generate = watched
        with monkeypatch.context() as patch:
            if not once:
                patch.setattr("powerflow_fast.training.rollout.prompts_once", nullcontext)
            torch.manual_seed(0)
            trainer.train() if way == "training" else trainer.evaluate()
        assert "_prefill" not in vars(own)
    assert shapes[True][0] == (2, 7) and shapes[False][0] == (8, 7)
    assert shapes[True][1:] == shapes[False][1:]


def test_under_an_adapter(each):
    model = get_peft_model(tiny.model(), tiny.lora(init_lora_weights=False))
    expected, _ = each(model, PROMPTS["padded"])
    drawn, once = draw(model, PROMPTS["padded"])
    assert all(map(torch.equal, drawn, expected)) and once[0] == (3, 8)


def test_the_model_is_as_before_after_an_error(monkeypatch):
    model = tiny.model()
    monkeypatch.setattr(model, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(model, PROMPTS["padded"])
    assert "_prefill" not in vars(model)
