"""What a run shows: its line, its table of completions, its curves, and the rate it chose."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("trl")

import pandas  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerState  # noqa: E402

from powerflow_fast import PowerFlowConfig, PowerFlowTrainer  # noqa: E402
from powerflow_fast.evaluation.curves import draw  # noqa: E402
from powerflow_fast.evaluation.record import RunRecord  # noqa: E402
from powerflow_fast.training.config import FULL_RATE, LORA_RATE  # noqa: E402
from powerflow_fast.training.progress import LinePrinter, duration, line  # noqa: E402
from tests.helpers import tiny  # noqa: E402
from tests.integrations.test_offline_trainer import offline  # noqa: E402
from tests.training.test_trainer import make  # noqa: E402

LOGS = {
    "loss": 2.64123,
    "residual/std": 1.625,
    "logps/policy": -1.8,
    "logps/reference": -1.95,
    "completions/mean_length": 14.23,
    "completions/distinct_per_prompt": 3.9,
    "kl": 0.0213,
    "tokens_per_second": 512.4,
}


def test_the_line_of_a_step():
    assert line(LOGS, 3, 16, 4) == (
        "step 3/16  loss 2.64  residual 1.62  log pi -1.800  log base -1.950  length 14.2  "
        "distinct 3.9/4  KL 0.021  512 tok/s"
    )
    evaluated = {f"eval_{name}": value for name, value in LOGS.items() if "token" not in name}
    assert line(evaluated, 3, 16, 4).startswith("step 3/16  eval  loss 2.64  residual 1.62")
    assert [duration(s) for s in (7, 600, 7200)] == ["7 s", "10 min", "2.0 h"]


def test_the_line_tells_what_is_left():
    printer, state = LinePrinter(), TrainerState(global_step=2, max_steps=10)
    printer.start(state)
    printer.began = (printer.began[0] - 60, 2)
    state.global_step = 4
    text = printer.text(tiny.config("x"), state, LOGS)
    assert text.endswith("3 min left")  # 6 steps of 30 s


def test_both_trainers_print_lines_with_the_same_names(tmp_path, capsys):
    make(tmp_path, max_steps=2)[0].train()
    ours = capsys.readouterr().out
    assert "step 2/2  loss " in ours and "distinct" in ours and "{" not in ours
    trainer = offline(tmp_path, disable_tqdm=True)
    trainer.train()
    out = capsys.readouterr().out
    assert "  residual " in out and "  log pi " in out and "{" not in out


@pytest.mark.parametrize("options", [{}, {"steps_per_generation": 2, "max_steps": 2}])
def test_completions_are_listed_with_what_the_loss_says(tmp_path, options, capsys):
    trainer, seen = make(tmp_path, log_completions=True, **options)
    trainer.train()
    printed = capsys.readouterr().out
    assert "log pi" in printed and "residual" in printed and "Advantage" not in printed
    assert "no_psi" not in printed
    files = sorted((tmp_path / "completions").glob("*.parquet"))
    table = pandas.read_parquet(files[-1])
    counted = table.dropna(subset=["log pi"])
    assert len(counted) == len(table) == 8 * (2 if options else 1)
    rows = {(r["prompt"], r["completion"]): r for _, r in table.iterrows()}
    assert len(rows) > 4
    if not options:  # means over completions, as the logs have them
        residuals = counted["residual"]
        assert residuals.std(ddof=0) == pytest.approx(seen.logs[0]["residual/std"], rel=1e-4)
        assert counted["log pi"].equals(counted["log base"])  # before the first step
    model = tiny.model().eval()
    for (prompt, completion), row in list(rows.items())[:3]:
        ids = tiny.tokenizer()(f"{prompt} {completion}", return_tensors="pt")["input_ids"]
        start = len(prompt.split())
        logps = model(ids).logits[0].log_softmax(-1)[:-1].gather(1, ids[0, 1:, None])[start - 1 :]
        own = float(logps.sum())
        lengths = (len(logps), len(logps) + 1)  # the end token is not in the text
        assert row["log base"] * lengths[1] <= own + 1e-3 or row["log base"] == pytest.approx(
            own / lengths[0], abs=1e-3
        )


def test_curves_with_and_without_held_out_questions(tmp_path):
    rows = [{"step": i + 1, **LOGS, "residual/std": 3 / (i + 1)} for i in range(20)]
    names = {name: 1 for name in ("num_generations", "max_completion_length", "seed")}
    record = RunRecord(
        model="m", alpha=4.0, chat=True, adapter=True, prompts=3, temperature=1.0,
        learning_rate=1e-4, balance="length", log_z="group", **names,
    )  # fmt: skip
    draw(rows, tmp_path / "a.png", record)
    scores = {"accuracy_sampled": 0.25, "accuracy_greedy": 0.5, "distinct_bigrams": 0.7}
    errors = {"standard_errors": {"accuracy_sampled": 0.03}}
    record.held_out = {"before": scores | errors, "after": scores | errors}
    record.held_out["forecast"] = {"policy": -1.0, "reference": -1.2}
    draw(rows, tmp_path / "b.png", record)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()
    assert (tmp_path / "b.png").stat().st_size > 30_000


def test_a_run_leaves_record_card_and_curves(tmp_path):
    trainer, _ = make(tmp_path, max_steps=2, draw_curves=True, alpha=2.5)
    trainer.train()
    assert len(json.loads((tmp_path / "curves.json").read_text())) == 2
    assert (tmp_path / "curves.png").is_file()
    trainer.save_model(str(tmp_path / "final"))
    record = RunRecord.load(tmp_path / "final")
    assert (record.alpha, record.steps, record.chat) == (2.5, 2, False)
    card = (tmp_path / "final" / "README.md").read_text()
    assert "alpha = 2.5" in card and "None" not in card and "Nothing was measured" in card
    (tmp_path / "final" / "run.json").write_text('{"alpha": 1}')
    with pytest.raises(ValueError, match="not a record of a run"):
        RunRecord.load(tmp_path / "final")


def test_the_learning_rate_is_that_of_what_is_trained(tmp_path):
    args = tiny.config(tmp_path, learning_rate=None)
    tiny.model().save_pretrained(tmp_path / "model")
    given = dict(train_dataset=tiny.dataset(), processing_class=tiny.tokenizer())
    adapted = PowerFlowTrainer(tiny.model(), args, peft_config=tiny.lora(), **given)
    whole = PowerFlowTrainer(str(tmp_path / "model"), args, **given)
    assert (adapted.args.learning_rate, whole.args.learning_rate) == (LORA_RATE, FULL_RATE)
    assert args.learning_rate is None and args.beta == 0  # the caller's are as they were


def test_plain_text_for_a_chat_model_is_asked_about(tmp_path):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    texts = ["rain <eos> the sea", "the sea is"]  # in a format of its own, or bare
    for text, warns in zip(texts, (False, True), strict=True):
        with pytest.warns() as seen:
            PowerFlowTrainer(
                tiny.model(),
                tiny.config(tmp_path),
                Dataset.from_list([{"prompt": text}] * 4),
                processing_class=tokenizer,
                peft_config=tiny.lora(),
            )
        assert any("plain text" in str(w.message) for w in seen) is warns


PAGE = Path(__file__).parents[2] / "docs" / "running.md"


def test_the_page_gives_the_defaults_that_there_are():
    rows = re.findall(r"^\| `(\w+)` \| ([\w.]+) \|", PAGE.read_text(), re.M)
    config = PowerFlowConfig("x", use_cpu=True)
    assert len(rows) >= 6
    for name, value in rows:
        assert str(getattr(config, name) or "none") == value, name
    assert "| 2e-4 with an adapter, 1e-6 for all parameters |" in PAGE.read_text()
    assert (LORA_RATE, FULL_RATE) == (2e-4, 1e-6)


def test_the_page_names_figures_that_are_logged(tmp_path):
    page = PAGE.read_text()
    table = page[page.index("| name in the logs |") : page.index("`PowerFlowTrainer` and `LATB")]
    cells = [line.split("|")[1] for line in table.splitlines()[2:] if line.startswith("|")]
    named = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    trainer, seen = make(tmp_path)
    trainer.train()
    assert len(named) > 15 and set(named) <= set(seen.logs[0])
