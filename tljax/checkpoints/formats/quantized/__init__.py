"""Checkpoints with quantised weights: one file for each format, read as the float weights that they stand for.

Each format is a function of ``quantization_config`` that returns layouts: the names of the tensors that one weight is
stored as, the weight's shape, and a function that makes the weight of these tensors. Formulas are in the formats'
files. Weights are dequantised in float32, whatever an inference engine would compute them in.
"""
