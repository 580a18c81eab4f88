"""Options: what is out of range, has no effect, or would draw otherwise than is scored."""

import json
import math

import pytest

pytest.importorskip("trl")

from powerflow_fast import PowerFlowConfig  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.integrations.test_offline_trainer import offline  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402

REFUSED_OPTIONS = [
    ({"alpha": 0.0}, "alpha"),
    ({"alpha": float("nan")}, "alpha"),
    ({"num_generations": 1}, "num_generations"),
    ({"beta": 0.1}, "beta"),
    ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
    ({"loss_type": "grpo"}, "loss_type"),
    ({"epsilon": 0.3}, "clip_eps"),
    ({"log_z": "other"}, "log_z"),
    ({"log_z_lr": 0.0}, "log_z_lr"),
    ({"disable_dropout": False}, "disable_dropout"),
    ({"router_aux_loss_coef": 0.1}, "MoE"),
]


@pytest.mark.parametrize(("options", "word"), REFUSED_OPTIONS, ids=lambda v: str(v))
def test_options_that_cannot_be_honoured_are_refused(tmp_path, options, word):
    with pytest.raises(ValueError, match=word):
        tiny.config(tmp_path, **options)


def test_config_needs_no_accelerator():
    assert PowerFlowConfig("unused", use_cpu=True).bf16 is False


OUT_OF_RANGE = [
    ("alpha", None),
    ("temperature", 0.0),
    ("temperature", None),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("top_k", -2),
    ("min_p", 2.0),
    ("repetition_penalty", 0.0),
    ("learning_rate", -1e-4),
    ("learning_rate", math.nan),
    ("weight_decay", -0.1),
    ("max_grad_norm", -1.0),
    ("num_iterations", 0),
    ("num_generations_eval", 1),
    ("steps_per_generation", 0),
    ("gradient_accumulation_steps", 0),
    ("per_device_train_batch_size", 0),
    ("max_completion_length", None),
    ("alpha_warmup_steps", 1.5),
    ("sample_completions", -1),
    ("round_logits", "yes"),
    ("padding_free", "no"),
    ("offload_reference", 1),
    ("stop_on_collapse", None),
    ("clip_eps", None),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE, ids=str)
def test_a_value_out_of_range_is_refused(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value!r}"):
        tiny.config(tmp_path, **{name: value})


def test_a_dict_that_is_no_json_is_named(tmp_path):
    with pytest.raises(ValueError, match="^generation_kwargs: expected JSON, got '{bad'"):
        tiny.config(tmp_path, generation_kwargs="{bad")


ON_THE_SIDE = [
    ("neftune_noise_alpha", 5.0, "parts the policy from its reference"),
    ("label_smoothing_factor", 0.1, "no labels to smooth"),
]


@pytest.mark.parametrize(("name", "value", "said"), ON_THE_SIDE)
def test_what_would_act_on_a_side_is_refused_by_both_trainers(tmp_path, name, value, said):
    for trainer in (make, offline):
        with pytest.raises(ValueError, match=f"^{name}: expected .*, got {value}: .*{said}"):
            trainer(tmp_path, **{name: value})


def test_a_scheduled_rate_needs_one_to_follow(tmp_path):
    with pytest.raises(ValueError, match="^learning_rate: expected > 0 beside log_z_lr_scheduled"):
        tiny.config(tmp_path, log_z="learned", log_z_lr_scheduled=True, learning_rate=0.0)


@pytest.mark.parametrize("name", ["temperature", "do_sample", "num_beams", "n"])
def test_no_second_temperature(tmp_path, name):
    for kwargs in ({name: 0.7}, json.dumps({name: 0.7})):
        with pytest.raises(ValueError, match=f"^generation_kwargs: expected no '{name}'"):
            tiny.config(tmp_path, generation_kwargs=kwargs)


def test_truncated_sampling_warns(tmp_path):
    with pytest.warns(UserWarning, match="no longer come from the policy"):
        make(tmp_path, top_p=0.9)
    with pytest.warns(UserWarning, match="no_repeat_ngram_size change .* no longer come from"):
        make(tmp_path, generation_kwargs={"no_repeat_ngram_size": 2})
