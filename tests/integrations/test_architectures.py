"""`patch_head` on architectures of transformers: here one per kind of head; all in `main`."""

import json
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import transformers  # noqa: E402
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES  # noqa: E402

from tests.integrations import architectures  # noqa: E402

PASSING = (
    "llama qwen3 gpt2 "  # plain, tied
    "gemma2 recurrent_gemma nanochat "  # caps, under two names
    "cohere2 granite minicpm3 hyperclovax falcon_h1 muse_glimmer "  # scales, under four names
    "phi gptj "  # a bias
    "llama4 opt bart mixtral deepseek_v3 gemma3 mamba qwen3_next"  # other kinds of backbones
).split()
REFUSED = ("bert", "modernbert-decoder", "inkling_text", "prophetnet")


@pytest.mark.parametrize(
    "model_type", [t for t in PASSING if t in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
)
def test_log_probs_equal_those_of_the_models_own_logits(model_type):
    assert architectures.check(model_type) == "passes"


@pytest.mark.parametrize("model_type", REFUSED)
def test_heads_of_another_form_are_refused(model_type):
    assert architectures.check(model_type).startswith("refused")


def test_the_recorded_walk_is_complete_and_of_this_version():
    recorded = json.loads(architectures.RESULTS.read_text())
    lines = recorded["architectures"]
    assert {line.split(":")[0] for line in lines.values()} == {"passes", "refused", "no toy model"}
    assert sum(line == "passes" for line in lines.values()) >= 60
    if transformers.__version__ == recorded["transformers"]:
        assert list(lines) == list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    counts = Counter(line.split(":")[0] for line in lines.values())
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert (
        f"Of the {len(lines)} causal language models that transformers 5.23 lists, "
        f"{counts['passes']} give their own log-probs through `patch_head` at toy size, "
        f"{counts['refused']} are refused (a layer before the head, sliced logits), and of "
        f"{counts['no toy model']} no toy model was built"
    ) in readme
    for model_type in PASSING:
        assert lines.get(model_type, "passes") == "passes"
