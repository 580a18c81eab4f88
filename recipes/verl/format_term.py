"""The format term psi [nats/token] as verl's reward; the right answer, if any, is not looked at."""

import numpy as np
from verl.experimental.reward_loop.reward_manager.naive import NaiveRewardManager

from powerflow_fast.rewards import missing_boxed


def psi(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return missing_boxed()([solution_str])[0]


class WithoutAnswers(NaiveRewardManager):
    """verl's reward manager, for prompts that come without what it reads from them."""

    async def run_single(self, data):
        for column, value in (("data_source", ""), ("reward_model", {"ground_truth": ""})):
            if column not in data.non_tensor_batch:
                data.non_tensor_batch[column] = np.array([value] * len(data), dtype=object)
        return await super().run_single(data)
