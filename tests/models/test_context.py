"""Sequences that a model does not take are refused before anything is computed."""

import pytest
import torch
from transformers import LlamaConfig, XLNetConfig

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset  # noqa: E402
from peft import get_peft_model  # noqa: E402

from powerflow_fast import sample  # noqa: E402
from powerflow_fast.models.context import Context  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.integrations.test_offline_trainer import offline  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402

LONG = dict(rope_type="longrope", rope_theta=1e4, factor=4.0, original_max_position_embeddings=10)
LONG |= dict(short_factor=[1.0] * 4, long_factor=[2.5] * 4)


def long_model():
    return tiny.model(
        rope_parameters=LONG,
        max_position_embeddings=40,
        num_attention_heads=2,
        num_key_value_heads=2,
    )


def test_the_smaller_limit_counts():
    config = LlamaConfig(max_position_embeddings=16)
    Context(config).check("row 0", 10, 6)
    with pytest.raises(ValueError, match=r"row 0 has 10 tokens, and up to 7 to come.* of 16; drop"):
        Context(config).check("row 0", 10, 7, "; drop it")
    with pytest.raises(ValueError, match="row 1 has 13 tokens: beyond the context of 12"):
        Context(config, 12).check("row 1", 13)


def test_a_model_without_a_limit_has_none():
    assert XLNetConfig().max_position_embeddings == -1
    Context(XLNetConfig()).check("row 0", 100_000)


def test_all_sequences_lie_on_one_side_of_a_change_of_positions():
    def check(*sizes):
        context = Context(long_model().config)
        for i, (tokens, more) in enumerate(sizes):
            context.check(f"row {i}", tokens, more)

    check((4, 6), (10, 0))
    check((11, 20), (30, 0))
    with pytest.raises(ValueError, match="row 0 has 4 tokens, .* passes 10, beyond which .*LongRo"):
        check((4, 7))
    for sizes in ([(4, 2), (11, 2)], [(11, 2), (4, 2)]):
        with pytest.raises(ValueError, match="row 1 has .* passes, unlike row 0, 10, beyond"):
            check(*sizes)


def test_such_a_model_does_score_short_rows_otherwise_beside_a_long_one():
    model, ids = long_model(), torch.randint(2, 20, (2, 14))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    with torch.no_grad():
        together = model(ids, attention_mask=mask).logits[0, :6]
        alone = model(ids[:1, :6]).logits[0]
    assert (together - alone).abs().max() > 0.1


def test_every_way_in_checks_it(tmp_path):
    with pytest.raises(ValueError, match="train_dataset: prompt .*LongRoPE.*max_completion_length"):
        make(tmp_path, model=long_model())
    make(tmp_path, model=long_model(), max_completion_length=2)
    rows = [{"prompt": "rain", "completion": c} for c in ("sea", "sea " * 12)]
    with pytest.raises(ValueError, match="row 1 has .*unlike .*row 0, 10.*LongRoPE"):
        offline(tmp_path, rows=rows, model=get_peft_model(long_model(), tiny.lora()))
    ids = torch.randint(2, 20, (1, 5))
    with pytest.raises(ValueError, match="input_ids: prompt 0 has 5 tokens.*LongRoPE"):
        sample(long_model(), ids, torch.ones_like(ids), max_new_tokens=9)
    with pytest.raises(ValueError, match="input_ids: prompt 0 .*beyond the context of 8"):
        sample(tiny.model(max_position_embeddings=8), ids, ids > 0, max_new_tokens=9)


BAD = [(["rain", None], "expected text or messages, got None"), ([], "empty")]
BAD += [
    (["rain", ""], "prompt 1: expected text or messages, got ''"),
    (["sea " * 30], "context of"),
]


@pytest.mark.parametrize(("prompts", "said"), BAD, ids=lambda v: str(v)[:20])
def test_evaluation_data_are_checked_like_training_data(prompts, said, tmp_path):
    data = Dataset.from_dict({"prompt": prompts})
    for given, name in ((data, "eval_dataset"), ({"hard": data}, r"eval_dataset\['hard'\]")):
        options = dict(model=tiny.model(max_position_embeddings=32), evaluation=given)
        with pytest.raises(ValueError, match=f"{name}: .*{said}"):
            make(tmp_path, **options)


@pytest.mark.parametrize(
    ("prompt", "said"), [(None, "prompt: expected text"), ("sea " * 30, "prompt has 30 .*of 32")]
)
def test_a_stream_is_checked_as_it_comes(prompt, said, tmp_path):
    def rows():
        while True:
            yield {"prompt": prompt}

    data = IterableDataset.from_generator(rows)
    model = tiny.model(max_position_embeddings=32)
    trainer, seen = make(tmp_path, model=model, rollout=None, data=data)
    with pytest.raises(ValueError, match=said):
        trainer.train()
    assert not seen.steps
