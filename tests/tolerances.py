"""How far a result may be from a float64 reference, as relative L2 error: one bound a precision family, none a test."""

TOLERANCE = {
    "f32": 3e-6,  # float products, sums of a few hundred in another order
    "bf16": 1.5e-2,  # weights, activations and the hidden layer each rounded to 8 bits; typically 4e-3
    "int8": 6e-2,  # activations and the hidden layer in 8 bits with one scale for 32; typically 1e-2
}
