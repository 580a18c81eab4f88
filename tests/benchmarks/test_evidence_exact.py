"""The exact experiment: enumerable models against hand-made values, plan, tables and plot."""

import math

import pytest
import torch

from benchmarks import plots
from benchmarks.evidence import exact, power_facts
from benchmarks.evidence.enumerable import Enumerable, kl, marks, total_variation, train


def coin(stop: bool) -> Enumerable:
    """Two tokens, length 2, token 1 with probability 3/4 everywhere."""
    model = Enumerable(vocab=2, length=2, stop=stop)
    model.base = torch.tensor([0.25, 0.75], dtype=torch.float64).log().expand(model.base.shape)
    return model


def test_probabilities_of_a_model_written_down_by_hand():
    model = coin(stop=False)
    assert model.sequences == [(0, 0), (0, 1), (1, 0), (1, 1)]
    expected = torch.tensor([[1, 3, 3, 9]], dtype=torch.float64) / 16
    torch.testing.assert_close(model.power(1).exp(), expected)
    squares = expected.square()
    torch.testing.assert_close(model.power(2).exp(), squares / squares.sum())


def test_a_stop_token_ends_a_sequence_and_the_tilt_normalises():
    model = coin(stop=True)
    assert model.sequences == [(0,), (1, 0), (1, 1)]
    assert model.lengths.tolist() == [1, 2, 2]
    powered = torch.tensor([4, 3, 9], dtype=torch.float64).div(16).square()
    # x = exp(-lambda): powered[0] x + (powered[1] + powered[2]) x^2 = 1
    a, b = (powered[1] + powered[2]).item(), powered[0].item()
    tilt = -math.log((-b + math.sqrt(b * b + 4 * a)) / (2 * a))
    assert model.normalising_tilt(2).item() == pytest.approx(tilt)
    expected = powered * torch.tensor([math.exp(-tilt), *2 * [math.exp(-2 * tilt)]])
    torch.testing.assert_close(model.power(2, tilt).exp()[0], expected)


def test_distances():
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
    assert total_variation(p, q).item() == pytest.approx(0.25)
    assert kl(p, q).item() == pytest.approx(0.5 * math.log(4 / 3))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"log_z": "learned"},
        {"updates": 4},
        {"source": "base", "importance": "none"},
        {"group_size": 4},
    ],
)
def test_sampled_training_nears_the_target(options):
    model = Enumerable(2, 3, prompts=2)
    run = dict(steps=150, completions=32, learning_rate=0.1, seed=0)
    target = model.power(2)
    start = total_variation(model.power(1), target).max().item()
    (*_, (step, table)) = train(model, 2.0, **run, **options)
    assert step == 150
    assert total_variation(model.totals(table), target).max().item() < 0.1 * start
    (*_, (_, again)) = train(model, 2.0, **run, **options)
    assert torch.equal(again, table)


def test_the_kl_of_a_small_tilt_is_of_second_order():
    found = power_facts.second_order(power_facts.tilted(2.0))
    assert found["slope"] == pytest.approx(2, abs=0.02)
    assert found["ratio_at_0.1"] == pytest.approx([1, 1], abs=0.2)


def test_powers_and_votes_tend_to_the_likeliest_answer():
    found = power_facts.majority(models=10, draws=200)
    for place in ("first", "last"):
        kinds = found[place]
        assert kinds["sequences"][0] == pytest.approx(kinds["answers"][0])  # the base itself
        assert kinds["votes"][0] == pytest.approx(kinds["answers"][0], abs=0.05)  # one vote
        assert kinds["answers"] == sorted(kinds["answers"])
        assert kinds["votes"][-1] > kinds["votes"][0] + 0.1
        assert kinds["sequences"][-1] == pytest.approx(kinds["mode_has_it"], abs=0.1)


def test_plan_names_every_run_once_and_runs_what_it_names():
    runs = exact.plan({})
    assert len({run.name for run in runs}) == len(runs)
    by_name = {run.name: run for run in runs}
    assert by_name["sampled/learned/0.25/1"].options["alpha"] == 0.25
    sampled = exact.run(**by_name["sampled/unequal lengths/4/0"].options, steps=3)
    assert sampled["steps"] == marks(3) == [1, 2, 3]
    # At step 1 the policy is still near the base, which is as far from the target as its power.
    assert 0 < sampled["tv"][-1] <= sampled["tv_worst"][-1] < 1


def results() -> dict:
    """A results file of few and short runs."""
    runs = {}
    for alpha in (2.0, 4.0):
        for seed in exact.SEEDS:
            options = {"setting": "group", "alpha": alpha, "seed": seed}
            result = exact.run(**options, steps=5)
            runs[f"sampled/group/{alpha:g}/{seed}"] = {"options": options, "result": result}
    others = {
        "enumerated/2": exact.run("enumerated", alpha=2.0),
        "tilted/2": exact.run("tilted", alpha=2.0),
        "majority": exact.run("majority", models=3, draws=20),
    }
    runs |= {name: {"options": {}, "result": result} for name, result in others.items()}
    done = {name: entry["result"] for name, entry in runs.items()}
    return {"runs": runs, "summary": exact.summarise(done)}


def test_tables_and_plot_come_from_the_results_file():
    file = results()
    (two, four) = file["summary"]["sampled"]
    assert not two["below_bar"] and two["tv_worst"] > exact.BAR  # five steps do not get there
    text = exact.tables(file)
    assert (
        f"| group, 2000 steps | {two['tv_worst']:.0e} (above the bar) | {four['tv_worst']:.0e}"
        in text
    )
    optimum = file["summary"]["enumerated"][0]
    assert optimum["tv"] < exact.BAR and max(optimum["tv_tilted"]) < exact.BAR
    assert min(optimum["tv_untilted"]) > 1e-2 and optimum["lambda_error"] < 1e-3
    assert f"{optimum['lambda'][0]:.2f}" in text
    widths = [line.count("|") for line in text.splitlines() if line.startswith("| group,")]
    assert widths == [4]
    drawn = plots.svg(lambda figure: exact.draw(figure, file))
    assert "on-policy, group log Z" in drawn and "vote of k" in drawn
    assert drawn == plots.svg(lambda figure: exact.draw(figure, file))
