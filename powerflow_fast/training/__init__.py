"""`PowerFlowTrainer`: its options, its rollouts and loss, its checks, logs and checkpoints."""
