"""What errors about a user's data are made of."""

from powerflow_fast.data.errors import did_you_mean, one_line


def test_the_nearest_name():
    assert did_you_mean("answrs", ["prompt", "answers"]) == "; did you mean answers?"
    assert did_you_mean("colour", ["prompt", "answers"]) == ""
    assert did_you_mean("answrs", ["answers"], cutoff=0.99) == ""


def test_one_line_of_an_error():
    assert one_line(ValueError("\n  no rows \nat all")) == "no rows"
    outer = RuntimeError()
    outer.__cause__ = KeyError("x")
    assert one_line(OSError(" ")) == "OSError" and one_line(outer) == "KeyError"
