"""`PowerFlowTrainer` and what a run of it needs."""
