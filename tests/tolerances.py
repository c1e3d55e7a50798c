"""How far a result may be from a float64 reference, as relative L2 error: one bound a precision family, none a test."""

TOLERANCE = {
    "f32": 5e-6,  # float products, sums in another order; codes carry an offset that is taken off again
    "int16": 1e-4,  # activations and the hidden layer in 16 bits, with a scale for 32 of them
    "bf16": 5e-3,  # activations and the hidden layer rounded to 8 bits, and weights too where tiles are filled
    "int8": 2e-2,  # activations and the hidden layer in 8 bits, with a scale for 256 of them
}
"""Of the routed experts, with the weights that are stored."""

FEW_VALUES = {"f32": 1e-5, "int16": 3e-4, "bf16": 2.6e-2, "int8": 6e-2}
"""The same where sums are of so few values that roundings do not average: all of them at their largest."""

CHAIN = {"f32": 3e-6, "bf16": 1.5e-2}
"""Of attention, of layers and of models: one rounded result is the input of the next."""

ROUNDING = {
    "int8_row": 1.2e-2,
    "q4_0": 0.13,  # the largest of 32 normal values is 2 standard deviations from 0, of 128 it is 2.6
    "int4_64": 0.13,
    "int4_128": 0.13,
}
"""Of normally distributed weights that are stored with loss."""
