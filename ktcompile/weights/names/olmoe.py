"""OLMoE: queries and keys are normalised over the whole width; their rows keep Hugging Face's order."""

from ktcompile.weights.names.common import ATTENTION, EXPERTS, NORMS, QK_NORM, table

OLMOE = table(NORMS | ATTENTION | QK_NORM | EXPERTS)
