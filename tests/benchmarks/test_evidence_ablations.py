"""The ablations: plan, the comparison of two runs, bf16 logits, tables and plot."""

import pytest
import torch

from benchmarks import plots
from benchmarks.evidence import ablations
from powerflow_fast import fused_linear_tb_loss
from powerflow_fast.training import forward


def language_run(rollouts: str, losses: list[float], sampled: float = 0.5, **more) -> dict:
    figures = dict.fromkeys(ablations.FIGURES, sampled)
    accuracy = [0.25 * i for i in range(len(losses))]
    return {
        "held_out": figures,
        "rollouts": list(rollouts),
        "loss": losses,
        "accuracy": accuracy,
        **more,
    }


def test_plan_names_every_run_once_and_needs_no_earlier_result():
    runs = ablations.plan({})
    assert len({run.name for run in runs}) == len(runs)
    assert runs == ablations.plan({run.name: {} for run in runs})
    settings = {run.options["setting"] for run in runs if run.options["part"] == "language"}
    assert settings == {"base", *ablations.LANGUAGE}


@pytest.mark.parametrize("part", ablations.TABLES)
def test_a_table_run_of_every_setting_moves_towards_the_target(part):
    for setting in ablations.TABLES[part]:
        curve = ablations.run(part, setting=setting, seed=0, steps=30)
        assert curve["steps"][-1] == 30
        if setting != "learned from 0":  # its first steps push all log-probs the same way
            assert curve["tv"][-1] < curve["tv"][0]


def test_losses_are_compared_up_to_the_first_different_rollout():
    exact = language_run("abcd", [4.0, 2.0, 1.0, 1.0])
    other = language_run("abxd", [4.0, 2.2, 9.0, 1.0], sampled=0.75)
    found = ablations.compare(exact, other)
    assert found["same_steps"] == 2 and found["steps"] == 4
    assert found["loss_difference"] == pytest.approx(0.2)
    assert found["relative_loss_difference"] == pytest.approx(0.1)
    assert found["loss_difference_all_steps"] == 8.0
    assert found["held_out_difference"] == 0.25 and found["columns_kept"] is None
    other["rollouts"][0] = "z"
    assert ablations.compare(exact, other)["loss_difference"] is None


def test_bf16_logits_reach_the_trainers_loss_and_leave_it_again():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 16), torch.randn(40, 16)
    reference = hidden.clone()
    options = dict(alpha=2.0, log_z=0.5, mask=None, cu_seqlens=torch.tensor([0, 3, 6]).int())
    call = (hidden, weight, torch.arange(6))
    plain = forward.fused_linear_tb_loss(*call, ref_hidden=reference, **options)
    with ablations.bf16_logits():
        rounded = forward.fused_linear_tb_loss(*call, ref_hidden=reference, **options)
    assert forward.fused_linear_tb_loss is fused_linear_tb_loss
    logits = (hidden.bfloat16().double() @ weight.bfloat16().double().T).bfloat16().double()
    expected = logits.log_softmax(-1)[torch.arange(6), torch.arange(6)].float()
    torch.testing.assert_close(rounded.logps, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(rounded.ref_logps, expected, atol=1e-4, rtol=0)
    assert (plain.logps - expected).abs().max() > 1e-3


def results() -> dict:
    curve = {"steps": [10, *ablations.SHOWN_STEPS], "tv": [0.5, 0.25, 0.125, 0.0625]}
    done = {f"estimators/groups of 2/{seed}": curve for seed in ablations.TABLE_SEEDS}
    done["estimators/groups of 2/1"] = curve | {"tv": [0.5, 0.75, 0.125, 0.0625]}
    done["language/base/0"] = language_run("", [], sampled=0.25)
    for seed in ablations.seeds_of(ablations.EXACT):
        done[f"language/{ablations.EXACT}/{seed}"] = language_run("ab", [4.0, 2.0])
    for seed in ablations.seeds_of("grad_tolerance 1e-3"):
        kept = {"certified/columns_kept": [1.0, 0.125]}
        other = language_run("ax", [4.0, 2.5], sampled=0.75, **kept)
        done[f"language/grad_tolerance 1e-3/{seed}"] = other
    runs = {name: {"options": {}, "result": result} for name, result in done.items()}
    return {"runs": runs, "summary": ablations.summarise(done)}


def test_tables_and_plot_come_from_the_results_file():
    file = results()
    text = ablations.tables(file)
    assert "| groups of 2 | 0.350 (0.250 to 0.750) | 0.125 (0.125 to 0.125) |" in text
    assert "| base | 1 | 25.0 (25.0 to 25.0) |" in text
    kept = "| 0e+00 | 0.0 points | +25.0 points | 100 %, 12 % |"
    assert f"| grad_tolerance 1e-3, seed 1 | 1 of 2 {kept}" in text
    assert "| alpha 4 | 4 | 50.0 (50.0 to 50.0) |" in text
    assert "groups of 4" not in text  # not run
    drawn = plots.svg(lambda figure: ablations.draw(figure, file))
    assert "groups of 2" in drawn and "grad_tolerance 1e-3" in drawn and "bf16" not in drawn
