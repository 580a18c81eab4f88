"""What is sampled is what is scored: the plain distribution, every end token, every padding."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers  # noqa: E402
from peft import PromptTuningConfig, get_peft_model  # noqa: E402
from transformers import GenerationConfig  # noqa: E402

from powerflow_fast import linear_logprobs, sample  # noqa: E402
from powerflow_fast.evaluation.scores import Sampling, complete  # noqa: E402
from powerflow_fast.integrations.transformers import patch_head  # noqa: E402
from powerflow_fast.models.lm_head import last_hidden_state, read_head  # noqa: E402
from powerflow_fast.models.sampling import end_tokens  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.helpers.packed import WORDS  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402

CHATTY = dict(do_sample=True, temperature=0.7, top_p=0.8, top_k=3, repetition_penalty=1.3)
ROTARY = WORDS | dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
    initializer_range=0.3,
)
HALF = 4  # of a head's dimensions, pairs that are rotated
# Where positions enter: learned, rotated, rotated with factors, rotated by the length so far.
MODELS = {
    "GPT2": WORDS | dict(n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3),
    "OPT": WORDS
    | dict(hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2)
    | dict(word_embed_proj_dim=16, max_position_embeddings=64, init_std=0.3),
    "Llama": ROTARY,
    "Phi3": ROTARY
    | dict(
        original_max_position_embeddings=8,
        rope_parameters=dict(
            rope_type="longrope",
            rope_theta=1e4,
            short_factor=[1.0 + 0.1 * i for i in range(HALF)],
            long_factor=[4.0 + i for i in range(HALF)],
            original_max_position_embeddings=8,
        ),
    ),
    "Llama, dynamic": ROTARY
    | dict(rope_parameters=dict(rope_type="dynamic", rope_theta=1e4, factor=4.0))
    | dict(max_position_embeddings=8),
}


def build(name: str, **options):
    config = getattr(transformers, f"{name.split(',')[0]}Config")(**MODELS[name] | options)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # positions that matter
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def rows(sizes=((2, 6), (6, 2), (3, 3))):
    """Texts of (prompt, completion) tokens, and a batch of them as samplers pad it.

    Prompts are padded on the left and completions on the right: 12 columns, though no text is
    longer than 8 tokens, up to which the models below keep their first kind of rotation.
    """
    torch.manual_seed(1)
    texts = [torch.randint(3, 60, (prompt + completion,)) for prompt, completion in sizes]
    start, width = max(p for p, _ in sizes), max(c for _, c in sizes)
    ids = torch.zeros(len(texts), start + width, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (text, (prompt, completion)) in enumerate(zip(texts, sizes, strict=True)):
        place = slice(start - prompt, start + completion)
        ids[i, place], mask[i, place] = text, 1
        labels[i, start : start + completion] = text[prompt:]
    return texts, ids, mask, labels, sizes


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_do_not_depend_on_padding(name):
    model, alone = build(name), []
    texts, ids, mask, labels, sizes = rows()
    with torch.no_grad():
        for text, (prompt, _) in zip(texts, sizes, strict=True):
            logps = model(text[None]).logits[0, :-1].log_softmax(-1)
            alone.append(logps.gather(1, text[1:, None])[prompt - 1 :, 0])
        alone = torch.cat(alone)
        head, scored = read_head(model), labels[:, 1:] != -100
        hidden = last_hidden_state(model, ids, mask)[:, :-1][scored]
        logps = linear_logprobs(hidden, head.weight, ids[:, 1:][scored], bias=head.bias)
        torch.testing.assert_close(logps, alone, rtol=1e-5, atol=2e-5)
        patch_head(model)
        out = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
        torch.testing.assert_close(out.log_probs[out.label_mask], alone, rtol=1e-5, atol=2e-5)


def test_positions_that_are_given_are_kept():
    model = build("GPT2")
    patch_head(model)
    _, ids, mask, labels, _ = rows()
    batch = dict(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True)
    places = torch.arange(12).expand(3, 12)
    given = model(**batch, position_ids=places).log_probs
    hidden = model.transformer(input_ids=ids, attention_mask=mask, position_ids=places)[0]
    logps = model.lm_head(hidden)[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(given, logps.where(labels[:, 1:] != -100, 0.0))


PROMPT = torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]])
REAL = (PROMPT != 0).long()


def draw(model, seed=0, **options):
    torch.manual_seed(seed)
    return sample(model, PROMPT, REAL, **dict(max_new_tokens=12, num_return_sequences=3) | options)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_models_own_generation_config_has_no_part(adapter):
    model = tiny.model()
    model.generation_config = GenerationConfig(eos_token_id=1)
    plain = draw(model)
    model.generation_config = own = GenerationConfig(**CHATTY, eos_token_id=1, max_length=5)
    model.train()
    model.model.layers[0].eval()
    if adapter:
        model = get_peft_model(model, tiny.lora())
    modes = [module.training for module in model.modules()]
    chatty = draw(model)
    assert all(map(torch.equal, plain, chatty))
    assert (model.get_base_model() if adapter else model).generation_config is own
    assert [module.training for module in model.modules()] == modes


def test_the_mode_and_configuration_come_back_after_an_error(monkeypatch):
    model = tiny.model().train()
    own = model.generation_config
    monkeypatch.setattr(model, "generate", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        draw(model)
    assert model.training and model.generation_config is own


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_probabilities(temperature):
    model = tiny.model()
    model.generation_config = GenerationConfig(**CHATTY)
    count = 20_000
    torch.manual_seed(0)
    drawn = sample(
        model,
        PROMPT[1:],
        REAL[1:],
        max_new_tokens=1,
        num_return_sequences=count,
        temperature=temperature,
    )
    p = (model(PROMPT[1:]).logits[0, -1] / temperature).softmax(-1)
    found = torch.bincount(drawn.input_ids[:, -1], minlength=len(p)) / count
    assert ((found - p).abs() <= 5 * (p * (1 - p) / count).sqrt() + 1e-4).all()


def test_any_of_the_models_end_tokens_ends_a_row():
    model = tiny.model()
    model.generation_config.eos_token_id = [1, 6]
    assert end_tokens(model) == [1, 6] and end_tokens(model, tiny.tokenizer()) == [1, 6]
    drawn = draw(model, num_return_sequences=20, max_new_tokens=30)
    ids, counted = drawn.completion(4)
    lengths = counted.sum(1)
    assert len(set(lengths.tolist())) > 3
    last = ids.gather(1, lengths[:, None] - 1)[:, 0]
    ends = torch.isin(ids, torch.tensor([1, 6]))
    assert ((ends & counted).sum(1) <= 1).all()  # none before the last token
    assert (torch.isin(last, torch.tensor([1, 6])) | (lengths == ids.shape[1])).all()
    for end in (1, 6):
        assert (last == end).any()
    prompts = REAL.repeat_interleave(20, 0)
    assert torch.equal(drawn.attention_mask, torch.cat([prompts, counted.long()], 1))
    assert torch.equal(drawn.labels[:, 4:], ids.where(counted, -100))
    assert (drawn.labels[:, :4] == -100).all()
    assert drawn.position_ids[0, :6].tolist() == [0, 0, 0, 1, 2, 3]


def test_no_end_token_no_end():
    drawn = draw(tiny.model(), end_token_ids=(), max_new_tokens=40)
    assert (drawn.labels[:, 4:] != -100).all() and (drawn.input_ids[:, 4:] == 1).any()


def test_greedy_is_the_likeliest():
    model = tiny.model()
    model.generation_config = GenerationConfig(**CHATTY)
    drawn = draw(model, greedy=True, num_return_sequences=1)
    expected = model(drawn.input_ids, attention_mask=drawn.attention_mask).logits.argmax(-1)
    counted = drawn.labels != -100
    assert torch.equal(expected[:, 3:-1][counted[:, 4:]], drawn.labels[:, 4:][counted[:, 4:]])


def test_evaluation_draws_and_scores_as_training_does():
    model = build("GPT2", vocab_size=len(tiny.WORDS.split()), eos_token_id=1)
    model.generation_config = GenerationConfig(**CHATTY, eos_token_id=[1, 6])
    prompts = ["rain", "what is the sum of one two"]
    drawn = complete(model, tiny.tokenizer(), prompts, Sampling(samples=8, max_new_tokens=10))
    plain = GenerationConfig(eos_token_id=[1, 6])
    model.generation_config = plain
    again = complete(model, tiny.tokenizer(), prompts, Sampling(samples=8, max_new_tokens=10))
    assert drawn.texts == again.texts
    one = complete(
        model, tiny.tokenizer(), prompts, Sampling(batch_size=1, max_new_tokens=10), greedy=True
    )
    both = complete(model, tiny.tokenizer(), prompts, Sampling(max_new_tokens=10), greedy=True)
    torch.testing.assert_close(one.base_logps, both.base_logps, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(temperature=0.0), "temperature: expected a finite number > 0, got 0.0"),
        (dict(max_new_tokens=0), "max_new_tokens, num_return_sequences: expected at least 1"),
        (dict(attention_mask=REAL.flip(1)), "attention_mask: expected prompts that end in the"),
        (dict(attention_mask=REAL[:1]), r"attention_mask: expected the shape .* got \(1, 4\)"),
    ],
)
def test_bad_input(options, said):
    options = dict(attention_mask=REAL, max_new_tokens=2) | options
    with pytest.raises(ValueError, match=said):
        sample(tiny.model(), PROMPT, **options)


def test_the_trainers_rollouts_are_of_the_plain_policy(tmp_path):
    """TRL passes a configuration of its own; what it leaves unset would come from the model's."""
    model = tiny.model()
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.suppress_tokens = list(range(2, 10))
    own = model.generation_config
    trainer, _ = make(tmp_path, model=model, rollout=None, max_completion_length=20)
    trainer.train()
    drawn = [row.tolist() for row in trainer._buffered_inputs[0]["completion_ids"]]
    assert any(len(set(ids)) < len(ids) - 3 for ids in drawn)
    assert {token for ids in drawn for token in ids} & set(range(2, 10))
    assert trainer.model.get_base_model().generation_config is own


def test_an_adapter_that_would_not_act_is_refused():
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="adds tokens before the prompt"):
        draw(get_peft_model(tiny.model(), prompts))
