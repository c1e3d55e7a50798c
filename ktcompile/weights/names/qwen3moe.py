"""Qwen3-30B-A3B and its larger sisters: queries and keys are normalised head by head."""

from ktcompile.weights.names.common import ATTENTION, EXPERTS, NORMS, QK_NORM, table

QWEN3MOE = table(NORMS | ATTENTION | QK_NORM | EXPERTS)
