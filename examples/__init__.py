"""Whole training scripts, one for each way of writing Flax; run one as ``python -m examples.linen_train_state``."""
