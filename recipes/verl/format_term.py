"""The format term psi [nats/token] as verl's reward; the right answer, if any, is not looked at."""

from powerflow_fast.rewards import missing_boxed


def psi(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return missing_boxed()([solution_str])[0]
